"""What the recipe costs beside TRL: GRPO steps of recipes/grpo.py against a bare TRL script.

    make bench-overhead

Both train the tiny model on the same questions with the same settings and reward functions, in turns, each in a process
of its own. The bare script makes a GRPOTrainer and trains; the recipe also checks, logs every component and completion,
shows its progress and writes a checkpoint at the end. What is compared is the time that ``trainer.train`` takes a step.
The last line is the ratio of the medians.
"""

import runpy
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from malpyeong.config.load import load_recipe
from malpyeong.config.recipe import GRPORecipe
from malpyeong.terminal import Command

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "grpo.py"
SETTINGS = ("recipes/tiny/grpo.yaml", "training.batch_size=32", "training.save_steps=1000", "training.gold_advantage=0")


def bare(overrides: list[str]) -> None:
    """Train with TRL alone."""
    from trl import GRPOConfig, GRPOTrainer

    from malpyeong.models.load import load_for_training
    from malpyeong.training.data import grpo_dataset, load_questions
    from malpyeong.training.rewards import REWARDS

    recipe = load_recipe(SETTINGS[0], [*SETTINGS[1:], *overrides], GRPORecipe)
    training = recipe.training
    model, tokenizer = load_for_training(recipe.model, training.seed, training.gradient_checkpointing)
    dataset = grpo_dataset(
        tokenizer,
        load_questions(recipe.data.train, recipe.data),
        recipe.model.max_length,
        training.max_completion_length,
        training.generations * training.groups,
        training.seed,
    )
    stated: dict[str, Any] = runpy.run_path(str(RECIPE))["arguments"](recipe, "hf")
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[REWARDS[name] for name in recipe.data.rewards],
        args=GRPOConfig(**{**stated, "log_completions": False, "save_strategy": "no"}),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    trainer.train()


def timed(way: str, overrides: list[str]) -> float:
    """Train one way in this process; return what ``trainer.train`` took, in seconds."""
    from transformers import Trainer

    train, seconds = Trainer.train, []

    def train_timed(self: Trainer, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        start = time.perf_counter()
        result = train(self, *args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return result

    Trainer.train = train_timed  # type: ignore[method-assign]
    if way == "bare":
        bare(overrides)
    else:
        runpy.run_path(str(RECIPE))["main"]([*SETTINGS, *overrides], standalone_mode=False)
    return seconds[0]


@click.command(cls=Command)
@click.option("--steps", default=6, show_default=True)
@click.option("--turns", default=5, show_default=True)
@click.option("--adapter", required=True, help="Folder of an SFT adapter of the tiny model.")
@click.option("--way", type=click.Choice(["bare", "ours"]), hidden=True)
@click.option("--output", hidden=True)
def main(steps: int, turns: int, adapter: str, way: str | None, output: str | None) -> None:
    """Print seconds a step of both, and their ratio."""
    if way:
        overrides = [f"model.adapter={adapter}", f"training.max_steps={steps}", f"training.output={output}"]
        click.echo(f"seconds: {timed(way, overrides) / steps}")
        return
    seconds: dict[str, list[float]] = {"bare": [], "ours": []}
    with TemporaryDirectory() as folder:
        for turn in range(turns):
            for name in ("bare", "ours") if turn % 2 else ("ours", "bare"):
                command = ["-m", "benchmarks.overhead", "--adapter", adapter, "--steps", str(steps), "--way", name]
                command += ["--output", f"{folder}/{name}-{turn}"]
                result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, encoding="utf-8")
                if result.returncode:
                    raise click.ClickException(result.stderr[-2000:])
                seconds[name].append(float(result.stdout.split("seconds: ")[1].split()[0]))
            click.echo(f"turn {turn + 1}: bare {seconds['bare'][-1]:.3f} s a step, ours {seconds['ours'][-1]:.3f}")
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["bare"], strict=True)]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    click.echo(f"ours / bare in each turn: {min(ratios):.3f} to {max(ratios):.3f}")
    click.echo(f"ratio: {medians['ours'] / medians['bare']:.3f}")


if __name__ == "__main__":
    main()
