"""Choosing a rule: the model names the candidate that it goes by, then answers.

The prompt shows the rules that a retriever found (a :class:`~malpyeong.context.Context`), numbered, in an order that
says nothing about their rank; the completion begins with a tag, ``[규범 2]``, or ``[규범 0]`` where none fits. The tag
is taken off before an answer is scored or submitted. Which candidate is right is known in training only, from a label
or from PPL mining (:class:`Labels`): candidates never come from there, so that training and test ask the same
question, and the labelled rule may be among them or not.
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
    "답 앞에는 [규범 후보] 가운데 이 문제에 적용되는 것의 번호를 [규범 1]과 같이 먼저 쓰고, "
    "적용되는 것이 없으면 [규범 0]이라고 쓰세요."
)
HEADING = "[규범 후보]"
NONE = 0  # the number that says that no candidate fits

_TAG = re.compile(r"\A\s*\[규범 ([0-9]{1,3})\]\s*")
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


def shuffled(record: Record, rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """Return the rules in an order that depends on the question and on nothing else."""
    return tuple(sorted(rules, key=lambda rule: hashlib.sha256(f"{record.question}\n{rule.id}".encode()).digest()))


def tag(number: int) -> str:
    """Return what names candidate ``number`` (from 1, or :data:`NONE`) before an answer."""
    return f"[규범 {number}] "


def split_choice(text: str) -> tuple[int | None, str]:
    """Take the tag off a completion.

    Returns:
        (number, answer): the number that was named, :data:`NONE` for no candidate, or None where there is no tag.
    """
    found = _TAG.match(text)
    return (int(found[1]), text[found.end() :]) if found else (None, text)


def best_choice(gains: Sequence[float]) -> int:
    """Return the number of the candidate that helps most, or :data:`NONE` if none does."""
    return gains.index(max(gains)) + 1 if any(gain > 0 for gain in gains) else NONE


def choice_reward(number: int | None, gains: Sequence[float]) -> float:
    """Return what naming ``number`` is worth, in 0 to 1.

    The candidate's gain as a share of the best candidate's; where none helps, 1.0 for saying so. 0.0 without a tag
    and for a number that was not shown.
    """
    if number is None or number > len(gains):
        return 0.0
    if best_choice(gains) == NONE or number == NONE:
        return float(best_choice(gains) == number)
    return max(0.0, gains[number - 1]) / max(gains)


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
