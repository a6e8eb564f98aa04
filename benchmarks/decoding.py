"""Free against constrained decoding against self-consistency, on the sample test split.

    make bench-decoding ADAPTERS="runs/sft-0/adapter runs/sft-1/adapter runs/sft-2/adapter"
    python -m benchmarks.decoding ADAPTER… [--records 345] [--samples 5]

Every way of decoding answers the same questions with the same model in one process; per adapter the ways take turns, so
that seconds compare. ``free`` and ``free, repaired`` are one run. Each adapter is another seed of the same training.
"""

import json
import platform
import time
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import click
import torch

from malpyeong.answer import parse_answer
from malpyeong.engines import Decoding, TransformersEngine
from malpyeong.files import digest, write_text
from malpyeong.model import load_for_prediction
from malpyeong.options import options
from malpyeong.predict import predict
from malpyeong.records import Record, load_records
from malpyeong.repair import repair
from malpyeong.samples import DATA, TINY_BASE
from malpyeong.scoring.report import score_records, summarise

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
    found = [(sentences, set(parse_answer(answer).sentences)) for sentences, answer in offered]
    kinds = {kind: part["exact_match"] for kind, part in summary["by_question_type"].items()}
    return {
        "exact_match": summary["exact_match"],
        "exact_match_choice": kinds.get("선택형", float("nan")),
        "exact_match_correction": kinds.get("교정형", float("nan")),
        "rouge_1": summary["rouge_1"] or 0.0,
        "format_rate": summary["format_rate"],
        "literal_options": mean(bool(answer) and answer <= sentences for sentences, answer in found),
        "seconds_per_record": seconds / len(golds),
    }


def compare(
    model: str, adapter: str | None, golds: Sequence[Record], samples: int, batch_size: int, max_new_tokens: int
) -> dict[str, dict[str, float]]:
    """Return every way's measurements with one model."""
    loaded = load_for_prediction(model, adapter)
    ways = {
        "free": Decoding(max_new_tokens=max_new_tokens),
        "constrained": Decoding(True, max_new_tokens=max_new_tokens),
        f"free, {samples} samples": Decoding(samples=samples, max_new_tokens=max_new_tokens),
        f"constrained, {samples} samples": Decoding(True, samples, max_new_tokens=max_new_tokens),
    }
    rows: dict[str, dict[str, float]] = {}
    for name, decoding in ways.items():
        start = time.perf_counter()
        found = dict(predict(TransformersEngine(*loaded, decoding), golds, batch_size))
        seconds = time.perf_counter() - start
        answers = [found[place] for place in range(len(golds))]
        rows[name] = measure(golds, answers, seconds)
        if name == "free":
            rows["free, repaired"] = measure(golds, [repair(answer)[0] for answer in answers], seconds)
        click.echo(f"{adapter or model}: {name}: {rows[name]}", err=True)
    return rows


def table(runs: Sequence[dict[str, dict[str, float]]]) -> str:
    """Return the means over the runs as a Markdown table."""
    lines = [f"| decoding | {' | '.join(COLUMNS.values())} |", "|-" * (len(COLUMNS) + 1) + "|"]
    for name in runs[0]:
        cells = [f"{mean(run[name][key] for run in runs):.3f}" for key in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    wins = sum(run["constrained"]["exact_match"] >= run["free"]["exact_match"] for run in runs)
    lines += ["", f"Constrained EM is not below free EM in {wins} of {len(runs)} runs."]
    return "\n".join(lines) + "\n"


@click.command()
@click.argument("adapters", nargs=-1)
@click.option("--model", default=str(TINY_BASE), show_default="the sample base")
@click.option("--questions", type=click.Path(path_type=Path), default=DATA / "test.json", help="With gold answers.")
@click.option("--records", type=click.IntRange(min=1), help="Only that many, spread over the file.")
@click.option("--samples", default=5, show_default=True, type=click.IntRange(min=2))
@click.option("--batch-size", default=64, show_default=True, type=click.IntRange(min=1))
@click.option("--max-new-tokens", default=200, show_default=True, type=click.IntRange(min=64))
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("benchmarks/results/decoding.json"))
def main(
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
    runs = [compare(model, adapter, golds, samples, batch_size, max_new_tokens) for adapter in (adapters or (None,))]
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, GPU: {torch.cuda.is_available()}",
        "versions": {name: version(name) for name in ("torch", "transformers", "llguidance")},
        "adapters": [digest(Path(adapter) / "adapter_model.safetensors") for adapter in adapters],
        "records": len(golds),
        "samples": samples,
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "runs": runs,
    }
    write_text(output, json.dumps(result, ensure_ascii=False, indent=2) + "\n")
    write_text(output.with_suffix(".md"), table(runs))
    click.echo(table(runs))


if __name__ == "__main__":
    main()
