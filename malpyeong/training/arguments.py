"""Look whether a trainer kept the arguments that a recipe states.

Unsloth's generated trainers change some when they are made. There are three classes:

1. What concerns memory or speed alone (``COST``): a change is a line in the log.
2. Values that mean the same (:func:`meaning`, ``OFF``): no change.
3. Every other argument decides what is learnt or what is known of it: a change ends the run.

``tests/training/unsloth_arguments.json`` lists what Unsloth assigns and what each assignment leads to.
"""

import copy
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from malpyeong.errors import InputError

COST = frozenset(
    {
        "activation_offloading",
        "bf16_full_eval",  # only where an evaluation is not part of training
        "fp16_full_eval",
        "cache_implementation",
        "dataloader_multiprocessing_context",
        "dataloader_num_workers",
        "dataloader_persistent_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
        "dataset_num_proc",
        "ddp_broadcast_buffers",  # of several GPUs, as the next two
        "ddp_bucket_cap_mb",
        "ddp_find_unused_parameters",
        "eval_accumulation_steps",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "pad_to_multiple_of",
        "torch_compile",
        "torch_compile_backend",
        "torch_compile_mode",
        "torch_empty_cache_steps",
        "unsloth_grpo_mini_batch",
        "unsloth_logit_chunk_multiplier",
        "unsloth_num_chunks",
        "use_cache",
        "vllm_enable_sleep_mode",
        "vllm_gpu_memory_utilization",
    }
)

# Values that mean None. vLLM's word for no top-k is -1, that of transformers is 0.
OFF: dict[str, tuple[Any, ...]] = {
    "chat_template_kwargs": ({},),
    "generation_kwargs": ({},),
    "gradient_checkpointing_kwargs": ({},),
    "lr_scheduler_kwargs": ({},),
    "min_p": (0,),
    "model_init_kwargs": ({},),
    "report_to": ([], ["none"], "none"),
    "top_k": (0, -1),
}

# The dtype: the flags, and what is computed in.
_DTYPE = ("bf16", "fp16", "mixed_precision")


def expected_arguments(config: Any, stated: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ANN401 -- TrainingArguments
    """Return every argument as a trainer must keep it: as the recipe states it, else as it is in ``config``.

    Args:
        config: the arguments before the trainer is made.
        stated: what they were made from; the configuration itself may have changed some.
    """
    names = [field.name for field in dataclasses.fields(config) if not field.name.startswith("_")]
    made = {name: copy.deepcopy(getattr(config, name)) for name in names if hasattr(config, name)}
    mixed_precision = "bf16" if stated.get("bf16") else "fp16" if stated.get("fp16") else "no"
    return {**made, **stated, "mixed_precision": mixed_precision}


def check_arguments(arguments: object, expected: Mapping[str, Any]) -> None:
    """Make sure that a trainer's arguments are those that are expected of it, and show what costs memory or time.

    Args:
        arguments: ``trainer.args``, once the trainer is made.
        expected: see :func:`expected_arguments`.

    Raises:
        InputError: one that decides what is learnt has changed; all such arguments are named, with both values.
    """
    actual = {name: getattr(arguments, name, None) for name in expected}
    if "max_seq_length" in actual:  # Unsloth's own: None stands for max_length
        actual["max_seq_length"] = actual["max_seq_length"] or actual["max_length"]
        expected = {**expected, "max_seq_length": expected["max_seq_length"] or expected["max_length"]}
    changed = [name for name in expected if not _same(meaning(name, actual[name]), meaning(name, expected[name]))]
    cost = [f"{name}={actual[name]!r} ({expected[name]!r})" for name in changed if name in COST]
    if cost:
        click.echo(f"for memory or speed alone, the trainer sets what the recipe does not: {', '.join(cost)}")
    if any(name in changed for name in _DTYPE):
        wanted, forced = _dtype(expected), _dtype(actual)
        raise InputError(
            f"model.dtype: the recipe says {wanted}, but the trainer cannot train this model so here and would compute "
            f"in {forced}; set model.dtype={forced}, or model.backend=hf"
        )
    learning = [f"{name} is {actual[name]!r}, not {expected[name]!r}" for name in changed if name not in COST]
    if learning:
        cure = "install the versions that pyproject.toml names (make setup)"
        if type(arguments).__name__.startswith("Unsloth"):
            cure = "set model.backend=hf, which trains without Unsloth, or state the trainer's value in the recipe"
        raise InputError(f"the trainer would not train as the recipe says: {'; '.join(learning)}; {cure}")


def meaning(name: str, value: Any) -> Any:  # noqa: ANN401 -- any argument's value
    """Return an argument's value in the one form that stands for all those that mean the same."""
    value = getattr(value, "value", value)  # enumerations and their names
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, (list, tuple)):
        value = [getattr(one, "value", one) for one in value]
    if value in OFF.get(name, ()):
        return None
    if name == "scale_rewards" and isinstance(value, bool):
        return "group" if value else "none"
    return value


def _same(actual: Any, stated: Any) -> bool:  # noqa: ANN401 -- any argument's value
    if isinstance(stated, float) and isinstance(actual, (int, float)):
        return math.isclose(actual, stated, rel_tol=1e-9)
    return bool(actual == stated)


def _dtype(arguments: Mapping[str, Any]) -> str:
    if arguments["bf16"] or arguments["mixed_precision"] == "bf16":
        return "bfloat16"
    return "float16" if arguments["fp16"] or arguments["mixed_precision"] == "fp16" else "float32"
