"""What a scoring of a prediction file takes: its files and its command-line options."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from malpyeong.contest.records import Answers, Record, check_same_questions, load_records, parse_json, text_by_id
from malpyeong.errors import InputError
from malpyeong.files import read_text
from malpyeong.metrics.aggregate import METRICS

Command = TypeVar("Command", bound=Callable[..., Any])


def load_answers(
    gold: Path, prediction: Path, load: Callable[[Path, Answers], list[Record]] = load_records
) -> tuple[list[Record], list[str]]:
    """Load gold records and the answers predicted for them, of the task that ``load`` reads.

    Raises:
        InputError: a file is defective or the ids or their order differ.
    """
    golds = load(gold, "gold")
    predictions = load(prediction, "prediction")
    check_same_questions(golds, predictions, gold, prediction)
    return golds, [record.answer or "" for record in predictions]


def load_categories(path: Path) -> dict[str, str]:
    """Read a JSON object of record id → category, or → an object with a ``category``.

    Raises:
        InputError: it cannot be read or is of another form.
    """
    expected = 'a JSON object like {"1": "띄어쓰기", "2": "문장 부호"}'
    values = parse_json(str(path), read_text(path, expected))
    if not isinstance(values, dict) or not values:
        raise InputError(f"{path}: is not {expected}")
    return text_by_id(path, values, "category", expected)


def parse_metrics(_: click.Context, __: click.Parameter, value: str) -> tuple[str, ...]:
    """Read the option ``--metrics``, for click.

    Raises:
        click.BadParameter: an unknown metric, or none.
    """
    metrics = tuple(dict.fromkeys(name.strip() for name in value.split(",") if name.strip()))
    for name in metrics or ("",):
        if name not in METRICS:
            raise click.BadParameter(f'"{name}" is not one of {", ".join(METRICS)}')
    return metrics


def scoring_options(command: Command) -> Command:
    """Add to a click command what every scoring of a prediction file takes: the two files, metrics and their models."""
    for add in (
        click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
        click.option("--bleurt-model", help="Hub id or folder; the contest's BLEURT-20 if not given."),
        click.option(
            "--bertscore-model", help="Hub id or folder; the contest's bert-base-multilingual-cased if not given."
        ),
        click.option(
            "--labels", type=click.Path(path_type=Path), help="JSON of record id → norm category, to average by."
        ),
        click.option(
            "--metrics",
            default=",".join(METRICS),
            show_default=True,
            callback=parse_metrics,
            help="Comma-separated; any of these.",
        ),
        click.argument("prediction", metavar="PRED", type=click.Path(path_type=Path)),
        click.argument("gold", type=click.Path(path_type=Path)),
    ):
        command = add(command)
    return command
