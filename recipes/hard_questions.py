"""The questions that GRPO has something to learn from.

    python recipes/hard_questions.py recipes/tiny/grpo.yaml -o runs/tiny-hard.json --share 0.5
    python recipes/hard_questions.py recipes/tiny/grpo.yaml -o runs/tiny-hard.json --pass-rate 0.1 0.9
    python recipes/grpo.py recipes/tiny/grpo.yaml data.train=runs/tiny-hard.json

GRPO learns from differences between the completions of one question. After SFT most questions are answered well every
time, and take their share of the steps all the same. This writes part of the recipe's ``data.train``, in the file's
order:

- ``--share``: those with the highest ``PPL(gold answer | prompt)``: one forward of each question, nothing is sampled.
- ``--pass-rate LOW HIGH``: those of whose ``--samples`` completions, sampled as in training, a share between the two
  has the right sentence. What is never right is left aside as too hard (or wrongly labelled), what is always right as
  known. The rates are kept in ``NAME.rates.jsonl``: another band of the same model samples nothing, and a run that was
  killed goes on. ``--easy-first`` writes the highest rate first, to be read with ``training.shuffle=false``.

What both gain on the sample data is in docs/compare.md ("Which questions").

- Model, adapter and prompts are the recipe's own; rules and examples are fitted to ``model.max_length`` as in SFT, and
  as in its loss the tag (where the model chooses) and the end of the turn count as parts of the answer.
- The model is loaded by transformers, whatever ``model.backend`` says.
- A question may be hard because its gold answer is wrong. The hardest are shown: look at them, all the more where SFT
  was trained on the same questions, for what it has not learnt there may be what is not to be learnt.

Raises ``InputError`` (exit code 2) for anything wrong with the recipe or the data.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median

import click

from malpyeong.config.load import load_recipe
from malpyeong.config.recipe import GRPORecipe
from malpyeong.contest.records import write_records
from malpyeong.errors import InputError, printable
from malpyeong.files import PartFile, check_writable
from malpyeong.metrics.exact_match import exact_match
from malpyeong.models.adapter import check_adapter
from malpyeong.models.environment import prepare_environment
from malpyeong.models.load import load_for_prediction
from malpyeong.models.memory import out_of_memory
from malpyeong.prompts.rule_choice import split_choice
from malpyeong.tasks.task import grammar_only
from malpyeong.terminal import Command
from malpyeong.training.data import Questions, grpo_prompts, load_train, sft_dataset, with_prompt_data
from malpyeong.training.run import inputs_of

ASKED = ("data.train", "data.context", "data.labels")


def perplexities(recipe: GRPORecipe, questions: Questions) -> list[float]:
    """Return PPL(gold answer | prompt) of each question."""
    from tqdm import tqdm

    from malpyeong.training.perplexity import answer_perplexities

    block = recipe.model
    model, tokenizer = load_for_prediction(block.name, block.adapter, block.dtype, block.load_in_4bit)
    rows = sft_dataset(tokenizer, questions, block.max_length)
    starts = [labels.count(-100) for labels in rows["labels"]]
    prompts = [ids[:start] for ids, start in zip(rows["input_ids"], starts, strict=True)]
    answers = [ids[start:] for ids, start in zip(rows["input_ids"], starts, strict=True)]
    measured = answer_perplexities(model, prompts, answers, tokenizer.pad_token_id)
    ppl = dict(tqdm(measured, total=len(answers), desc="perplexity", unit="question"))
    return [ppl[row] for row in range(len(answers))]


def pass_rates(recipe: GRPORecipe, questions: Questions, samples: int, path: Path) -> list[float]:
    """Return each question's share of completions with the right sentence, sampled as in training; keep them in a file.

    Raises:
        InputError: the file holds another model's rates, or others of this one.
    """
    from tqdm import tqdm

    from malpyeong.decoding.answers import sample
    from malpyeong.decoding.engines import Decoding, TransformersEngine

    block, training, records = recipe.model, recipe.training, questions.records
    # The engine's first answer is greedy and not counted.
    decoding = Decoding(False, samples + 1, training.temperature, training.seed, training.max_completion_length)
    inputs = {key: value for key, value in inputs_of(recipe).items() if key.startswith("model.") or key in ASKED}
    file = PartFile(path, {**inputs, **asdict(decoding), "samples": samples, "max_length": block.max_length})
    try:
        right = {piece["id"]: int(piece["right"]) for piece in file.pieces}
    except (KeyError, TypeError, ValueError):
        raise file.damaged() from None
    done = {row for row, record in enumerate(records) if record.id in right}
    if len(done) < len(records):
        model, tokenizer = load_for_prediction(block.name, block.adapter, block.dtype, block.load_in_4bit)
        prompts = grpo_prompts(tokenizer, questions, block.max_length, training.max_completion_length)
        engine = TransformersEngine(model, tokenizer, decoding)
        rows = sample(engine, prompts, training.effective_batch_size, done)
        with tqdm(total=len(records), initial=len(done), desc="pass rate", unit="question") as bar:
            for row, (_, *answers) in rows:
                record = records[row]
                texts = [split_choice(text)[1] if questions.mode == "choose_rule" else text for text in answers]
                right[record.id] = int(sum(exact_match(text, record.answer or "") for text in texts))
                if row not in done:
                    file.add({"id": record.id, "right": right[record.id]})
                    bar.update()
    return [right[record.id] / samples for record in records]


def hardest(ppl: Sequence[float], share: float) -> tuple[list[int], dict[int, str], str]:
    """Return the rows of the highest perplexities in their order, what to show of the hardest, and a line."""
    ranked = sorted(range(len(ppl)), key=lambda row: (-ppl[row], row))
    chosen = sorted(ranked[: max(1, round(share * len(ranked)))])
    line = (
        f"the {len(chosen)} hardest of {len(ppl)} questions, perplexity {min(ppl[row] for row in chosen):.3f} and more "
        f"(median of all {median(ppl):.3f})"
    )
    return chosen, {row: f"{ppl[row]:8.3f}" for row in ranked[:5]}, line


def within(
    rates: Sequence[float], band: tuple[float, float], samples: int, easy_first: bool
) -> tuple[list[int], dict[int, str], str]:
    """Return the rows whose pass rate is in the band, what to show of those that are never right, and a line."""
    low, high = band
    chosen = [row for row, rate in enumerate(rates) if low <= rate <= high]
    if easy_first:
        chosen.sort(key=lambda row: -rates[row])
    never = {row: "   never" for row, rate in enumerate(rates) if rate == 0}
    line = (
        f"{len(chosen)} of {len(rates)} questions, right in {low:g} to {high:g} of {samples} completions; "
        f"never right {len(never)}, always right {rates.count(1)}, mean {fmean(rates):.3f}"
    )
    return chosen, never, line


@click.command(cls=Command)
@click.argument("recipe_file", metavar="RECIPE", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[block.key=value]...")
@click.option("--drop-leaks", is_flag=True, help="Leave the questions of data.dev out of data.train.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Contest file of the hardest.")
@click.option(
    "--share", type=click.FloatRange(0, 1, min_open=True), default=0.5, show_default=True, help="Of data.train."
)
@click.option(
    "--pass-rate", "band", type=click.FloatRange(0, 1), nargs=2, metavar="LOW HIGH", help="Instead of --share."
)
@click.option("--samples", type=click.IntRange(min=2), default=8, show_default=True, help="Of each, for --pass-rate.")
@click.option("--easy-first", is_flag=True, help="Write the highest pass rate first.")
def main(
    recipe_file: Path,
    overrides: tuple[str, ...],
    drop_leaks: bool,
    output: Path,
    share: float,
    band: tuple[float, float] | None,
    samples: int,
    easy_first: bool,
) -> None:
    """Write the questions of a GRPO RECIPE that are worth asking."""
    if easy_first and not band:
        raise InputError("--easy-first: goes with --pass-rate LOW HIGH")
    prepare_environment()
    if drop_leaks:
        overrides = (*overrides, "data.drop_leaks=true")
    recipe = load_recipe(recipe_file, overrides, GRPORecipe)
    block, data = recipe.model, recipe.data
    questions = with_prompt_data(load_train(data), data)
    records = questions.records
    grammar_only(questions.task, {"--pass-rate": band})
    check_adapter(block.adapter)
    check_writable(output, data.train, data.context, data.labels)
    cure = "a smaller model" if block.load_in_4bit else "model.load_in_4bit=true or a smaller model"
    with out_of_memory(f"take {cure}"):
        if band is None:
            chosen, shown, line = hardest(perplexities(recipe, questions), share)
        else:
            rates = pass_rates(recipe, questions, samples, output.with_name(f"{output.stem}.rates.jsonl"))
            chosen, shown, line = within(rates, band, samples, easy_first)
    if not chosen:
        raise InputError(f"{data.train}: nothing to ask: {line}; widen --pass-rate")
    write_records(output, [records[row] for row in chosen])
    for row, score in list(shown.items())[:5]:
        click.echo(f"  {score}  id {printable(records[row].id, 40)}: {printable(records[row].question, 100)}")
    click.echo(f"{output}: {line}")


if __name__ == "__main__":
    main()
