"""What the context in the prompt is worth: nothing, rules, solved examples, both, and rules that the model chooses.

    make bench-contexts                                   (hours on two cores; resumes where it stopped)
    python -m benchmarks.contexts --seed 0 -o runs/contexts
    python -m benchmarks.contexts --row "neighbours' five rules, SFT" --row "neighbours' five rules, SFT + GRPO"

For each seed the tiny model is fine-tuned as in the demo; from there once more with each kind of context in its
prompts (half of the train split, one epoch), and answers the sample test and unseen questions with the same kind.
Rules and examples are what BM25 finds; a rule is shown by its title and three examples, because this model reads one
character at a time. Of the model that was trained with the retrieved rule two more rows come without training: the
same questions with a random rule and with the labelled one (oracle) in its place.

``choice`` sees the titles of five rules in any order and names one first. From the demo's SFT it learns to name the
rule of a question without seeing any (mode ``recall_rule``), then to choose and answer, both on the whole train split,
and then by GRPO. The five are BM25's, or those that the labels of similar training questions vote for (``neighbours``).
"""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import click

from malpyeong.contest.records import Record, load_records, write_records
from malpyeong.contest.rulebook import Rule, load_rule_book
from malpyeong.evaluate import evaluate
from malpyeong.files import write_text
from malpyeong.metrics.aggregate import summarise
from malpyeong.prompts.context import Context, load_contexts, write_contexts
from malpyeong.prompts.rule_choice import Labels, load_labels
from malpyeong.samples import DATA, TINY_BASE
from malpyeong.terminal import Command, make

RECIPES = Path(__file__).parent.parent / "recipes"
LABELS, RULES = DATA / "labels.json", DATA / "rules.json"
SPLITS = ("test", "unseen")
CANDIDATES = 5
HALF = (
    "training.epochs=1",
    "training.learning_rate=1.0e-3",
    "training.warmup_steps=5",
    "training.batch_size=16",
    "training.eval_steps=50",
)
# Row → (the context that the model was trained with, the context that it is asked with).
ROWS = {
    "no context": ("none", "none"),
    "retrieved rule": ("rule", "rule"),
    "… a random rule instead": ("rule", "random"),
    "… the labelled rule instead (oracle)": ("rule", "oracle"),
    "retrieved example": ("example", "example"),
    "retrieved rule and example": ("both", "both"),
    "choice of five rules, SFT": ("choice", "choice"),
    "choice of five rules, SFT + GRPO": ("choice-grpo", "choice"),
    "neighbours' five rules, SFT": ("neighbours", "neighbours"),
    "neighbours' five rules, SFT + GRPO": ("neighbours-grpo", "neighbours"),
}
CHOICES = ("choice", "neighbours")


def short(rule: Rule) -> Rule:
    """Return a rule with its title for its text, and three of its examples."""
    return replace(rule, text=rule.title or rule.text, title="", examples=rule.examples[:3])


def title_only(rule: Rule) -> Rule:
    """Return a rule with its title for its text: what stands in a list to choose from."""
    return replace(rule, text=rule.title or rule.text, title="", examples=())


def variants(
    record: Record, found: Context, voted: Context, label: Labels, rules: Sequence[Rule]
) -> dict[str, Context]:
    """Return every kind of context of one question, from what BM25 and neighbours' labels found for it."""
    oracle = [rule for rule in rules if rule.id in label.gains]
    other = random.Random(record.question).choice([rule for rule in rules if rule.id not in label.gains])
    return {
        "rule": Context((short(found.rules[0]),)),
        "random": Context((short(other),)),
        "oracle": Context(tuple(map(short, oracle))),
        "example": Context((), found.examples[:1]),
        "both": Context((short(found.rules[0]),), found.examples[:1]),
        "choice": Context(tuple(map(title_only, found.rules))),
        "neighbours": Context(tuple(map(title_only, voted.rules))),
    }


class Bench:
    """The files under one folder, each made once."""

    def __init__(self, output: Path) -> None:
        self.output = output

    def prepare(self) -> None:
        """Write the training file and a context file of each kind."""
        if (self.output / "neighbours.jsonl").exists():
            return
        self.output.mkdir(parents=True, exist_ok=True)
        train = load_records(DATA / "train.json", answers="gold")
        write_records(self.output / "train.json", train[::2])
        splits = [DATA / f"{split}.json" for split in ("train", "dev", "explore", *SPLITS)]
        counts = ("--rules-k", str(CANDIDATES), "--examples-k", "1")
        search = ("-m", "malpyeong.retrieval", "search", *splits, "--rules", RULES, "--examples", DATA / "train.json")
        found = make(self.output / "retrieved.jsonl", *search, *counts, "-o", self.output / "retrieved.jsonl")
        voted = self.output / "voted.jsonl"  # of other questions' labels: a training question's own has no vote
        make(voted, *search, *counts, "--labels", LABELS, "-o", voted)
        records = [record for split in splits for record in load_records(split, answers="gold")]
        rules = load_rule_book(RULES)
        labels = load_labels(LABELS, records)
        rows = [
            variants(record, context, other, label, rules)
            for record, context, other, label in zip(
                records, load_contexts(found, records), load_contexts(voted, records), labels, strict=True
            )
        ]
        for kind in rows[0]:  # scores are of no use from here on; "neighbours" is written last
            ranked = [row[kind] for row in rows]
            write_contexts(
                self.output / f"{kind}.jsonl",
                records,
                [[(0.0, rule) for rule in context.rules] for context in ranked],
                [[(0.0, one) for one in context.examples] for context in ranked],
            )

    def train(self, kind: str, seed: int) -> Path:
        """Return the adapter of the demo's SFT ("sft"), or the one that went on from it with one kind of context."""
        run = self.output / f"{kind}-{seed}"
        common = (f"training.output={run}", f"training.seed={seed}", "--resume", "auto")
        if kind == "sft":
            return make(run / "adapter", RECIPES / "sft.py", RECIPES / "tiny" / "sft.yaml", *common)
        base = kind.removesuffix("-grpo")
        stage = "grpo" if kind != base else "sft"
        start = self.train(base if kind != base else "recall" if kind in CHOICES else "sft", seed)
        overrides = [f"model.adapter={start}"]
        if kind == "recall":
            overrides += ["data.mode=recall_rule", f"data.labels={LABELS}"]
        elif base in CHOICES:
            context = self.output / f"{base}.jsonl"
            overrides += ["data.mode=choose_rule", f"data.labels={LABELS}", f"data.context={context}"]
            if stage == "grpo":
                overrides += ["data.rewards.choice=1.0", "training.batch_size=16"]
                overrides.append("training.gradient_accumulation_steps=4")
        else:
            overrides += [f"data.train={self.output / 'train.json'}", *HALF]
            if kind != "none":
                overrides += ["data.mode=context", f"data.context={self.output / f'{kind}.jsonl'}"]
        recipe = (RECIPES / f"{stage}.py", RECIPES / "tiny" / f"{stage}.yaml")
        return make(run / "adapter", *recipe, *overrides, *common)

    def measure(self, trained: str, asked: str, seed: int) -> dict[str, float]:
        """Return one row of one seed."""
        adapter = self.train(trained, seed)
        measured: dict[str, float] = {}
        for split in SPLITS:
            answers = self.output / f"{trained}-{seed}" / f"{asked}-{split}.json"
            choices = answers.with_suffix(".choices.jsonl")
            context = () if asked == "none" else ("--context", self.output / f"{asked}.jsonl")
            choose = ("--choose",) if asked in CHOICES else ()
            predict = ("-m", "malpyeong.predict", TINY_BASE, DATA / f"{split}_questions.json", "--adapter", adapter)
            size = ("--batch-size", "64", "--max-new-tokens", "208", "--decoding", "free", "--no-repair")
            make(answers, *predict, *context, *choose, *size, "-o", answers)
            summary = summarise(evaluate(DATA / f"{split}.json", answers))
            measured |= {f"{split} EM": summary["exact_match"], f"{split} ROUGE-1": summary["rouge_1"]}
            if asked != "none" and asked != "example":
                measured[f"{split} right rule"] = self.right(asked, split, choices)
        return measured

    def right(self, asked: str, split: str, choices: Path) -> float:
        """Return how often the labelled rule was the one that was named, or the only one shown."""
        records = load_records(DATA / f"{split}.json", answers="gold")
        labels = load_labels(LABELS, records)
        if asked in CHOICES:
            named = {row["id"]: row["rule"] for row in map(json.loads, choices.read_text("utf-8").splitlines())}
            return fmean(named[record.id] in label.gains for record, label in zip(records, labels, strict=True))
        contexts = load_contexts(self.output / f"{asked}.jsonl", records)
        return fmean(any(label.of(context.rules)) for context, label in zip(contexts, labels, strict=True))


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """Return Markdown: mean of the seeds, and their standard deviation where there are several."""
    columns = [f"{split} {what}" for split in SPLITS for what in ("EM", "ROUGE-1", "right rule")]
    lines = [f"| context | {' | '.join(columns)} |", "|-" * (len(columns) + 1) + "|"]
    for name, seeds in rows.items():
        cells = []
        for column in columns:
            values = [row[column] for row in seeds if column in row]
            spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{fmean(values):.3f}{spread}" if values else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command(cls=Command)
@click.option("--seed", "seeds", multiple=True, type=int, default=(0, 1, 2), show_default=True)
@click.option("--row", "names", multiple=True, type=click.Choice(list(ROWS)), default=tuple(ROWS), help="Only these.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("runs/contexts"), show_default=True)
def main(seeds: Sequence[int], names: Sequence[str], output: Path) -> None:
    """Train, answer and measure; write OUTPUT/results.json and print the table."""
    bench = Bench(output)
    bench.prepare()
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for seed in seeds:
        for name in names:
            rows[name].append(bench.measure(*ROWS[name], seed))
    write_text(output / "results.json", json.dumps({"seeds": seeds, "rows": rows}, ensure_ascii=False, indent=2) + "\n")
    click.echo(f"\nseeds {', '.join(map(str, seeds))}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
