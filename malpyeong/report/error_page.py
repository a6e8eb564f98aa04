"""The error page: scores with their intervals, why Exact Match failed, and every answer beside its gold."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from malpyeong.contest.answer import contest_split
from malpyeong.metrics.aggregate import FINALS, METRICS, RecordScore, confidence, summarise
from malpyeong.report.causes import Cause, find_cause
from malpyeong.report.pages import render
from malpyeong.report.text import Piece, cut, differences

_NAMES = {
    "final_score": "최종",
    "exact_match": "EM",
    "descriptive_avg": "서술 평균",
    "rouge_1": "ROUGE-1",
    "bertscore": "BERTScore",
    "bleurt": "BLEURT",
}

# Runs of equal characters in two reasons that are shorter than this are chance.
_SHORTEST_EQUAL_RUN = 3


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """Averages of some records with their 95 % intervals (both 0–1), by the report's keys."""

    name: str
    group: str
    averages: Mapping[str, Any]
    intervals: Mapping[str, Sequence[float]]


@dataclass(frozen=True, slots=True)
class Side:
    """A gold or predicted answer, cut by the contest's split, with what differs from the other side marked.

    Attributes:
        verdict: pieces of the text up to 가/이 옳다, at most as many characters as a page shows.
        reason: pieces of the text after it.
        verdict_chars: length of the whole verdict.
        reason_chars: length of the whole reason.
    """

    verdict: Sequence[Piece]
    reason: Sequence[Piece]
    verdict_chars: int
    reason_chars: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One record of the page."""

    score: RecordScore
    category: str | None
    cause: Cause | None
    reason_score: float | None
    gold: Side
    prediction: Side


def error_page(
    scores: Sequence[RecordScore],
    metrics: Sequence[str],
    *,
    gold: Path,
    prediction: Path,
    categories: Mapping[str, str] | None = None,
    left_out: Sequence[str] = (),
) -> str:
    """Return the page as HTML.

    Args:
        scores: of every record.
        metrics: those that were computed.
        gold: the file that the gold answers are from, named on the page.
        prediction: the file that the predictions are from.
        categories: record id → norm category.
        left_out: metrics that were asked for and have no model here.
    """
    entries = [_entry(score, categories) for score in scores]
    rows = _score_rows(scores, metrics, categories)
    causes = Counter(entry.cause for entry in entries if entry.cause)
    return render(
        "errors.html.j2",
        "errors.js",
        title=f"오답 보고서 · {prediction.name}",
        gold=gold.name,
        prediction=prediction.name,
        names={key: name for key, name in _NAMES.items() if key in METRICS.values() or key in FINALS},
        shown={METRICS[metric] for metric in metrics} | (set(FINALS) if len(metrics) == len(METRICS) else set()),
        left_out=[_NAMES[METRICS[metric]] for metric in left_out],
        rows=rows,
        entries=entries,
        causes=causes.most_common(),
        categories=sorted({entry.category for entry in entries if entry.category}),
        types=[(row.name, row.averages["records"]) for row in rows if row.group == "유형"],
        format_problems=Counter(score.format_problem.korean for score in scores if score.format_problem).most_common(),
        wrong=sum(causes.values()),
        missing_reasons=sum(score.missing_reason for score in scores),
    )


def _score_rows(
    scores: Sequence[RecordScore], metrics: Sequence[str], categories: Mapping[str, str] | None
) -> list[ScoreRow]:
    summary = summarise(scores, metrics, categories)
    rows = [ScoreRow("전체", "", summary, confidence(scores, metrics))]
    for kind, part in summary["by_question_type"].items():
        chosen = [score for score in scores if score.record.question_type == kind]
        rows.append(ScoreRow(kind, "유형", part, confidence(chosen, metrics)))
    for category, part in summary.get("by_category", {}).items():
        chosen = [score for score in scores if (categories or {}).get(score.record.id, "?") == category]
        rows.append(ScoreRow(_category_name(category), "범주", part, confidence(chosen, metrics)))
    return rows


def _category_name(category: str) -> str:
    return "범주 모름" if category == "?" else category


def _entry(score: RecordScore, categories: Mapping[str, str] | None) -> Entry:
    gold, prediction = _sides(contest_split(score.record.answer or ""), contest_split(score.prediction))
    known = [value for value in (score.rouge_1, score.bertscore, score.bleurt) if value is not None]
    return Entry(
        score=score,
        category=_category_name(categories.get(score.record.id, "?")) if categories is not None else None,
        cause=find_cause(score.record, score.prediction),
        reason_score=fmean(known) if known else None,
        gold=gold,
        prediction=prediction,
    )


def _sides(gold: tuple[str, str], prediction: tuple[str, str]) -> tuple[Side, Side]:
    verdicts = differences(cut(gold[0]), cut(prediction[0]))
    if all((gold[1], prediction[1])):
        reasons = differences(cut(gold[1]), cut(prediction[1]), _SHORTEST_EQUAL_RUN)
    else:  # nothing to compare
        first, second = ([Piece(cut(reason), differs=False)] if reason else [] for reason in (gold[1], prediction[1]))
        reasons = first, second
    first_side, second_side = (
        Side(verdict, reason, *map(len, whole))
        for verdict, reason, whole in zip(verdicts, reasons, (gold, prediction), strict=True)
    )
    return first_side, second_side
