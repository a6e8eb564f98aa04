"""A training run's folder: what it was made from, its checkpoints, its log, and its adapter.

``runs/NAME/`` holds ``config.yaml`` (every key resolved), ``environment.json`` (versions, digests of what it was made
from, git revision), ``checkpoint-N/``, in a GRPO run ``completions/`` (TRL's tables of every logged step's
completions, rewards and advantages) and, only when training has ended, ``log.json`` (what the trainer logged, step by
step) and ``adapter/``. A run that goes on is the same run if it learns the same, wherever its folder and files lie.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import yaml

from malpyeong.config.gpu import preset
from malpyeong.config.load import upgrade
from malpyeong.config.recipe import Block, GRPORecipe, SFTRecipe
from malpyeong.errors import InputError
from malpyeong.files import digest, new_folder, write_text
from malpyeong.models.adapter import adapter_folder, check_adapter
from malpyeong.models.environment import processes
from malpyeong.models.load import weight_files_digest
from malpyeong.models.tokenizer import save_tokenizer

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
    "tokenizers",
    "llguidance",
    "sentence-transformers",
    "kiwipiepy",
    "unsloth",
    "vllm",
)


# What may be another when a run is resumed, because no weight depends on it. Files and models may lie elsewhere: they
# are compared by what is in them; and ``gpu`` by the keys that it stands for. ``training.max_steps`` may be another
# where the learning rate is constant, so that it says only when to stop. Anything else changes what is learnt.
FREE = (
    "gpu",
    "training.output",
    "mining.output",
    "training.save_steps",
    "training.report_to",
    "training.logging_steps",
    "training.gradient_checkpointing",
    "data.scorers.device",
    "data.test",  # only compared with train
)
MAX_STEPS = "training.max_steps"

Inputs = Mapping[str, str | list[str]]
"""What a run is made from: the recipe's key → SHA-256 of its file, of each of its files, or of samples of a model's
weights (:func:`digests`)."""


def open_run(recipe: SFTRecipe | GRPORecipe, resume: bool) -> tuple[Inputs, Path | None] | None:
    """Look at the run's folder before anything is loaded.

    Returns:
        (what the run is made from, the checkpoint to resume from or None), or None if the run has ended, which is said
        on the screen.

    Raises:
        InputError: see :func:`check_run`; or the recipe's adapter is none.
    """
    output = Path(recipe.training.output)
    if recipe.model.adapter:
        check_adapter(recipe.model.adapter)
    inputs = inputs_of(recipe)
    checkpoint = check_run(output, recipe, inputs, resume)
    if run_has_ended(output, recipe):
        click.echo(f"{output / 'adapter'}: this run has ended already")
        return None
    if checkpoint is not None:
        for folder in {checkpoint, best_checkpoint(checkpoint)}:
            check_whole(folder)
    return inputs, checkpoint


def inputs_of(recipe: SFTRecipe | GRPORecipe) -> Inputs:
    """Return the digests of what a recipe's run is made from, by the recipe's key."""
    files = {name: getattr(recipe.data, name, None) for name in ("train", "dev", "context", "labels")}
    made_of: dict[str, Path | list[Path] | str] = {f"data.{name}": Path(path) for name, path in files.items() if path}
    if recipe.model.adapter:
        made_of["model.adapter"] = adapter_folder(recipe.model.adapter) / "adapter_model.safetensors"
    made_of["model.name"] = recipe.model.name
    scorers = getattr(recipe.data, "scorers", None)
    for name in ("bertscore", "bleurt"):
        if scorer := getattr(scorers, name, None):
            made_of[f"data.scorers.{name}"] = scorer
    for name, file in getattr(recipe.data, "own_rewards", {}).items():
        made_of[f"data.rewards.{name}"] = Path(file)
    return digests(made_of)


def check_run(output: Path, recipe: Block, inputs: Inputs, resume: bool) -> Path | None:
    """Look at a run's folder before anything is loaded. What is another than before, but may be, is said on the screen.

    Args:
        output: the run's folder, which need not exist.
        recipe: the resolved recipe.
        inputs: what the run is made from, which must be what an earlier start recorded.
        resume: resume from the last complete checkpoint, if there is one.

    Returns:
        The checkpoint to resume from, or None to begin.

    Raises:
        InputError: the folder holds a run and ``resume`` is False, or one that would go on to learn something else (the
            overrides that prevent it are named), or its checkpoints do not suffice.
    """
    if not (output / "config.yaml").exists():
        return None
    if not resume:
        raise InputError(
            f"{output}: holds a run already; add --resume auto to go on with it, or choose another output folder"
        )
    before, now = _flat(_recorded_recipe(output, recipe)), _flat(recipe.model_dump(mode="json"))
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    may_change = {*FREE, MAX_STEPS} if _has_constant_rate(recipe) else {*FREE}
    different = {key for key in changed if key not in may_change}
    recorded = _recorded_digests(output, before)
    for key, value in inputs.items():
        if key in recorded:
            (different.discard if recorded[key] == value else different.add)(key)
    if different:
        raise _refusal(output, recipe, before, [key for key in {**before, **now} if key in different])
    checkpoint = last_checkpoint(output)
    if checkpoint is not None:
        best_checkpoint(checkpoint)
    if MAX_STEPS in changed:
        _check_length(output, recipe, before[MAX_STEPS], checkpoint)
    for key in changed:
        click.echo(f"{output}: goes on with {key} {before.get(key)} → {now.get(key)}")
    return checkpoint


def _has_constant_rate(recipe: Any) -> bool:  # noqa: ANN401 -- any recipe
    return getattr(getattr(recipe, "training", None), "lr_scheduler_type", None) == "constant_with_warmup"


def _refusal(output: Path, recipe: Block, before: Mapping[str, Any], different: Sequence[str]) -> InputError:
    """Return the error that names what is another and the overrides that keep it as it was."""
    now = _flat(recipe.model_dump(mode="json"))
    old_presets, presets = (_flat(preset(gpu, now["stage"])) for gpu in (before.get("gpu"), now.get("gpu")))
    by_gpu = [
        key
        for key in different
        if key in old_presets and before[key] == old_presets[key] and now[key] == presets.get(key)
    ]
    cures = [_override("gpu", before["gpu"])] if by_gpu else []
    cures += [
        _override(key, before[key])
        for key in different
        if key in before and key not in by_gpu and before[key] != now.get(key)
    ]
    rewritten = [f"{key} {before[key]}" for key in different if before.get(key) == now.get(key)]
    ways = [f"put back the old {', '.join(rewritten)}"] if rewritten else []
    ways += [f"add {' '.join(cures)} to go on with it"] if cures else []
    if any(key in (MAX_STEPS, "training.epochs") for key in different):
        ways.append(
            "train further in another folder from what this run has learnt (model.adapter=…): the learning rate of all "
            "its steps depends on their number"
        )
    return InputError(
        f"{output}: holds a run of another recipe or other data (different: {', '.join(different)}); "
        f"{', '.join(ways)}, or choose another output folder (make: RUNS=…)"
    )


def _check_length(output: Path, recipe: Any, before: int, checkpoint: Path | None) -> None:  # noqa: ANN401
    """Make sure that a run with a constant learning rate can become a longer or shorter one."""
    done, steps = step_of(checkpoint), recipe.training.max_steps
    keep = f"keep to {_override(MAX_STEPS, before)}"
    if steps <= done:
        raise InputError(f"{output}: {done} steps are done, {MAX_STEPS} is {steps}; {keep}")
    if (output / "adapter").exists() and done < before:
        raise InputError(
            f"{output}: has no checkpoint of its last step {before} to resume from; {keep}, or train its adapter "
            f"further in another folder (model.adapter={output / 'adapter'})"
        )
    if done % recipe.training.num_iterations:
        raise InputError(
            f"{output}: its checkpoint of step {done} is between two uses of the same completions "
            f"(num_iterations={recipe.training.num_iterations}); {keep}"
        )
    click.echo(f"the learning rate is constant: the result is that of a run of {steps} steps from the start")


def start_run(output: Path, recipe: Block, inputs: Inputs) -> None:
    """Make a run's folder and write down what the run is made from.

    Of a run that is resumed the versions stay; the adapter of one that had ended and is trained further moves to
    ``adapter-STEPS``.
    """
    environment = {"versions": versions(), "git": git_revision(), "sha256": dict(inputs)}
    config = output / "config.yaml"
    if config.exists():
        environment = {**_environment(output), "sha256": environment["sha256"]}
    write_text(output / "environment.json", json.dumps(environment, ensure_ascii=False, indent=2) + "\n")
    if config.exists() and (output / "adapter").exists():
        steps = _flat(_recorded_recipe(output, recipe)).get(MAX_STEPS)
        shutil.rmtree(output / f"adapter-{steps}", ignore_errors=True)
        (output / "adapter").rename(output / f"adapter-{steps}")
    resolved = recipe.model_dump(mode="json")
    write_text(config, yaml.safe_dump(resolved, allow_unicode=True, sort_keys=False))


def run_has_ended(output: Path, recipe: Any) -> bool:  # noqa: ANN401 -- any training recipe
    """Tell whether a run is there and done, and need not become longer."""
    if not (output / "adapter").exists():
        return False
    before = _flat(_recorded_recipe(output, recipe)).get(MAX_STEPS)
    return before is None or recipe.training.max_steps <= before


def last_checkpoint(output: Path) -> Path | None:
    """Return the newest complete checkpoint; one that a kill cut off is removed.

    The trainer writes ``trainer_state.json`` last, so a checkpoint is complete if that file can be read.
    """
    for folder in checkpoints(output):
        try:
            json.loads((folder / "trainer_state.json").read_text("utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(folder, ignore_errors=processes() > 1)  # which another process may be removing
        else:
            return folder
    return None


def check_whole(checkpoint: Path) -> None:
    """Make sure that a complete checkpoint has not been cut off since, as by a copy: the trainer would end in a
    traceback, or go on without what is missing.

    Raises:
        InputError: a file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    weights = list(checkpoint.rglob("*.safetensors")) or [checkpoint / "adapter_model.safetensors"]
    states = [*checkpoint.glob("rng_state_*.pth")] or [checkpoint / "rng_state.pth"]  # of several processes, or of one
    if not [*checkpoint.glob("global_step*"), *checkpoint.glob("optimizer_*"), *checkpoint.glob("optimizer.bin")]:
        states += [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt"]  # else an engine's own (ZeRO, FSDP)
    for path in (*weights, *states):
        try:
            if path in weights:
                with safe_open(path, "numpy"):
                    pass
            elif not zipfile.is_zipfile(path):  # what torch.save writes
                raise OSError("missing or cut off")
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{path}: cannot be read ({error}); copy the checkpoint again, or remove {checkpoint.name} to go on "
                "from an earlier one or from the start"
            ) from None


def random_state() -> str:
    """Return the name of the file in a checkpoint that holds this process's random state."""
    return "rng_state.pth" if processes() == 1 else f"rng_state_{os.environ['RANK']}.pth"


def checkpoints(output: Path) -> list[Path]:
    """Return a run's checkpoints, complete or not, the newest first."""
    found = [folder for folder in output.glob("checkpoint-*") if folder.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda folder: -int(folder.name.removeprefix("checkpoint-")))


def is_last(checkpoint: Path, max_steps: int | None) -> bool:
    """Tell whether training ends with a checkpoint: all steps are done, or it stopped early.

    Args:
        checkpoint: a complete one.
        max_steps: of the run, where the recipe states them.
    """
    state = _state(checkpoint)
    stopped = bool(state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"])
    if max_steps is None:
        return stopped
    # At the last step of all the trainer stops too, but a longer run goes on from there.
    return bool(state["global_step"] >= max_steps or (stopped and state["global_step"] < state["max_steps"]))


def best_checkpoint(checkpoint: Path) -> Path:
    """Return the checkpoint whose weights are kept at the end, as far as a checkpoint knows.

    Raises:
        InputError: it is not in the run's folder.
    """
    best = _state(checkpoint).get("best_global_step")
    found = checkpoint.parent / f"checkpoint-{best}" if best else checkpoint
    if not found.exists():
        raise InputError(
            f"{found}: is missing, the best checkpoint so far; copy the run's whole folder, or start again in another"
        )
    return found


def step_of(checkpoint: Path | None) -> int:
    """Return the step after which a checkpoint was written; 0 for none."""
    return int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0


def _state(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
    return state


def finish_run(
    output: Path,
    model: Any,  # noqa: ANN401 -- a PeftModel
    weights: Mapping[str, Any],
    tokenizer: Any,  # noqa: ANN401 -- a transformers tokenizer
    base: str,
    log: Sequence[Mapping[str, Any]],
) -> None:
    """Save the log and, last and whole, the trained adapter.

    Args:
        output: the run's folder.
        model: the trained model.
        weights: :func:`trained_weights` of it.
        tokenizer: saved beside the adapter.
        base: name of the base model, recorded in the adapter (Unsloth puts a quantised copy's name there).
        log: what the trainer logged. The last row, of the whole run, is left out: of a run that was resumed its figures
            are those of the last start, and one that was killed behind its last step has none.
    """
    config = model.peft_config["default"]
    config.base_model_name_or_path = base
    if isinstance(config.target_modules, set):  # whose order is another in every process
        config.target_modules = sorted(config.target_modules)
    steps = [row for row in log if "train_runtime" not in row]
    write_text(output / "log.json", json.dumps(steps, ensure_ascii=False, indent=1) + "\n")
    with new_folder(output / "adapter") as folder:
        model.save_pretrained(folder, selected_adapters=["default"], state_dict=dict(weights))
        save_tokenizer(tokenizer, folder)


def trained_weights(model: Any) -> dict[str, Any]:  # noqa: ANN401 -- a PeftModel or any torch module
    """Return the weights that are trained, name → tensor; where each process holds a part, all of them must call."""
    return {name: _whole(tensor) for name, tensor in model.named_parameters() if tensor.requires_grad}


def _whole(parameter: Any) -> Any:  # noqa: ANN401 -- torch tensors
    if hasattr(parameter, "full_tensor"):  # FSDP2
        return parameter.detach().full_tensor()
    if hasattr(parameter, "ds_id"):  # ZeRO-3
        from deepspeed.zero import GatheredParameters  # type: ignore[import-not-found]

        with GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach()


def weights_digest(weights: Mapping[str, Any]) -> str:
    """Return a digest of weights, name → tensor."""
    found = hashlib.sha256()
    for name, tensor in weights.items():
        found.update(name.encode())
        found.update(tensor.float().cpu().numpy().tobytes())
    return found.hexdigest()


def logged(row: Mapping[str, Any], key: str) -> float | None:
    """Return a number of a logged step, or None where there is none.

    Of a reward that applied to no completion of the step TRL logs None, its tables have NaN.
    """
    value = row.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def digests(made_of: Mapping[str, Path | list[Path] | str]) -> Inputs:
    """Return the digests of files and of named models by the recipe's key; a model that is not here is left out."""

    def of(value: Path | list[Path] | str) -> str | list[str] | None:
        if isinstance(value, str):
            return weight_files_digest(value)
        return digest(value) if isinstance(value, Path) else [digest(path) for path in value]

    return {key: known for key, value in made_of.items() if (known := of(value)) is not None}


def _recorded_digests(output: Path, before: Mapping[str, Any]) -> dict[str, Any]:
    """Return the digests of an earlier start by the recipe's key; earlier versions named them by path."""
    recorded = dict(_environment(output)["sha256"])

    def of(path: str) -> str | None:
        return recorded.get(str(Path(path))) or recorded.get(str(Path(path) / "adapter_model.safetensors"))

    for key, value in before.items():
        found = (
            [of(path) for path in value] if key == "data.questions" else of(value) if isinstance(value, str) else None
        )
        if found and key not in recorded:
            recorded[key] = found
    return recorded


def _environment(output: Path) -> dict[str, Any]:
    try:
        environment: dict[str, Any] = json.loads((output / "environment.json").read_text("utf-8"))
        environment["sha256"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"{output}: its environment.json is missing or damaged; start again in another folder"
        ) from None
    return environment


def _recorded_recipe(output: Path, recipe: Block) -> dict[str, Any]:
    """Return the recipe of an earlier start, with every key that this version knows."""
    try:
        values = yaml.safe_load((output / "config.yaml").read_text("utf-8"))
        if isinstance(values, dict):
            values.setdefault("stage", type(recipe).model_fields["stage"].default)
            list(upgrade(values))
        return type(recipe).model_validate(values).model_dump(mode="json")
    except (OSError, ValueError, yaml.YAMLError):
        raise InputError(
            f"{output}: its config.yaml is damaged, or no recipe of this version; start again in another folder"
        ) from None


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed :data:`PACKAGES`, and the kind of machine."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """Return the revision of the clone that this package is in, or None where there is none."""
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


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return values by their dotted keys; the rewards, whose keys the recipe chooses, are one value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and key != "rewards":
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _override(key: str, value: Any) -> str:  # noqa: ANN401 -- what YAML gives
    """Return an override as it is typed in a shell."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return shlex.quote(f"{key}={text}")
