"""How much of what the best of n samples gains over the greedy answer is luck.

    python -m benchmarks.headroom ADAPTER... -o runs/headroom.json      (six minutes an adapter on one core)

The sample data draw by lot how a reason ends (one of six conclusions) and whether 혹은 or 또는 joins two right
sentences. Nothing in the question tells; of n samples one fits by chance, and the best of n counts that as knowledge.
So each answer is scored once more against every gold answer that the lots could have given, and keeps its best score
("without lots"). "All known but the lots" is who is right in everything else: as greedy answer the one with the best
mean over the lots, as samples n draws.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import click

from malpyeong.contest.records import Record, load_records
from malpyeong.files import write_text
from malpyeong.metrics.aggregate import score_records
from malpyeong.samples import DATA, TINY_BASE
from malpyeong.score import record_score
from malpyeong.terminal import Command, json_text
from tools.samples.build import CONCLUSIONS, JOINERS, fits, named
from tools.samples.items import load_items


def possible_golds(records: Sequence[Record]) -> list[list[str]]:
    """Return for each record every gold answer that the lots could have given; its own is one of them."""
    labels = json.loads((DATA / "labels.json").read_text("utf-8"))
    items = {item.id: item for item in load_items()}
    golds = []
    for record in records:
        item, answer = items.get(labels[record.id]["item"]), record.answer or ""
        if item is None:  # a special: no lots
            golds.append([answer])
            continue
        verdict = answer[: answer.index(item.reason)]
        sentence = verdict.rsplit("옳다", 1)[0].rstrip().rstrip("이가").rstrip().removesuffix('"')
        endings = [ending for form in CONCLUSIONS if fits(sentence, ending := named(item, form))]
        verdicts = [verdict]
        if item.also_right:
            verdicts = [verdict.replace(f'" {ours} "', f'" {joiner} "') for joiner in JOINERS for ours in JOINERS]
            verdicts = list(dict.fromkeys(verdicts))
        golds.append([f"{head}{item.reason} {ending}" for head in verdicts for ending in endings])
        assert answer in golds[-1], record.id
    return golds


def scores(records: Sequence[Record], answers: Sequence[str]) -> list[float]:
    """Return each answer's mean of EM and ROUGE-1; EM alone where a reason is missing."""
    return [record_score(score) for score in score_records(records, answers)]


def without_lots(records: Sequence[Record], golds: Sequence[Sequence[str]], answers: Sequence[str]) -> list[float]:
    """Return each answer's score against the gold answer, of those that the lots could have given, that fits best."""
    pairs = [
        (record.with_answer(gold), answer)
        for record, own, answer in zip(records, golds, answers, strict=True)
        for gold in own
    ]
    found = iter(scores(*zip(*pairs, strict=True)))
    return [max(next(found) for _ in own) for own in golds]


def rows(columns: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return the greedy answers' score, the samples' mean and the best samples' (greedy first)."""
    greedy, *samples = columns
    return {
        "greedy": fmean(greedy),
        "mean of samples": fmean(map(fmean, samples)),
        "best of samples": fmean(max(row) for row in zip(*samples, strict=True)),
    }


def all_known(records: Sequence[Record], golds: Sequence[Sequence[str]], n: int, seed: int) -> list[list[str]]:
    """Return greedy answers and n samples of who knows all but the lots."""
    rng, greedy = random.Random(seed), []
    for record, own in zip(records, golds, strict=True):
        pairs = [(record.with_answer(gold), answer) for answer in own for gold in own]
        found = scores(*zip(*pairs, strict=True))
        means = [fmean(found[start : start + len(own)]) for start in range(0, len(found), len(own))]
        greedy.append(own[means.index(max(means))])
    return [greedy, *([rng.choice(own) for own in golds] for _ in range(n))]


@click.command(cls=Command)
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option("--samples", default=8, show_default=True, type=click.IntRange(min=1))
@click.option("--records", type=click.IntRange(min=1), help="Of the test split, evenly spaced.  [default: all]")
@click.option("--batch-size", default=144, show_default=True, type=click.IntRange(min=1), help="Answers at once.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="JSON file; rows are added to it.")
def main(adapters: tuple[str, ...], samples: int, records: int | None, batch_size: int, output: Path) -> None:
    """Score greedy answers and samples of ADAPTERS of the tiny base on the sample test split, with and without lots."""
    from tqdm import tqdm

    from malpyeong.decoding.answers import sample
    from malpyeong.decoding.engines import Decoding, TransformersEngine
    from malpyeong.models.load import load_for_prediction
    from malpyeong.prompts.messages import render

    test = load_records(DATA / "test.json", answers="gold")
    test = test[:: max(1, len(test) // records)][:records] if records else test
    golds = possible_golds(test)
    result: dict[str, Any] = json.loads(output.read_text("utf-8")) if output.exists() else {}

    def add(name: str, columns: Sequence[Sequence[str]]) -> None:
        result[name] = {
            "score": rows([scores(test, column) for column in columns]),
            "without lots": rows([without_lots(test, golds, column) for column in columns]),
        }
        write_text(output, json_text(result) + "\n")

    add("all known but the lots", all_known(test, golds, samples, 0))
    for adapter in adapters:
        model, tokenizer = load_for_prediction(str(TINY_BASE), adapter, "float32")
        engine = TransformersEngine(model, tokenizer, Decoding(False, samples + 1, 0.9, 0, 200))
        answers: list[list[str]] = [[] for _ in test]
        prompts = [render(tokenizer, record) for record in test]
        for row, given in tqdm(sample(engine, prompts, batch_size), total=len(test), desc=adapter, unit="record"):
            answers[row] = given
        add(adapter, list(zip(*answers, strict=True)))
    click.echo(json_text(result))


if __name__ == "__main__":
    main()
