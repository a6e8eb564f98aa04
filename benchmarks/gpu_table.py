"""The results of benchmarks/gpu.py as Markdown."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]

_NOTE = """\
Random weights in the models' real shapes, real recipes, every case in a fresh process; every completion has the full
length. A cap (`torch.cuda.set_per_process_memory_fraction`) on a data-centre card shows what fits a smaller card's
memory, not how fast that card is; the CUDA context (here {beside}) comes on top of what is allocated. Made by
`python -m benchmarks.gpu`; every row with its full command is in `gpu.jsonl`.
"""


def table(rows: Sequence[Row]) -> str:
    """Return the whole report; the last row of a key counts."""
    last = {row["key"]: row for row in rows}
    if not last:
        return "# GRPO on one GPU\n\nNothing has been measured yet.\n"
    parts = [
        "# GRPO on one GPU",
        _head(list(last.values())),
        *(text for part in (_speed, _limits, _split, _gradients, _whole) if (text := part(last))),
    ]
    failed = [key for key, row in last.items() if row["status"] == "failed"]
    if failed:
        parts.append("Failed, and not in the tables: " + ", ".join(f"`{key}`" for key in failed) + ".")
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _head(rows: Sequence[Row]) -> str:
    found: dict[str, set[str]] = {}
    for row in rows:
        for name, value in {**(row.get("environment") or {}), "date": row["date"], "git": row["git"]}.items():
            found.setdefault(name, set()).add(str(value))
    order = ["card", "date", "git", *(name for name in found if name not in ("card", "date", "git"))]
    facts = [f"{name} {', '.join(sorted(found[name]))}" for name in order if name in found]
    if "card" not in found:
        facts.insert(0, "**no GPU: a trial of the benchmark on a CPU, whose figures mean nothing**")
    beside = [step["beside_gib"] for row in rows for step in _steps(row) if "beside_gib" in step]
    note = _NOTE.format(beside=f"{max(beside):.1f} GiB" if beside else "not measured")
    return f"{'; '.join(facts)}.\n\n{note}"


def _speed(rows: dict[str, Row]) -> str:
    lines = []
    for key, row in _of(rows, "a"):
        _, shape, backend, size = key.split("/")
        plain = rows.get(f"a/{shape}/hf/{size}")
        tokens_per_second = _ratio(_median(row, "completion_tokens"), _median(row, "generate_seconds"))
        lines.append(
            {
                "model": shape,
                "answers": size.removeprefix("G"),
                "backend": backend,
                "result": row["status"],
                "tokens/s": _number(tokens_per_second, 0),
                "generate s": _number(_median(row, "generate_seconds")),
                "update s": _number(_median(row, "update_seconds")),
                "step s": _number(_median(row, "step_seconds")),
                "times faster than hf": _number(_ratio(_median(plain, "step_seconds"), _median(row, "step_seconds"))),
                "peak GiB": _number(_peak(row)),
                "of hf's memory": _number(_ratio(_peak(row), _peak(plain))),
            }
        )
    note = "One question a step, one backward pass; medians without the first step."
    return _section("Unsloth and plain TRL + PEFT + bitsandbytes", note, lines)


def _limits(rows: dict[str, Row]) -> str:
    lines = []
    for place in dict.fromkeys(key.rpartition("/")[0] for key, _ in _of(rows, "b")):
        _, shape, backend, size, cap = place.split("/")
        searched = [row for name in ("coarse", "fine") if (row := rows.get(f"{place}/{name}"))]
        # A step is counted when it has ended, so the one that ran out of memory is not among them.
        best = max(
            (step for row in searched for step in _steps(row)), key=lambda step: step["prompt_tokens"], default={}
        )
        ended = any(row["status"] == "out of memory" for row in searched)
        lines.append(
            {
                "model": shape,
                "cap": cap,
                "answers": size.removeprefix("G"),
                "backend": backend,
                "longest prompt": f"{'' if ended else '≥ '}{best['prompt_tokens']:,}" if best else "none",
                "peak GiB at it": _number(best.get("peak_allocated_gib")),
            }
        )
    return _section(
        "The longest prompt under a cap", "In tokens, without the answer; two answers a backward pass.", lines
    )


def _split(rows: dict[str, Row]) -> str:
    lines = []
    for key, row in _of(rows, "c"):
        _, shape, backend, device = key.split("/")
        share = _ratio(_median(row, "reward_seconds"), _median(row, "step_seconds"))
        lines.append(
            {
                "model": shape,
                "backend": backend,
                "rewards": device,
                "result": row["status"],
                "generate s": _number(_median(row, "generate_seconds")),
                "rewards s": _number(_median(row, "reward_seconds")),
                "update s": _number(_median(row, "update_seconds")),
                "step s": _number(_median(row, "step_seconds")),
                "rewards' share": "–" if share is None else f"{share:.1%}",
                "peak GiB": _number(_peak(row)),
            }
        )
    return _section("Where a step's time goes", "Four questions a step, five rewards, no two answers alike.", lines)


def _gradients(rows: dict[str, Row]) -> str:
    lines = [
        {
            "model": key.split("/")[1],
            "x": pair["of"],
            "y": pair["against"],
            "relative error": f"{pair['relative_error']:.2e}",
            "cosine": f"{pair['cosine']:.6f}",
            "same 4-bit weights": "yes" if row["figures"]["same_4bit_weights"] else "no",
        }
        for key, row in _of(rows, "d")
        for pair in row["figures"].get("pairs", ())
    ]
    note = "The adapter's, on one batch with the same weights and answers: ‖x − y‖ / ‖y‖ over all weights."
    return _section("Gradients", note, lines)


def _whole(rows: dict[str, Row]) -> str:
    lines = []
    for place in dict.fromkeys(key.rpartition("/")[0] for key, _ in _of(rows, "e")):
        _, shape, backend, cap = place.split("/")
        names = {"SFT": "sft", "GRPO": "grpo killed", "again": "grpo resumed", "export": "export"}
        stages = {name: rows.get(f"{place}/{stage}") for name, stage in names.items()}
        peaks = [peak for row in stages.values() if (peak := _peak(row)) is not None]
        parity = (stages["export"] or {}).get("figures", {})
        lines.append(
            {
                "model": shape,
                "cap": cap,
                "backend": backend,
                **{name: row["status"] if row else "–" for name, row in stages.items()},
                "steps after the kill": str(len(_steps(stages["again"]))),
                "all GRPO steps": str(len(_steps(rows.get(f"{place}/log")))),
                "peak GiB": _number(max(peaks, default=None)),
                "largest logit difference": f"{parity['max_logit_diff']:.1e}" if "max_logit_diff" in parity else "–",
                "same answers": str(parity.get("same_answers", "–")),
            }
        )
    note = "SFT; GRPO with five rewards, killed (SIGKILL) and started again; merge in float32."
    return _section("The whole way under a cap", note, lines)


def _of(rows: dict[str, Row], part: str) -> Iterable[tuple[str, Row]]:
    return [(key, row) for key, row in rows.items() if key.startswith(f"{part}/") and row["status"] != "failed"]


def _steps(row: Row | None) -> list[dict[str, Any]]:
    return (row or {}).get("figures", {}).get("steps", [])


def _median(row: Row | None, name: str) -> float | None:
    values = [step[name] for step in _steps(row)[1:] if name in step]
    return statistics.median(values) if values else None


def _peak(row: Row | None) -> float | None:
    return max((step["peak_allocated_gib"] for step in _steps(row) if "peak_allocated_gib" in step), default=None)


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _section(title: str, note: str, lines: Sequence[dict[str, str]]) -> str:
    if not lines:
        return ""
    table = [f"| {' | '.join(lines[0])} |", f"|{'-|' * len(lines[0])}"]
    table += [f"| {' | '.join(line.values())} |" for line in lines]
    return "\n".join([f"## {title}", "", note, "", *table])
