"""한국어 어문 규범 기반 생성 (2025): what this project is made for. Its rewards: ``training/rewards.py``."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from malpyeong.contest import answer
from malpyeong.contest.records import QUESTION_TYPES, Record
from malpyeong.metrics.aggregate import METRICS, combined_score, score_records, summarise

if TYPE_CHECKING:
    from malpyeong.metrics.pairs import PairScorer

NAME = "grammar"
TYPES: tuple[str, ...] = QUESTION_TYPES
REWARDS: dict[str, Callable[..., list[float | None]]] = {}
STAND_IN = "mean of EM and ROUGE-1"


def instruction(record: Record) -> str:
    """Return the system prompt, the same for all questions."""
    return answer.INSTRUCTION


def question(record: Record) -> str:
    """Return the question with its type."""
    return f"[{record.question_type}] {record.question}"


def target(record: Record) -> str:
    """Return the gold answer."""
    return record.answer or ""


def format_problem(question_type: str, text: str) -> answer.FormatProblem | None:
    """See :func:`malpyeong.contest.answer.format_problem`."""
    return answer.format_problem(text)


def scores(golds: Sequence[Record], answers: Sequence[str], scorers: Mapping[str, "PairScorer"]) -> dict[str, float]:
    """Return EM and the reason's metrics, as far as their scorers are loaded."""
    metrics = ["em", "rouge1", *(name for name in ("bertscore", "bleurt") if name in scorers)]
    summary = summarise(score_records(golds, answers, metrics, scorers), metrics)
    row = {key: summary[key] for key in METRICS.values() if summary[key] is not None}
    if summary["final_score"] is not None:
        row["final"] = summary["final_score"]
    row["score"] = row.get("final", combined_score(row["exact_match"], [row["rouge_1"]]))
    return row
