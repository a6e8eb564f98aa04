"""Choosing a rule: the model names the candidate that it goes by, then answers.

The prompt shows the rules that a retriever found (a :class:`~malpyeong.prompts.context.Context`), in an order that says
nothing about their rank; the completion begins with a tag that names one, ``[규범 한글 맞춤법 제42항]``, or
``[규범 없음]`` where none fits. The tag is taken off before an answer is scored or submitted. Which candidate is right
is known in training only, from a label or from PPL mining (:class:`Labels`): candidates never come from there, so that
training and test ask the same question, and the labelled rule may be among them or not.

A tag names the rule by its id, not by its number: an id means the same in every prompt, so that a small model can
learn which rule a question is about before it can find it among several.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from malpyeong.contest.records import Record, json_lines, parse_json, text_by_id
from malpyeong.contest.rulebook import Rule
from malpyeong.errors import InputError, printable
from malpyeong.files import read_text

INSTRUCTION = (
    "먼저 한 줄에 [규범 후보] 가운데 이 문제에 적용되는 것의 이름을 [규범 한글 맞춤법 제1항]과 같이 쓰고, "
    "적용되는 것이 없으면 [규범 없음]이라고 쓰세요. 답은 그다음 줄에 쓰세요."
)
HEADING = "[규범 후보]"
NONE = "없음"  # the name that says that no candidate fits

_TAG = re.compile(r"\A\s*\[규범 ([^\[\]\n]{1,100})\]\s*")
_GIVEN = 'an object like {"1": "한글 맞춤법 제41항"} or {"1": {"rule": "한글 맞춤법 제41항"}}'
_EXPECTED = f"{_GIVEN}, or contexts.jsonl of recipes/mine.py"

# A rule that lowers the answer's perplexity by less than this share is taken for one that does not help.
MIN_IMPROVEMENT = 0.01


@dataclass(frozen=True, slots=True)
class Labels:
    """How much each rule helps with one question.

    Attributes:
        gains: rule id → 1.0 for a given label; for mined ones the improvement ratio (PPL(a|q) - PPL(a|c,q)) / PPL(a|q)
            of every rule that was tried, 0.0 below :data:`MIN_IMPROVEMENT`.
        mined: whether a rule that is not in ``gains`` was never tried, so that it counts as no help for want of
            knowledge; given labels name all that help.
    """

    gains: Mapping[str, float]
    mined: bool = False

    def of(self, rules: Sequence[Rule]) -> list[float]:
        """Return the gain of each rule."""
        return [self.gains.get(rule.id, 0.0) for rule in rules]

    def best(self, rules: Sequence[Rule]) -> str:
        """Return the id of the rule that helps most, or :data:`NONE` if none does."""
        return best_choice([rule.id for rule in rules], self.of(rules))

    @property
    def shares(self) -> dict[str, float]:
        """The gains of the rules that help, as shares of the largest."""
        best = max(self.gains.values(), default=0.0)
        return {rule: gain / best for rule, gain in self.gains.items() if gain > 0}

    @property
    def best_of_all(self) -> str | None:
        """The id of the rule that helps most, or None if none does."""
        name = best_choice(list(self.gains), list(self.gains.values()))
        return None if name == NONE else name


def shuffled(record: Record, rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """Return the rules in an order that depends on the question and on nothing else."""
    return tuple(sorted(rules, key=lambda rule: hashlib.sha256(f"{record.question}\n{rule.id}".encode()).digest()))


def tag(name: str) -> str:
    """Return what names a rule by its id, or :data:`NONE`, before an answer.

    A line of its own: what follows is then tokenized as if it stood alone.
    """
    return f"[규범 {name}]\n"


def is_readable(name: str) -> bool:
    """Tell whether a rule's id can be named: whether it comes back from its tag, and does not say that none fits."""
    return name != NONE and split_choice(tag(name)) == (name, "")


def split_choice(text: str) -> tuple[str | None, str]:
    """Take the tag off a completion.

    Returns:
        (name, answer): the rule's id or :data:`NONE`, or None where there is no tag.
    """
    named = _TAG.match(text)
    return (named[1], text[named.end() :]) if named else (None, text)


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


def load_labels(path: str | Path, records: Sequence[Record]) -> list[Labels]:
    """Read the labels of ``records``, in their order: given ones, or mined ones.

    Raises:
        InputError: the file is of neither form, or a record has no label.
    """
    labels: list[Labels] = []
    for record, label in zip(records, find_labels(path, records), strict=True):
        if label is None:
            raise InputError(
                f'{path}: has no label for id "{printable(record.id, 40)}"; add it or leave the record out'
            )
        labels.append(label)
    return labels


def find_labels(path: str | Path, records: Sequence[Record]) -> list[Labels | None]:
    """Read the labels of ``records`` as :func:`load_labels` does, None for a record that has none."""
    path = Path(path)
    text = read_text(path, _EXPECTED)
    if '"ppl_question"' in text.split("\n", 1)[0]:
        mined = dict(_mined(f"{path}: {place}", row) for place, row in json_lines(path, text))
        return [mined.get((record.id, record.question)) for record in records]
    given = _given(path, text, _EXPECTED)
    return [Labels({given[record.id]: 1.0}) if record.id in given else None for record in records]


def _given(path: Path, text: str, expected: str) -> dict[str, str]:
    values = parse_json(str(path), text)
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected {expected}")
    return text_by_id(path, values, "rule", _GIVEN)


def _mined(where: str, row: Any) -> tuple[tuple[str, str], Labels]:  # noqa: ANN401 -- JSON is Any
    try:
        ratios = {str(one["rule"]): float(one["improvement_ratio"]) for one in row["candidates"]}
        key = (str(row["id"]), str(row["question"]))
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{where}: is not a line of contexts.jsonl; expected {_EXPECTED}") from None
    gains = {rule: ratio if ratio >= MIN_IMPROVEMENT else 0.0 for rule, ratio in ratios.items()}
    return key, Labels(gains, mined=True)
