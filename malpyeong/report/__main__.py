"""``python -m malpyeong.report errors GOLD PRED -o errors.html`` and ``… run RUN -o run.html``."""

from pathlib import Path

import click

from malpyeong.errors import InputError
from malpyeong.files import check_writable, write_text
from malpyeong.metrics.aggregate import score_records
from malpyeong.metrics.inputs import load_answers, load_categories, scoring_options
from malpyeong.metrics.scorers import load_scorers
from malpyeong.terminal import Group


@click.group(cls=Group)
def main() -> None:
    """Write a page to read in a browser: one HTML file that works offline."""


@main.command()
@scoring_options
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="HTML file to write.")
def errors(
    gold: Path,
    prediction: Path,
    output: Path,
    metrics: tuple[str, ...],
    labels: Path | None,
    bertscore_model: str | None,
    bleurt_model: str | None,
    device: str,
) -> None:
    """Show what PRED got wrong, beside GOLD.

    Both are contest files with the same ids in the same order. BERTScore and BLEURT need models; where one is not on
    this machine the page is written without it and says so.
    """
    from malpyeong.report.error_page import error_page

    _check_output(output, gold, prediction, labels)
    categories = load_categories(labels) if labels else None
    golds, answers = load_answers(gold, prediction)
    scorers, missing = load_scorers(metrics, bertscore_model, bleurt_model, device)
    for metric, message in missing.items():
        click.echo(f"{metric} is left out. {message}", err=True)
    metrics = tuple(metric for metric in metrics if metric not in missing)
    scores = score_records(golds, answers, metrics, scorers)
    page = error_page(
        scores, metrics, gold=gold, prediction=prediction, categories=categories, left_out=sorted(missing)
    )
    write_text(output, page)
    click.echo(str(output))


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="HTML file to write.")
def run(run: Path, output: Path) -> None:
    """Show how the training RUN went, or is going."""
    from malpyeong.report.run_page import read_run, run_page

    _check_output(output)
    write_text(output, run_page(read_run(run)))
    click.echo(str(output))


def _check_output(output: Path, *sources: Path | None) -> None:
    if output.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{output}: name an .html file")
    check_writable(output, *sources)


if __name__ == "__main__":
    main()
