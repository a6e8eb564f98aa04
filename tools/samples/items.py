"""The item bank: norms with a wrong form, a right form and sentences, and how a sentence is filled in."""

import random
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml

from malpyeong.contest.particles import attach as attach
from tools.samples import BANK

FILES = ("spacing", "spelling1", "spelling2", "standard", "standard2", "loanword", "punctuation")

_SLOT = re.compile(r"<(?P<kind>[^>]+)>(?:\((?P<particle>[가-힣]+)\))?")


@dataclass(frozen=True, slots=True)
class Item:
    """One norm item.

    Attributes:
        id: unique in the bank.
        category: one of the rule book's categories.
        rule: id of the rule that it illustrates.
        right, wrong: the forms, as they stand in every sentence.
        wrong2: a second wrong form, "" if there is none.
        also_right: a second right form, "" if there is none.
        only: the single question type that suits it, "" if both do.
        reason: why, in one or two sentences, without the conclusion.
        sentences: five frames with ``[]`` for the form and slots such as ``<사람>(은)``.
        explore: a sixth one, "" for an item that is kept out of training.
    """

    id: str
    category: str
    rule: str
    right: str
    wrong: str
    reason: str
    sentences: tuple[str, ...]
    explore: str = ""
    wrong2: str = ""
    also_right: str = ""
    only: str = ""


@cache
def load_rules() -> list[dict[str, Any]]:
    """Return the rule book's entries: id, category, title, text, examples."""
    rules: list[dict[str, Any]] = []
    for part in _parts().values():
        rules.extend(part["rules"])
    return rules


@cache
def load_items() -> list[Item]:
    """Return every item of the bank, in the order of the files."""
    category = {rule["id"]: rule["category"] for rule in load_rules()}
    return [
        Item(**{**item, "category": category[item["rule"]], "sentences": tuple(item["sentences"])})
        for part in _parts().values()
        for item in part["items"]
    ]


def draw_words(rng: random.Random) -> dict[str, str]:
    """Draw one word for each kind of slot."""
    return {kind: rng.choice(words) for kind, words in _fillers().items()}


def fill(sentence: str, words: dict[str, str]) -> str:
    """Fill the slots of a frame; ``[]`` stays."""

    def choose(slot: re.Match[str]) -> str:
        word = words[slot["kind"]]
        return attach(word, slot["particle"]) if slot["particle"] else word

    return _SLOT.sub(choose, sentence)


@cache
def load_specials() -> list[dict[str, Any]]:
    """Return the rare questions: id, rule, type, after, reason, choice or (ask, before), joiner of two answers."""
    specials: list[dict[str, Any]] = yaml.safe_load((BANK / "specials.yaml").read_text("utf-8"))
    return specials


@cache
def _parts() -> dict[str, Any]:
    return {name: yaml.safe_load((BANK / f"{name}.yaml").read_text("utf-8")) for name in FILES}


@cache
def _fillers() -> dict[str, list[str]]:
    fillers: dict[str, list[str]] = yaml.safe_load((BANK / "fillers.yaml").read_text("utf-8"))
    return fillers
