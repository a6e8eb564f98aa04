"""Load a model for training or for prediction: one place for both backends and for 4-bit weights.

Training: Unsloth where a GPU that it supports and the package are present, else transformers + PEFT. 4-bit NF4
(QLoRA) works on both, on a CPU too.
"""

import hashlib
import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from malpyeong.errors import InputError
from malpyeong.models.adapter import (
    adapter_folder,
    check_adapter,
    check_base,
    check_fit,
    check_lora,
    check_pair,
    check_target_modules,
    put_adapter,
)
from malpyeong.models.environment import keep_compiled_code, keep_freed_memory, processes, version_problems
from malpyeong.models.memory import VLLM_SHARE, Backend
from malpyeong.models.tokenizer import load_tokenizer, not_found, tokenizer_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from malpyeong.config.recipe import ModelBlock

# On CPUs with avx512_bf16 bitsandbytes looks for an optional kernel on the hub and warns if it is not there.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def choose_backend(model: "ModelBlock") -> Backend:
    """Return ``unsloth`` or ``hf`` for this machine and configuration.

    Raises:
        InputError: Unsloth is asked for where it is not installed or there is no GPU, or for several processes, or for
            float32, which it does not compute in, or other packages' versions are such that it would not work.
    """
    import torch

    if processes() > 1:
        if model.backend == "unsloth":
            raise InputError("model.backend is unsloth, which trains in one process; set model.backend=hf")
        return "hf"
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

    tokenizer = tokenizer_of(model)
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


def load_base(name: str, dtype: "torch.dtype", load_in_4bit: bool = False) -> "PreTrainedModel":
    """Load causal-LM weights from a folder or the hub, 4-bit NF4 with double quantisation if asked.

    Raises:
        InputError: there is no such folder and the hub does not have it or cannot be reached.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if not torch.cuda.is_available():
        keep_freed_memory()
    options: dict[str, Any] = {"dtype": dtype}
    if load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        options["device_map"] = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
    try:
        model = AutoModelForCausalLM.from_pretrained(name, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise not_found(name, error) from None
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


def model_folder(name: str) -> Path | None:
    """Return a model's folder, or that of a hub id in this machine's cache, named after its revision; None if neither
    is here."""
    from huggingface_hub import try_to_load_from_cache

    if Path(name).is_dir():
        return Path(name)
    try:
        cached = try_to_load_from_cache(name, "config.json")
    except ValueError:  # not even the form of a hub id
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def weight_files_digest(name: str) -> str | None:
    """Return a digest that tells a model's weights from others', under whatever name; None if they are not here.

    Of each weight file its size and 64 evenly spaced pieces of it: reading tens of gigabytes would take minutes.
    """
    folder = model_folder(name)
    if folder is None:
        return None
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    pieces = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        pieces.update(str(size).encode())
        with path.open("rb") as file:
            for start in range(0, size, max(1 << 14, size >> 6)):
                file.seek(start)
                pieces.update(file.read(1 << 14))
    return pieces.hexdigest() if files else None


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
        check_fit(loaded, model.adapter)
    tokenizer = tokenizer_of(model)
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
