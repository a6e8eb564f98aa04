"""Load a model for training or for prediction: one place for both backends and for 4-bit weights.

Training: Unsloth where a GPU that it supports and the package are present, else transformers + PEFT. 4-bit NF4
(QLoRA) works on both, on a CPU too.
"""

import difflib
import functools
import hashlib
import importlib.util
import json
import logging
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from malpyeong.errors import InputError
from malpyeong.files import digest, missing_cure, nfd_twin, write_text
from malpyeong.models.environment import keep_compiled_code, version_problems
from malpyeong.models.memory import VLLM_SHARE, Backend
from malpyeong.prompts.messages import TEMPLATE_OPTIONS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from malpyeong.config.recipe import ModelBlock

# On CPUs with avx512_bf16 bitsandbytes looks for an optional kernel on the hub and warns if it is not there.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def choose_backend(model: "ModelBlock") -> Backend:
    """Return ``unsloth`` or ``hf`` for this machine and configuration.

    Raises:
        InputError: Unsloth is asked for where it is not installed or there is no GPU, or for float32, which it does not
            compute in, or other packages' versions are such that it would not work.
    """
    import torch

    if model.backend == "unsloth" and model.dtype == "float32":
        raise InputError(
            "model.dtype is float32, but Unsloth computes in 16 bits; set model.dtype=auto, or set model.backend=hf"
        )
    usable = torch.cuda.is_available() and importlib.util.find_spec("unsloth") is not None
    if model.backend == "unsloth" and not usable:
        raise InputError(
            "model.backend is unsloth, which needs a CUDA GPU and the package; run make setup on a GPU machine, or set "
            "model.backend=hf"
        )
    if not usable or model.backend == "hf" or model.dtype == "float32":
        return "hf"
    problems = [line for package in ("unsloth", "unsloth_zoo") for line in version_problems(package, missing=False)]
    if problems:
        raise InputError(f"{'; '.join(problems)}; or set model.backend=hf")
    return "unsloth"


def pick_dtype(name: str) -> "torch.dtype":
    """Turn ``auto`` into bfloat16 where the GPU has it, float16 on other GPUs (T4), float32 on a CPU."""
    import torch

    if name != "auto":
        dtype = getattr(torch, name)
        assert isinstance(dtype, torch.dtype)
        return dtype
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_for_training(
    model: "ModelBlock", seed: int, gradient_checkpointing: bool, use_vllm: bool = False
) -> tuple[Any, Any]:
    """Load base weights and a LoRA adapter that can be trained.

    The adapter is ``model.adapter`` where one is named (GRPO starts from SFT's), else a new one, drawn after
    ``seed`` is set.

    Returns:
        (PeftModel, tokenizer), the tokenizer with a pad token that differs from its eos token.
    """
    from transformers import set_seed

    check_lora(model)
    set_seed(seed)
    if choose_backend(model) == "unsloth":
        return _load_unsloth(model, seed, gradient_checkpointing, use_vllm)
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    tokenizer = load_tokenizer(model.name, model.eos_token, model.pad_token, model.tokenizer_json)
    base: Any = load_base(model.name, pick_dtype(model.dtype), load_in_4bit=model.load_in_4bit)
    set_generation_config(base, tokenizer)
    check_target_modules(base, model.lora.target_modules)
    if model.load_in_4bit:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=gradient_checkpointing)
    elif gradient_checkpointing:
        base.enable_input_require_grads()
    if model.adapter:
        peft_model = put_adapter(base, model.adapter, is_trainable=True)
    else:
        config = LoraConfig(
            r=model.lora.r,
            lora_alpha=model.lora.alpha,
            lora_dropout=0.0,
            target_modules=list(model.lora.target_modules),
            bias="none",
            task_type="CAUSAL_LM",
        )
        peft_model = get_peft_model(base, config)
    return peft_model, tokenizer


def load_for_prediction(
    name: str, adapter: str | None = None, dtype: str = "auto", load_in_4bit: bool = False
) -> tuple[Any, Any]:
    """Load a model in eval mode; on the GPU if there is one.

    A named adapter is merged into 16- or 32-bit weights, in memory: without its own matrices a token takes less time,
    and the answers are those of an exported model, which is what is submitted. Onto quantised weights it is put as it
    is: there a merge would lose it.

    Returns:
        (model, tokenizer), the tokenizer padding on the left.
    """
    import torch

    tokenizer = tokenizer_for_prediction(name, adapter)
    model: Any = load_base(name, pick_dtype(dtype), load_in_4bit=load_in_4bit)
    set_generation_config(model, tokenizer)
    quantised = getattr(model, "quantization_method", None) is not None
    if torch.cuda.is_available() and not quantised:
        model = model.to("cuda")
    if adapter:
        model = put_adapter(model, adapter)
        model = model if quantised else model.merge_and_unload()
    return model.eval(), tokenizer


def tokenizer_for_prediction(name: str, adapter: str | None = None) -> "PreTrainedTokenizerBase":
    """Load the tokenizer that a model, or the adapter on it, was trained with: its eos may not be the base's.

    Its ``model_max_length`` is ``model.max_length`` of the recipe that trained it; of another model it is what its
    files say, or a number beyond any length.
    """
    check_base(name)
    check_adapter(adapter)
    check_pair(name, adapter)
    folder = adapter_folder(adapter) if adapter else None
    own = folder is not None and (folder / "tokenizer_config.json").exists()
    return load_tokenizer(str(folder) if own else name)


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
    _check_fit(model, adapter)
    return model


def _check_fit(model: Any, adapter: str | Path) -> None:  # noqa: ANN401 -- a PeftModel
    """Make sure that all of an adapter's weights have found their place: PEFT passes over those that do not."""
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
        found = [module for name, module in layers.items() if name == wanted or name.endswith(f".{wanted}")]
        if not found:
            nearest = difflib.get_close_matches(wanted, ends, n=3, cutoff=0.5) or ends
            raise InputError(
                f"model.lora.target_modules: this model has no layer {wanted}; nearest: {', '.join(nearest)}"
            )
        if output is None:
            continue
        if output in found:
            raise InputError(
                f"model.lora.target_modules: {wanted}: the loss reads this layer's own weights, piece by piece, so "
                "that an adapter on it would not be trained; leave it out"
            )
        if base.get_input_embeddings() in found and base.config.get_text_config().tie_word_embeddings:
            raise InputError(
                f"model.lora.target_modules: {wanted} shares its weights with the output layer in this model, so that "
                "an adapter on it could not be merged; leave it out"
            )


def load_base(name: str, dtype: "torch.dtype", load_in_4bit: bool = False) -> "PreTrainedModel":
    """Load causal-LM weights from a folder or the hub, 4-bit NF4 with double quantisation if asked.

    Raises:
        InputError: there is no such folder and the hub does not have it or cannot be reached.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": dtype}
    if load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        options["device_map"] = {"": 0 if torch.cuda.is_available() else "cpu"}
    try:
        model = AutoModelForCausalLM.from_pretrained(name, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise _not_found(name, error) from None
    keep_cpu_4bit_weights_differentiable(model)
    return model


def keep_cpu_4bit_weights_differentiable(model: Any) -> None:  # noqa: ANN401 -- any torch module
    """Stop bitsandbytes from repacking 4-bit weights on CPUs with avx512_bf16.

    On such a CPU the first no-grad forward in eval mode (an evaluation, a ``generate``) repacks the weights for
    a faster kernel; afterwards the loss is right but gradients are silently wrong. The test suite compares
    gradients with those of a dequantised copy after an evaluation.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def load_tokenizer(
    name: str, eos_token: str | None = None, pad_token: str | None = None, tokenizer_json: bool = False
) -> "PreTrainedTokenizerBase":
    """Load a tokenizer that pads on the left, whose pad token is not its eos token, and whose template knows no today.

    Args:
        name: folder or hub id.
        eos_token: ends an answer, instead of the tokenizer's own.
        pad_token: pads, instead of the tokenizer's own.
        tokenizer_json: read ``tokenizer.json`` as it is, whatever class transformers has for the architecture.

    Raises:
        InputError: not found, no chat template, no eos token, no token to pad with, or a stated one is unknown.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    try:
        # Of a folder that was saved from such a tokenizer, AutoTokenizer would again look at the architecture alone.
        declared = get_tokenizer_config(name).get("tokenizer_class")
        as_is = tokenizer_json or declared in ("TokenizersBackend", "PreTrainedTokenizerFast")
        kind: Any = PreTrainedTokenizerFast if as_is else AutoTokenizer
        tokenizer = kind.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise _not_found(name, error) from None
    for key, token in (("eos_token", eos_token), ("pad_token", pad_token)):
        if token is None:
            continue
        if token not in tokenizer.get_vocab():
            known = ", ".join(sorted(set(tokenizer.all_special_tokens))[:10])
            raise InputError(f"{name}: model.{key} {token} is not a token of this model; its special tokens: {known}")
        setattr(tokenizer, key, token)
    if not tokenizer.chat_template:
        raise InputError(f"{name}: the tokenizer has no chat template; use the instruct version of the model")
    if tokenizer.eos_token_id is None:
        raise InputError(f"{name}: the tokenizer has no eos token; generation would never stop")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        spare = next((token for token in _SPARE_TOKENS if _is_spare(tokenizer, token)), None)
        if spare is None:
            raise InputError(
                f"{name}: pad and eos are the same token and no spare one is known; training would unlearn to "
                "stop. Name a token that no text contains with model.pad_token"
            )
        tokenizer.pad_token = spare
    tokenizer.chat_template = _as_trained(tokenizer.chat_template)
    tokenizer.padding_side = "left"
    loaded: PreTrainedTokenizerBase = tokenizer
    return loaded


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path, texts: Sequence[str] = ()) -> None:
    """Save a tokenizer so that programs of transformers 4's time load it too, if they read ``texts`` as it does."""
    from tokenizers import Tokenizer

    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    if not path.exists():
        return
    alone = Tokenizer.from_file(str(path))
    if all(
        alone.encode(text, add_special_tokens=False).ids == list(tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in texts
    ):
        name_old_tokenizer_class(folder)


def name_old_tokenizer_class(folder: Path) -> None:
    """Give a saved tokenizer the names of transformers 4, which version 5 knows too.

    Version 5 writes ``TokenizersBackend`` for what reads ``tokenizer.json`` as it is, and calls additional special
    tokens extra ones: there transformers 4, vLLM and llama.cpp's converter of its time stop.
    """
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    write_text(path, json.dumps(config, ensure_ascii=False, indent=2) + "\n")


_SPARE_TOKENS = ("<|endoftext|>", "<|pad|>", "<pad>", "<|finetune_right_pad_id|>", "<|end_of_text|>")

# Templates ask transformers for today's date by this function. A macro of the same name takes its place, in the
# template itself, so that every program that renders it sees the same prompt on every day.
_FROZEN_DATE = "{%- macro strftime_now(format) -%}01 Jan 2025{%- endmacro -%}"


def _as_trained(template: str | dict[str, str]) -> str | dict[str, str]:
    """Return a template that knows no today and renders as in training where a program states none of its options.

    Who serves a merged folder does not know that Qwen3 was trained without thinking.
    """
    if isinstance(template, dict):
        return {name: str(_as_trained(text)) for name, text in template.items()}
    for name, value in TEMPLATE_OPTIONS.items():
        default = f"{{%- if {name} is not defined -%}}{{%- set {name} = {json.dumps(value)} -%}}{{%- endif -%}}"
        if name in template and default not in template:
            template = default + template
    if "strftime_now" in template and _FROZEN_DATE not in template:
        template = _FROZEN_DATE + template
    return template


def set_generation_config(model: Any, tokenizer: "PreTrainedTokenizerBase") -> None:  # noqa: ANN401 -- a causal LM
    """Replace all of a model's generation config: greedy, and an end at :func:`stop_tokens`, whatever its files say.

    Penalties, temperatures and minimum lengths of a base would else take part in every ``generate`` that does not
    state them, rollouts included, and be written into merged folders, where servers obey them.
    """
    from transformers import GenerationConfig

    stops = _with_eos(tokenizer, model.generation_config.eos_token_id)
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stops if len(stops) > 1 else stops[0],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.generation_config = config
    if hasattr(model, "get_base_model"):  # a PEFT model has one of its own
        model.get_base_model().generation_config = config


def stop_tokens(name: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the ids that end an answer of a model that is not loaded: the tokenizer's eos, and those of its files."""
    from transformers import AutoConfig, GenerationConfig

    try:
        named = GenerationConfig.from_pretrained(name).eos_token_id
    except (OSError, ValueError):
        named = getattr(AutoConfig.from_pretrained(name), "eos_token_id", None)
    return _with_eos(tokenizer, named)


def _with_eos(tokenizer: "PreTrainedTokenizerBase", named: int | list[int] | None) -> list[int]:
    eos: Any = tokenizer.eos_token_id
    others = named if isinstance(named, list) else [] if named is None else [named]
    return [eos, *(token for token in others if token != eos)]


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


@functools.cache
def _fetch(adapter: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["adapter_config.json", "adapter_model.*", "tokenizer*", "special_tokens_map.json", "chat_template.jinja"]
    return Path(snapshot_download(adapter, allow_patterns=wanted))


def check_base(name: str) -> None:
    """Make sure that a named model is no adapter: transformers would load it with its base, and training put another
    in its place.

    Raises:
        InputError: it is one.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        found = find_adapter_config_file(name)
    except (OSError, ValueError):  # not found: loading says so
        return
    if found:
        base = json.loads(Path(found).read_text("utf-8")).get("base_model_name_or_path")
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


def weight_files_digest(name: str) -> str | None:
    """Return a digest that tells a model's weights from others', under whatever name; None if they are not here.

    Of each weight file its size and 64 evenly spaced pieces of it: reading tens of gigabytes would take minutes.
    """
    from huggingface_hub import try_to_load_from_cache

    folder = Path(name)
    if not folder.is_dir():
        try:
            cached = try_to_load_from_cache(name, "config.json")
        except ValueError:  # not even the form of a hub id
            return None
        if not isinstance(cached, str):
            return None
        folder = Path(cached).parent
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    found = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        found.update(str(size).encode())
        with path.open("rb") as file:
            for start in range(0, size, max(1 << 14, size >> 6)):
                file.seek(start)
                found.update(file.read(1 << 14))
    return found.hexdigest() if files else None


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
        found = config.get(key)
        found = set(found) if isinstance(found, list) else found
        if found != value:
            raise InputError(
                f"{model.adapter}: was trained with {key}={found}, model.lora says {value}; make them agree"
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


def _load_unsloth(model: "ModelBlock", seed: int, gradient_checkpointing: bool, use_vllm: bool) -> tuple[Any, Any]:
    from unsloth import FastLanguageModel

    keep_compiled_code()
    checkpointing: Any = "unsloth" if gradient_checkpointing else False
    with_vllm = {"max_lora_rank": model.lora.r, "gpu_memory_utilization": VLLM_SHARE} if use_vllm else {}
    loaded, _ = FastLanguageModel.from_pretrained(
        model_name=str(adapter_folder(model.adapter)) if model.adapter else model.name,
        max_seq_length=model.max_length,
        dtype=pick_dtype(model.dtype),
        load_in_4bit=model.load_in_4bit,
        use_gradient_checkpointing=checkpointing,
        # Not a quantised copy of Unsloth's, which differs from the model that is named and that `export` merges onto.
        use_exact_model_name=True,
        random_state=seed,
        fast_inference=use_vllm,
        **with_vllm,
    )
    check_target_modules(loaded, model.lora.target_modules)
    if model.adapter is None:
        loaded = FastLanguageModel.get_peft_model(
            loaded,
            r=model.lora.r,
            lora_alpha=model.lora.alpha,
            lora_dropout=0,
            bias="none",
            target_modules=list(model.lora.target_modules),
            use_gradient_checkpointing=checkpointing,
            random_state=seed,
            max_seq_length=model.max_length,
        )
    else:
        _check_fit(loaded, model.adapter)
    tokenizer = load_tokenizer(model.name, model.eos_token, model.pad_token, model.tokenizer_json)
    set_generation_config(loaded, tokenizer)
    return loaded, tokenizer


def check_vllm(model: "ModelBlock", use_vllm: bool) -> None:
    """Make sure, before anything is loaded, that vLLM can sample where a recipe asks for it.

    Raises:
        InputError: it is not installed, the card is too old for it, or the trainer cannot hand it 4-bit weights.
    """
    if not use_vllm:
        return
    import torch

    cure = "leave training.use_vllm out"
    if importlib.util.find_spec("vllm") is None:
        raise InputError(f"training.use_vllm: vLLM is not installed; run make setup-vllm, or {cure}")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        raise InputError(f"training.use_vllm: vLLM needs a GPU of the Ampere generation or later, not a T4; {cure}")
    if choose_backend(model) == "hf" and model.load_in_4bit:
        raise InputError(
            "training.use_vllm: without Unsloth, vLLM cannot take over 4-bit weights; set model.load_in_4bit=false, or "
            + cure
        )


def _is_spare(tokenizer: "PreTrainedTokenizerBase", token: str) -> bool:
    return token in tokenizer.get_vocab() and token not in (tokenizer.unk_token, tokenizer.eos_token)


def _not_found(name: str, error: Exception) -> InputError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if name.count("/") > 1 and not Path(name).exists():  # not a hub id, about whose form the reason would be
        reason = f"no such folder; {missing_cure(Path(name))}"
    return InputError(
        f"{name}: cannot be loaded as a model ({reason[:200]}); give a folder with config.json and weights, or a "
        "hub id while online"
    )
