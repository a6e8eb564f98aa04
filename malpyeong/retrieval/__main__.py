"""``python -m malpyeong.retrieval search`` and ``evaluate``."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from malpyeong.contest.records import load_records
from malpyeong.contest.rulebook import load_rule_book
from malpyeong.errors import InputError, counted, printable
from malpyeong.files import check_writable
from malpyeong.prompts.context import write_contexts
from malpyeong.prompts.rule_choice import find_labels
from malpyeong.retrieval.finder import Finder
from malpyeong.retrieval.search import Document, example_documents, rule_documents
from malpyeong.terminal import Group, json_text

if TYPE_CHECKING:
    from malpyeong.retrieval.neural import Dense, Reranker

_PATH = click.Path(path_type=Path)


@click.group(cls=Group)
def main() -> None:
    """Find rules and solved questions for questions, and measure how well."""


@main.command()
@click.argument("questions", nargs=-1, required=True, type=_PATH)
@click.option("-o", "--output", type=_PATH, required=True, help="Context file (JSONL) to write.")
@click.option("--rules", "rule_book", type=_PATH, help="Rule book of python -m malpyeong.rules build.")
@click.option("--examples", "solved", type=_PATH, help="Contest file with answers, such as train.json.")
@click.option("--labels", "label_file", type=_PATH, help="Rules of the examples, given or mined, to find rules by.")
@click.option("--rules-k", default=3, show_default=True, type=click.IntRange(min=1), help="Rules a question.")
@click.option("--examples-k", default=3, show_default=True, type=click.IntRange(min=1), help="Examples a question.")
@click.option("--dense", help="Folder or hub id of a sentence-transformers model, to be fused with BM25.")
@click.option("--reranker", help="Folder or hub id of a cross-encoder, to order the best anew.")
def search(
    questions: tuple[Path, ...],
    output: Path,
    rule_book: Path | None,
    solved: Path | None,
    label_file: Path | None,
    rules_k: int,
    examples_k: int,
    dense: str | None,
    reranker: str | None,
) -> None:
    """Find rules and solved examples for every question of QUESTIONS (contest files).

    A solved question is never found for itself, so QUESTIONS may be the file of the examples. With --labels, rules are
    found by what similar examples needed as well as by their texts; a question's own label is never looked at.
    """
    if rule_book is None and solved is None:
        raise InputError("nothing to search in; name --rules or --examples")
    if label_file and not (rule_book and solved):
        raise InputError("--labels are rules of examples: name --rules and --examples too")
    records = [record for path in questions for record in load_records(path)]
    rules = load_rule_book(rule_book) if rule_book else []
    examples = load_records(solved, answers="gold") if solved else []
    labels = find_labels(label_file, examples) if label_file else []
    if any(labels):
        click.echo(f"{sum(label is not None for label in labels)} of {len(examples)} examples have a label")
    check_writable(output, *questions, rule_book, solved, label_file)
    model = _reranker(reranker)
    finder = Finder(rules, examples, labels, rules_k, examples_k, lambda documents: _dense(documents, dense), model)
    found_rules, found_examples = finder.rules(records), finder.examples(records)
    write_contexts(output, records, found_rules, found_examples)
    rules_found, examples_found = sum(map(len, found_rules)), sum(map(len, found_examples))
    counts = f"{counted(rules_found, 'rule')}, {counted(examples_found, 'example')}"
    click.echo(f"{output}: {counted(len(records), 'question')}, {counts}")


@main.command()
@click.argument("questions", nargs=-1, required=True, type=_PATH)
@click.option("--labels", "label_file", type=_PATH, help="Rules of questions and examples, given or mined.")
@click.option("--rules", "rule_book", type=_PATH, help="Rule book of python -m malpyeong.rules build.")
@click.option("--examples", "solved", type=_PATH, help="Contest file with answers, such as train.json.")
@click.option("--dense", help="Folder or hub id of a sentence-transformers model.")
@click.option("--reranker", help="Folder or hub id of a cross-encoder.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of Markdown tables.")
def evaluate(
    questions: tuple[Path, ...],
    label_file: Path | None,
    rule_book: Path | None,
    solved: Path | None,
    dense: str | None,
    reranker: str | None,
    as_json: bool,
) -> None:
    """Measure retrieval on QUESTIONS (contest files with answers), file by file.

    Examples are judged by the ROUGE-1 of the nearest one's reason, with what an answer without a model would score;
    rules, with --labels, by the exact id of the labelled one. In brackets the 95 % interval. The rows "random" and
    "oracle" show what chance and a perfect choice give.
    """
    if rule_book is None and solved is None:
        raise InputError("nothing to search in; name --rules or --examples")
    if rule_book and label_file is None:
        raise InputError("--rules are judged by labels: name --labels too, or leave --rules out")
    from malpyeong.retrieval.evaluate import (
        check_labels,
        evaluate_examples,
        evaluate_floor,
        evaluate_rules,
        example_methods,
        markdown,
        rule_methods,
    )

    splits = {str(path): load_records(path, answers="gold") for path in questions}
    rules = load_rule_book(rule_book) if rule_book else []
    examples = load_records(solved, answers="gold") if solved else []
    labelled = [*(record for records in splits.values() for record in records), *examples]
    labels = find_labels(label_file, labelled) if label_file else [None] * len(labelled)
    right = {record.id: label.best_of_all for record, label in zip(labelled, labels, strict=True) if label}
    best = {id_: rule for id_, rule in right.items() if rule}
    model = _reranker(reranker)
    report: dict[str, dict[str, Any]] = {name: {} for name in splits}
    sizes = {
        "rules": counted(len(rules), "rule"),
        "examples": counted(len(examples), "solved question"),
        "floor": "the floor",
    }
    if rules and label_file:
        compared = rule_methods(
            rules, _dense(rule_documents(rules), dense), model, examples, labels[len(labelled) - len(examples) :]
        )
        for name, records in splits.items():
            helped = [record for record in records if record.id in best or record.id not in right]
            check_labels(label_file, best, helped, rules)
            report[name]["rules"] = evaluate_rules(helped, best, rules, compared)
    if examples:
        documents = example_documents(examples)
        searched = example_methods(documents, _dense(documents, dense), model)
        for name, records in splits.items():
            report[name]["examples"] = evaluate_examples(records, best, examples, searched)
            report[name]["floor"] = evaluate_floor(records, searched["questions and edits"])
    if as_json:
        plain = {
            name: {
                kind: {method: {key: asdict(one) for key, one in row.items()} for method, row in table.items()}
                for kind, table in tables.items()
            }
            for name, tables in report.items()
        }
        click.echo(json_text(plain))
        return
    for name, tables in report.items():
        for kind, table in tables.items():
            shown = counted(len(splits[name]), "question")
            click.echo(f"\n{printable(name)}: {shown}, {sizes[kind]}\n\n{markdown(table)}")


def _dense(documents: list[Document], name: str | None) -> "Dense | None":
    if name is None:
        return None
    from malpyeong.retrieval.neural import Dense

    return Dense(documents, name)


def _reranker(name: str | None) -> "Reranker | None":
    if name is None:
        return None
    from malpyeong.retrieval.neural import Reranker

    return Reranker(name)


if __name__ == "__main__":
    main()
