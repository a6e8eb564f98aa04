"""The questions that GRPO has something to learn from: those whose gold answers the model finds least likely.

    python recipes/hard_questions.py recipes/tiny/grpo.yaml -o runs/tiny-hard.json --share 0.5
    python recipes/grpo.py recipes/tiny/grpo.yaml data.train=runs/tiny-hard.json

GRPO learns from differences between the completions of one question. After SFT most questions are answered well every
time, and take their share of the steps all the same. This writes the ``--share`` of the recipe's ``data.train`` with
the highest ``PPL(gold answer | prompt)``, in the file's order: one forward of each question, nothing is sampled. What
it gains on the sample data is in docs/grpo-tiny.md.

- Model, adapter and prompts are the recipe's own; rules and examples are fitted to ``model.max_length`` as in SFT, and
  as in its loss the tag (where the model chooses) and the end of the turn count as parts of the answer.
- The model is loaded by transformers, whatever ``model.backend`` says.
- A question may be hard because its gold answer is wrong. The hardest are shown: look at them, all the more where SFT
  was trained on the same questions, for what it has not learnt there may be what is not to be learnt.

Raises ``InputError`` (exit code 2) for anything wrong with the recipe or the data.
"""

from pathlib import Path
from statistics import median

import click

from malpyeong.config.load import load_recipe
from malpyeong.config.recipe import GRPORecipe
from malpyeong.contest.records import write_records
from malpyeong.errors import printable
from malpyeong.files import check_writable
from malpyeong.models.adapter import check_adapter
from malpyeong.models.environment import prepare_environment
from malpyeong.models.load import load_for_prediction
from malpyeong.models.memory import out_of_memory
from malpyeong.terminal import Command
from malpyeong.training.data import load_train, sft_dataset, with_prompt_data


@click.command(cls=Command)
@click.argument("recipe_file", metavar="RECIPE", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[block.key=value]...")
@click.option("--drop-leaks", is_flag=True, help="Leave the questions of data.dev out of data.train.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Contest file of the hardest.")
@click.option(
    "--share", type=click.FloatRange(0, 1, min_open=True), default=0.5, show_default=True, help="Of data.train."
)
def main(recipe_file: Path, overrides: tuple[str, ...], drop_leaks: bool, output: Path, share: float) -> None:
    """Write the hardest questions of a GRPO RECIPE."""
    prepare_environment()
    if drop_leaks:
        overrides = (*overrides, "data.drop_leaks=true")
    recipe = load_recipe(recipe_file, overrides, GRPORecipe)
    block, data = recipe.model, recipe.data
    questions = with_prompt_data(load_train(data), data)
    check_adapter(block.adapter)
    check_writable(output, data.train, data.context, data.labels)
    from tqdm import tqdm

    from malpyeong.training.perplexity import answer_perplexities

    cure = "a smaller model" if block.load_in_4bit else "model.load_in_4bit=true or a smaller model"
    with out_of_memory(f"take {cure}"):
        model, tokenizer = load_for_prediction(block.name, block.adapter, block.dtype, block.load_in_4bit)
        rows = sft_dataset(tokenizer, questions, block.max_length)
        starts = [labels.count(-100) for labels in rows["labels"]]
        prompts = [ids[:start] for ids, start in zip(rows["input_ids"], starts, strict=True)]
        answers = [ids[start:] for ids, start in zip(rows["input_ids"], starts, strict=True)]
        perplexities = answer_perplexities(model, prompts, answers, tokenizer.pad_token_id)
        ppl = dict(tqdm(perplexities, total=len(answers), desc="perplexity", unit="question"))
    ranked = sorted(ppl, key=lambda place: (-ppl[place], place))
    hard = ranked[: max(1, round(share * len(ranked)))]
    write_records(output, [questions.records[place] for place in sorted(hard)])
    for place in hard[:5]:
        record = questions.records[place]
        click.echo(f"  {ppl[place]:8.3f}  id {printable(record.id, 40)}: {printable(record.question, 100)}")
    click.echo(
        f"{output}: the {len(hard)} hardest of {len(ranked)} questions, perplexity {ppl[hard[-1]]:.3f} and more "
        f"(median of all {median(ppl.values()):.3f})"
    )


if __name__ == "__main__":
    main()
