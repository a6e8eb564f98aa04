"""A language model with random weights in a real one's shape: a whole checkpoint folder, made on the spot.

    python -m benchmarks.random_models Qwen/Qwen3-4B runs/models/4b

Speed and memory do not depend on the values of weights, but rewards, stopping and constrained decoding depend on what
is written, and random weights write noise without end. So a few weights are set: whatever the prompt, the model opens
with one of four verdicts, goes on from syllable to syllable in a fixed order, leaving some out, and stops. Its answers
are well formed and differ; the greedy one has the gold answer's sentence. The tokenizer is the sample model's, padded
with the other Hangul syllables.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

from malpyeong.contest.records import Record, write_records
from malpyeong.files import new_folder
from malpyeong.models.memory import SHAPES, ModelShape
from malpyeong.prompts.messages import build_messages, prompt_ids
from malpyeong.samples import TINY_BASE
from malpyeong.terminal import Command

TINY = ModelShape(128, 2, 2, 1, 64, 128, 2_000, True)  # to try a benchmark itself on a CPU
VERDICTS = [f'"{word}."가 옳다. ' for word in ("하나", "둘", "셋", "넷")]
_QUIET = 0.05  # what blocks add to the residual stream, of what usual random ones add
_GATE, _DOWN = 0.3, 0.5  # the weights that make a token call for its successors
_LOGIT = 30  # of a token that follows
_LIKELIER = 1.04  # times that for the likeliest one


def make_model(folder: Path, name: str, syllables: int) -> None:
    """Write a checkpoint folder in bfloat16 with configuration and tokenizer.

    Args:
        folder: to write.
        name: of ``malpyeong.models.memory.SHAPES``, or tiny.
        syllables: of the order that answers go through; a sampled answer has some three fifths of them, a greedy one
            half.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = TINY if name == "tiny" else SHAPES[name]
    config = AutoConfig.for_model(
        "qwen3" if name == "tiny" or "Qwen3" in name else "llama",
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=32_768,
        eos_token_id=2,  # the sample tokenizer's
        pad_token_id=0,
        bos_token_id=None,
    )
    needed = 2.5 * (shape.block_parameters + shape.other_parameters)
    on_card = torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > needed
    torch.manual_seed(0)
    with new_folder(folder) as made:
        order = make_tokenizer(made, shape.vocabulary, syllables)
        with torch.device("cuda" if on_card else "cpu"), torch.no_grad():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            _make_it_write(model, order)
        model.save_pretrained(made)


def _make_it_write(model: Any, order: Sequence[int]) -> None:  # noqa: ANN401 -- a transformers model
    """Set the weights that make each token of ``order`` call for those that may follow it.

    The first is the one that prompts end with; then come the verdicts, syllables, a period and the end of the turn.
    Each has a dimension of the residual stream for its own, which a neuron of the first block reads, writing to those
    of the successors.
    """
    blocks, last = model.model.layers, len(order) - 1
    for block in blocks:
        block.self_attn.o_proj.weight *= _QUIET
        block.mlp.down_proj.weight *= _QUIET
    places, verdicts = torch.arange(len(order)), len(VERDICTS)
    tokens = torch.tensor(order)
    likelier = (places == 1) | ((places > verdicts) & (places % 2 == 0))
    for weight in {id(one): one for one in (model.get_input_embeddings().weight, model.lm_head.weight)}.values():
        weight[tokens] = torch.zeros_like(weight[tokens])
        weight[tokens, places] = torch.where(likelier, _LIKELIER, 1.0).to(weight)
    mlp = blocks[0].mlp
    mlp.gate_proj.weight[places, places] = mlp.up_proj.weight[places, places] = _GATE
    for place in range(last):
        if place == 0:
            successors = range(1, 1 + verdicts)
        elif place <= verdicts:
            successors = range(1 + verdicts, 3 + verdicts)
        else:
            successors = range(place + 1, min(place + 3, last) + (place + 1 == last))
        mlp.down_proj.weight[list(successors), place] = _DOWN
    model.model.norm.weight.fill_(_LOGIT / (model.config.hidden_size / 2) ** 0.5)


def make_tokenizer(folder: Path, vocabulary: int, syllables: int) -> list[int]:
    """Write the tokenizer; return the ids of the order that answers go through (see :func:`_make_it_write`)."""
    from malpyeong.models.tokenizer import load_tokenizer

    tokenizer = json.loads((TINY_BASE / "tokenizer.json").read_text("utf-8"))
    vocab = tokenizer["model"]["vocab"]
    first = 1 + max(*vocab.values(), *(token["id"] for token in tokenizer["added_tokens"]))
    other = [syllable for syllable in map(chr, range(ord("가"), ord("힣") + 1)) if syllable not in vocab]
    entries = [*VERDICTS, *other, *(f"~{number:x}~" for number in range(vocabulary))]
    vocab |= {entry: first + number for number, entry in enumerate(entries[: vocabulary - first])}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    settings = json.loads((TINY_BASE / "tokenizer_config.json").read_text("utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 32_768}), encoding="utf-8")
    shutil.copy(TINY_BASE / "chat_template.jinja", folder)
    loaded = load_tokenizer(str(folder))
    opening = prompt_ids(loaded, build_messages(Record("0", "교정형", "가")))[-1]
    return [opening, *range(first, first + len(VERDICTS) + syllables), vocab["."], loaded.eos_token_id]


def make_questions(path: Path, model: Path, lengths: Sequence[int]) -> None:
    """Write one record for each length, whose whole prompt has exactly that many tokens.

    Raises:
        ValueError: a length is less than what every prompt has.
    """
    from malpyeong.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(model))
    start = tokenizer.get_vocab()[VERDICTS[0]] + len(VERDICTS)
    gold = f"{VERDICTS[0]}{tokenizer.decode(range(start + 1, start + 81, 2))}."
    records = []
    empty = len(prompt_ids(tokenizer, build_messages(Record("0", "교정형", ""))))
    text = "가나다라마바사 아자차카타파하 "
    for number, length in enumerate(lengths):
        question = (text * (length // len(text) + 1))[: length - empty]
        records.append(Record(str(number), "교정형", question, gold))
        found = len(prompt_ids(tokenizer, build_messages(records[-1])))
        if found != length:
            raise ValueError(f"a prompt of {length} tokens cannot be made (got {found}; an empty one has {empty})")
    write_records(path, records)


@click.command(cls=Command)
@click.argument("name", type=click.Choice([*SHAPES, "tiny"]))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--syllables", default=256, show_default=True)
def main(name: str, folder: Path, syllables: int) -> None:
    """Write a model in the shape of NAME with random weights to FOLDER."""
    make_model(folder, name, syllables)


if __name__ == "__main__":
    main()
