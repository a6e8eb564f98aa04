"""Choosing a rule: the model names the candidate that it goes by, then answers.

The prompt shows the rules that a retriever found (a :class:`~malpyeong.context.Context`), in an order that says
nothing about their rank; the completion begins with a tag that names one, ``[규범 한글 맞춤법 제42항]``, or
``[규범 없음]`` where none fits. The tag is taken off before an answer is scored or submitted. Which candidate is right
is known in training only, from a label or from PPL mining (:class:`Labels`): candidates never come from there, so that
training and test ask the same question, and the labelled rule may be among them or not.

A tag names the rule by its id, not by its number: an id means the same in every prompt, so that a small model can
learn which rule a question is about before it can find it among several (docs/choice.md has what was measured).
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from malpyeong.errors import InputError, printable
from malpyeong.files import read_text
from malpyeong.records import Record
from malpyeong.rules import Rule

INSTRUCTION = (
    "먼저 한 줄에 [규범 후보] 가운데 이 문제에 적용되는 것의 이름을 [규범 한글 맞춤법 제1항]과 같이 쓰고, "
    "적용되는 것이 없으면 [규범 없음]이라고 쓰세요. 답은 그다음 줄에 쓰세요."
)
HEADING = "[규범 후보]"
NONE = "없음"  # the name that says that no candidate fits

_TAG = re.compile(r"\A\s*\[규범 ([^\[\]\n]{1,100})\]\s*")
_EXPECTED = "a JSON object of record id → rule id, or contexts.jsonl of recipes/mine_contexts.py"

# A rule that lowers the answer's perplexity by less than this share is taken for one that does not help.
MIN_IMPROVEMENT = 0.01


@dataclass(frozen=True, slots=True)
class Labels:
    """How much each rule helps with one question; rules that are not named do not.

    Attributes:
        gains: rule id → 1.0 for a label, the improvement ratio (PPL(a|q) - PPL(a|c,q)) / PPL(a|q) for a mined one.
    """

    gains: Mapping[str, float]

    def of(self, rules: Sequence[Rule]) -> list[float]:
        """Return the gain of each rule."""
        return [self.gains.get(rule.id, 0.0) for rule in rules]

    def best(self, rules: Sequence[Rule]) -> str:
        """Return the id of the rule that helps most, or :data:`NONE` if none does."""
        return best_choice([rule.id for rule in rules], self.of(rules))


def shuffled(record: Record, rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """Return the rules in an order that depends on the question and on nothing else."""
    return tuple(sorted(rules, key=lambda rule: hashlib.sha256(f"{record.question}\n{rule.id}".encode()).digest()))


def tag(name: str) -> str:
    """Return what names a rule by its id, or :data:`NONE`, before an answer.

    A line of its own: what follows is then tokenized as if it stood alone.
    """
    return f"[규범 {name}]\n"


def split_choice(text: str) -> tuple[str | None, str]:
    """Take the tag off a completion.

    Returns:
        (name, answer): the rule's id or :data:`NONE`, or None where there is no tag.
    """
    found = _TAG.match(text)
    return (found[1], text[found.end() :]) if found else (None, text)


def best_choice(ids: Sequence[str], gains: Sequence[float]) -> str:
    """Return the id of the candidate that helps most, or :data:`NONE` if none does."""
    return ids[gains.index(max(gains))] if any(gain > 0 for gain in gains) else NONE


def choice_reward(name: str | None, ids: Sequence[str], gains: Sequence[float]) -> float:
    """Return what naming ``name`` is worth, in 0 to 1.

    The candidate's gain as a share of the best candidate's; where none helps, 1.0 for saying so. 0.0 without a tag
    and for a rule that was not shown.
    """
    if best_choice(ids, gains) == NONE or name == NONE:
        return float(best_choice(ids, gains) == name)
    return max(0.0, gains[ids.index(name)]) / max(gains) if name in ids else 0.0


def load_choice_labels(path: str | Path, records: Sequence[Record]) -> list[Labels]:
    """Read the labels of ``records``, in their order: given ones, or mined ones.

    Raises:
        InputError: the file is of neither form, or a record has no label.
    """
    path = Path(path)
    text = read_text(path, _EXPECTED)
    try:
        found = _mined(text) if '"ppl_question"' in text.split("\n", 1)[0] else _given(text)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: expected {_EXPECTED}") from None
    for record in records:
        if record.id not in found:
            raise InputError(
                f'{path}: has no label for id "{printable(record.id, 40)}"; add it or leave the record out'
            )
    return [found[record.id] for record in records]


def _given(text: str) -> dict[str, Labels]:
    rules = {id_: value["rule"] if isinstance(value, dict) else value for id_, value in json.loads(text).items()}
    if not all(isinstance(rule, str) for rule in rules.values()):
        raise ValueError
    return {id_: Labels({rule: 1.0}) for id_, rule in rules.items()}


def _mined(text: str) -> dict[str, Labels]:
    found = {}
    for line in text.splitlines():
        row = json.loads(line)
        ratios = {str(one["rule"]): float(one["improvement_ratio"]) for one in row["candidates"]}
        found[str(row["id"])] = Labels({rule: ratio for rule, ratio in ratios.items() if ratio >= MIN_IMPROVEMENT})
    return found
