"""The contest's report over prediction files: per-record scores, averages, confidence, comparison."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from malpyeong.contest.answer import FormatProblem, contest_split, format_problem
from malpyeong.contest.records import QUESTION_TYPES, Record
from malpyeong.metrics.bootstrap import interval, resampled_means
from malpyeong.metrics.exact_match import exact_match

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from malpyeong.metrics.pairs import PairScorer

# Metric as the command line names it → key of the report.
METRICS = {"em": "exact_match", "rouge1": "rouge_1", "bertscore": "bertscore", "bleurt": "bleurt"}
FINALS = ("descriptive_avg", "final_score")
AVERAGES = (*METRICS.values(), *FINALS)


@dataclass(frozen=True, slots=True)
class RecordScore:
    """Scores of one record. Those of the reason are None if not asked for or if either reason is empty.

    Attributes:
        record: the gold record.
        prediction: the predicted answer.
        exact_match: 1.0 or 0.0; None if not asked for.
        rouge_1: ROUGE-1 F1 of the reasons (0–1).
        bertscore: BERTScore F1 of the reasons.
        bleurt: BLEURT of the reasons.
        missing_reason: True if the gold has a reason and the prediction none (the contest leaves such a
            record out of the reason averages; it is counted here, never exploited).
        format_problem: why the prediction is not in the contest's form, or None.
    """

    record: Record
    prediction: str
    exact_match: float | None
    rouge_1: float | None
    bertscore: float | None
    bleurt: float | None
    missing_reason: bool
    format_problem: FormatProblem | None


def score_records(
    golds: Sequence[Record],
    predictions: Sequence[str],
    metrics: Sequence[str] = ("em", "rouge1"),
    scorers: Mapping[str, "PairScorer"] | None = None,
) -> list[RecordScore]:
    """Score predicted answers against gold records, position by position.

    Args:
        golds: records with answers.
        predictions: an answer for each.
        metrics: of :data:`METRICS`.
        scorers: the loaded models of ``bertscore`` and ``bleurt``, where those are asked for.

    Raises:
        ValueError: the lengths differ or a gold has no answer.
        KeyError: a scorer is asked for and not given.
    """
    reasons = []
    for record, prediction in zip(golds, predictions, strict=True):
        if record.answer is None:
            raise ValueError(f"record {record.id} has no gold answer")
        reasons.append((contest_split(prediction)[1], contest_split(record.answer)[1]))
    pairs = [pair for pair in reasons if all(pair)]
    of_reason: dict[str, dict[tuple[str, str], float]] = {"rouge1": {}, "bertscore": {}, "bleurt": {}}
    for metric, known in of_reason.items():
        if metric not in metrics:
            continue
        if metric == "rouge1":
            from malpyeong.metrics.rouge import rouge_1

            known.update({pair: rouge_1(*pair) for pair in pairs})
        elif pairs:
            candidates, references = zip(*pairs, strict=True)
            known.update(zip(pairs, (scorers or {})[metric].score(candidates, references), strict=True))
    return [
        RecordScore(
            record=record,
            prediction=prediction,
            exact_match=exact_match(prediction, record.answer or "") if "em" in metrics else None,
            rouge_1=of_reason["rouge1"].get(pair),
            bertscore=of_reason["bertscore"].get(pair),
            bleurt=of_reason["bleurt"].get(pair),
            missing_reason=bool(pair[1]) and not pair[0],
            format_problem=format_problem(prediction),
        )
        for record, prediction, pair in zip(golds, predictions, reasons, strict=True)
    ]


def summarise(
    scores: Sequence[RecordScore],
    metrics: Sequence[str] = ("em", "rouge1"),
    categories: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Average scores into the report's JSON object.

    ``descriptive_avg`` is the mean of ROUGE-1, BERTScore and BLEURT, ``final_score`` the mean of that and EM. What was
    not asked for is None, and so are these two if any part of them is: a partial average would be a different score.

    Args:
        scores: of :func:`score_records`.
        metrics: those that were computed.
        categories: record id → norm category, to average by.
    """
    summary = _averages(scores, metrics)
    summary["by_question_type"] = {
        kind: _averages(part, metrics)
        for kind in QUESTION_TYPES
        if (part := [score for score in scores if score.record.question_type == kind])
    }
    if categories is not None:
        summary["by_category"] = {
            category: _averages(part, metrics)
            for category in sorted({*categories.values(), "?"})
            if (part := [score for score in scores if categories.get(score.record.id, "?") == category])
        }
    return summary


def confidence(scores: Sequence[RecordScore], metrics: Sequence[str]) -> dict[str, list[float]]:
    """Return the 95 % interval of every average (see :mod:`malpyeong.metrics.bootstrap`)."""
    return {
        name: [round(bound, 6) for bound in interval(column)]
        for name, column in _resampled([_matrix(scores, metrics)], metrics)[0].items()
    }


def compare(scores: Sequence[RecordScore], others: Sequence[RecordScore], metrics: Sequence[str]) -> dict[str, Any]:
    """Compare two predictions of the same records by the paired bootstrap (Koehn 2004).

    Args:
        scores: of one prediction.
        others: of the other; positive differences are in favour of the first.
        metrics: those that were computed.

    Returns:
        ``difference``: for every average its value, its 95 % interval and ``p``, the share of resamples in which the
        first is not better; ``changed_answers``: how many answers differ; ``em_gained`` and ``em_lost``: ids of records
        that only the first, or only the other, gets right.
    """
    import numpy as np

    first, second = _resampled([_matrix(scores, metrics), _matrix(others, metrics)], metrics)
    averages, other_averages = _averages(scores, metrics), _averages(others, metrics)
    difference = {
        name: {
            "value": averages[name] - other_averages[name],
            "confidence_95": [round(bound, 6) for bound in interval(first[name] - second[name])],
            "p": float(np.mean(first[name] - second[name] <= 0)),
        }
        for name in first
    }
    both = list(zip(scores, others, strict=True))
    return {
        "difference": difference,
        "changed_answers": sum(a.prediction != b.prediction for a, b in both),
        "em_gained": [a.record.id for a, b in both if (a.exact_match or 0) > (b.exact_match or 0)],
        "em_lost": [a.record.id for a, b in both if (a.exact_match or 0) < (b.exact_match or 0)],
    }


def _averages(scores: Sequence[RecordScore], metrics: Sequence[str]) -> dict[str, Any]:
    means: dict[str, float | None] = {
        key: _mean([value for score in scores if (value := getattr(score, key)) is not None])
        if metric in metrics
        else None
        for metric, key in METRICS.items()
    }
    finals: dict[str, float | None] = final_scores(means) if None not in means.values() else dict.fromkeys(FINALS)
    return {
        **means,
        **finals,
        "records": len(scores),
        "missing_reasons": sum(score.missing_reason for score in scores),
        "format_rate": _mean([float(score.format_problem is None) for score in scores]),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def final_scores(means: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contest's two combined scores (:data:`FINALS`) of the four metrics' means: numbers, or arrays."""
    reason = [means[key] for key in ("rouge_1", "bertscore", "bleurt")]
    return dict(zip(FINALS, (sum(reason) / 3, combined_score(means["exact_match"], reason)), strict=True))


def combined_score(exact_match: Any, reason: Sequence[Any]) -> Any:  # noqa: ANN401 -- numbers, or arrays of them
    """Return the mean of EM and of the reason's mean, 0 for a reason that has no score.

    With all three metrics of the reason it is the contest's final score; with fewer, what stands for it.
    """
    return (exact_match + (sum(reason) / len(reason) if reason else 0.0)) / 2


def _matrix(scores: Sequence[RecordScore], metrics: Sequence[str]) -> "NDArray[np.float64]":
    """Return values of shape (records, asked-for metrics), NaN where a reason is left out."""
    import numpy as np

    keys = [key for metric, key in METRICS.items() if metric in metrics]
    values = [[getattr(score, key) for key in keys] for score in scores]
    return np.array(values, dtype=np.float64).reshape(len(scores), len(keys))


def _resampled(
    matrices: Sequence["NDArray[np.float64]"], metrics: Sequence[str]
) -> list[dict[str, "NDArray[np.float64]"]]:
    """Return for each matrix every average over the same resamples of the records."""
    import numpy as np

    keys = [key for metric, key in METRICS.items() if metric in metrics]
    resampled = []
    for means in np.hsplit(resampled_means(np.hstack(matrices)), len(matrices)):
        columns = dict(zip(keys, means.T, strict=True))
        resampled.append({**columns, **final_scores(columns)} if len(keys) == len(METRICS) else columns)
    return resampled
