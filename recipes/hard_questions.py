"""The questions that GRPO has something to learn from: those whose gold answers the model finds least likely.

    python recipes/hard_questions.py recipes/tiny/grpo.yaml -o runs/tiny-hard.json --share 0.5
    python recipes/grpo.py recipes/tiny/grpo.yaml data.train=runs/tiny-hard.json

GRPO learns from differences between the answers to one question. After SFT most questions are answered alike every
time, and take their share of the steps all the same. This writes the ``--share`` of the recipe's ``data.train`` with
the highest ``PPL(gold answer | prompt)``, in the file's order: one forward of each question, no answers sampled.

- Model, adapter and prompts are the recipe's own: rules and examples, and the tag where the model chooses.
- The model is loaded by transformers, whatever ``model.backend`` says.
- A question may be hard because its gold answer is wrong: the five hardest are shown; look at them.

Raises ``InputError`` (exit code 2) for anything wrong with the recipe or the data.
"""

from pathlib import Path
from statistics import median

import click
import torch
from tqdm import tqdm

from malpyeong.config import GRPORecipe, load_recipe
from malpyeong.environment import prepare_environment
from malpyeong.errors import InputError, printable
from malpyeong.files import check_writable
from malpyeong.model import load_for_prediction
from malpyeong.perplexity import answer_perplexities
from malpyeong.records import write_records
from malpyeong.training import load_questions, sft_dataset


@click.command()
@click.argument("recipe_file", metavar="RECIPE", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[block.key=value]...")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="A contest file.")
@click.option("--share", type=click.FloatRange(0, 1, min_open=True), default=0.5, show_default=True)
def main(recipe_file: Path, overrides: tuple[str, ...], output: Path, share: float) -> None:
    """Write the hardest questions of a GRPO RECIPE."""
    prepare_environment()
    recipe = load_recipe(recipe_file, overrides, GRPORecipe)
    block = recipe.model
    questions = load_questions(recipe.data.train, recipe.data)
    check_writable(output)
    model, tokenizer = load_for_prediction(block.name, block.adapter, block.dtype, block.load_in_4bit)
    rows = sft_dataset(tokenizer, questions, block.max_length)
    starts = [labels.count(-100) for labels in rows["labels"]]
    prompts = [ids[:start] for ids, start in zip(rows["input_ids"], starts, strict=True)]
    answers = [ids[start:] for ids, start in zip(rows["input_ids"], starts, strict=True)]
    try:
        found = answer_perplexities(model, prompts, answers, tokenizer.pad_token_id)
        ppl = dict(tqdm(found, total=len(answers), desc="perplexity", unit="question"))
    except torch.OutOfMemoryError:
        raise InputError(
            "the GPU's memory does not suffice; set model.load_in_4bit=true, or take a smaller model"
        ) from None
    ranked = sorted(ppl, key=lambda place: (-ppl[place], place))
    hard = ranked[: max(1, round(share * len(ranked)))]
    write_records(output, [questions.records[place] for place in sorted(hard)])
    for place in ranked[:5]:
        record = questions.records[place]
        click.echo(f"  {ppl[place]:8.3f}  id {printable(record.id, 40)}: {printable(record.question, 100)}")
    click.echo(
        f"{output}: the {len(hard)} hardest of {len(ranked)} questions, perplexity {ppl[hard[-1]]:.3f} and more "
        f"(median of all {median(ppl.values()):.3f})"
    )


if __name__ == "__main__":
    main()
