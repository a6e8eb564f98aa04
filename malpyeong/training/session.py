"""A training session: what both training scripts do before and after ``trainer.train``."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from malpyeong.config.recipe import GRPORecipe, GRPOTraining, SFTRecipe, SFTTraining
from malpyeong.errors import InputError
from malpyeong.files import writing
from malpyeong.models.environment import is_main_process, keep_compiled_code, processes
from malpyeong.models.load import pick_dtype
from malpyeong.models.memory import Backend
from malpyeong.training.run import (
    Inputs,
    best_checkpoint,
    finish_run,
    is_last,
    random_state,
    start_run,
    step_of,
    trained_weights,
    weights_digest,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def precision(dtype: str) -> dict[str, Any]:
    """Return the trainer's dtype flags: mixed precision in the dtype of the weights, none for float32."""
    import torch

    chosen = pick_dtype(dtype)
    # Without use_cpu the trainer refuses bf16 where there is no GPU.
    return {
        "bf16": chosen == torch.bfloat16,
        "fp16": chosen == torch.float16,
        "use_cpu": not torch.accelerator.is_available(),
    }


def batches(training: SFTTraining | GRPOTraining) -> dict[str, int]:
    """Return the trainer's arguments that make a recipe's effective batch size, however many processes share it.

    Raises:
        InputError: it cannot be shared evenly.
    """
    batch, accumulation, count = training.batch_size, training.gradient_accumulation_steps, processes()
    fewer_steps = math.gcd(accumulation, count)
    smaller = count // fewer_steps
    if batch % smaller:
        raise InputError(
            f"training.batch_size × gradient_accumulation_steps = {batch} × {accumulation} cannot be shared evenly by "
            f"{count} processes; set training.gradient_accumulation_steps={accumulation * smaller}"
        )
    return {
        "per_device_train_batch_size": batch // smaller,
        "gradient_accumulation_steps": accumulation // fewer_steps,
    }


def keep_adapter_in_float32(model: Any) -> None:  # noqa: ANN401 -- a PeftModel
    """Hold the weights that are trained in float32 again.

    TRL casts them to bfloat16 where the base is 4-bit. A GRPO update is smaller than bfloat16 can add to a weight,
    and a resumed run loads them as float32, so that it would not go on to the same result.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def keep_reference(model: Any) -> None:  # noqa: ANN401 -- a PeftModel
    """Keep a copy of the adapter that is trained, which the KL penalty (``training.beta``) is measured against.

    TRL's trainer does so when it is made; Unsloth leaves that out, and its KL would pull towards the base without an
    adapter, away from all that SFT has taught.
    """
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)


def trackers(training: SFTTraining | GRPOTraining) -> dict[str, Any]:
    """Return the trainer's arguments for ``training.report_to``: a run of its folder's name, in the project malpyeong.

    Raises:
        InputError: the tracker is not installed, or is one of a server that does not let us in.
    """
    name = training.report_to
    if name != "none" and find_spec(name) is None:
        raise InputError(f"training.report_to={name}: {name} is not installed; pip install {name}, or leave it at none")
    project = "malpyeong"
    if name == "wandb" and is_main_process():
        os.environ.setdefault("WANDB_PROJECT", project)  # it reads no argument
        wandb: Any = import_module(name)
        try:
            wandb.login()  # now, and not when the model has been loaded
        except wandb.Error as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"training.report_to=wandb: {reason} Or set WANDB_MODE=offline") from None
    return {"report_to": [] if name == "none" else [name], "project": project, "run_name": Path(training.output).name}


def announce_compilation(backend: Backend) -> None:
    """Say that the first step takes longer, where Unsloth compiles, and keep what it compiles for the next start."""
    if backend == "unsloth":
        folder = keep_compiled_code()
        click.echo(f"the first step compiles, which may take a minute; {folder} keeps the result for the next start")


def go_on_counting(trainer: Any, checkpoint: Path) -> None:  # noqa: ANN401 -- a transformers Trainer
    """Let the log's ``num_tokens`` go on where a checkpoint's ends: TRL's SFT trainer counts from 0 again."""
    rows = json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))["log_history"]
    counts = [row[key] for row in rows for key in ("num_tokens", "eval_num_tokens") if key in row]
    trainer._total_train_tokens = int(max(counts, default=0))


@contextmanager
def recorded(
    trainer: Any,  # noqa: ANN401 -- a transformers Trainer
    tokenizer: "PreTrainedTokenizerBase",
    recipe: SFTRecipe | GRPORecipe,
    inputs: Inputs,
    checkpoint: Path | None,
) -> Iterator[bool]:
    """Write down what a run is made from; once its block has trained, check what was learnt and save it.

    Args:
        trainer: an SFTTrainer or GRPOTrainer.
        tokenizer: saved beside the adapter, with ``model.max_length`` for its ``model_max_length``.
        recipe: written down in the run's folder.
        inputs: what the run is made from.
        checkpoint: where to resume from; one that was written at the very end is loaded here.

    Yields:
        Whether there are steps left to train.

    Raises:
        TrainingStoppedError: nothing was learnt (see ``malpyeong.training.callbacks``).
        InputError: the run's folder cannot be written (any more).
    """
    from accelerate.utils import set_seed
    from transformers import TrainerState

    from malpyeong.training.callbacks import check_learnt

    output = Path(recipe.training.output)
    keep_adapter_in_float32(trainer.model)
    before = weights_digest(trained_weights(trainer.model))
    if is_main_process():
        start_run(output, recipe, inputs)
    if checkpoint is not None:
        click.echo(f"resuming from {checkpoint}")
        go_on_counting(trainer, checkpoint)
        if not (checkpoint / random_state()).exists():
            click.echo("the checkpoint is of another number of processes: random numbers start again")
            set_seed(recipe.training.seed + step_of(checkpoint), device_specific=True)
    with writing(output):
        if checkpoint is not None and is_last(checkpoint, getattr(recipe.training, "max_steps", None)):
            trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            trainer._load_from_checkpoint(str(best_checkpoint(checkpoint)))
            yield False
        else:
            yield True
        log, weights = trainer.state.log_history, trained_weights(trainer.model)
        check_learnt(weights, before, log, trainer.state.best_global_step)
        tokenizer.model_max_length = recipe.model.max_length  # of prompt and answer: prediction keeps to it
        if is_main_process():
            finish_run(output, trainer.model, weights, tokenizer, recipe.model.name, log)
        trainer.accelerator.wait_for_everyone()
