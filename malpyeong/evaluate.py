"""Score a prediction file against a gold file: ``python -m malpyeong.evaluate GOLD PRED``."""

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from malpyeong.errors import printable
from malpyeong.records import check_same_questions, load_records
from malpyeong.scoring.report import METRICS, RecordScore, score_records, summarise

_COLUMNS = {
    "exact_match": "EM",
    "rouge_1": "ROUGE-1",
    "format_rate": "format",
    "missing_reasons": "no reason",
}


def evaluate(gold: Path, prediction: Path, metrics: tuple[str, ...] = METRICS) -> list[RecordScore]:
    """Load two files, check that they hold the same questions, and score every record.

    Raises:
        InputError: a file is defective or the ids or their order differ.
    """
    golds = load_records(gold, answers="gold")
    predictions = load_records(prediction, answers="prediction")
    check_same_questions(golds, predictions, gold, prediction)
    return score_records(golds, [record.answer or "" for record in predictions], metrics)


def _parse_metrics(_: click.Context, __: click.Parameter, value: str) -> tuple[str, ...]:
    metrics = tuple(dict.fromkeys(name.strip() for name in value.split(",") if name.strip()))
    for name in metrics or ("",):
        if name not in METRICS:
            raise click.BadParameter(f'"{name}" is not one of {", ".join(METRICS)}')
    return metrics


@click.command()
@click.argument("gold", type=click.Path(path_type=Path))
@click.argument("prediction", metavar="PRED", type=click.Path(path_type=Path))
@click.option(
    "--metrics",
    default=",".join(METRICS),
    show_default=True,
    callback=_parse_metrics,
    help="Comma-separated; any of these.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@click.option("--worst", default=5, show_default=True, help="How many of the worst records to show.")
def main(gold: Path, prediction: Path, metrics: tuple[str, ...], as_json: bool, worst: int) -> None:
    """Score PRED against GOLD as the contest does (2025 rules).

    Both are contest files (JSON list or JSONL) with the same ids in the same order.
    """
    scores = evaluate(gold, prediction, metrics)
    summary = summarise(scores, metrics)
    if as_json:
        click.echo(json.dumps(summary, ensure_ascii=False, indent=2))
        return
    console = Console()
    console.print(_summary_table(summary))
    if worst > 0:
        _print_worst(console, scores, worst)


def _summary_table(summary: dict[str, Any]) -> Table:
    table = Table(title="contest score (0–1)")
    table.add_column("")
    table.add_column("records", justify="right")
    for name in _COLUMNS.values():
        table.add_column(name, justify="right")
    for title, part in {"all": summary, **summary["by_question_type"]}.items():
        table.add_row(title, str(part["records"]), *(_cell(part[key]) for key in _COLUMNS))
    return table


def _cell(value: float | None) -> str:
    return "–" if value is None else str(value) if isinstance(value, int) else f"{value:.4f}"


def _print_worst(console: Console, scores: list[RecordScore], count: int) -> None:
    def badness(score: RecordScore) -> float:
        reason = 0.0 if score.missing_reason or score.format_problem else 1.0
        return (1.0 if score.exact_match is None else score.exact_match) + (
            reason if score.rouge_1 is None else score.rouge_1
        )

    worst = sorted((score for score in scores if badness(score) < 2 or score.format_problem), key=badness)
    for score in worst[:count]:
        head = f"\nid {printable(score.record.id)}  EM {_cell(score.exact_match)}  ROUGE-1 {_cell(score.rouge_1)}"
        console.print(Text(head + (f"  ({score.format_problem})" if score.format_problem else "")))
        console.print(Text(f"  gold  {printable(score.record.answer or '')}"))
        console.print(Text(f"  pred  {printable(score.prediction)}"))


if __name__ == "__main__":
    main()
