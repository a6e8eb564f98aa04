"""한국문화 질의응답 (2025): 선다형 (a number), 단답형 (a word or two) and 서술형 (sentences) about Korean culture.

Accuracy of 선다형, EM of 단답형 (any of the gold answers between ``#``) and the mean of ROUGE-1, BERTScore and BLEURT
of 서술형 have the same weight. What of this is known and what assumed: ``docs/tasks.md``.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from malpyeong.contest.answer import REPEATED, SENTENCE_END, hardly_text
from malpyeong.contest.records import Record

if TYPE_CHECKING:
    from malpyeong.metrics.pairs import PairScorer

NAME = "culture"
TYPES: tuple[str, ...] = ("선다형", "단답형", "서술형")
STAND_IN = "mean of accuracy, EM and the metrics of 서술형 that are there"
_INSTRUCTIONS = {
    "선다형": "한국 문화에 대한 물음에 알맞은 보기를 하나 고르세요. 보기의 번호만 숫자로 쓰세요.",
    "단답형": "한국 문화에 대한 물음에 낱말 한두 개로 답하세요. 답만 쓰고 다른 말은 덧붙이지 마세요.",
    "서술형": "한국 문화에 대한 물음에 완결된 문장으로 설명하세요.",
}
_NUMBER = re.compile("[1-9][0-9]?")

Rewards = list[float | None]


def instruction(record: Record) -> str:
    """Return the system prompt of a question type."""
    return _INSTRUCTIONS[record.question_type]


def question(record: Record) -> str:
    """Return the question with its type, and what the file says it is about."""
    given = record.raw.get("input", {})
    about = [given[key] for key in ("category", "domain", "topic_keyword") if isinstance(given.get(key), str)]
    return f"[{record.question_type}] {record.question}" + (f"\n(분야: {', '.join(about)})" if about else "")


def target(record: Record) -> str:
    """Return the gold answer; of several accepted ones the first, as a ``#`` in a prediction matches nothing."""
    gold = record.answer or ""
    return gold.split("#")[0].strip() if record.question_type == "단답형" else gold


def format_problem(question_type: str, text: str) -> str | None:
    """Return why an answer cannot be right, whatever the question, or None."""
    if not text.strip():
        return "empty answer"
    if text != text.strip():
        return "space before or after the answer"
    if "<think>" in text or "</think>" in text or "```" in text:
        return "thinking or a code fence is left in the answer"
    if question_type == "선다형":
        return None if _NUMBER.fullmatch(text) else "not the number of an option alone"
    if question_type == "단답형":
        return "more than a short answer: a # or a line break in it" if re.search("[#\r\n]", text) else None
    if not SENTENCE_END.search(text):
        return "answer is cut off (does not end in a period)"
    return "answer repeats itself or has hardly any text" if REPEATED.search(text) or hardly_text(text) else None


def accuracy(text: str, gold: str) -> float:
    """Return 1.0 if a 선다형 answer is the gold one to the letter, else 0.0."""
    return float(text == gold)


def exact_match(text: str, gold: str) -> float:
    """Return 1.0 if a 단답형 answer is one of the gold ones between ``#``, but for outer spaces, else 0.0."""
    return float(text.strip() in [part.strip() for part in gold.split("#")])


def scores(golds: Sequence[Record], answers: Sequence[str], scorers: Mapping[str, "PairScorer"]) -> dict[str, float]:
    """Return the metrics of the question types that are there; an empty 서술형 answer scores 0."""
    row: dict[str, float] = {}
    given = list(zip([record.question_type for record in golds], answers, [r.answer or "" for r in golds], strict=True))
    for kind, name, metric in (("선다형", "accuracy", accuracy), ("단답형", "exact_match", exact_match)):
        if found := [metric(text, gold) for of, text, gold in given if of == kind]:
            row[name] = sum(found) / len(found)
    reason: list[float] = []
    if texts := [(text, gold) for of, text, gold in given if of == "서술형"]:
        pairs = [pair for pair in texts if pair[0].strip()]
        for name, score in _described(scorers).items():
            row[name] = sum(score(*map(list, zip(*pairs, strict=True)))) / len(texts) if pairs else 0.0
            reason.append(row[name])
        if len(reason) == 3:
            row["descriptive_avg"] = sum(reason) / 3
    parts = [row[name] for name in ("accuracy", "exact_match") if name in row]
    parts += [sum(reason) / len(reason)] if reason else []
    mean = sum(parts) / len(parts)
    return {**row, **({"final": mean} if len(reason) in (0, 3) else {}), "score": mean}


def _described(scorers: Mapping[str, "PairScorer"]) -> Mapping[str, Callable[[list[str], list[str]], Sequence[float]]]:
    """Return the metrics of 서술형 that can be computed."""
    return {"rouge_1": _rouge_1} | {name: scorers[name].score for name in ("bertscore", "bleurt") if name in scorers}


def _rouge_1(texts: Sequence[str], golds: Sequence[str], **_: Any) -> list[float]:  # noqa: ANN401
    from malpyeong.metrics.rouge import rouge_1

    return list(map(rouge_1, texts, golds))


def _reward(kind: str, score: Callable[..., Sequence[float]]) -> Callable[..., Rewards]:
    """Return a reward of one question type: None in another type, 0 where the form does not hold or it is below 0."""

    def reward(texts: Sequence[str], reference: Sequence[str], question_type: Sequence[str], **models: Any) -> Rewards:  # noqa: ANN401
        rewards: Rewards = [0.0 if of == kind else None for of in question_type]
        rows = [row for row, of in enumerate(question_type) if of == kind and format_problem(of, texts[row]) is None]
        values = score([texts[row] for row in rows], [reference[row] for row in rows], **models) if rows else []
        for row, value in zip(rows, values, strict=True):
            rewards[row] = max(0.0, value)
        return rewards

    return reward


def _format(texts: Sequence[str], question_type: Sequence[str], **_: Any) -> Rewards:  # noqa: ANN401
    return [float(format_problem(of, text) is None) for of, text in zip(question_type, texts, strict=True)]


def _official(texts: Sequence[str], **columns: Any) -> Rewards:  # noqa: ANN401
    def mean(parts: Sequence[float | None]) -> float:
        known = [part for part in parts if part is not None]  # one of accuracy and EM, or the three of 서술형
        return sum(known) / len(known)

    names = ("accuracy", "exact_match", "rouge_1", "bertscore", "bleurt")
    return [mean(parts) for parts in zip(*(REWARDS[name](texts, **columns) for name in names), strict=True)]


REWARDS: dict[str, Callable[..., Rewards]] = {
    "format": _format,
    "accuracy": _reward("선다형", lambda texts, golds, **_: list(map(accuracy, texts, golds))),
    "exact_match": _reward("단답형", lambda texts, golds, **_: list(map(exact_match, texts, golds))),
    "rouge_1": _reward("서술형", _rouge_1),
    "bertscore": _reward("서술형", lambda texts, golds, bertscore_model, **_: bertscore_model.score(texts, golds)),
    "bleurt": _reward("서술형", lambda texts, golds, bleurt_model, **_: bleurt_model.score(texts, golds)),
    "official": _official,
}
