"""Make the tiny Korean base model that the demo fine-tunes: tokenizer, Qwen3 architecture, pre-training.

    python -m tools.tiny_base -o runs/tiny_base

No weights can be downloaded everywhere, and most readers try a repository on a laptop first; this model lets
them run the very code that a GPU run takes. It reads one character at a time (a syllable may be copied or
replaced but never hidden inside a longer token); the phrases of the prompt are one token each.

Pre-training sees what a base model has seen before fine-tuning: the language of the *train* split (the words of its
sentences, in any order), the norms as prose, before/after pairs, the rule book, and the task of copying a text. It
never sees the contest's answer form, nor any sentence of dev, test or unseen.
"""

import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import click
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, set_seed

from malpyeong.contest.answer import INSTRUCTION
from malpyeong.files import digest, new_folder
from malpyeong.terminal import Command
from tools.samples.build import CHOOSE, CORRECT, build_splits, conclusion, split_frames
from tools.samples.items import Item, draw_words, fill, load_rules

END, TURN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
THINKING = ("<think>", "</think>")
PHRASES = (INSTRUCTION, CORRECT, CHOOSE)

# Qwen3's chat format, for text messages.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a character tokenizer over the sample text, with bytes for every character it has not seen."""
    texts = [f"{entry.record.question}\n{entry.record.answer}" for entry in build_splits()["train"]]
    texts += [f"{rule['id']}{rule['title']}{rule['text']}{''.join(rule['examples'])}" for rule in load_rules()]
    ascii_ = [chr(code) for code in range(0x20, 0x7F)]
    characters = sorted({*"".join(texts), *ascii_, *"ㄱㄴㄷㄹㅁㅂㅅㅇㅈㅊㅋㅌㅍㅎㅏㅑㅓㅕㅗㅛㅜㅠㅡㅣ“”‘’"})
    special = [END, TURN, TURN_END]
    vocabulary = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(vocabulary)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in (*THINKING, *PHRASES)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def documents(rng: random.Random, tokenizer: PreTrainedTokenizerFast) -> Iterator[str]:
    """Yield pre-training documents without end.

    Every context is words of the sample language in any order, among them some that do not exist: a model that copies
    sentences it knows learns them by heart, and drifts into them when it has to copy another one.
    """
    frames = [(item, frame) for item, split, frame in split_frames() if split == "train"]
    words = sorted({word for _, frame in frames for word in fill(frame, draw_words(rng)).split() if "[]" not in word})
    items, rules = [item for item, _ in frames], load_rules()
    # The 2,350 syllables of KS X 1001 are what Korean text is made of; those that the tokenizer does not have are
    # three byte tokens each, which must be copied too.
    letters = [bytes((lead, trail)).decode("euc-kr") for lead in range(0xB0, 0xC9) for trail in range(0xA1, 0xFF)]
    letters += sorted(letter for letter in tokenizer.get_vocab() if len(letter) == 1)

    def word() -> str:
        return rng.choice(words) if rng.random() < 0.7 else "".join(rng.choices(letters, k=rng.randint(1, 4)))

    def context() -> str:
        left, right = (" ".join(word() for _ in range(rng.randint(0, 5))) for _ in range(2))
        return f"{left} []{rng.choice(('', ' '))}{right}{rng.choice('..?')}".strip()

    while True:
        item = rng.choice(items)
        sentence = context()
        right, wrong = sentence.replace("[]", item.right), sentence.replace("[]", item.wrong)
        roll = rng.random()
        if roll < 0.08:
            yield _copy_task("".join(rng.choices(letters, k=rng.randint(5, 40))))
        elif roll < 0.28:
            yield _copy_task(context().replace("[]", " ".join(word() for _ in range(rng.randint(1, 3)))))
        elif roll < 0.63:
            yield f"고치기 전: {wrong}\n고친 뒤: {right}\n{_norm(item, right, rng)}"
        elif roll < 0.82:
            first, second = rng.sample((item.right, item.wrong), 2)
            framed = sentence.replace("[]", f"{{{first}/{second}}}")
            yield f"{framed}\n앞: {sentence.replace('[]', first)}\n뒤: {sentence.replace('[]', second)}"
        elif roll < 0.95:
            yield _norm(item, right, rng)
        else:
            rule = rng.choice(rules)
            yield f"{rule['id']} {rule['title']}: {rule['text']} 예: {', '.join(rule['examples'])}"


def _copy_task(text: str) -> str:
    ask = f"{TURN}user\n다음을 그대로 옮기세요.\n{text}{TURN_END}\n"
    return f"{ask}{TURN}assistant\n<think>\n\n</think>\n\n{text}{TURN_END}"


def _norm(item: Item, right: str, rng: random.Random) -> str:
    return f"'{item.wrong}', '{item.right}': {item.reason} {conclusion(item, right, rng)}"


def batches(rng: random.Random, tokenizer: PreTrainedTokenizerFast, rows: int, length: int) -> Iterator[torch.Tensor]:
    """Yield token ids of shape (rows, length), documents packed one after the other."""
    stream: list[int] = []
    for document in documents(rng, tokenizer):
        stream += [*tokenizer(document, add_special_tokens=False)["input_ids"], tokenizer.pad_token_id]
        if len(stream) >= rows * length:
            yield torch.tensor(stream[: rows * length]).view(rows, length)
            stream = []


@click.command(cls=Command)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--steps", default=4000, show_default=True)
@click.option("--hidden", default=192, show_default=True)
@click.option("--layers", default=4, show_default=True)
@click.option("--rows", default=16, show_default=True, help="Rows of a batch.")
@click.option("--length", default=256, show_default=True, help="Tokens of a row.")
@click.option("--learning-rate", default=2e-3, show_default=True, help="AdamW's; Muon's is twice this.")
@click.option("--bf16", is_flag=True, help="Multiply in bfloat16: faster on CPUs with avx512_bf16 only.")
@click.option("--compile", "compiled", is_flag=True, help="Compile the model first: faster, needs a C++ compiler.")
@click.option("--seed", default=0, show_default=True)
def main(
    output: Path,
    steps: int,
    hidden: int,
    layers: int,
    rows: int,
    length: int,
    learning_rate: float,
    bf16: bool,
    compiled: bool,
    seed: int,
) -> None:
    """Pre-train the tiny model on the sample language and write it to a new folder."""
    set_seed(seed)
    tokenizer = make_tokenizer()
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=math.ceil(len(tokenizer) / 64) * 64,
            hidden_size=hidden,
            intermediate_size=hidden * 3,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 64,
            head_dim=64,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=0.02,
        )
    )
    click.echo(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(tokenizer)} tokens")
    # Muon for the matrices, AdamW for embeddings and norms: copying, which every answer needs, is learnt in less than
    # half the steps that AdamW alone takes.
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in model.named_parameters() if weight.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, 2 * learning_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min(1, (step + 1) / 100) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2),
        )
        for optimizer in optimizers
    ]
    forward = torch.compile(model) if compiled else model
    stream, start = batches(random.Random(seed), tokenizer, rows, length), time.perf_counter()
    for step in range(steps):
        ids = next(stream)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == steps - 1:
            click.echo(f"step {step:5d}  loss {loss.item():.4f}  {time.perf_counter() - start:6.0f} s")
    with new_folder(output) as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    click.echo(json.dumps({"sha256": digest(output / "model.safetensors")}))


if __name__ == "__main__":
    main()
