"""``python -m malpyeong.retrieval search`` and ``evaluate``."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from malpyeong.contest.records import load_records
from malpyeong.contest.rulebook import load_rule_book
from malpyeong.errors import InputError, printable
from malpyeong.files import check_writable
from malpyeong.prompts.context import write_contexts
from malpyeong.prompts.rule_choice import load_given_labels
from malpyeong.retrieval.search import Document, Retriever, Scorer, example_documents, rule_documents

if TYPE_CHECKING:
    from malpyeong.retrieval.neural import Dense, Reranker

_PATH = click.Path(path_type=Path)


@click.group()
def main() -> None:
    """Find rules and solved questions for questions, and measure how well."""


@main.command()
@click.argument("questions", nargs=-1, required=True, type=_PATH)
@click.option("-o", "--output", type=_PATH, required=True, help="Context file (JSONL) to write.")
@click.option("--rules", "rule_book", type=_PATH, help="Rule book of python -m malpyeong.rules build.")
@click.option("--examples", "solved", type=_PATH, help="Contest file with answers, such as train.json.")
@click.option("--rules-k", default=3, show_default=True, type=click.IntRange(min=1), help="Rules a question.")
@click.option("--examples-k", default=3, show_default=True, type=click.IntRange(min=1), help="Examples a question.")
@click.option("--dense", help="Folder or hub id of a sentence-transformers model, to be fused with BM25.")
@click.option("--reranker", help="Folder or hub id of a cross-encoder, to order the best anew.")
def search(
    questions: tuple[Path, ...],
    output: Path,
    rule_book: Path | None,
    solved: Path | None,
    rules_k: int,
    examples_k: int,
    dense: str | None,
    reranker: str | None,
) -> None:
    """Find rules and solved examples for every question of QUESTIONS (contest files).

    A solved question is never found for itself, so QUESTIONS may be the file of the examples.
    """
    if rule_book is None and solved is None:
        raise InputError("nothing to search in; name --rules or --examples")
    for path in (*questions, rule_book, solved):
        if path is not None and path.exists() and output.exists() and output.samefile(path):
            raise InputError(f"{output}: would overwrite an input; choose another name")
    records = [record for path in questions for record in load_records(path)]
    rules = load_rule_book(rule_book) if rule_book else []
    examples = load_records(solved, answers="gold") if solved else []
    check_writable(output)
    model = _reranker(reranker)
    found_rules: list[list[Any]] = [[] for _ in records]
    found_examples: list[list[Any]] = [[] for _ in records]
    if rules:
        hits = _retriever(rule_documents(rules), dense, model).search_all(records, rules_k)
        found_rules = [[(hit.score, rules[hit.position]) for hit in row] for row in hits]
    if examples:
        hits = _retriever(example_documents(examples), dense, model).search_all(records, examples_k)
        found_examples = [[(hit.score, examples[hit.position]) for hit in row] for row in hits]
    write_contexts(output, records, found_rules, found_examples)
    counts = f"{sum(map(len, found_rules))} rules, {sum(map(len, found_examples))} examples"
    click.echo(f"{output}: {len(records)} questions, {counts}")


@main.command()
@click.argument("questions", nargs=-1, required=True, type=_PATH)
@click.option("--labels", "label_file", type=_PATH, required=True, help="JSON of record id → rule id.")
@click.option("--rules", "rule_book", type=_PATH, help="Rule book of python -m malpyeong.rules build.")
@click.option("--examples", "solved", type=_PATH, help="Contest file with answers, such as train.json.")
@click.option("--dense", help="Folder or hub id of a sentence-transformers model.")
@click.option("--reranker", help="Folder or hub id of a cross-encoder.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of Markdown tables.")
def evaluate(
    questions: tuple[Path, ...],
    label_file: Path,
    rule_book: Path | None,
    solved: Path | None,
    dense: str | None,
    reranker: str | None,
    as_json: bool,
) -> None:
    """Measure retrieval on QUESTIONS (contest files with answers), file by file.

    Rules are judged by the exact id of the labelled rule, examples by the ROUGE-1 of the nearest one's reason; in
    brackets the 95 % interval. The rows "random" and "oracle" show what chance and a perfect choice give.
    """
    if rule_book is None and solved is None:
        raise InputError("nothing to search in; name --rules or --examples")
    from malpyeong.retrieval.evaluate import (
        check_labels,
        evaluate_examples,
        evaluate_rules,
        markdown,
        methods,
    )

    splits = {str(path): load_records(path, answers="gold") for path in questions}
    labels = load_given_labels(label_file)
    rules = load_rule_book(rule_book) if rule_book else []
    examples = load_records(solved, answers="gold") if solved else []
    if rules:
        for records in splits.values():
            check_labels(label_file, labels, records, rules)
    model = _reranker(reranker)
    report: dict[str, dict[str, Any]] = {name: {} for name in splits}
    if rules:
        documents = rule_documents(rules)
        compared = methods(documents, _dense(documents, dense), model)
        for name, records in splits.items():
            report[name]["rules"] = evaluate_rules(records, labels, rules, compared)
    if examples:
        documents = example_documents(examples)
        compared = methods(documents, _dense(documents, dense), model)
        for name, records in splits.items():
            report[name]["examples"] = evaluate_examples(records, labels, examples, compared)
    if as_json:
        plain = {
            name: {
                kind: {method: {key: asdict(one) for key, one in row.items()} for method, row in table.items()}
                for kind, table in tables.items()
            }
            for name, tables in report.items()
        }
        click.echo(json.dumps(plain, ensure_ascii=False, indent=2))
        return
    sizes = {"rules": f"{len(rules)} rules", "examples": f"{len(examples)} solved questions"}
    for name, tables in report.items():
        for kind, table in tables.items():
            click.echo(f"\n{printable(name)}: {len(splits[name])} questions, {sizes[kind]}\n\n{markdown(table)}")


def _retriever(documents: list[Document], dense: str | None, reranker: "Reranker | None") -> Retriever:
    from malpyeong.retrieval.bm25 import BM25

    scorers: list[Scorer] = [BM25(documents)]
    model = _dense(documents, dense)
    if model is not None:
        scorers.append(model)
    return Retriever(documents, scorers, reranker)


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
