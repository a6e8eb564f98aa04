"""PPL mining: label each question with the rules that make its gold answer likelier.

    python recipes/mine.py recipes/tiny/mine.yaml
    python recipes/mine.py recipes/mine.yaml recipes/models/qwen.yaml data.questions=train.json --estimate

What it does:
- Computes PPL(a|q) and PPL(a|c,q) for each rule c that is tried; writes the ``top_k`` rules by delta, and the PPL of
  each option of a choice question (``malpyeong/training/mining.py`` has the formulas).
- Tries ``mining.share`` of all pairs: the rules that BM25 finds by question and gold answer, then round by round those
  that may help more (``malpyeong/training/candidates.py``); with ``--all`` every rule on every question.
- A rule's part of the prompt is computed once for all questions; ``--estimate`` says how many tokens are left.
- ``--resume auto`` resumes from the last batch before a kill to the same file.

In the output folder: ``config.yaml``, ``environment.json`` (versions, digests of the data), ``mining.json`` (digests of
the model's weights and of all tokens, counts) and, last, ``contexts.jsonl``.

Raises ``InputError`` (exit code 2) for anything wrong with the recipe or the data.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

import click

from malpyeong.config.load import load_recipe
from malpyeong.config.recipe import MiningRecipe
from malpyeong.contest.records import Record, load_records
from malpyeong.contest.rulebook import load_rule_book
from malpyeong.errors import InputError, counted, printable
from malpyeong.files import PartFile, check_writable, write_text
from malpyeong.models.adapter import adapter_folder, check_adapter
from malpyeong.models.load import load_for_prediction
from malpyeong.models.memory import out_of_memory
from malpyeong.models.tokenizer import load_tokenizer
from malpyeong.terminal import Command
from malpyeong.training.run import check_run, digests, start_run


@click.command(cls=Command)
@click.argument("recipe_file", metavar="RECIPE", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[block.key=value]...")
@click.option("--resume", type=click.Choice(["never", "auto"]), default="never", show_default=True)
@click.option("--all", "try_all", is_flag=True, help="Try every rule on every question.")
@click.option("--estimate", is_flag=True, help="Say what it would cost, and stop.")
def main(recipe_file: Path, overrides: tuple[str, ...], resume: str, try_all: bool, estimate: bool) -> None:
    """Find the rules that make each gold answer likelier, as RECIPE says."""
    if try_all:
        overrides = (*overrides, "mining.share=1")
    recipe = load_recipe(recipe_file, overrides, MiningRecipe)
    model_block, data, mining = recipe.model, recipe.data, recipe.mining
    import numpy as np
    from tqdm import tqdm

    from malpyeong.training.candidates import ROUNDS, WIDE, named_rules, promising
    from malpyeong.training.mining import improvement_ratios, make_plan, mine, pairs_of, ranked, weights_digest

    records: dict[str, Record] = {}
    for path in data.questions:
        for record in load_records(path, answers="gold"):
            if record.id in records:
                raise InputError(
                    f'{path}: id "{printable(record.id, 40)}" is in an earlier file too; give each its own id'
                )
            records[record.id] = record
    questions, rules = list(records.values()), load_rule_book(data.rules)
    inputs: dict[str, Path | list[Path] | str] = {
        "data.questions": [Path(path) for path in data.questions],
        "data.rules": Path(data.rules),
        "model.name": model_block.name,
    }
    if model_block.adapter:
        check_adapter(model_block.adapter)
        inputs["model.adapter"] = adapter_folder(model_block.adapter) / "adapter_model.safetensors"

    plan = make_plan(load_tokenizer(model_block.name), questions, rules, model_block.max_length, mining.batch_tokens)
    everything = len(questions) * len(rules)
    pairs = max(len(questions), int(mining.share * everything))
    wide = min(WIDE, pairs // len(questions)) if mining.share < 1 else len(rules)
    tokens = plan.tokens(plan.alone()) + round(pairs * fmean(map(len, plan.rows[: len(questions)])))
    click.echo(
        f"{counted(len(questions), 'question')}, {counted(len(rules), 'rule')}: {pairs:,} of {everything:,} pairs "
        f"({pairs / everything:.0%}), about {tokens:,} tokens to compute"
    )
    if estimate:
        return
    output = Path(mining.output)
    result, kept = output / "contexts.jsonl", output / "contexts.part.jsonl"
    sources = digests(inputs)
    check_run(output, recipe, sources, resume == "auto")
    if result.exists():
        kept.unlink(missing_ok=True)
        click.echo(f"{result}: this run has ended already")
        return
    check_writable(result)

    model, tokenizer = load_for_prediction(
        model_block.name, model_block.adapter, model_block.dtype, model_block.load_in_4bit
    )
    start_run(output, recipe, sources)
    # The tokens are of every question and rule as it is read, so that no file can be another unnoticed.
    header = {"weights": weights_digest(model), "tokens": plan.digest(), "pairs": pairs}
    part = PartFile(kept, header)
    ppl: dict[tuple[int, int], float] = {}
    with tqdm(total=tokens, desc="mine", unit="tok", unit_scale=True) as progress:

        def compute(asked: Iterable[tuple[int, int]]) -> None:
            batches = plan.batches(asked)
            for batch, values in zip(batches, mine(model, plan, batches, tokenizer.pad_token_id, part), strict=True):
                ppl.update({(batch.context, row): value for row, value in zip(batch.rows, values, strict=True)})
                progress.update(plan.cost(batch))

        cure = f"halve mining.batch_tokens={mining.batch_tokens} and start again in another output folder"
        with out_of_memory(cure):
            compute([*plan.alone(), *pairs_of(named_rules(questions, rules, wide))])
            for left in range(ROUNDS, 0, -1):
                gains = improvement_ratios(ppl, len(questions), len(rules))
                open_pairs = pairs - int(np.isfinite(gains).sum())
                compute(pairs_of(promising(gains, open_pairs // left)) if open_pairs else [])
    if part.pieces:
        raise part.damaged()
    rows = ranked(plan, questions, rules, ppl, mining.top_k)
    counts = {"questions": len(questions), "rules": len(rules), "perplexities": len(ppl), "tokens": tokens}
    write_text(output / "mining.json", json.dumps({"sha256": header, **counts}, indent=2) + "\n")
    write_text(result, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    part.remove()
    click.echo(f"{result}: the best {counted(mining.top_k, 'rule')} for each of {counted(len(rows), 'question')}")


if __name__ == "__main__":
    main()
