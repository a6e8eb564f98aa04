"""Answer every question of a file: ``python -m malpyeong.predict MODEL QUESTIONS -o PRED``."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from malpyeong.errors import InputError
from malpyeong.files import check_writable
from malpyeong.records import Record, load_records, write_records

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def predict(
    model: Any,  # noqa: ANN401 -- a transformers or PEFT model
    tokenizer: "PreTrainedTokenizerBase",
    records: Sequence[Record],
    batch_size: int = 16,
    max_new_tokens: int = 512,
) -> Iterator[tuple[int, str]]:
    """Yield (position, answer) for every record, greedily decoded, longest prompts first.

    Prompts are padded on the left within a batch; answers come as generated, without the end-of-turn token.
    """
    import torch

    from malpyeong.prompts import build_messages, prompt_ids

    prompts = [prompt_ids(tokenizer, build_messages(record)) for record in records]
    order = sorted(range(len(records)), key=lambda index: -len(prompts[index]))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        batch = tokenizer.pad(
            {"input_ids": [prompts[place] for place in places]}, return_tensors="pt", padding_side="left"
        ).to(model.device)
        with torch.inference_mode():
            output = model.generate(
                **batch,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
            )
        completions = output[:, batch["input_ids"].shape[1] :]
        yield from zip(places, tokenizer.batch_decode(completions, skip_special_tokens=True), strict=True)


@click.command()
@click.argument("model")
@click.argument("questions", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Prediction file to write.")
@click.option("--adapter", help="Folder of a LoRA adapter to put on MODEL.")
@click.option("--batch-size", default=16, show_default=True, type=click.IntRange(min=1))
@click.option("--max-new-tokens", default=512, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "float16", "bfloat16"]),
)
@click.option("--load-in-4bit", is_flag=True, help="Hold MODEL in 4-bit NF4.")
def main(
    model: str,
    questions: Path,
    output: Path,
    adapter: str | None,
    batch_size: int,
    max_new_tokens: int,
    dtype: str,
    load_in_4bit: bool,
) -> None:
    """Answer QUESTIONS (a contest file) with MODEL (a folder or hub id), greedily."""
    records = load_records(questions)
    if output.exists() and output.samefile(questions):
        raise InputError(f"{output}: would overwrite the questions; choose another name")
    check_writable(output)
    from tqdm import tqdm

    from malpyeong.model import load_for_prediction

    loaded, tokenizer = load_for_prediction(model, adapter, dtype, load_in_4bit)
    answers = [""] * len(records)
    with tqdm(total=len(records), desc="predict", unit="record") as progress:
        for place, answer in predict(loaded, tokenizer, records, batch_size, max_new_tokens):
            answers[place] = answer
            progress.update()
    write_records(output, [record.with_answer(text) for record, text in zip(records, answers, strict=True)])
    click.echo(f"{output}: {len(records)} answers")


if __name__ == "__main__":
    main()
