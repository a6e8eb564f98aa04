"""Score a prediction file against a gold file: ``python -m malpyeong.evaluate GOLD PRED``."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from malpyeong.contest.records import QUESTION_TYPES, Record, load_records
from malpyeong.errors import printable
from malpyeong.metrics.aggregate import AVERAGES, RecordScore, compare, confidence, score_records, summarise
from malpyeong.metrics.ceiling import ceiling
from malpyeong.metrics.inputs import load_answers, load_categories, scoring_options
from malpyeong.metrics.scorers import load_scorers
from malpyeong.tasks import grammar
from malpyeong.tasks.task import Task, grammar_only, load, task_of
from malpyeong.terminal import Command, json_text

if TYPE_CHECKING:
    from malpyeong.metrics.pairs import PairScorer

_COLUMNS = {
    "exact_match": "EM",
    "rouge_1": "ROUGE-1",
    "bertscore": "BERTScore",
    "bleurt": "BLEURT",
    "descriptive_avg": "descriptive",
    "final_score": "final",
    "format_rate": "format",
    "missing_reasons": "no reason",
}
_NARROW = {"ROUGE-1": "ROUGE\n-1", "BERTScore": "BERT\nScore", "descriptive": "descr.", "no reason": "no\nreason"}


def evaluate(gold: Path, prediction: Path) -> list[RecordScore]:
    """Load two files, check that they hold the same questions, and score every record by EM and ROUGE-1.

    Raises:
        InputError: a file is defective or the ids or their order differ.
    """
    return score_records(*load_answers(gold, prediction))


def _print_ceiling(context: click.Context, _: click.Parameter, gold: Path | None) -> None:
    if gold is None:
        return
    reached = ceiling(load_records(gold, answers="gold"))
    table = Table(title="ceiling of constrained decoding (0–1)", box=SIMPLE, show_edge=False, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in ("n", "sentence", "with particle", "kept by repair"):
        table.add_column(name, justify="right")
    parts = {"all": reached}
    parts |= {kind: [one for one in reached if one.record.question_type == kind] for kind in QUESTION_TYPES}
    parts["선택형, well formed, literal"] = [one for one in reached if one.literal]
    for title, part in parts.items():
        sums = (sum(one.sentence for one in part), sum(one.verdict for one in part), sum(one.kept for one in part))
        table.add_row(title, str(len(part)), *(f"{count / len(part):.3f}" if part else "–" for count in sums))
    Console().print(table)
    missed = [one.record for one in reached if not one.kept]
    for record in missed[:20]:
        click.echo(f'{gold}: id "{printable(record.id)}": out of reach: {printable(record.answer or "", 60)}')
    if len(missed) > 20:
        click.echo(f"… and {len(missed) - 20} more")
    context.exit()


@click.command(cls=Command)
@scoring_options
@click.option(
    "--ceiling",
    type=click.Path(path_type=Path),
    metavar="GOLD",
    is_eager=True,
    expose_value=False,
    callback=_print_ceiling,
    help="Only show how many of GOLD's answers constrained decoding could write and repair would keep.",
)
@click.option("--against", type=click.Path(path_type=Path), help="Another prediction file to compare PRED with.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@click.option("--worst", default=5, show_default=True, help="How many of the worst records to show.")
def main(
    gold: Path,
    prediction: Path,
    metrics: tuple[str, ...],
    against: Path | None,
    labels: Path | None,
    bertscore_model: str | None,
    bleurt_model: str | None,
    device: str,
    as_json: bool,
    worst: int,
) -> None:
    """Score PRED against GOLD as the contest of its task does (grammar: 2025 rules).

    Both are contest files (JSON list or JSONL) with the same ids in the same order. BERTScore and BLEURT need
    models; where one is not on this machine the report is given without it and says so.
    """
    categories = load_categories(labels) if labels else None
    # Defects of the files first: models take long to load.
    golds, answers = load_answers(gold, prediction, load)
    if (task := task_of(golds[0])) is not grammar:
        grammar_only(task, {"--labels": labels, "--against": against})
        neural = [name for name in ("bertscore", "bleurt") if name in metrics and name in task.REWARDS]
        known, scorers = load_scorers(neural, bertscore_model, bleurt_model, device)
        other = _summary_of(task, golds, answers, scorers)
        other["left_out"] = sorted({*neural} - {*known})
        if as_json:
            click.echo(json_text(other))
        else:
            Console().print(f"contest score of the task {task.NAME}:", _table_of(other))
            if "final" not in other:
                Console().print(f"score: {task.STAND_IN}")
        return
    others = load_answers(gold, against)[1] if against else []
    computed, scorers = load_scorers(metrics, bertscore_model, bleurt_model, device)
    scores = score_records(golds, answers, computed, scorers)
    summary = summarise(scores, computed, categories)
    summary["confidence_95"] = confidence(scores, computed)
    summary["left_out"] = missing = sorted({*metrics} - {*computed})
    if against:
        summary["comparison"] = compare(scores, score_records(golds, others, computed, scorers), computed)
    if as_json:
        click.echo(json_text(summary))
        return
    console = Console()
    console.print(_summary_table(summary))
    if missing:
        console.print(f"[bold]partial report[/bold]: without {', '.join(missing)} there is no final score")
    if against:
        _print_comparison(console, summary["comparison"], against)
    if worst > 0:
        _print_worst(console, scores, worst)


def _summary_table(summary: dict[str, Any]) -> Table:
    """Return what was measured, narrow enough for a terminal of 80 columns."""
    shown = [key for key in _COLUMNS if summary[key] is not None]
    table = Table(title="contest score (0–1)", box=SIMPLE, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("", no_wrap=True)
    for name in ("n", *(_COLUMNS[key] for key in shown)):
        table.add_column(_NARROW.get(name, name), justify="right", min_width=5)
    parts = [("all", summary), *summary["by_question_type"].items(), *summary.get("by_category", {}).items()]
    for title, part in parts:
        table.add_row(Text(printable(title)), str(part["records"]), *(_cell(part[key]) for key in shown))
    interval = summary["confidence_95"]
    for place, title in enumerate(("95 % from", "     to")):
        table.add_row(title, "", *(f"{interval[key][place]:.3f}" if key in interval else "" for key in shown))
    return table


def _summary_of(
    task: Task, golds: list[Record], answers: list[str], scorers: Mapping[str, "PairScorer"]
) -> dict[str, Any]:
    """Return what another task than grammar scores."""
    kinds = [record.question_type for record in golds]
    problems = [task.format_problem(kind, answer) for kind, answer in zip(kinds, answers, strict=True)]
    return {
        "task": task.NAME,
        "records": len(golds),
        **task.scores(golds, answers, scorers),
        "format_rate": problems.count(None) / len(golds),
    }


def _table_of(summary: dict[str, Any]) -> Table:
    table = Table(box=SIMPLE, show_edge=False, pad_edge=False, show_header=False)
    for key, value in summary.items():
        if isinstance(value, int | float):
            table.add_row(_COLUMNS.get(key, key), _cell(value))
    return table


def _cell(value: float | None) -> str:
    return "–" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"


def _print_comparison(console: Console, comparison: dict[str, Any], other: Path) -> None:
    table = Table(title=Text(f"difference to {printable(str(other))} (paired bootstrap)"))
    for name in ("", "difference", "95 %", "p (not better)"):
        table.add_column(name, justify="left" if not name else "right")
    for key in AVERAGES:
        if key in comparison["difference"]:
            row = comparison["difference"][key]
            low, high = row["confidence_95"]
            table.add_row(_COLUMNS[key], f"{row['value']:+.3f}", f"{low:+.3f} to {high:+.3f}", f"{row['p']:.3f}")
    console.print(table)
    console.print(f"answers that differ: {comparison['changed_answers']}")
    for name, word in (("em_gained", "now right"), ("em_lost", "no longer right")):
        ids = comparison[name]
        if ids:
            shown = ", ".join(printable(id_) for id_ in ids[:20]) + (" …" if len(ids) > 20 else "")
            console.print(Text(f"{word} ({len(ids)}): {shown}"))


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
