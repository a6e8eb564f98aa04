"""Presets of a card: what ``gpu: t4 | 24gb | 40gb | 80gb`` in a recipe stands for.

A table of numbers, no logic: a key that the recipe or the command line states is left alone. By the estimate of
``malpyeong.models.memory`` every model of ``recipes/`` fits with Unsloth (on a T4 those below 7B and one of 7B, on 24
GB 11.5B but for a hair); docs/gpu.md has the table, and the doctor names the lever for the rest, and what should
sample quicker on the card: 16-bit weights, vLLM. SFT's effective batch size is 16 on every card; GRPO's depends
on the card, because all completions of a step are sampled together, and that is what takes most memory.
"""

import shutil
from typing import Any, Literal

from malpyeong.errors import InputError

Gpu = Literal["t4", "24gb", "40gb", "80gb"]

# What a process can use of the card's memory (GiB): the driver and the CUDA context take the rest.
USABLE_GIB: dict[str, float] = {"t4": 14.5, "24gb": 23.0, "40gb": 39.0, "80gb": 78.5}

_SHARED: dict[str, dict[str, Any]] = {
    "t4": {"dtype": "float16", "max_length": 1664},  # no bfloat16 before Ampere
    "24gb": {"dtype": "bfloat16", "max_length": 2048},
    "40gb": {"dtype": "bfloat16", "max_length": 2048},
    "80gb": {"dtype": "bfloat16", "max_length": 2560},
}
_SFT: dict[str, dict[str, Any]] = {
    "t4": {"batch_size": 2, "gradient_accumulation_steps": 8},
    "24gb": {"batch_size": 4, "gradient_accumulation_steps": 4},
    "40gb": {"batch_size": 8, "gradient_accumulation_steps": 2},
    "80gb": {"batch_size": 16, "gradient_accumulation_steps": 1},
}
_GRPO: dict[str, dict[str, Any]] = {
    "t4": {"batch_size": 2, "gradient_accumulation_steps": 8, "num_generations": 8},
    "24gb": {"batch_size": 4, "gradient_accumulation_steps": 4, "num_generations": 8},
    "40gb": {"batch_size": 8, "gradient_accumulation_steps": 4, "num_generations": 8},
    "80gb": {"batch_size": 16, "gradient_accumulation_steps": 4, "num_generations": 16},
}
_COMPLETION = 320  # tokens; the contest's longest answer has fewer
_SCORERS = {"t4": "cpu", "24gb": "cuda", "40gb": "cuda", "80gb": "cuda"}  # 3 GB that a T4 does not have


def preset(gpu: str | None, stage: str) -> dict[str, Any]:
    """Return the keys of a stage's recipe, block by block, that a card decides; none for no card or an unknown one."""
    if gpu not in USABLE_GIB or stage not in ("sft", "grpo"):
        return {}
    if stage == "sft":
        return {"model": _SHARED[gpu], "training": _SFT[gpu]}
    return {
        "model": _SHARED[gpu],
        "training": {**_GRPO[gpu], "max_completion_length": _COMPLETION},
        "data": {"scorers": {"device": _SCORERS[gpu]}},
    }


def nearest(usable_gib: float, bf16: bool) -> str | None:
    """Return the largest setting of the preset that a card can hold, or None if it is smaller than all of them.

    Args:
        usable_gib: the card's memory.
        bf16: whether it computes in bfloat16; all settings but ``t4`` do.
    """
    fitting = [name for name, size in USABLE_GIB.items() if usable_gib >= 0.95 * size and (bf16 or name == "t4")]
    return fitting[-1] if fitting else None


def detect() -> str:
    """Return the preset's setting for the card of this machine.

    Raises:
        InputError: there is no GPU, or it has less memory than a T4.
    """
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            raise InputError(
                f"gpu: auto finds no GPU, though nvidia-smi is here: torch {torch.__version__} does not run with this "
                "driver or card; install a build of torch for the CUDA version that nvidia-smi names (pytorch.org)"
            )
        raise InputError(
            "gpu: auto finds no GPU here; state the card with gpu=t4, 24gb, 40gb or 80gb, or try a recipe of "
            "recipes/tiny on a CPU"
        )
    properties = torch.cuda.get_device_properties(0)
    found = nearest(properties.total_memory / 2**30, torch.cuda.is_bf16_supported(including_emulation=False))
    if found is None:
        raise InputError(
            f"gpu: auto: {properties.name} has {properties.total_memory / 2**30:.1f} GiB, less than the smallest card "
            "of the preset; state gpu=t4 and lower what `python -m malpyeong.doctor` names"
        )
    return found
