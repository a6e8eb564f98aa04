"""A training run's folder: what it was made from, its checkpoints, its log, and its adapter.

``runs/NAME/`` holds ``config.yaml`` (every key resolved), ``environment.json`` (versions, digests of the data
files, git revision), ``checkpoint-N/``, ``log.json`` (what the trainer logged, step by step) and, only when
training has ended, ``adapter/``.
"""

import importlib.metadata
import json
import math
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from malpyeong.config import Block
from malpyeong.errors import InputError
from malpyeong.files import digest, new_folder, write_text

PACKAGES = (
    "malpyeong",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "unsloth",
)


def start_run(output: Path, recipe: Block, data: Sequence[str], resume: bool) -> Path | None:
    """Make or reopen a run's folder and write down what the run is made from.

    Args:
        output: the run's folder.
        recipe: the resolved recipe.
        data: files whose digests are recorded.
        resume: go on from the last complete checkpoint, if there is one.

    Returns:
        The checkpoint to go on from, or None to begin.

    Raises:
        InputError: the folder holds a run and ``resume`` is False, or it holds a run of another recipe.
    """
    config = output / "config.yaml"
    resolved = recipe.model_dump(mode="json")
    if config.exists():
        if not resume:
            raise InputError(
                f"{output}: holds a run already; add --resume auto to go on with it, or choose another folder "
                "with training.output=…"
            )
        different = _differences(yaml.safe_load(config.read_text("utf-8")) or {}, resolved)
        if different:
            raise InputError(
                f"{output}: holds a run of another recipe (different: {', '.join(different[:5])}); "
                "choose another folder with training.output=…"
            )
    if (output / "adapter").exists():
        raise InputError(f"{output}: this run has ended; its adapter is in {output / 'adapter'}")
    write_text(output / "environment.json", json.dumps(_environment(data), ensure_ascii=False, indent=2) + "\n")
    write_text(config, yaml.safe_dump(resolved, allow_unicode=True, sort_keys=False))
    return last_checkpoint(output)


def last_checkpoint(output: Path) -> Path | None:
    """Return the newest complete checkpoint; one that a kill cut off is removed.

    The trainer writes ``trainer_state.json`` last, so a checkpoint is complete if that file can be read.
    """
    found = [folder for folder in output.glob("checkpoint-*") if folder.name.removeprefix("checkpoint-").isdigit()]
    for folder in sorted(found, key=lambda folder: -int(folder.name.removeprefix("checkpoint-"))):
        try:
            json.loads((folder / "trainer_state.json").read_text("utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(folder)
        else:
            return folder
    return None


def assert_arguments(arguments: object, stated: Mapping[str, Any]) -> None:
    """Make sure that a trainer kept every argument that the recipe stated.

    Unsloth's generated trainers change some silently.

    Raises:
        RuntimeError: names each changed argument with both values.
    """
    changed = [
        f"{name} is {getattr(arguments, name, None)!r}, stated {value!r}"
        for name, value in stated.items()
        if not _same(getattr(arguments, name, None), value)
    ]
    if changed:
        raise RuntimeError(f"the trainer changed what the recipe states: {'; '.join(changed)}")


def finish_run(output: Path, model: Any, tokenizer: Any, log: Sequence[Mapping[str, Any]]) -> None:  # noqa: ANN401
    """Save the log and, last and whole, the trained adapter.

    Raises:
        RuntimeError: the adapter is still zero, that is, nothing was learnt.
    """
    if not adapter_is_non_zero(model):
        raise RuntimeError("the adapter is still zero after training: nothing was learnt (learning rate, labels?)")
    write_text(output / "log.json", json.dumps(list(log), ensure_ascii=False, indent=1) + "\n")
    with new_folder(output / "adapter") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def adapter_is_non_zero(model: Any) -> bool:  # noqa: ANN401 -- a PeftModel
    """Tell whether some LoRA B matrix differs from the zeros that it starts with."""
    return any(
        bool(parameter.detach().abs().max() > 0)
        for name, parameter in model.named_parameters()
        if "lora_B" in name and ".ref." not in name
    )


def _environment(data: Sequence[str]) -> dict[str, Any]:
    versions = {"python": platform.python_version(), "machine": platform.machine()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "git": _git_revision(),
        "data_sha256": {name: digest(Path(name)) for name in data},
    }


def _git_revision() -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}")
    return found


def _same(found: Any, stated: Any) -> bool:  # noqa: ANN401 -- any argument's value
    if isinstance(stated, float) and isinstance(found, float):
        return math.isclose(found, stated, rel_tol=1e-9)
    return bool(found == stated or str(getattr(found, "value", found)) == str(stated))
