"""The contest's report over two files: per-record scores and their averages."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from malpyeong.answer import contest_split, format_problem
from malpyeong.records import QUESTION_TYPES, Record
from malpyeong.scoring.exact_match import exact_match

METRICS = ("em", "rouge1")


@dataclass(frozen=True, slots=True)
class RecordScore:
    """Scores of one record.

    Attributes:
        record: the gold record.
        prediction: the predicted answer.
        exact_match: 1.0 or 0.0; None if not asked for.
        rouge_1: ROUGE-1 F1 of the reasons (0–1); None if not asked for or if either reason is empty.
        missing_reason: True if the gold has a reason and the prediction none (the contest leaves such a
            record out of the reason averages; it is counted here, never exploited).
        format_problem: why the prediction is not in the contest's form, or None.
    """

    record: Record
    prediction: str
    exact_match: float | None
    rouge_1: float | None
    missing_reason: bool
    format_problem: str | None


def score_records(
    golds: Sequence[Record], predictions: Sequence[str], metrics: Sequence[str] = METRICS
) -> list[RecordScore]:
    """Score predicted answers against gold records, position by position.

    Raises:
        ValueError: the lengths differ or a gold has no answer.
    """
    scores = []
    for record, prediction in zip(golds, predictions, strict=True):
        if record.answer is None:
            raise ValueError(f"record {record.id} has no gold answer")
        gold_reason, reason = contest_split(record.answer)[1], contest_split(prediction)[1]
        rouge = None
        if "rouge1" in metrics and gold_reason and reason:
            from malpyeong.scoring.rouge import rouge_1

            rouge = rouge_1(reason, gold_reason)
        scores.append(
            RecordScore(
                record=record,
                prediction=prediction,
                exact_match=exact_match(prediction, record.answer) if "em" in metrics else None,
                rouge_1=rouge,
                missing_reason=bool(gold_reason) and not reason,
                format_problem=format_problem(prediction),
            )
        )
    return scores


def summarise(scores: Sequence[RecordScore], metrics: Sequence[str] = METRICS) -> dict[str, Any]:
    """Average scores into the report's JSON object.

    A metric that was not asked for is None, and so are ``descriptive_avg`` (the mean of ROUGE-1, BERTScore
    and BLEURT) and ``final_score`` (the mean of that and EM): a partial average would be a different score.
    """
    summary = _averages(scores, metrics)
    summary["by_question_type"] = {
        kind: _averages(part, metrics)
        for kind in QUESTION_TYPES
        if (part := [score for score in scores if score.record.question_type == kind])
    }
    return summary


def _averages(scores: Sequence[RecordScore], metrics: Sequence[str]) -> dict[str, Any]:
    matches = [score.exact_match for score in scores if score.exact_match is not None]
    rouges = [score.rouge_1 for score in scores if score.rouge_1 is not None]
    return {
        "exact_match": _mean(matches) if "em" in metrics else None,
        "rouge_1": _mean(rouges) if "rouge1" in metrics else None,
        "bertscore": None,
        "bleurt": None,
        "descriptive_avg": None,
        "final_score": None,
        "records": len(scores),
        "missing_reasons": sum(score.missing_reason for score in scores),
        "format_rate": _mean([float(score.format_problem is None) for score in scores]),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
