"""A training run's folder: what it was made from, its checkpoints, its log, and its adapter.

``runs/NAME/`` holds ``config.yaml`` (every key resolved), ``environment.json`` (versions, digests of the files it was
made from, git revision), ``checkpoint-N/``, in a GRPO run ``completions/`` (TRL's tables of every logged step's
completions, rewards and advantages) and, only when training has ended, ``log.json`` (what the trainer logged, step by
step) and ``adapter/``.
"""

import hashlib
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

from malpyeong.config.recipe import Block
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
    "bert-score",
    "rouge-score",
    "mecab-ko",
    "python-mecab-ko-dic",
    "sentencepiece",
    "sentence-transformers",
    "bm25s",
    "kiwipiepy",
    "unsloth",
)


def check_run(output: Path, recipe: Block, inputs: Sequence[Path], resume: bool) -> Path | None:
    """Look at a run's folder before anything is loaded.

    Args:
        output: the run's folder, which need not exist.
        recipe: the resolved recipe.
        inputs: files that the run is made from; their digests must be those that an earlier start recorded.
        resume: go on from the last complete checkpoint, if there is one.

    Returns:
        The checkpoint to go on from, or None to begin.

    Raises:
        InputError: the folder holds a run and ``resume`` is False, or one of another recipe or other data.
    """
    config = output / "config.yaml"
    if not config.exists():
        return None
    if not resume:
        raise InputError(
            f"{output}: holds a run already; add --resume auto to go on with it, or choose another output folder"
        )
    try:
        recorded = json.loads((output / "environment.json").read_text("utf-8"))["sha256"]
    except (OSError, ValueError, KeyError):
        raise InputError(
            f"{output}: its environment.json is missing or damaged; start again in another folder"
        ) from None
    different = _differences(yaml.safe_load(config.read_text("utf-8")) or {}, recipe.model_dump(mode="json"))
    different += [name for name, value in _digests(inputs).items() if recorded.get(name) != value]
    if different:
        raise InputError(
            f"{output}: holds a run of another recipe or other data (different: {', '.join(different[:5])}); choose "
            "another output folder (make: RUNS=…)"
        )
    return last_checkpoint(output)


def start_run(output: Path, recipe: Block, inputs: Sequence[Path]) -> None:
    """Make a run's folder and write down what the run is made from; a folder that is being resumed stays as it is."""
    if (output / "config.yaml").exists():
        return
    environment = {"versions": _versions(), "git": _git_revision(), "sha256": _digests(inputs)}
    write_text(output / "environment.json", json.dumps(environment, ensure_ascii=False, indent=2) + "\n")
    resolved = recipe.model_dump(mode="json")
    write_text(output / "config.yaml", yaml.safe_dump(resolved, allow_unicode=True, sort_keys=False))


def last_checkpoint(output: Path) -> Path | None:
    """Return the newest complete checkpoint; one that a kill cut off is removed.

    The trainer writes ``trainer_state.json`` last, so a checkpoint is complete if that file can be read.
    """
    for folder in checkpoints(output):
        try:
            json.loads((folder / "trainer_state.json").read_text("utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(folder)
        else:
            return folder
    return None


def checkpoints(output: Path) -> list[Path]:
    """Return a run's checkpoints, complete or not, the newest first."""
    found = [folder for folder in output.glob("checkpoint-*") if folder.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda folder: -int(folder.name.removeprefix("checkpoint-")))


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


def has_ended(checkpoint: Path) -> bool:
    """Tell whether training had ended (all steps done, or stopped early) when a checkpoint was written."""
    state = json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
    return bool(state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"])


def finish_run(
    output: Path,
    model: Any,  # noqa: ANN401 -- a PeftModel
    tokenizer: Any,  # noqa: ANN401 -- a transformers tokenizer
    base: str,
    before: str,
    log: Sequence[Mapping[str, Any]],
) -> None:
    """Save the log and, last and whole, the trained adapter.

    Args:
        output: the run's folder.
        model: the trained model.
        tokenizer: saved beside the adapter.
        base: name of the base model, recorded in the adapter (Unsloth puts a quantised copy's name there).
        before: :func:`adapter_digest` before training.
        log: what the trainer logged.

    Raises:
        RuntimeError: the adapter is what it was before training, that is, nothing was learnt.
    """
    if adapter_digest(model) == before:
        raise RuntimeError("training has not changed the adapter: nothing was learnt (rewards all equal? labels?)")
    model.peft_config["default"].base_model_name_or_path = base
    write_text(output / "log.json", json.dumps(list(log), ensure_ascii=False, indent=1) + "\n")
    with new_folder(output / "adapter") as folder:
        model.save_pretrained(folder, selected_adapters=["default"])
        tokenizer.save_pretrained(folder)


def adapter_digest(model: Any) -> str:  # noqa: ANN401 -- a PeftModel
    """Return a digest of the weights that are trained."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found.update(name.encode())
            found.update(parameter.detach().float().cpu().numpy().tobytes())
    return found.hexdigest()


def _digests(inputs: Sequence[Path]) -> dict[str, str]:
    return {str(path): digest(path) for path in inputs}


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "machine": platform.machine()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


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
