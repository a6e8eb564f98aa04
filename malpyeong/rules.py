"""The reference document as a checked JSON rule book: ``python -m malpyeong.rules build FILE -o rules.json``."""

import statistics
from collections import Counter
from pathlib import Path

import click

from malpyeong.contest.rulebook import write_rule_book
from malpyeong.contest.rulebook_reader import build_rule_book
from malpyeong.errors import counted
from malpyeong.files import check_writable
from malpyeong.terminal import Group


@click.group(cls=Group)
def main() -> None:
    """Rule books from the reference document."""


@main.command()
@click.argument("document", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Rule book (JSON) to write.")
def build(document: Path, output: Path) -> None:
    """Read DOCUMENT (docx, PDF or text) into a rule book, and say what could not be placed."""
    check_writable(output, document)
    rules, notes = build_rule_book(document)
    write_rule_book(output, rules)
    for note in notes:
        click.echo(note, err=True)
    lengths = [len(rule.text) for rule in rules]
    click.echo(
        f"{output}: {counted(len(rules), 'rule')}, {counted(sum(lengths), 'character')} "
        f"(median {statistics.median(lengths):.0f}, longest {max(lengths):,})"
    )
    for category, count in Counter(rule.category for rule in rules).items():
        click.echo(f"  {category}: {count}")


if __name__ == "__main__":
    main()
