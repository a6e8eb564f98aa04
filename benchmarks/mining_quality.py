"""How often PPL mining finds the labelled rule on the sample data, with the rule before the question and after it.

    python -m benchmarks.mining_quality --adapter runs/tiny-sft/adapter

Before the question is what ``recipes/mine.py`` does; after it, in the user's message, all rules share a
question's beginning instead. Random choice among all rules is given beside them.
"""

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from malpyeong.contest.records import Record, load_records
from malpyeong.contest.rulebook import Rule, load_rule_book
from malpyeong.models.load import load_for_prediction
from malpyeong.prompts.messages import build_messages, completion_ids, prompt_ids
from malpyeong.samples import DATA, TINY_BASE
from malpyeong.terminal import Command
from malpyeong.training.mining import make_plan, mine
from malpyeong.training.perplexity import Row, perplexities, shared_prefix


def rule_first(model: Any, tokenizer: Any, records: Sequence[Record], rules: Sequence[Rule]) -> list[list[float]]:  # noqa: ANN401
    """Return PPL(a|c,q) for each record (outer) and rule (inner), and PPL(a|q) last."""
    plan = make_plan(tokenizer, records, rules, None, 2048, 2048)
    table = [[0.0] * (len(rules) + 1) for _ in records]
    results = tqdm(mine(model, plan, tokenizer.pad_token_id), total=len(plan.batches), desc="rule first")
    for batch, values in zip(plan.batches, results, strict=True):
        for row, value in zip(batch.rows, values, strict=True):
            if row < len(records):
                table[row][batch.context - 1] = value
    return table


def question_first(model: Any, tokenizer: Any, records: Sequence[Record], rules: Sequence[Rule]) -> list[list[float]]:  # noqa: ANN401
    """Return PPL(a|q,c) for each record (outer) and rule (inner)."""
    table = []
    for record in tqdm(records, desc="question first"):
        prompts = []
        for rule in rules:
            system, user = build_messages(record)
            user["content"] += f"\n\n[참고 규범]\n\n{rule.full_text}"
            prompts.append(prompt_ids(tokenizer, [system, user]))
        shared = len(os.path.commonprefix(prompts))
        prefix = shared_prefix(model, prompts[0][:shared])
        answer = completion_ids(tokenizer, record.answer or "")[:-1]
        order = sorted(range(len(rules)), key=lambda place: len(prompts[place]))
        values = [0.0] * len(rules)
        for start in range(0, len(order), 4):
            places = order[start : start + 4]
            rows = [Row(prompts[place][shared:], answer) for place in places]
            for place, value in zip(places, perplexities(model, prefix, rows, tokenizer.pad_token_id), strict=True):
                values[place] = value
        table.append(values)
    return table


def ranks(ppl: Sequence[Sequence[float]], labels: Sequence[int]) -> list[int]:
    """Return the place of the labelled rule (1: the best) for each record."""
    return [1 + sum(value < row[label] for value in row) for row, label in zip(ppl, labels, strict=True)]


@click.command(cls=Command)
@click.option("--model", default=str(TINY_BASE))
@click.option("--adapter")
@click.option("--questions", default=30, show_default=True, help="How many, evenly spread over the dev split.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="JSON file to write the figures to.")
def main(model: str, adapter: str | None, questions: int, output: Path | None) -> None:
    """Print top-1, top-5 and MRR of the labelled rule for both orders and random choice."""
    loaded, tokenizer = load_for_prediction(model, adapter, "float32")
    dev, rules = load_records(DATA / "dev.json", answers="gold"), load_rule_book(DATA / "rules.json")
    records = [dev[number * len(dev) // questions] for number in range(questions)]
    names = json.loads((DATA / "labels.json").read_text("utf-8"))
    labels = [[rule.id for rule in rules].index(names[record.id]["rule"]) for record in records]

    tables = rule_first(loaded, tokenizer, records, rules)
    first, alone = [row[:-1] for row in tables], [row[-1] for row in tables]
    last = question_first(loaded, tokenizer, records, rules)
    count = len(rules)
    figures: dict[str, Any] = {
        "random": {"top1": 1 / count, "top5": 5 / count, "mrr": sum(1 / n for n in range(1, count + 1)) / count}
    }
    for name, ppl in (("rule first", first), ("question first", last)):
        found = ranks(ppl, labels)
        figures[name] = {
            "top1": sum(rank == 1 for rank in found) / questions,
            "top5": sum(rank <= 5 for rank in found) / questions,
            "mrr": statistics.mean(1 / rank for rank in found),
            "median_rank": statistics.median(found),
            "best_rule_helps": sum(min(row) < base for row, base in zip(ppl, alone, strict=True)) / questions,
            "labelled_rule_helps": sum(row[label] < base for row, base, label in zip(ppl, alone, labels, strict=True))
            / questions,
        }
    table = Table(title=f"{questions} dev questions, {count} rules")
    for title in ("order", "top 1", "top 5", "MRR", "median rank", "best rule: delta > 0", "labelled rule: delta > 0"):
        table.add_column(title, justify="left" if title == "order" else "right")
    for name, row in figures.items():
        table.add_row(name, *(f"{value:.3f}" if key != "median_rank" else f"{value:.0f}" for key, value in row.items()))
    Console(width=120).print(table)
    figures["spearman"] = statistics.mean(
        float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])
        for a, b in zip(first, last, strict=True)
    )
    figures["same_top1"] = sum(
        min(range(count), key=a.__getitem__) == min(range(count), key=b.__getitem__)
        for a, b in zip(first, last, strict=True)
    ) / len(records)
    click.echo(
        f"the two orders: mean rank correlation {figures['spearman']:.3f}, same top 1 {figures['same_top1']:.3f}"
    )
    if output:
        output.write_text(json.dumps({"questions": questions, "rules": count, **figures}, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
