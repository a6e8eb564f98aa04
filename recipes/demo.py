"""The whole way with the tiny model: base → SFT → GRPO → merge → prediction → submission.

    make demo            (or: python recipes/demo.py --seed 1 -o runs/demo-1)

Every step is a command that is printed before it runs, the very one that you would type; the last lines are a
table and ``summary.json``. A second start resumes where the first one stopped.
"""

import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from malpyeong.contest.answer import contest_split
from malpyeong.contest.records import load_records
from malpyeong.errors import InputError
from malpyeong.evaluate import evaluate
from malpyeong.files import digest, write_text
from malpyeong.metrics.aggregate import RecordScore, summarise
from malpyeong.samples import DATA, TINY_BASE
from malpyeong.submit import is_split
from malpyeong.terminal import Command, make

RECIPES = Path(__file__).parent
SPLITS = ("test", "unseen")
SIZE = ("--batch-size", "128", "--max-new-tokens", "200")
# What training does to the answers would be hidden by constraints and repair, which the submission's answers have.
AS_TRAINED = ("--decoding", "free", "--no-repair")
STAGES = {"base": "base", "sft": "SFT", "grpo": "SFT+GRPO"}


class Demo:
    """Runs commands once each, and remembers in a file how long each took."""

    def __init__(self, output: Path, seed: int) -> None:
        self.output, self._file = output, output / "demo.json"
        inputs = [TINY_BASE / "model.safetensors", *sorted(RECIPES.glob("tiny/*.yaml")), *sorted(DATA.glob("*.json"))]
        made_of = {"seed": seed, "sha256": {path.name: digest(path) for path in inputs}}
        self._state: dict[str, Any] = {**made_of, "seconds": {}}
        if self._file.exists():
            self._state = json.loads(self._file.read_text("utf-8"))
            if any(self._state.get(key) != value for key, value in made_of.items()):
                raise InputError(f"{output}: holds a demo of another seed, recipe or data; remove it")

    @property
    def seconds(self) -> float:
        """Time of all commands, over every start of the demo."""
        return sum(self._state["seconds"].values())

    def make(self, product: Path, *command: str | Path) -> Path:
        """Run a command unless what it makes is there, and add up how long it took."""
        start = time.perf_counter()
        try:
            return make(product, *command)
        finally:
            seconds = self._state["seconds"]
            seconds[str(product)] = seconds.get(str(product), 0) + time.perf_counter() - start
            write_text(self._file, json.dumps(self._state, indent=2) + "\n")

    def train(self, stage: str, *overrides: str) -> Path:
        """Run a recipe, or go on with it; return the adapter."""
        run = self.output / stage
        recipe = (RECIPES / f"{stage}.py", RECIPES / "tiny" / f"{stage}.yaml")
        return self.make(run / "adapter", *recipe, f"training.output={run}", *overrides, "--resume", "auto")

    def predict(self, stage: str, model: Path, *options: str | Path) -> None:
        """Answer test and unseen questions."""
        for split in SPLITS:
            prediction = self.output / "predictions" / stage / f"{split}.json"
            command = ("-m", "malpyeong.predict", model, DATA / f"{split}_questions.json", "-o", prediction)
            self.make(prediction, *command, *SIZE, *options, *AS_TRAINED)


def measure(folder: Path) -> dict[str, float]:
    """Return a stage's line of the summary."""
    scores: dict[str, list[RecordScore]] = {
        split: evaluate(DATA / f"{split}.json", folder / f"{split}.json") for split in SPLITS
    }
    test, unseen = (summarise(scores[split]) for split in SPLITS)
    return {
        "exact_match": test["exact_match"],
        "rouge_1": test["rouge_1"],
        "format_rate": test["format_rate"],
        "reason_median_chars": median(len(contest_split(score.prediction)[1]) for score in scores["test"]),
        "unseen_exact_match": unseen["exact_match"],
    }


@click.command(cls=Command)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(output: Path, seed: int) -> None:
    """Run the demo and write OUTPUT/summary.json."""
    demo = Demo(output, seed)
    seeded = f"training.seed={seed}"
    demo.predict("base", TINY_BASE)
    sft = demo.train("sft", seeded)
    demo.predict("sft", TINY_BASE, "--adapter", sft)
    hard, select = output / "hard.json", (RECIPES / "hard_questions.py", RECIPES / "tiny" / "grpo.yaml")
    demo.make(hard, *select, f"model.adapter={sft}", "-o", hard)
    grpo = demo.train("grpo", seeded, f"model.adapter={sft}", f"data.train={hard}")
    merged = demo.make(output / "merged", "-m", "malpyeong.export", grpo, "-o", output / "merged", "--dtype", "float32")
    demo.predict("grpo", merged)
    questions, prediction = DATA / "test_questions.json", output / "predictions" / "submission" / "test.json"
    demo.make(prediction, "-m", "malpyeong.predict", merged, questions, "-o", prediction, *SIZE)
    submission = demo.make(
        output / "submission.json", "-m", "malpyeong.submit", questions, prediction, "-o", output / "submission.json"
    )
    for stage in ("sft", "grpo"):
        page = output / f"{stage}.html"
        demo.make(page, "-m", "malpyeong.report", "run", output / stage, "-o", page)

    stages = {stage: measure(output / "predictions" / stage) for stage in STAGES}
    parity = json.loads((merged / "export.json").read_text("utf-8"))
    submitted = load_records(submission, answers="prediction")
    summary: dict[str, Any] = {
        "seed": seed,
        "seconds": round(demo.seconds, 1),
        "stages": stages,
        "merge": {key: parity[key] for key in ("max_logit_diff", "same_answers")},
        "submission": {
            "records": len(submitted),
            "valid": all(map(is_split, submitted)),
        },
    }
    write_text(output / "summary.json", json.dumps(summary, ensure_ascii=False, indent=2) + "\n")
    show(output, summary, summarise(evaluate(DATA / "test.json", prediction))["exact_match"])


def show(output: Path, summary: dict[str, Any], submitted_match: float) -> None:
    """Print the table of the stages, and what is submitted with its exact match."""
    gold = [contest_split(record.answer or "")[1] for record in load_records(DATA / "test.json", answers="gold")]
    table = Table(title=f"sample test split, tiny model, seed {summary['seed']}")
    columns = ("exact_match", "rouge_1", "format_rate", "reason_median_chars", "unseen_exact_match")
    for name in ("stage", *columns):
        table.add_column(name.replace("_", " "), justify="left" if name == "stage" else "right")
    for stage, values in summary["stages"].items():
        cells = (f"{values[name]:.0f}" if name == "reason_median_chars" else f"{values[name]:.3f}" for name in columns)
        table.add_row(STAGES[stage], *cells)
    console = Console()
    console.print(table)
    merge, submission = summary["merge"], summary["submission"]
    console.print(f"gold reasons: median {median(map(len, gold)):.0f} characters")
    console.print(
        f"merge: largest logit difference {merge['max_logit_diff']:.1e}, same answers: {merge['same_answers']}"
    )
    console.print(
        f"submission: {submission['records']} records, valid: {submission['valid']}; constrained decoding, exact match "
        f"{submitted_match:.3f}"
    )
    console.print(
        f"{summary['seconds']:.0f} s; {output}/ holds summary.json, sft.html, grpo.html, merged/, submission.json"
    )


if __name__ == "__main__":
    main()
