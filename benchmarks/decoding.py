"""Free against constrained decoding against self-consistency, on the sample test split.

    make bench-decoding                                  # speed, with an adapter that it trains if it has to
    make bench-decoding ADAPTERS="runs/sft-0/adapter runs/sft-1/adapter runs/sft-2/adapter"    # quality, then speed
    python -m benchmarks.decoding quality ADAPTER… [--records 345] [--samples 5]
    python -m benchmarks.decoding speed [ADAPTER] [--records 64] [--repeats 5]

``quality``: every way of decoding answers the same questions with the same model; per adapter the ways take turns.
``free`` and ``free, repaired`` are one run. Each adapter is another seed of the same training. Every row is written as
soon as it is measured, and the same command resumes there.

``speed``: free and constrained answers in turn, in one process; the last line is how many times the seconds of free
answers constrained ones take, the median over the turns.
"""

import json
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median
from typing import Any

import click
import torch

from malpyeong.contest.answer import parse_answer
from malpyeong.contest.question import options
from malpyeong.contest.records import Record, load_records
from malpyeong.contest.repair import repair
from malpyeong.decoding.constrain import token_ids
from malpyeong.decoding.engines import Decoding, TransformersEngine
from malpyeong.errors import InputError
from malpyeong.files import digest, write_text
from malpyeong.metrics.aggregate import score_records, summarise
from malpyeong.models.load import load_for_prediction, weight_files_digest
from malpyeong.predict import predict
from malpyeong.prompts.messages import render
from malpyeong.samples import DATA, TINY_BASE
from malpyeong.terminal import Group

COLUMNS = {
    "exact_match": "EM",
    "exact_match_choice": "EM 선택형",
    "exact_match_correction": "EM 교정형",
    "rouge_1": "ROUGE-1",
    "format_rate": "format",
    "literal_options": "literal options",
    "seconds_per_record": "s/record",
}


def measure(golds: Sequence[Record], answers: Sequence[str], seconds: float) -> dict[str, float]:
    """Return one way's line of the table."""
    summary = summarise(score_records(golds, answers))
    offered = [(set(options(record)), answer) for record, answer in zip(golds, answers, strict=True) if options(record)]
    answered = [(sentences, set(parse_answer(answer).sentences)) for sentences, answer in offered]
    kinds = {kind: part["exact_match"] for kind, part in summary["by_question_type"].items()}
    return {
        "exact_match": summary["exact_match"],
        "exact_match_choice": kinds.get("선택형", float("nan")),
        "exact_match_correction": kinds.get("교정형", float("nan")),
        "rouge_1": summary["rouge_1"] or 0.0,
        "format_rate": summary["format_rate"],
        "literal_options": mean(bool(answer) and answer <= sentences for sentences, answer in answered),
        "seconds_per_record": seconds / len(golds),
    }


def ways_of_decoding(samples: int, max_new_tokens: int) -> dict[str, Decoding]:
    """Return the ways that are compared, by name; without votes if there is but one sample."""
    ways = {
        "free": Decoding(max_new_tokens=max_new_tokens),
        "constrained": Decoding(True, max_new_tokens=max_new_tokens),
    }
    if samples > 1:
        ways[f"free, {samples} samples"] = Decoding(samples=samples, max_new_tokens=max_new_tokens)
        ways[f"constrained, {samples} samples"] = Decoding(True, samples, max_new_tokens=max_new_tokens)
    return ways


def compare(
    model: str,
    adapter: str | None,
    golds: Sequence[Record],
    ways: Mapping[str, Decoding],
    batch_size: int,
    done: Mapping[str, dict[str, float]],
) -> Iterator[dict[str, dict[str, float]]]:
    """Yield each way's measurements with one model, by name, in turn; ways that are done are left out."""
    if all(name in done for name in ways):
        return
    loaded = load_for_prediction(model, adapter)
    for name, decoding in ways.items():
        if name in done:
            continue
        start = time.perf_counter()
        prompts = [render(loaded[1], record) for record in golds]
        answers = [text for _, text in sorted(predict(TransformersEngine(*loaded, decoding), prompts, batch_size))]
        seconds = time.perf_counter() - start
        rows = {name: measure(golds, answers, seconds)}
        if name == "free":
            rows["free, repaired"] = measure(golds, [repair(answer)[0] for answer in answers], seconds)
        yield rows


def unfinished(output: Path, made_of: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Return the rows that a killed run has left in ``output``: adapter → way → measurements.

    Raises:
        InputError: they are of something else.
    """
    if not output.exists():
        return {}
    result = json.loads(output.read_text("utf-8"))
    differing = [key for key in made_of if result.get(key) != made_of[key]]
    if differing:
        raise InputError(f"{output}: holds rows of another {', '.join(differing)}; remove it, or name another with -o")
    click.echo(f"resuming from the rows in {output}; remove it to measure them again", err=True)
    rows: dict[str, dict[str, dict[str, float]]] = result["runs"]
    return rows


def table(runs: Sequence[dict[str, dict[str, float]]]) -> str:
    """Return the means over the runs as a Markdown table."""
    lines = [f"| decoding | {' | '.join(COLUMNS.values())} |", "|-" * (len(COLUMNS) + 1) + "|"]
    for name in runs[0]:
        cells = [f"{mean(run[name][key] for run in runs):.3f}" for key in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| EM of each run |" + " |" * len(runs), "|-" * (len(runs) + 1) + "|"]
    for name in runs[0]:
        lines.append(f"| {name} | {' | '.join('{exact_match:.3f}'.format(**run[name]) for run in runs)} |")
    wins = sum(run["constrained"]["exact_match"] >= run["free"]["exact_match"] for run in runs)
    lines += ["", f"Constrained EM is not below free EM in {wins} of {len(runs)} runs."]
    return "\n".join(lines) + "\n"


@click.group(cls=Group)
def main() -> None:
    """Measure ways of decoding."""


@main.command()
@click.argument("adapter", required=False)
@click.option("--model", default=str(TINY_BASE), show_default="the sample base")
@click.option("--questions", type=click.Path(path_type=Path), default=DATA / "test_questions.json")
@click.option("--records", default=64, show_default=True, type=click.IntRange(min=1), help="Spread over the file.")
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(min=1))
@click.option("--batch-size", default=16, show_default=True, type=click.IntRange(min=1))
@click.option("--max-new-tokens", default=200, show_default=True, type=click.IntRange(min=64))
def speed(
    adapter: str | None,
    model: str,
    questions: Path,
    records: int,
    repeats: int,
    batch_size: int,
    max_new_tokens: int,
) -> None:
    """Measure seconds of free and constrained answers of MODEL with ADAPTER in turn."""
    asked = load_records(questions)
    asked = asked[:: max(1, len(asked) // records)][:records]
    loaded = load_for_prediction(model, adapter)
    ways = ways_of_decoding(1, max_new_tokens)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    tokens = dict.fromkeys(ways, 0)
    for turn in range(repeats + 1):  # the first is not counted
        for name, decoding in ways.items():
            engine = TransformersEngine(*loaded, decoding)
            start = time.perf_counter()
            answers = dict(predict(engine, [render(engine.tokenizer, record) for record in asked], batch_size))
            if turn:
                seconds[name].append(time.perf_counter() - start)
            # Of constrained answers the verdict's tokens count too, also where they were chosen as a whole.
            tokens[name] = sum(len(token_ids(engine.tokenizer, answer)) for answer in answers.values())
    click.echo(f"| {len(asked)} questions, batch {batch_size} | s | answer tokens | ms/token |\n|-|-|-|-|")
    for name, times in seconds.items():
        taken = median(times)
        click.echo(f"| {name} | {taken:.2f} | {tokens[name]} | {1000 * taken / tokens[name]:.3f} |")
    ratios = [of / to for of, to in zip(seconds["constrained"], seconds["free"], strict=True)]
    click.echo(f"constrained / free: {median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f} in {repeats} turns)")


@main.command()
@click.argument("adapters", nargs=-1)
@click.option("--model", default=str(TINY_BASE), show_default="the sample base")
@click.option("--questions", type=click.Path(path_type=Path), default=DATA / "test.json", help="With gold answers.")
@click.option("--records", type=click.IntRange(min=1), help="Only that many, spread over the file.")
@click.option("--samples", default=5, show_default=True, type=click.IntRange(min=1), help="Of a vote; 1: no votes.")
@click.option("--batch-size", default=64, show_default=True, type=click.IntRange(min=1))
@click.option("--max-new-tokens", default=200, show_default=True, type=click.IntRange(min=64))
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("benchmarks/results/decoding.json"))
def quality(
    adapters: tuple[str, ...],
    model: str,
    questions: Path,
    records: int | None,
    samples: int,
    batch_size: int,
    max_new_tokens: int,
    output: Path,
) -> None:
    """Measure every way of decoding with MODEL and each of ADAPTERS; write OUTPUT (JSON) and a .md table beside it."""
    golds = load_records(questions, answers="gold")
    if records:
        golds = golds[:: max(1, len(golds) // records)][:records]
    made_of = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, GPU: {torch.cuda.is_available()}",
        "versions": {name: version(name) for name in ("torch", "transformers", "llguidance")},
        "model": weight_files_digest(model) or model,
        "questions": digest(questions),
        "records": len(golds),
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
    }
    measured = unfinished(output, made_of)
    ways = ways_of_decoding(samples, max_new_tokens)
    runs = []
    for adapter in adapters or (None,):
        run = measured.setdefault(weight_files_digest(adapter) if adapter else "no adapter", {})
        for rows in compare(model, adapter, golds, ways, batch_size, run):
            run.update(rows)
            result = {"date": date.today().isoformat(), **made_of, "runs": measured}
            write_text(output, json.dumps(result, ensure_ascii=False, indent=2) + "\n")
            click.echo(f"{adapter or model}: {rows}", err=True)
        runs.append({name: row for name, row in run.items() if name in (*ways, "free, repaired")})
    write_text(output.with_suffix(".md"), table(runs))
    click.echo(table(runs))


if __name__ == "__main__":
    main()
