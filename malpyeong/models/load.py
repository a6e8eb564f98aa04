"""Load a model for training or for prediction: one place for both backends and for 4-bit weights.

Training: Unsloth where a GPU that it supports and the package are present, else transformers + PEFT. 4-bit NF4
(QLoRA) works on both, on a CPU too.
"""

import importlib.util
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from malpyeong.errors import InputError
from malpyeong.models.environment import keep_compiled_code, version_problems
from malpyeong.models.memory import Backend

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from malpyeong.config.recipe import ModelBlock

VLLM_SHARE = 0.4  # of the card's memory, for vLLM's weights and caches where it samples

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

    The adapter is ``model.adapter`` where one is named (GRPO goes on from SFT's), else a new one, drawn after
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
    stop_at_eos(base, tokenizer)
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
    """Load a model, with an adapter on it if one is named, in eval mode; on the GPU if there is one.

    Returns:
        (model, tokenizer), the tokenizer padding on the left.
    """
    import torch

    tokenizer = tokenizer_for_prediction(name, adapter)
    model: Any = load_base(name, pick_dtype(dtype), load_in_4bit=load_in_4bit)
    stop_at_eos(model, tokenizer)
    if adapter:
        model = put_adapter(model, adapter)
    if torch.cuda.is_available() and not load_in_4bit:
        model = model.to("cuda")
    return model.eval(), tokenizer


def tokenizer_for_prediction(name: str, adapter: str | None = None) -> "PreTrainedTokenizerBase":
    """Load the tokenizer that a model, or the adapter on it, was trained with: its eos may not be the base's.

    Its ``model_max_length`` is ``model.max_length`` of the recipe that trained it; of another model it is what its
    files say, or a number beyond any length.
    """
    check_adapter(adapter)
    own = adapter is not None and (Path(adapter) / "tokenizer_config.json").exists()
    return load_tokenizer(str(adapter) if own else name)


def put_adapter(base: Any, adapter: str | Path, is_trainable: bool = False) -> Any:  # noqa: ANN401 -- PEFT models
    """Put a saved LoRA adapter on a base model.

    Raises:
        InputError: the adapter does not fit this base.
    """
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(base, str(adapter), is_trainable=is_trainable)
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputError(
            f"{adapter}: does not fit the base model ({str(error).strip()[:200]}); was it trained on another one?"
        ) from None


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
    tokenizer.chat_template = _without_today(tokenizer.chat_template)
    tokenizer.padding_side = "left"
    loaded: PreTrainedTokenizerBase = tokenizer
    return loaded


_SPARE_TOKENS = ("<|endoftext|>", "<|pad|>", "<pad>", "<|finetune_right_pad_id|>", "<|end_of_text|>")

# Templates ask transformers for today's date by this function. A macro of the same name takes its place, in the
# template itself, so that every program that renders it sees the same prompt on every day.
_FROZEN_DATE = "{%- macro strftime_now(format) -%}01 Jan 2025{%- endmacro -%}"


def _without_today(template: str | dict[str, str]) -> str | dict[str, str]:
    if isinstance(template, dict):
        return {name: str(_without_today(text)) for name, text in template.items()}
    if "strftime_now" not in template or template.startswith(_FROZEN_DATE):
        return template
    return _FROZEN_DATE + template


def stop_at_eos(model: Any, tokenizer: "PreTrainedTokenizerBase") -> None:  # noqa: ANN401 -- a transformers model
    """Let generation stop at the tokenizer's eos token, and at what the model's own files name besides."""
    generation = model.generation_config
    named = generation.eos_token_id
    others = named if isinstance(named, list) else [] if named is None else [named]
    stops = [tokenizer.eos_token_id, *(token for token in others if token != tokenizer.eos_token_id)]
    generation.eos_token_id = stops if len(stops) > 1 else stops[0]
    generation.pad_token_id = tokenizer.pad_token_id


def check_adapter(adapter: str | Path | None) -> dict[str, Any]:
    """Make sure that a named adapter folder holds a whole adapter and return its configuration.

    Raises:
        InputError: it does not.
    """
    if adapter is None:
        return {}
    from safetensors import SafetensorError, safe_open

    weights = Path(adapter) / "adapter_model.safetensors"
    try:
        config: dict[str, Any] = json.loads((Path(adapter) / "adapter_config.json").read_text("utf-8"))
        with safe_open(weights, "numpy"):
            pass
    except OSError:
        raise InputError(f"{adapter}: holds no adapter; train it first (make sft-NAME, or recipes/sft.py)") from None
    except (ValueError, SafetensorError) as error:
        raise InputError(f"{adapter}: the adapter is damaged ({error}); train or copy it again") from None
    return config


def check_lora(model: "ModelBlock") -> None:
    """Make sure that a recipe's LoRA block describes the adapter that it goes on from.

    Raises:
        InputError: rank, alpha or target modules differ.
    """
    if model.adapter is None:
        return
    config = check_adapter(model.adapter)
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
        model_name=model.adapter or model.name,
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
    tokenizer = load_tokenizer(model.name, model.eos_token, model.pad_token, model.tokenizer_json)
    stop_at_eos(loaded, tokenizer)
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
        reason = "no such folder"
    return InputError(
        f"{name}: cannot be loaded as a model ({reason[:200]}); give a folder with config.json and weights, or a "
        "hub id while online"
    )
