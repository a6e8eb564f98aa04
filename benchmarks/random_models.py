"""Language models with random weights in the shapes of real ones: whole checkpoint folders, made on the spot.

    python -m benchmarks.random_models 4b runs/bench/models/4b

Memory and speed do not depend on the values of weights; both backends load the folder as they would a downloaded one.
Shards are drawn one after the other in bfloat16, on the GPU where there is one, so that 23 GB need neither 23 GB of
memory nor many minutes. The tokenizer is the sample model's, padded to the vocabulary.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from safetensors.torch import save_file

from malpyeong.config.recipe import LoraBlock
from malpyeong.contest.answer import format_problem
from malpyeong.contest.records import Record, load_records, write_records
from malpyeong.files import new_folder
from malpyeong.prompts.messages import build_messages, prompt_ids
from malpyeong.samples import DATA, TINY_BASE

# From the models' published config.json, as written down here by hand: Qwen/Qwen3-4B, Qwen/Qwen3-8B,
# K-intelligence/Midm-2.0-Base-Instruct (a Llama of 11.5 B parameters).
SHAPES: dict[str, dict[str, Any]] = {
    "4b": {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "8b": {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "11.5b": {
        "model_type": "llama",
        "vocab_size": 131_392,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "tiny": {  # to try the benchmark itself on a CPU
        "model_type": "qwen3",
        "vocab_size": 2_000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "tie_word_embeddings": True,
    },
}
_SPREAD = 0.02
_SHARD_BYTES = 4 * 2**30


def empty_model(shape: str) -> Any:  # noqa: ANN401 -- a transformers model
    """Return a model of a shape without memory for its weights (on the meta device)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**SHAPES[shape], max_position_embeddings=32_768, dtype="bfloat16")
    config.eos_token_id, config.pad_token_id, config.bos_token_id = 2, 0, None  # the sample tokenizer's
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def make_model(folder: Path, shape: str, seed: int = 0) -> None:
    """Write a checkpoint folder: sharded bfloat16 safetensors, configuration, tokenizer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    model = empty_model(shape)
    shards = list(_shards(model))
    with new_folder(folder) as made:
        places = {}
        for number, names in enumerate(shards, start=1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            places |= dict.fromkeys(names, file)
            tensors = {name: _draw(sizes, generator, device).cpu() for name, sizes in names.items()}
            save_file(tensors, made / file, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": places}
        (made / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(made)
        model.generation_config.save_pretrained(made)
        make_tokenizer(made, SHAPES[shape]["vocab_size"])


def make_tokenizer(folder: Path, vocabulary: int) -> None:
    """Write the sample model's tokenizer with entries that never occur, up to ``vocabulary``."""
    tokenizer = json.loads((TINY_BASE / "tokenizer.json").read_text("utf-8"))
    vocab = tokenizer["model"]["vocab"]
    first = 1 + max(*vocab.values(), *(token["id"] for token in tokenizer["added_tokens"]))
    vocab |= {f"~{number:x}~": number for number in range(first, vocabulary)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    settings = json.loads((TINY_BASE / "tokenizer_config.json").read_text("utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 32_768}), encoding="utf-8")
    shutil.copy(TINY_BASE / "chat_template.jinja", folder)


def make_adapter(folder: Path, base: Path, shape: str, recipe: Path) -> None:
    """Write a LoRA adapter as ``recipe`` describes it, with random A and B: as if SFT had been there."""
    from peft import LoraConfig

    lora = LoraBlock.model_validate(yaml.safe_load(recipe.read_text("utf-8"))["model"]["lora"])
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name, module in empty_model(shape).named_modules():
        if name.rpartition(".")[2] in lora.target_modules:
            for part, sizes in (("A", (lora.r, module.in_features)), ("B", (module.out_features, lora.r))):
                key = f"base_model.model.{name}.lora_{part}.weight"
                weights[key] = _SPREAD * torch.randn(sizes, generator=generator)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        target_modules=lora.target_modules,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
        inference_mode=True,
    )
    with new_folder(folder) as made:
        save_file(weights, made / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(made)


def make_questions(path: Path, model: Path, lengths: Sequence[int]) -> None:
    """Write one record for each length, whose whole prompt has exactly that many tokens of the model's tokenizer.

    Raises:
        ValueError: a length is less than what every prompt has.
    """
    from malpyeong.models.load import load_tokenizer

    tokenizer = load_tokenizer(str(model))
    samples = [
        record
        for record in load_records(DATA / "train.json", answers="gold")
        if format_problem(record.answer or "") is None
    ]
    records = []
    for number, length in enumerate(lengths):
        sample = samples[number % len(samples)]
        empty = len(prompt_ids(tokenizer, build_messages(Record(str(number), "교정형", "가"))))
        text = "가나다라마바사 아자차카타파하 "
        question = (text * (length // len(text) + 1))[: length - empty + 1]
        record = Record(str(number), "교정형", question, sample.answer)
        found = len(prompt_ids(tokenizer, build_messages(record)))
        if found != length:
            raise ValueError(f"a prompt of {length} tokens cannot be made (got {found}; an empty one has {empty - 1})")
        records.append(record)
    write_records(path, records)


def _shards(model: Any) -> Iterator[dict[str, torch.Size]]:  # noqa: ANN401 -- a transformers model
    """Yield name → sizes of the weights of each file; a tied output matrix is not stored."""
    shard: dict[str, torch.Size] = {}
    used = 0
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if shard and used + 2 * tensor.numel() > _SHARD_BYTES:
            yield shard
            shard, used = {}, 0
        shard[name] = tensor.shape
        used += 2 * tensor.numel()
    yield shard


def _draw(sizes: torch.Size, generator: torch.Generator, device: str) -> torch.Tensor:
    if len(sizes) == 1:  # of a norm
        return torch.ones(sizes, dtype=torch.bfloat16, device=device)
    return torch.empty(sizes, dtype=torch.bfloat16, device=device).normal_(0, _SPREAD, generator=generator)


@click.command()
@click.argument("shape", type=click.Choice(list(SHAPES)))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--recipe", type=click.Path(path_type=Path), help="Also write FOLDER-adapter, with this recipe's LoRA.")
def main(shape: str, folder: Path, recipe: Path | None) -> None:
    """Write a model of SHAPE with random weights to FOLDER."""
    if not folder.exists():
        make_model(folder, shape)
    adapter = folder.with_name(f"{folder.name}-adapter")
    if recipe and not adapter.exists():
        make_adapter(adapter, folder, shape, recipe)


if __name__ == "__main__":
    main()
