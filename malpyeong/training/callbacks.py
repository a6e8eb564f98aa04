"""What watches a run: stop one that can learn nothing, and say why; time each step and note its memory."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from statistics import fmean
from typing import TYPE_CHECKING, Any

import click
from transformers import ProgressCallback, TrainerCallback

from malpyeong.config.recipe import GRPORecipe, SFTRecipe
from malpyeong.models.memory import GIB, Backend, estimate_recipe, lever_text, out_of_memory, shape_of
from malpyeong.training.run import logged, weights_digest

if TYPE_CHECKING:
    from malpyeong.training.rewards import RewardRun

STEPS = 10


class TrainingStoppedError(click.ClickException):
    """Training was stopped because going on is pointless or impossible; its checkpoints stay. Exit code 3."""

    exit_code = 3


class Guards(TrainerCallback):
    """Watch what is logged, and raise where something has been wrong for ``steps`` logged steps in a row.

    One bad step is no reason to stop: float16 training skips its first steps while the loss scale falls, and a batch
    of easy questions has only dead groups.
    """

    def __init__(self, steps: int = STEPS) -> None:
        self._steps = steps
        self._in_a_row: dict[str, int] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ANN401
        """Count, and raise :class:`TrainingStoppedError` where a count is full."""
        first_length = next((row["reason_length"] for row in state.log_history if "reason_length" in row), None)
        for reason, is_bad in _findings(logs or {}, first_length).items():
            self._in_a_row[reason] = self._in_a_row.get(reason, 0) + 1 if is_bad else 0
            if self._in_a_row[reason] >= self._steps:
                raise TrainingStoppedError(
                    f"stopped at step {state.global_step}: {self._steps} logged steps in a row {reason}"
                )


def _findings(logs: dict[str, Any], first_length: float | None) -> dict[str, bool]:
    """Return for each thing that this row tells about whether it is wrong.

    Args:
        logs: a logged row.
        first_length: ``reason_length`` of the first row that has it.
    """
    found = {}
    numbers = [float(logs[key]) for key in ("loss", "grad_norm") if logs.get(key) is not None]
    if numbers:
        found[
            "had a loss or gradient that is not a number; lower training.learning_rate, or set model.dtype"
        ] = not all(map(math.isfinite, numbers))
    if (dead := logged(logs, "dead_groups")) is not None:
        found[
            "had only dead groups: all completions of a group earn the same, so nothing can be learnt; raise "
            "training.temperature or training.num_generations, or take questions that the model does not know by heart"
        ] = dead >= 1
    if (clipped := logged(logs, "completions/clipped_ratio")) is not None:
        found[
            "cut off more than half of the completions; raise training.max_completion_length, or train SFT longer: "
            "the model has not learnt to stop"
        ] = clipped > 0.5
    if first_length is not None and (length := logged(logs, "reason_length")) is not None:
        found[
            "had reasons of less than half the length that they had at first; raise the weights of the reason's "
            "rewards (rouge_1, bertscore, bleurt), or lower training.learning_rate"
        ] = length < first_length / 2
    return found


class StepClock(TrainerCallback):
    """Put into the trainer's log what a step took, and the GPU's memory at its fullest moment.

    Where several steps are logged together: their mean, and the peak of all.

    - ``step_seconds``: without evaluating, logging and saving.
    - ``generate_seconds``, ``reward_seconds``, ``update_seconds``: what GRPO's sampling, rewards and all the rest took.
    - ``peak_allocated_gib``, ``peak_reserved_gib``: as torch's allocator counts them; not on a CPU.

    Args:
        rewards: of a GRPO run.
    """

    def __init__(self, rewards: "RewardRun | None" = None) -> None:
        self._rewards = rewards
        self._steps: list[dict[str, float]] = []
        self._start = self._generated = self._rewarded = 0.0

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Count what is done inside as sampling."""
        start = _synchronised()
        yield
        self._generated += _synchronised() - start

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
        """Start the clock."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._generated, self._rewarded = 0.0, self._rewards.seconds if self._rewards else 0.0
        self._start = _synchronised()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
        """Note what the step took."""
        import torch

        step = {"step_seconds": _synchronised() - self._start}
        if self._rewards is not None:
            step["generate_seconds"] = self._generated
            step["reward_seconds"] = self._rewards.seconds - self._rewarded
            step["update_seconds"] = step["step_seconds"] - step["generate_seconds"] - step["reward_seconds"]
        if torch.cuda.is_available():
            step["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
            step["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        self._steps.append(step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ANN401
        """Add the figures to what was logged of training, here and in the trainer's history."""
        if "loss" not in (logs or {}) or not self._steps:
            return
        found = {}
        for name in self._steps[0]:
            values = [step[name] for step in self._steps]
            found[name] = max(values) if name.startswith("peak_") else fmean(values)
        logs.update(found)
        state.log_history[-1].update(found)
        self._steps = []


def _synchronised() -> float:
    """Return the time, in seconds, at which all that was asked of the GPU is done."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def check_learnt(
    weights: Mapping[str, Any], before: str, log: Sequence[Mapping[str, Any]], best: int | None = None
) -> None:
    """Make sure that training has left something to use.

    Args:
        weights: what is trained, name → tensor.
        before: :func:`malpyeong.training.run.weights_digest` of them before training.
        log: what the trainer logged.
        best: step of the best adapter on dev, whose weights they are; None for the last step.

    Raises:
        TrainingStoppedError: they are as before, or hold what is no number.
    """
    if not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
        raise TrainingStoppedError("training has left weights that are not numbers; lower training.learning_rate")
    if weights_digest(weights) != before:
        return
    log = [row for row in log if best is None or row["step"] <= best]
    rates, gradients = ([logged(row, key) for row in log if key in row] for key in ("learning_rate", "grad_norm"))
    if rates and all(rate == 0 for rate in rates):
        reason = "the learning rate was 0 at every step, all of warm-up; set training.warmup_steps=0"
    elif gradients and all(gradient == 0 for gradient in gradients):
        reason = (
            "every gradient was 0, as where all completions of a group earn the same; raise training.temperature, "
            "or take other questions"
        )
    else:
        reason = "look at the loss and the rewards of the steps above"
    kept = f" by step {best}, the best on dev" if best else ""
    raise TrainingStoppedError(f"training has changed no weight{kept}: {reason}")


class OwnArguments(TrainerCallback):
    """Let a resumed run save and log as often as its own arguments say, not as the checkpoint's said."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
        """Take the steps of the arguments."""
        state.compute_steps(args, state.max_steps)


# What a step's line shows, in this order; everything else is in log.json.
_SHOWN = {
    "loss": "loss",
    "eval_loss": "dev loss",
    "eval_score": "dev score",
    "eval_exact_match": "dev EM",
    "eval_rouge_1": "dev ROUGE-1",
    "eval_format_rate": "dev format",
    "reward": "reward",
    "dead_groups": "dead groups",
    "completions/mean_length": "tokens",
    "completions/clipped_ratio": "cut off",
    "reason_length": "reason / gold",
    "grad_norm": "gradient",
    "step_seconds": "seconds",
    "generate_seconds": "sampling",
    "reward_seconds": "rewards",
}


class ShortProgress(ProgressCallback):
    """One short line a logged step under the progress bar, where the trainer prints some thirty numbers."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ANN401
        """Write the line."""
        line = progress_line(state.global_step, logs or {})
        if self.training_bar is not None and line:
            self.training_bar.write(line)


def show_progress(trainer: Any) -> None:  # noqa: ANN401 -- a transformers Trainer
    """Put :class:`ShortProgress` in the place of the trainer's own printout, and the clock before the trackers.

    A callback that is handed to a trainer comes after its own: trackers would report a row without the clock's figures.
    """
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ShortProgress)
    if clock := trainer.pop_callback(StepClock):
        trainer.callback_handler.callbacks.insert(0, clock)


def progress_line(step: int, logs: dict[str, Any]) -> str:
    """Return one line of the numbers that tell whether training goes well, or "" if there are none."""
    rewards = {key: key.split("/")[1] for key in logs if key.startswith("rewards/") and key.endswith("/mean")}
    numbers = {name: logged(logs, key) for key, name in {**_SHOWN, **rewards}.items()}
    parts = [f"{name} {number:.4g}" for name, number in numbers.items() if number is not None]
    return f"step {step}: {', '.join(parts)}" if parts else ""


def explain_out_of_memory(
    recipe: SFTRecipe | GRPORecipe | None, backend: Backend = "hf"
) -> AbstractContextManager[None]:
    """Turn a GPU's out-of-memory error into the measured peak and the lever to pull next.

    Args:
        recipe: that is run; None for one whose memory is not estimated.
        backend: that the model was loaded with.
    """
    import torch

    shape = shape_of(recipe.model.name) if recipe else None
    if recipe is None:
        lever = "halve training.batch_size"
    elif shape is None:
        lever = "halve training.batch_size and double training.gradient_accumulation_steps"
    else:
        # The card was too small whatever the estimate says: aim for four fifths of what the estimate gives this recipe.
        aim = 0.8 * estimate_recipe(recipe, shape, backend).peak / GIB
        if torch.cuda.is_available():
            aim = min(aim, torch.cuda.mem_get_info()[1] / GIB)
        lever = f"by the estimate, {lever_text(recipe, shape, backend, aim)}"
    return out_of_memory(f"{lever}; start again in another folder (training.output=…)", TrainingStoppedError)
