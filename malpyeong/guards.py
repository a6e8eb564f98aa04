"""Stop a run that can learn nothing, and say why: silence costs an evening of somebody's GPU."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click
from transformers import TrainerCallback

from malpyeong.config import GRPORecipe, SFTRecipe
from malpyeong.memory import Backend, estimate_recipe
from malpyeong.runs import logged, weights_digest

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
        for reason, is_bad in _findings(logs or {}).items():
            self._in_a_row[reason] = self._in_a_row.get(reason, 0) + 1 if is_bad else 0
            if self._in_a_row[reason] >= self._steps:
                raise TrainingStoppedError(
                    f"stopped at step {state.global_step}: {self._steps} logged steps in a row {reason}"
                )


def _findings(logs: dict[str, Any]) -> dict[str, bool]:
    """Return for each thing that this row tells about whether it is wrong."""
    found = {}
    numbers = [float(logs[key]) for key in ("loss", "grad_norm") if logs.get(key) is not None]
    if numbers:
        found[
            "had a loss or gradient that is not a number; lower training.learning_rate, or set model.dtype"
        ] = not all(map(math.isfinite, numbers))
    if (dead := logged(logs, "dead_groups")) is not None:
        found[
            "had only dead groups: all answers to a question earn the same, so nothing can be learnt; raise "
            "training.temperature or training.num_generations, or take questions that the model does not know by heart"
        ] = dead >= 1
    if (clipped := logged(logs, "completions/clipped_ratio")) is not None:
        found[
            "cut off more than half of the completions; raise training.max_completion_length, or train SFT longer: "
            "the model has not learnt to stop"
        ] = clipped > 0.5
    return found


def check_learnt(weights: Mapping[str, Any], before: str, log: Sequence[Mapping[str, Any]]) -> None:
    """Make sure that training has left something to use.

    Args:
        weights: what is trained, name → tensor.
        before: :func:`malpyeong.runs.weights_digest` of them before training.
        log: what the trainer logged.

    Raises:
        TrainingStoppedError: they are as before, or hold what is no number.
    """
    if not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
        raise TrainingStoppedError("training has left weights that are not numbers; lower training.learning_rate")
    if weights_digest(weights) != before:
        return
    rates, gradients = ([logged(row, key) for row in log if key in row] for key in ("learning_rate", "grad_norm"))
    if rates and all(rate == 0 for rate in rates):
        reason = "the learning rate was 0 at every step: warm-up is longer than the run; set training.warmup_steps=0"
    elif gradients and all(gradient == 0 for gradient in gradients):
        reason = (
            "every gradient was 0, as where all answers to a question earn the same; raise training.temperature, or "
            "take other questions"
        )
    else:
        reason = "look at the loss and the rewards of the steps above"
    raise TrainingStoppedError(f"training has changed no weight: {reason}")


@contextmanager
def explain_out_of_memory(recipe: SFTRecipe | GRPORecipe | None, backend: Backend = "hf") -> Iterator[None]:
    """Turn a GPU's out-of-memory error into the measured peak and the lever to pull next.

    Args:
        recipe: that is run; None for one whose memory is not estimated.
        backend: that the model was loaded with.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        peak, whole = torch.cuda.max_memory_allocated() / 2**30, torch.cuda.mem_get_info()[1] / 2**30
        raise TrainingStoppedError(out_of_memory_text(recipe, backend, peak, whole)) from None


def out_of_memory_text(recipe: SFTRecipe | GRPORecipe | None, backend: Backend, peak: float, whole: float) -> str:
    """Return what to do after a run needed more than a card has, its peak and size in GiB."""
    from malpyeong.doctor import lever_text, shape_of

    shape = shape_of(recipe.model.name) if recipe else None
    # The card was too small whatever the estimate says: aim for four fifths of what the estimate gives this recipe.
    if recipe is None:
        lever = "halve training.batch_size"
    elif shape is None:
        lever = "halve training.batch_size and double training.gradient_accumulation_steps"
    else:
        aim = min(whole, 0.8 * estimate_recipe(recipe, shape, backend).peak / 2**30)
        lever = f"by the estimate, {lever_text(recipe, shape, backend, aim)}"
    return (
        f"the GPU's memory does not suffice (peak {peak:.1f} GiB of {whole:.1f}); {lever}; start again in another "
        "folder (training.output=…)"
    )
