"""글쓰기 채점 능력 평가 (2026): an essay in, one JSON object out, of three scores from 1 to 5 with a rationale each.

RMSE and Spearman of the mean of the three scores, each rounded half up first, against the raters' average; an answer
that cannot be read counts as 0. What of this is known and what assumed: ``docs/tasks.md``.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from malpyeong.contest import records
from malpyeong.contest.answer import REPEATED, hardly_text
from malpyeong.contest.records import Answers, Record
from malpyeong.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from malpyeong.metrics.pairs import PairScorer

NAME = "essay"
TYPES: tuple[str, ...] = ("글쓰기 채점",)
STAND_IN = "mean of Spearman and 1 - RMSE / 4"
AREAS = {"content": "내용", "organization": "구성", "expression": "표현"}
_LEVELS = {1: "매우 부족하다", 2: "부족하다", 3: "보통이다", 4: "좋다", 5: "매우 좋다"}
INSTRUCTION = (
    "주어진 문제에 대해 쓴 글을 읽고 내용(content), 구성(organization), 표현(expression)을 따로따로 채점하세요. "
    "점수는 1(매우 부족함)부터 5(매우 좋음)까지의 정수이고, 점수마다 글에서 찾은 근거를 한국어로 씁니다. "
    "코드 블록 없이 JSON 객체 하나만 쓰세요: "
    '{"content":{"score":3,"rationale":"…"},"organization":{"score":3,"rationale":"…"},'
    '"expression":{"score":3,"rationale":"…"}}'
)

Rewards = list[float | None]


class Essay(Record):
    """An essay and its writing prompt as ``question``, the JSON of gold or predicted scores as ``answer``."""

    __slots__ = ()

    def to_json(self) -> dict[str, Any]:
        """Return the contest's object, with ``output.answer`` beside what it has."""
        kept = {key: value for key, value in self.raw.items() if key != "output"}
        return kept if self.answer is None else {**kept, "output": {"answer": self.answer}}


def record_from_json(where: str, item: dict[str, Any], answers: Answers) -> Record:
    """Read an essay: ``id``, ``prompt``, ``essay`` and, with gold, ``score`` and perhaps a ``rationale`` of each area.

    Raises:
        InputError: begins with ``where`` and names the defect.
    """
    texts = [item.get(key) for key in ("prompt", "essay")]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(f'{where}: "prompt" and "essay" are not both texts; an essay has {{"id", "prompt", "essay"}}')
    body = {key: item[key] for key in ("id", "output") if key in item and (key == "id" or answers == "prediction")}
    body["input"] = {"question_type": TYPES[0], "question": f"[prompt_text]\n{texts[0]}\n\n[essay_text]\n{texts[1]}"}
    if answers == "gold":
        body["output"] = {"answer": _gold(f'{where} (id "{item.get("id")}")', item)}
    record = records.record_from_json(where, body, answers, TYPES)
    return Essay(record.id, record.question_type, record.question, record.answer, item)


def _gold(where: str, item: dict[str, Any]) -> str:
    """Return gold scores as an answer is written, but unrounded and with their ``average``."""
    score, why = item.get("score"), item.get("rationale") or {}
    if not isinstance(score, dict) or not isinstance(why, dict):
        raise InputError(f'{where}: "score" (or "rationale") is no object; expected {{{", ".join(AREAS)}}}')
    for area in AREAS:
        if not _in_range(score.get(area)):
            raise InputError(f"{where}: score.{area} is {str(score.get(area))[:20]}; expected a number from 1 to 5")
    average = score.get("average", sum(score[area] for area in AREAS) / 3)
    if not _in_range(average) or not all(isinstance(why.get(area, ""), str) for area in AREAS):
        raise InputError(f"{where}: score.average is no number from 1 to 5, or a rationale is no text")
    # The contest's files have no rationales; without one the target says what the score means.
    given = {
        area: {"score": score[area], "rationale": why.get(area) or f"{name} 면에서 {_LEVELS[half_up(score[area])]}."}
        for area, name in AREAS.items()
    }
    return _json({**given, "average": average})


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _in_range(value: Any) -> bool:  # noqa: ANN401 -- any JSON value
    return isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value <= 5


def half_up(score: float) -> int:
    """Round as the contest does: 2.5 to 3, where Python's ``round`` gives 2."""
    return math.floor(score + 0.5)


def instruction(record: Record) -> str:
    """Return the system prompt. The organisers send one of their own: to train for it, write it in its place."""
    return INSTRUCTION


def question(record: Record) -> str:
    """Return writing prompt and essay under the contest's two headings."""
    return record.question


def target(record: Record) -> str:
    """Return the gold scores as a model should write them: whole numbers, each with its rationale."""
    gold = json.loads(record.answer or "")
    return _json({area: {**gold[area], "score": half_up(gold[area]["score"])} for area in AREAS})


def read_scores(text: str) -> dict[str, int] | None:
    """Read an answer as the contest does: the first ``{…}`` whose braces balance, code fences aside.

    Returns:
        Area → score, rounded half up; None where there is no such object, or a score is no number from 1 to 5.
    """
    _, opened, rest = re.sub("```(?:json)?", "", text).partition("{")
    depth, text = 0, opened + rest
    for brace in re.finditer("[{}]", text):  # those in a rationale count too, as in the contest
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            text = text[: brace.end()]
            break
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    found = {area: value[area].get("score") for area in AREAS if isinstance(value.get(area), dict)}
    fits = len(found) == len(AREAS) and all(map(_in_range, found.values()))
    return {area: half_up(score) for area, score in found.items()} if fits else None


def format_problem(question_type: str, text: str) -> str | None:
    """Return why an answer is not one JSON object of three whole scores with rationales, and nothing else; or None."""
    if not text.strip():
        return "empty answer"
    if "```" in text or not (text.startswith("{") and text.endswith("}")):
        return "not one JSON object alone (text around it, a code fence, or it is cut off)"
    if read_scores(text) is None:
        return "the contest reads no three scores from 1 to 5 in it: it counts as 0"
    try:
        value = json.loads(text)
    except ValueError:
        return "more than one JSON object"
    if list(value) != list(AREAS) or any(set(value[area]) != {"score", "rationale"} for area in AREAS):
        return f"other keys, or in another order, than {', '.join(AREAS)} with score and rationale each"
    if any(type(value[area]["score"]) is not int for area in AREAS):
        return "a score is no whole number"
    for why in (value[area]["rationale"] for area in AREAS):
        if not isinstance(why, str) or hardly_text(why) or REPEATED.search(why):
            return "a rationale is missing, repeats itself or has hardly any text"
    return None


def rmse(predicted: "NDArray[np.float64]", gold: "NDArray[np.float64]") -> float:
    """Return the root mean square error."""
    return float(((predicted - gold) ** 2).mean() ** 0.5)


def spearman(predicted: "NDArray[np.float64]", gold: "NDArray[np.float64]") -> float:
    """Return Spearman's rank correlation; equal values share their mean rank. 0 where one side is constant."""
    import numpy as np

    def ranks(values: "NDArray[np.float64]") -> "NDArray[np.float64]":
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        centred: NDArray[np.float64] = (count.cumsum() - (count - 1) / 2)[place] - (len(values) + 1) / 2
        return centred

    first, second = ranks(predicted), ranks(gold)
    scale = float((first @ first) * (second @ second)) ** 0.5
    return float(first @ second) / scale if scale else 0.0


def average(text: str) -> float:
    """Return the mean of an answer's three scores, 0 where the contest cannot read them."""
    read = read_scores(text)
    return sum(read.values()) / 3 if read else 0.0


def scores(golds: Sequence[Record], answers: Sequence[str], scorers: Mapping[str, "PairScorer"]) -> dict[str, float]:
    """Return RMSE, Spearman and ``score``, the mean of Spearman and 1 - RMSE / 4: the higher, the better."""
    import numpy as np

    predicted = np.array([average(text) for text in answers])
    gold = np.array([float(json.loads(record.answer or "")["average"]) for record in golds])
    error, correlation = rmse(predicted, gold), spearman(predicted, gold)
    return {"rmse": error, "spearman": correlation, "score": (correlation + 1 - error / 4) / 2}


def _format(texts: Sequence[str], **_: Any) -> Rewards:  # noqa: ANN401
    return [float(format_problem(TYPES[0], text) is None) for text in texts]


def _average_score(texts: Sequence[str], reference: Sequence[str], **_: Any) -> Rewards:  # noqa: ANN401
    """How near the mean of the scores is, which the contest compares: 1 at the raters' average, 0 four points off."""
    return [
        1 - abs(average(text) - json.loads(gold)["average"]) / 4 if read_scores(text) else 0.0
        for text, gold in zip(texts, reference, strict=True)
    ]


def _area_scores(texts: Sequence[str], reference: Sequence[str], **_: Any) -> Rewards:  # noqa: ANN401
    """How near each area's score is, so that errors of opposite sign do not cancel out."""
    rewards: Rewards = []
    for text, gold in zip(texts, map(json.loads, reference), strict=True):
        read = read_scores(text)
        rewards.append(sum(1 - abs(read[area] - gold[area]["score"]) / 4 for area in AREAS) / 3 if read else 0.0)
    return rewards


REWARDS: dict[str, Callable[..., Rewards]] = {
    "format": _format,
    "average_score": _average_score,
    "area_scores": _area_scores,
}
