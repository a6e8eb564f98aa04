"""The claims, side by side: SFT, GRPO with and without it, and what else one could do with the same completions.

    make compare                                                     (hours on two cores; resumes where it stopped)
    python -m benchmarks.compare --row ppo --seed 0 -o runs/compare
    python -m benchmarks.compare --variants --seed 0                 (GRPO with other questions, losses, penalties)
    python -m benchmarks.compare --steps 2 --row dpo --seed 0 -o /tmp/short

Every row of the claims but SFT's own starts from the SFT of its seed (OUTPUT/sft-SEED, the demo's), asks the questions
that the demo's GRPO asks in the same order, and takes as many steps; "GRPO without SFT" starts from the base. What is
earned is the reward of recipes/tiny/grpo.yaml. A variant of GRPO changes one thing of another row (VARIANTS); those
that use each completion twice take twice as many steps, for as many completions. Each product is made once, in
OUTPUT/ROW-SEED; a second start resumes. What has been measured so far, of whatever rows and seeds, is in
OUTPUT/results.json and OUTPUT/results.md.

Greedy answers are measured as training left them, without constraints and repair, and of the last step's adapter (of
SFT: of the one with the lowest dev loss). Dev, of which every third question is asked, draws the curves, and decides
nothing. docs/compare.md says how each row is trained.
"""

import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import click

from malpyeong.config.load import load_recipe
from malpyeong.config.recipe import GRPORecipe
from malpyeong.contest.answer import contest_split
from malpyeong.contest.records import load_records, write_records
from malpyeong.errors import InputError
from malpyeong.evaluate import evaluate
from malpyeong.files import digest, write_text
from malpyeong.metrics.aggregate import combined_score, summarise
from malpyeong.metrics.bootstrap import RESAMPLES, interval, resampled_means
from malpyeong.samples import DATA, TINY_BASE
from malpyeong.terminal import Command, make

RECIPES = Path(__file__).parent.parent / "recipes"
SPLITS = ("test", "unseen")
# Of SFT that goes on, on the best completions or on the gold answers.
MORE_SFT = ("training.learning_rate=2.0e-4", "training.warmup_steps=2", "training.logging_steps=1")
AS_TRAINED = ("--batch-size", "128", "--max-new-tokens", "200", "--decoding", "free", "--no-repair")
# Row → (what it is called, the stages that are its own; their costs are the row's).
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "sft": ("SFT", ("sft",)),
    "zero": ("GRPO without SFT", ("zero",)),
    "grpo": ("SFT → GRPO", ("grpo",)),
    "grpo_gold": ("SFT → GRPO with the gold answers", ("grpo_gold",)),
    "rloo": ("SFT → RLOO", ("rloo",)),
    "dpo": ("SFT → DPO", ("samples", "dpo")),
    "ppo": ("SFT → reward model → PPO", ("samples", "reward", "ppo")),
    "best": ("SFT → SFT on the best of 8", ("samples", "best")),
    "gold": ("SFT → SFT on the gold answers", ("gold",)),
}
TWICE = "training.num_iterations=2"
# Row → (what it is called, the row that it is compared with, all that it changes of "SFT → GRPO").
VARIANTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "all": ("all questions", "grpo", ()),
    "band": ("pass rate 0.1 to 0.9", "grpo", ()),
    "band_gold": ("pass rate 0.1 to 0.9, with the gold answers", "grpo_gold", ("training.gold_advantage=4",)),
    "loss_grpo": ("loss_type grpo (here the same gradient as GSPO and SAPO)", "grpo", ("training.loss_type=grpo",)),
    "dr_grpo": ("Dr. GRPO", "grpo", ("training.loss_type=dr_grpo",)),
    "kl": ("beta 0.04", "grpo", ("training.beta=0.04",)),
    "entropy": ("entropy_coef 0.01", "grpo", ("training.entropy_coef=0.01",)),
    "no_gdpo": ("without GDPO", "grpo", ("training.multi_objective_aggregation=sum_then_normalize",)),
    "dapo_twice": ("each completion twice", "grpo", (TWICE,)),
    "no_clip_higher_twice": ("twice, without clip-higher", "dapo_twice", (TWICE, "training.epsilon_high=0.2")),
    "gspo_twice": (
        "twice, GSPO",
        "dapo_twice",
        (TWICE, "training.loss_type=grpo", "training.importance_sampling_level=sequence"),
    ),
    "cispo_twice": ("twice, CISPO", "dapo_twice", (TWICE, "training.loss_type=cispo", "training.epsilon_high=5")),
    "sapo_twice": ("twice, SAPO", "dapo_twice", (TWICE, "training.loss_type=sapo")),
}
SAMPLING = ("zero", "grpo", "grpo_gold", "rloo", "samples", "ppo", *VARIANTS)
TITLES = {row: title for row, (title, _) in ROWS.items()} | {
    row: f"SFT → GRPO, {title}" for row, (title, *_) in VARIANTS.items()
}


class Comparison:
    """The products under one folder, each made once.

    Args:
        output: the folder.
        steps: of every row but SFT's own; None for those of GRPO's recipe.
        data: folder of explore.json, dev.json, and of the splits with their questions.

    Raises:
        InputError: the folder holds a comparison of other steps or data.
    """

    def __init__(self, output: Path, steps: int | None = None, data: Path = DATA) -> None:
        self.output, self._data = output, data
        self._grpo = load_recipe(RECIPES / "tiny" / "grpo.yaml", [], GRPORecipe).training
        self._steps = steps or self._grpo.max_steps
        inputs = [TINY_BASE / "model.safetensors", *sorted(RECIPES.glob("tiny/*.yaml")), *sorted(data.glob("*.json"))]
        made_of = {"steps": self._steps, "sha256": {path.name: digest(path) for path in inputs}}
        file = output / "compare.json"
        if not file.exists():
            write_text(file, json.dumps(made_of, indent=1) + "\n")
        elif json.loads(file.read_text("utf-8")) != made_of:
            raise InputError(f"{output}: holds a comparison of other --steps, recipes or data; choose another -o")
        self._dev = output / "dev.json"
        if not self._dev.exists():
            write_records(self._dev, load_records(data / "dev.json", answers="gold")[::3])

    def folder(self, stage: str, seed: int) -> Path:
        """Return where a stage's products are."""
        return self.output / f"{stage}-{seed}"

    def adapter(self, stage: str, seed: int) -> Path | None:
        """Train a stage, and what it needs; return its adapter, None where training was stopped: nothing to learn."""
        run = self.folder(stage, seed)
        of_run = (f"training.output={run}", f"training.seed={seed}")
        if stage == "sft":
            self._make(run / "adapter", RECIPES / "sft.py", RECIPES / "tiny" / "sft.yaml", *of_run, "--resume", "auto")
            return run / "adapter"
        sft = self.adapter("sft", seed)
        start = f"model.adapter={'null' if stage == 'zero' else sft}"
        uses = _uses(stage)
        often, last = (
            f"training.eval_steps={min(self._grpo.eval_steps, self._steps) * uses}",
            run / f"checkpoint-{self._steps * uses}",
        )
        if stage in ("best", "gold"):
            records = self._samples(seed) / f"{stage}.json"
            size = self._grpo.groups  # a step reads the answers of as many questions as GRPO asks in one
            steps_of_a_pass = -(-len(load_records(records)) // size)
            epochs = f"training.epochs={(self._steps - 0.5) / steps_of_a_pass}"  # the trainer rounds up
            files = (f"data.train={records}", f"data.dev={self._dev}")
            score = ("training.best_by=score", "training.patience=1000", often, epochs)
            recipe = (RECIPES / "sft.py", RECIPES / "tiny" / "sft.yaml", *MORE_SFT, f"training.batch_size={size}")
            self._make(run / "adapter", *recipe, start, *files, *score, *of_run, "--resume", "auto")
            return last
        asked = self._data / "explore.json" if stage == "all" else self._hard(seed, by_rate=stage.startswith("band"))
        files = (f"data.train={asked}", f"data.dev={self._dev}", f"training.max_steps={self._steps * uses}")
        grpo = (RECIPES / "tiny" / "grpo.yaml", start, *files, often, *of_run)
        if stage in ("zero", "grpo", "grpo_gold", *VARIANTS):
            plain = () if stage == "grpo_gold" else ("training.gold_advantage=0", *_changes(stage))
            self._make(
                run / "adapter", RECIPES / "grpo.py", *grpo, *plain, "--resume", "auto", may_stop=run / "stopped"
            )
            return None if (run / "stopped").exists() else last
        if stage == "ppo":
            reward = self.adapter("reward", seed)
            self._make(run / "adapter", "-m", "benchmarks.ppo", *grpo, "--reward-model", str(reward))
        else:
            samples = () if stage == "rloo" else ("--samples", self._samples(seed))
            self._make(run / "adapter", "-m", "benchmarks.trainers", stage, *grpo, *samples)
        return run / "adapter"

    def _hard(self, seed: int, by_rate: bool = False) -> Path:
        """Return the questions that the demo's GRPO is asked: those that SFT finds hardest, or those of a pass rate."""
        hard = self.folder("hard", seed) / ("band.json" if by_rate else "hard.json")
        files = (f"model.adapter={self.adapter('sft', seed)}", f"data.train={self._data / 'explore.json'}")
        recipe = (RECIPES / "tiny" / "grpo.yaml", *files, f"training.seed={seed}")
        rate = ("--pass-rate", "0.1", "0.9") if by_rate else ()
        return make(hard, RECIPES / "hard_questions.py", *recipe, "-o", hard, *rate)

    def _samples(self, seed: int) -> Path:
        """Return the folder of the completions that SFT gives to GRPO's questions (``benchmarks.trainers sample``)."""
        run = self.folder("samples", seed)
        files = (f"data.train={self._hard(seed)}", f"training.max_steps={self._steps}", f"training.output={run}")
        recipe = (RECIPES / "tiny" / "grpo.yaml", f"model.adapter={self.adapter('sft', seed)}", *files)
        self._make(run / "samples.json", "-m", "benchmarks.trainers", "sample", *recipe, f"training.seed={seed}")
        return run

    def _make(self, product: Path, *command: str | Path, may_stop: Path | None = None) -> Path:
        """Run a command with this Python, offline, unless what it makes is there; note beside it its peak memory.

        Args:
            product: a file or folder in the stage's folder, which appears whole.
            command: its words.
            may_stop: file that is written where training stops because there is nothing to learn (exit code 3).
        """
        if product.exists() or (may_stop and may_stop.exists()):
            return product
        words = [str(word) for word in command]
        click.secho(f"\n$ python {shlex.join(words)}", bold=True)
        process = subprocess.Popen([sys.executable, *words], env={**os.environ, "HF_HUB_OFFLINE": "1"})
        _, status, usage = os.wait4(process.pid, 0)
        code = process.returncode = os.waitstatus_to_exitcode(status)
        if code and not (code == 3 and may_stop):
            raise SystemExit(code)
        peak, file = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10), product.parent / "peak.json"
        write_text(file, json.dumps({"mib": round(max(peak, _read(file).get("mib", 0)), 1)}) + "\n")
        if code and may_stop:
            write_text(may_stop, "nothing to learn\n")
        return product

    def measure(self, row: str, seed: int) -> dict[str, Any]:
        """Return what is measured of a row of one seed, once."""
        measured = self.folder(row, seed) / "row.json"
        if measured.exists():
            return _read(measured)
        adapter = self.adapter(row, seed)
        result: dict[str, Any] = {"row": row, "seed": seed, "stopped": adapter is None}
        for split in SPLITS:
            answers = self.folder(row, seed) / f"{split}.json"
            predict = ("-m", "malpyeong.predict", TINY_BASE, self._data / f"{split}_questions.json", "-o", answers)
            trained = ("--adapter", adapter) if adapter else ()
            make(answers, *predict, *trained, *AS_TRAINED)
            scores = evaluate(self._data / f"{split}.json", answers)
            summary, golds = summarise(scores), [score.record.answer or "" for score in scores]
            given, wanted = (
                median(len(contest_split(text)[1]) for text in texts)
                for texts in ([score.prediction for score in scores], golds)
            )
            result[split] = {
                "exact_match": summary["exact_match"],
                "rouge_1": summary["rouge_1"],
                "score": combined_score(summary["exact_match"], [summary["rouge_1"]]),
                "format_rate": summary["format_rate"],
                "reason_median_chars": given,
                "reason_ratio": given / wanted,
            }
        result["costs"] = {stage: self._costs(stage, seed) for stage in (ROWS[row][1] if row in ROWS else (row,))}
        result["curve"] = _read(self.folder(row, seed) / "scores.json", [])
        write_text(measured, json.dumps(result, indent=1) + "\n")
        return result

    def _costs(self, stage: str, seed: int) -> dict[str, Any]:
        """Return what a stage took; None for what is not known, as of a run that was made elsewhere."""
        run, counted, seconds = self.folder(stage, seed), 0, 0.0
        log, sampled = _read(run / "log.json", []), _read(run / "samples.json")
        for entry in log:
            if "step_seconds" in entry:  # a mean over the steps that were logged together
                seconds += entry["step_seconds"] * (entry["step"] - counted)
                counted = entry["step"]
        steps = max((entry["step"] for entry in log), default=0)
        completions = steps // _uses(stage) * self._grpo.effective_batch_size if stage in SAMPLING else 0
        known = bool(steps or sampled)
        return {
            "steps": steps if known else None,
            "completions": sampled.get("completions", completions) if known else None,
            "seconds": sampled.get("seconds", seconds) if known else None,
            "peak_mib": _read(run / "peak.json").get("mib"),
            "parameters": _read(run / "parameters.json") or _policy_parameters(run / "adapter"),
        }

    def write_results(self) -> str:
        """Write what has been measured so far, of whatever rows and seeds, and return its tables."""
        rows = [_read(path) for path in self.output.glob("*/row.json")]
        rows.sort(key=lambda row: (list(TITLES).index(row["row"]), row["seed"]))
        write_text(self.output / "results.json", json.dumps({"steps": self._steps, "rows": rows}, indent=1) + "\n")
        text = f"{table(rows)}\n\n{self.gains(rows)}"
        if any(row["row"] in VARIANTS for row in rows):
            text += f"\n\n{self.gains(rows, variants=True)}"
        write_text(self.output / "results.md", text + "\n")
        return text

    def gains(self, rows: Sequence[dict[str, Any]], variants: bool = False) -> str:
        """Return a Markdown table of what each row adds to another's test score (paired bootstrap over the questions).

        Args:
            rows: what was measured.
            variants: less the row that a variant is compared with; else less SFT's, all rows.
        """
        import numpy as np

        other = "the row beside it" if variants else TITLES["sft"]
        lines = [
            f"| less {other} of the same seed | seeds | test score | 95 % interval | EM: right now / wrong now |",
            "|-" * 5 + "|",
        ]
        seeds_of = {kind: {row["seed"] for row in rows if row["row"] == kind and not row["stopped"]} for kind in TITLES}
        for kind in VARIANTS if variants else TITLES:
            than = VARIANTS[kind][1] if variants else "sft"
            seeds = sorted(seeds_of[kind] & seeds_of[than])
            if kind == than or not seeds:
                continue
            ours, base = (np.hstack([self._scores(one, seed) for seed in seeds]) for one in (kind, than))
            (gain,) = np.nanmean(ours, 0, keepdims=True).mean(1) - np.nanmean(base, 0, keepdims=True).mean(1)
            means = resampled_means(np.hstack([ours, base])).reshape(RESAMPLES, 2, -1).mean(2)
            low, high = interval(means[:, 0] - means[:, 1])
            changed = ours[:, ::2] - base[:, ::2]
            sizes = f"{int((changed > 0).sum())} / {int((changed < 0).sum())}"
            listed = ", ".join(map(str, seeds))
            name = f"{TITLES[kind]}; {TITLES[than]}" if variants else TITLES[kind]
            lines.append(f"| {name} | {listed} | {gain:+.4f} | {low:+.4f} to {high:+.4f} | {sizes} |")
        return "\n".join(lines)

    def _scores(self, row: str, seed: int) -> Any:  # noqa: ANN401 -- an array
        """Return EM and ROUGE-1 of each test question, of shape (questions, 2), NaN where a reason is missing."""
        import numpy as np

        scores = evaluate(self._data / "test.json", self.folder(row, seed) / "test.json")
        return np.array([[score.exact_match, score.rouge_1] for score in scores], dtype=float)


def _changes(stage: str) -> tuple[str, ...]:
    """Return what a variant changes of the recipe, nothing of other stages."""
    return VARIANTS[stage][2] if stage in VARIANTS else ()


def _uses(stage: str) -> int:
    """Return how many updates read each completion."""
    return 2 if TWICE in _changes(stage) else 1


def _read(path: Path, missing: Any = None) -> Any:  # noqa: ANN401 -- any JSON
    """Return what a file holds, or ``missing``, by default nothing by any key."""
    return json.loads(path.read_text("utf-8")) if path.exists() else {} if missing is None else missing


def _policy_parameters(adapter: Path) -> dict[str, dict[str, int]] | None:
    """Return the numbers of weights of what a recipe trains: an adapter on the base, and nothing beside it."""
    from safetensors import safe_open

    def count(path: Path) -> int:
        with safe_open(path, "numpy") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118

    if not adapter.exists():
        return None
    trained = count(adapter / "adapter_model.safetensors")
    return {"policy": {"trained": trained, "resident": trained + count(TINY_BASE / "model.safetensors")}}


def _cell(values: Sequence[float | None], form: str = ".3f") -> str:
    """Return mean ± standard deviation of what is known of the seeds."""
    known = [value for value in values if value is not None]
    spread = f" ± {stdev(known):{form}}" if len(known) > 1 and stdev(known) else ""
    return f"{fmean(known):{form}}{spread}" if known else ""


def _total(row: dict[str, Any], key: str, add: Callable[[list[float]], float]) -> float | None:
    """Return a cost of a row over its stages; None if one is not known."""
    values = [costs[key] for costs in row["costs"].values()]
    return None if None in values else add(values)


def _weights(row: dict[str, Any]) -> str:
    """Return the millions of weights that are trained and in memory in a row's last stage."""
    models = list(row["costs"].values())[-1]["parameters"]
    if not models:
        return ""
    return " / ".join(f"{sum(model[key] for model in models.values()) / 1e6:.2f}" for key in ("trained", "resident"))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return two Markdown tables of what :meth:`Comparison.measure` returned: scores and costs, and dev's curves."""
    of_split = {"exact_match": "EM", "rouge_1": "ROUGE-1", "score": "score"}
    columns = [f"{split} {name}" for split in SPLITS for name in of_split.values()]
    columns += ["format", "reason ÷ gold", "steps", "completions", "seconds", "peak MiB", "trained / resident (M)"]
    lines = [f"| row | seeds | {' | '.join(columns)} |", "|-" * (len(columns) + 2) + "|"]
    steps = sorted({point["step"] // _uses(row["row"]) for row in rows for point in row["curve"]})
    curves = [f"| dev score at step | {' | '.join(map(str, steps))} |", "|-" * (len(steps) + 1) + "|"]
    for kind, name in TITLES.items():
        seeds = [row for row in rows if row["row"] == kind]
        if not seeds:
            continue
        cells = [_cell([row[split][key] for row in seeds]) for split in SPLITS for key in of_split]
        cells += [_cell([row["test"]["format_rate"] for row in seeds])]
        cells += [_cell([row["test"]["reason_ratio"] for row in seeds], ".2f")]
        cells += [_cell([_total(row, key, sum) for row in seeds], ".0f") for key in ("steps", "completions", "seconds")]
        cells += [_cell([_total(row, "peak_mib", max) for row in seeds], ".0f"), _weights(seeds[0])]
        title = name + (" (stopped: nothing to learn)" if all(row["stopped"] for row in seeds) else "")
        lines.append(f"| {title} | {', '.join(str(row['seed']) for row in seeds)} | {' | '.join(cells)} |")
        scores = [{point["step"] // _uses(kind): point["score"] for point in row["curve"]} for row in seeds]
        if any(scores):
            curves.append(f"| {name} | {' | '.join(_cell([one.get(step) for one in scores]) for step in steps)} |")
    return "\n".join([*lines, "", *curves])


@click.command(cls=Command)
@click.option("--seed", "seeds", multiple=True, type=int, default=(0, 1, 2), show_default=True)
@click.option("--row", "rows", multiple=True, type=click.Choice(list(TITLES)), help="Only these.")
@click.option("--variants", is_flag=True, help="SFT, GRPO, and GRPO with one thing changed, in place of the claims.")
@click.option("--steps", type=click.IntRange(min=2), help="Of every row but SFT; default: those of GRPO's recipe.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("runs/compare"), show_default=True)
def main(seeds: Sequence[int], rows: Sequence[str], variants: bool, steps: int | None, output: Path) -> None:
    """Train, answer and measure; write OUTPUT/results.json and results.md, and print the table."""
    if rows and variants:
        raise click.UsageError("--row or --variants, not both")
    comparison = Comparison(output, steps)
    for seed in seeds:
        for row in rows or (("sft", "grpo", *VARIANTS) if variants else ROWS):
            comparison.measure(row, seed)
    click.echo(f"\n{comparison.write_results()}")


if __name__ == "__main__":
    main()
