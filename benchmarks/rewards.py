"""Scoring GRPO batches pair by pair, as is commonly done, against the project's batched and cached scorers.

    make bench-rewards

Both ways score the same answers with the same random-weight models: multilingual BERT's real shape, and RemBERT's
real width and vocabulary at a depth that two CPU cores can run. Their scores are compared. A run has 20 steps of 64
prompts and 8 answers each, and comes back to each of its 192 prompts six or seven times.

- pair by pair: ``bert_score.score()`` for every pair, which loads its model and tokenizer again; a SentencePiece model
  loaded and a BLEURT forward for every pair; a new MeCab and a new rouge scorer for every pair. Nothing is kept from
  pair to pair but BLEURT's weights. Its cost per pair does not change, so it is measured on a sample of the pairs.
- pair by pair, kept: the same one pair at a time, with models and tokenizers loaded once.
- ours: what a training run calls; every pair of every step.

How alike the answers are decides what there is to gain: on a CPU the networks' arithmetic is nearly all of our time.
Each prompt has 24 variants of its gold reason, drawn by Zipf's law: of 8 answers 64 % are distinct, of 56 27 %. With
the tiny model's samples for questions that SFT has trained on, as the contest's GRPO asks them, it is 63 and 26 %
(counted on 20 questions). The table also gives the cost where no two answers are alike.
"""

import contextlib
import gc
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from benchmarks.random_scorers import make_bleurt, make_encoder
from malpyeong.contest.answer import contest_split
from malpyeong.contest.records import load_records
from malpyeong.samples import DATA
from malpyeong.terminal import Command

Pair = tuple[str, str]
Scorer = Callable[[list[str], list[str]], list[float]]
METRICS = {"ROUGE-1": 1e-9, "BERTScore": 1e-4, "BLEURT": 1e-4}
PROMPTS, VARIANTS, EXPONENT = 192, 24, 1.25


def references() -> list[str]:
    """Return gold reasons of the length that the contest's have (median 108 characters)."""
    reasons = {contest_split(record.answer or "")[1] for record in load_records(DATA / "train.json", answers="gold")}
    longest = sorted(reasons, key=lambda reason: (-len(reason), reason))
    rng = random.Random(0)
    return [" ".join((rng.choice(longest[:400]), *([] if n % 3 else [rng.choice(longest)]))) for n in range(PROMPTS)]


def vary(reason: str, rng: random.Random, words: Sequence[str]) -> str:
    """Return a reason with about a fifth of its words replaced."""
    return " ".join(rng.choice(words) if rng.random() < 0.2 else word for word in reason.split())


def make_run(steps: int, prompts: int, generations: int, alike: bool) -> list[list[Pair]]:
    """Return each step's (candidate, reference) pairs."""
    rng, golds = random.Random(1), references()
    words = sorted({word for gold in golds for word in gold.split()})
    pools = [[gold, *(vary(gold, rng, words) for _ in range(VARIANTS - 1))] for gold in golds]
    chances = [rank**-EXPONENT for rank in range(1, VARIANTS + 1)]
    order: list[int] = []
    while len(order) < steps * prompts:
        order += rng.sample(range(len(golds)), len(golds))
    run = []
    for step in range(steps):
        pairs = []
        for prompt in order[step * prompts : (step + 1) * prompts]:
            answers = (
                rng.choices(pools[prompt], chances, k=generations)
                if alike
                else [vary(golds[prompt], rng, words) for _ in range(generations)]
            )
            pairs += [(answer, golds[prompt]) for answer in answers]
        run.append(pairs)
    return run


def ours(encoder: Path, bleurt: Path) -> dict[str, Scorer]:
    """Return the project's scorers, with nothing remembered."""
    from malpyeong.metrics import rouge
    from malpyeong.metrics.bertscore import BERTScore
    from malpyeong.metrics.bleurt import BLEURT

    rouge.rouge_1.cache_clear()
    return {
        "ROUGE-1": lambda candidates, golds: list(map(rouge.rouge_1, candidates, golds)),
        "BERTScore": BERTScore(str(encoder), device="cpu").score,
        "BLEURT": BLEURT(str(bleurt), device="cpu").score,
    }


def one_by_one(encoder: Path, bleurt: Path, keep: bool) -> dict[str, Scorer]:
    """Return scorers of one pair a call; unless ``keep``, tokenizers and bert-score's model are loaded in each call."""
    import torch
    from bert_score import score as bert_score
    from bert_score.scorer import BERTScorer
    from rouge_score import rouge_scorer
    from sentencepiece import SentencePieceProcessor

    from malpyeong.metrics.bertscore import LAYER
    from malpyeong.metrics.bleurt import BLEURT
    from malpyeong.metrics.rouge import MorphemeTokenizer

    model = BLEURT(str(bleurt), device="cpu")._model
    kept = {
        "rouge": rouge_scorer.RougeScorer(["rouge1"], tokenizer=MorphemeTokenizer()),
        "bert": BERTScorer(str(encoder), num_layers=LAYER, device="cpu"),
        "pieces": SentencePieceProcessor(model_file=str(bleurt / "spm.model")),
    }

    def rouge(candidates: list[str], golds: list[str]) -> list[float]:
        scorer = kept["rouge"] if keep else rouge_scorer.RougeScorer(["rouge1"], tokenizer=MorphemeTokenizer())
        return [scorer.score(golds[0], candidates[0])["rouge1"].fmeasure]

    def bert(candidates: list[str], golds: list[str]) -> list[float]:
        if keep:
            return [float(kept["bert"].score(candidates, golds)[2])]
        return [float(bert_score(candidates, golds, model_type=str(encoder), num_layers=LAYER, device="cpu")[2])]

    def regress(candidates: list[str], golds: list[str]) -> list[float]:
        pieces = kept["pieces"] if keep else SentencePieceProcessor(model_file=str(bleurt / "spm.model"))
        first, second = pieces.EncodeAsIds(golds[0]), pieces.EncodeAsIds(candidates[0])
        cls, sep = pieces.PieceToId("[CLS]"), pieces.PieceToId("[SEP]")
        ids = torch.tensor([[cls, *first, sep, *second, sep]])
        types = torch.tensor([[0] * (len(first) + 2) + [1] * (len(second) + 1)])
        with torch.inference_mode():
            return [float(model(input_ids=ids, token_type_ids=types, attention_mask=torch.ones_like(ids)).logits)]

    return {"ROUGE-1": rouge, "BERTScore": bert, "BLEURT": regress}


def time_alone(scorer: Scorer, pairs: Sequence[Pair]) -> tuple[float, list[float]]:
    """Return seconds a pair and the scores, one pair a call."""
    scorer([pairs[0][0]], [pairs[0][1]])
    start = time.perf_counter()
    scores = [scorer([candidate], [gold])[0] for candidate, gold in pairs]
    return (time.perf_counter() - start) / len(pairs), scores


def time_run(scorers: dict[str, Scorer], run: Sequence[Sequence[Pair]]) -> dict[str, list[float]]:
    """Return seconds of every step for each metric."""
    seconds: dict[str, list[float]] = {name: [] for name in scorers}
    for pairs in run:
        candidates, golds = (list(column) for column in zip(*pairs, strict=True))
        for name, scorer in scorers.items():
            start = time.perf_counter()
            scorer(candidates, golds)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_memory(what: str, folder: Path, pairs: Sequence[Pair]) -> float:
    """Return by how many MiB a fresh process grows at most when it loads a scorer and scores ``pairs`` (Linux)."""
    code = (
        "import json, re, sys, torch, transformers, bert_score, sentencepiece\n"
        "from pathlib import Path\n"
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "from malpyeong.metrics.bertscore import BERTScore\n"
        "from malpyeong.metrics.bleurt import BLEURT\n"
        "before = peak()\n"
        "pairs = json.load(sys.stdin)\n"
        f"{what}(sys.argv[1], device='cpu').score(*map(list, zip(*pairs)))\n"
        "print((peak() - before) / 1024)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder)], input=json.dumps(pairs), capture_output=True, text=True, check=True
    )
    return float(result.stdout.split()[-1])


@click.command(cls=Command)
@click.option("--steps", default=20, show_default=True)
@click.option("--prompts", default=64, show_default=True, help="Prompts of a step.")
@click.option("--generations", default=8, show_default=True, help="Answers to a prompt.")
@click.option("--layers", default=2, show_default=True, help="Layers of BLEURT's RemBERT (BLEURT-20 has 32).")
@click.option("--sample", default=16, show_default=True, help="Pairs on which pair-by-pair scoring is measured.")
@click.option("--repeats", default=3, show_default=True, help="Times that everything is measured; medians are shown.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="JSON file to write the figures to.")
def main(
    steps: int, prompts: int, generations: int, layers: int, sample: int, repeats: int, output: Path | None
) -> None:
    """Print seconds a pair and ratios per metric; the last line is the ratio over the whole run, all metrics."""
    import torch

    run = make_run(steps, prompts, generations, alike=True)
    distinct = make_run(1, max(1, prompts // 4), generations, alike=False)
    every = [pair for pairs in run for pair in pairs]
    tested = random.Random(2).sample(every, sample)
    # A relative path: bert-score takes any path with "t5" in it for a T5.
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        encoder = make_encoder(Path("mbert"))
        bleurt = make_bleurt(Path("bleurt"), layers=layers)
        memory = {
            "BERTScore": peak_memory("BERTScore", encoder, run[0]),
            "BLEURT": peak_memory("BLEURT", bleurt, run[0]),
        }
        measured: dict[str, dict[str, list[float]]] = {
            name: {key: [] for key in ("naive", "kept", "first", "all", "distinct")} for name in METRICS
        }
        for _ in range(repeats):
            mine = ours(encoder, bleurt)
            for name, seconds in time_run(mine, run).items():
                measured[name]["first"].append(seconds[0] / len(run[0]))
                measured[name]["all"].append(sum(seconds) / len(every))
            for name, seconds in time_run(ours(encoder, bleurt), distinct).items():
                measured[name]["distinct"].append(seconds[0] / len(distinct[0]))
            gc.collect()
            for key, keep in (("naive", False), ("kept", True)):
                for name, scorer in one_by_one(encoder, bleurt, keep).items():
                    seconds_a_pair, scores = time_alone(scorer, tested)
                    measured[name][key].append(seconds_a_pair)
                    expected = mine[name](*(list(column) for column in zip(*tested, strict=True)))
                    difference = max(abs(a - b) for a, b in zip(scores, expected, strict=True))
                    if difference > METRICS[name]:
                        raise click.ClickException(f"{name}: the two ways differ by {difference}")
    median = {name: {key: statistics.median(values) for key, values in row.items()} for name, row in measured.items()}
    median["all"] = {key: sum(row[key] for row in median.values()) for key in median["ROUGE-1"]}
    show(median, memory, run, layers)
    if output:  # outside the temporary folder again
        figures = {
            "date": str(date.today()),
            "command": f"python -m benchmarks.rewards {' '.join(sys.argv[1:])}",
            "cpu": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "versions": {name: version(name) for name in ("torch", "transformers", "bert-score")},
            "pairs": len(every),
            "distinct_pairs": len(set(every)),
            "seconds_a_pair": median,
            "peak_mib": memory,
        }
        output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    click.echo(f"ratio with no two answers alike: {median['all']['naive'] / median['all']['distinct']:.1f}")
    click.echo(f"ratio of the first step: {median['all']['naive'] / median['all']['first']:.1f}")
    click.echo(f"ratio: {median['all']['naive'] / median['all']['all']:.1f}")


def show(
    median: dict[str, dict[str, float]], memory: dict[str, float], run: Sequence[Sequence[Pair]], layers: int
) -> None:
    """Print the table: milliseconds a pair, and how many times faster ours is."""
    every = [pair for pairs in run for pair in pairs]
    console = Console(width=130)
    console.print(
        f"{len(run)} steps of {len(run[0])} pairs; distinct: {len(set(run[0])) / len(run[0]):.0%} of the first step, "
        f"{len(set(every)) / len(every):.0%} of the run; RemBERT with {layers} layers"
    )
    table = Table(title="ms a pair (median)")
    columns = {
        "naive": "pair by pair",
        "kept": "… kept",
        "distinct": "ours, none alike",
        "first": "ours, step 1",
        "all": "ours, run",
    }
    for title in ("metric", *columns.values(), "ratio step 1", "ratio run", "kept / ours run", "peak MiB"):
        table.add_column(title, justify="left" if title == "metric" else "right")
    for name, row in median.items():
        ratios = (row["naive"] / row["first"], row["naive"] / row["all"], row["kept"] / row["all"])
        cells = [f"{1000 * row[key]:.2f}" for key in columns] + [f"{ratio:.1f}" for ratio in ratios]
        table.add_row(name, *cells, f"{memory[name]:.0f}" if name in memory else "")
    console.print(table)


if __name__ == "__main__":
    main()
