"""LoRA adapters: where one is, whether it is whole and fits its base and recipe, and putting it on."""

import difflib
import functools
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from malpyeong.errors import InputError
from malpyeong.files import digest, missing_cure, nfd_twin

if TYPE_CHECKING:
    from malpyeong.config.recipe import ModelBlock


def adapter_folder(adapter: str | Path) -> Path:
    """Return the folder of a named adapter; one with the name of a hub id that is no folder is fetched from the hub.

    Raises:
        InputError: the hub does not have it, or cannot be reached.
    """
    if Path(adapter).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(adapter)):
        return Path(adapter)
    try:
        return _fetch(str(adapter))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{adapter}: there is no such folder, and no adapter can be fetched from the hub by this name "
            f"({type(error).__name__}); give the adapter's folder, or a hub id while online"
        ) from None


def check_adapter(adapter: str | Path | None) -> dict[str, Any]:
    """Make sure that a named adapter folder holds a whole adapter and return its configuration.

    Raises:
        InputError: it does not.
    """
    if adapter is None:
        return {}
    from safetensors import SafetensorError, safe_open

    folder = adapter_folder(adapter)
    weights = folder / "adapter_model.safetensors"
    try:
        config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        with safe_open(weights, "numpy"):
            pass
    except OSError:
        if (folder / "adapter_model.bin").exists():
            code = (
                "import sys, torch; from safetensors.torch import save_file; "
                "save_file(torch.load(sys.argv[1], weights_only=True), sys.argv[2])"
            )
            raise InputError(
                f"{adapter}: holds adapter_model.bin, the format of old versions of PEFT; write it again with: "
                f"{shlex.join(['python', '-c', code, str(folder / 'adapter_model.bin'), str(weights)])}"
            ) from None
        cure = missing_cure(folder) if nfd_twin(folder) else "train it first (make sft-NAME, or recipes/sft.py)"
        raise InputError(f"{adapter}: holds no adapter; {cure}") from None
    except (ValueError, SafetensorError) as error:
        raise InputError(f"{adapter}: the adapter is damaged ({error}); train or copy it again") from None
    return config


def check_base(name: str) -> None:
    """Make sure that a named model is no adapter: transformers would load it with its base, and training put another
    in its place.

    Raises:
        InputError: it is one.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        config = find_adapter_config_file(name)
    except (OSError, ValueError):  # not found: loading says so
        return
    if config:
        base = json.loads(Path(config).read_text("utf-8")).get("base_model_name_or_path")
        raise InputError(
            f"{name}: is an adapter; name it as such (model.adapter, --adapter) and its base {base} as the model"
        )


def check_pair(name: str, adapter: str | Path | None) -> None:
    """Make sure that an adapter is not put on a model that it, or one like it, has been merged into.

    Raises:
        InputError: it has, by what ``malpyeong.export`` wrote into the model's folder.
    """
    try:
        made_of = json.loads((Path(name) / "export.json").read_text("utf-8"))
    except (OSError, ValueError):
        return
    if adapter is None:
        return
    cure = f"leave the adapter out, or put it on {made_of.get('base')}"
    if digest(adapter_folder(adapter) / "adapter_model.safetensors") == made_of.get("adapter_sha256"):
        raise InputError(f"{name}: has {adapter} merged into it already; {cure}")
    if check_adapter(adapter).get("base_model_name_or_path") == made_of.get("base"):
        raise InputError(f"{name}: has an adapter merged into it, and {adapter} was trained without that one; {cure}")


def check_lora(model: "ModelBlock") -> None:
    """Make sure that a recipe's LoRA block describes the adapter that it starts from.

    Raises:
        InputError: rank, alpha or target modules differ, or the model is itself an adapter.
    """
    check_base(model.name)
    if model.adapter is None:
        return
    config = check_adapter(model.adapter)
    check_pair(model.name, model.adapter)
    stated = {"r": model.lora.r, "lora_alpha": model.lora.alpha, "target_modules": set(model.lora.target_modules)}
    for key, value in stated.items():
        trained = config.get(key)
        trained = set(trained) if isinstance(trained, list) else trained
        if trained != value:
            raise InputError(
                f"{model.adapter}: was trained with {key}={trained}, model.lora says {value}; make them agree"
            )


def check_target_modules(base: Any, names: Sequence[str]) -> None:  # noqa: ANN401 -- any torch module
    """Make sure that LoRA goes on every module that a recipe names; PEFT passes over names that match none.

    Raises:
        InputError: a name matches no layer, or a layer whose adapter would not be trained or could not be merged.
    """
    layers = {
        name: module
        for name, module in base.named_modules()
        if getattr(module, "weight", None) is not None and module.weight.dim() > 1
    }
    ends = sorted({name.rpartition(".")[2] for name in layers})
    output = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    for wanted in names:
        matching = [module for name, module in layers.items() if name == wanted or name.endswith(f".{wanted}")]
        if not matching:
            nearest = difflib.get_close_matches(wanted, ends, n=3, cutoff=0.5) or ends
            raise InputError(
                f"model.lora.target_modules: this model has no layer {wanted}; nearest: {', '.join(nearest)}"
            )
        if output is None:
            continue
        if output in matching:
            raise InputError(
                f"model.lora.target_modules: {wanted}: the loss reads this layer's own weights, piece by piece, so "
                "that an adapter on it would not be trained; leave it out"
            )
        if base.get_input_embeddings() in matching and base.config.get_text_config().tie_word_embeddings:
            raise InputError(
                f"model.lora.target_modules: {wanted} shares its weights with the output layer in this model, so that "
                "an adapter on it could not be merged; leave it out"
            )


def base_of_adapter(adapter: str | Path) -> str:
    """Return the base model's name that an adapter was trained on.

    Raises:
        InputError: the adapter does not say.
    """
    name = check_adapter(adapter).get("base_model_name_or_path")
    if not name:
        raise InputError(f"{adapter}: does not say which base model it was trained on; name it with --base")
    return str(name)


def put_adapter(base: Any, adapter: str | Path, is_trainable: bool = False) -> Any:  # noqa: ANN401 -- PEFT models
    """Put a saved LoRA adapter on a base model.

    Raises:
        InputError: the adapter does not fit this base.
    """
    from peft import PeftModel

    try:
        model = PeftModel.from_pretrained(base, str(adapter_folder(adapter)), is_trainable=is_trainable)
    except (RuntimeError, ValueError, KeyError) as error:
        raise _does_not_fit(adapter, str(error).strip()[:200]) from None
    check_fit(model, adapter)
    return model


def check_fit(model: Any, adapter: str | Path) -> None:  # noqa: ANN401 -- a PeftModel
    """Make sure that the model has all of an adapter's weights: PEFT passes over those that it has no place for.

    Raises:
        InputError: it has not.
    """
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    held = {name for name in get_peft_model_state_dict(model, save_embedding_layers=False) if "lora_" in name}
    with safe_open(adapter_folder(adapter) / "adapter_model.safetensors", "numpy") as file:
        saved = {name for name in file.keys() if "lora_" in name}  # noqa: SIM118 -- not a mapping
    if held != saved:
        first = min(held ^ saved)
        raise _does_not_fit(adapter, f"{len(saved)} weights for {len(held)} places; only one of the two has {first}")


def _does_not_fit(adapter: str | Path, reason: str) -> InputError:
    return InputError(f"{adapter}: does not fit the base model ({reason}); was it trained on another one?")


@functools.cache
def _fetch(adapter: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["adapter_config.json", "adapter_model.*", "tokenizer*", "special_tokens_map.json", "chat_template.jinja"]
    return Path(snapshot_download(adapter, allow_patterns=wanted))
