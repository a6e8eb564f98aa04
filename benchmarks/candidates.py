"""How often a third of all pairs of questions and rules finds the best rule of all.

    python -m benchmarks.candidates -o runs/candidates       (half an hour beside other work; resumes where it stopped)

Mines 622 evenly spaced questions of the sample train split with every rule (``recipes/mine.py --all``), as many
questions as the contest's train split has. Then the choice that ``mining.share`` makes is played back on what that has
found: the same pairs in the same rounds, their perplexities looked up. docs/mining.md has the figures.
"""

from pathlib import Path

import click
import numpy as np

from malpyeong.contest.records import json_lines, load_records, write_records
from malpyeong.contest.rulebook import load_rule_book
from malpyeong.files import read_text
from malpyeong.samples import DATA
from malpyeong.terminal import Command, make
from malpyeong.training.candidates import ROUNDS, WIDE, named_rules, promising

RECIPES = Path(__file__).parent.parent / "recipes"


@click.command(cls=Command)
@click.option("--questions", default=622, show_default=True, type=click.IntRange(min=2))
@click.option("--share", default=0.33, show_default=True, type=click.FloatRange(0, 1), help="As mining.share.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the mining run.")
def main(questions: int, share: float, output: Path) -> None:
    """Mine with every rule, and play back what a share of the pairs would have found."""
    records, rules = load_records(DATA / "train.json", answers="gold"), load_rule_book(DATA / "rules.json")
    records = records[:: max(1, len(records) // questions)][:questions]
    file, run = output / "questions.json", output / "all"
    write_records(file, records)
    settings = (f"data.questions={file}", f"mining.output={run}", f"mining.top_k={len(rules)}")
    recipe = (RECIPES / "mine.py", RECIPES / "tiny" / "mine.yaml", *settings)
    contexts = make(run / "contexts.jsonl", *recipe, "--all", "--resume", "auto")
    column = {rule.id: place for place, rule in enumerate(rules)}
    gains = np.full((len(records), len(rules)), np.nan)
    for row, (_, found) in enumerate(json_lines(contexts, read_text(contexts, "as recipes/mine.py writes it"))):
        for candidate in found["candidates"]:
            gains[row, column[candidate["rule"]]] = candidate["improvement_ratio"]
    best, pairs = gains.max(1), int(share * gains.size)
    tried = named_rules(records, rules, WIDE)
    for left in range(ROUNDS, 0, -1):
        tried |= promising(np.where(tried, gains, np.nan), (pairs - int(tried.sum())) // left)
    found_best = np.where(tried, gains, -np.inf).max(1)
    higher = ((1 - found_best) / (1 - best) - 1).mean()
    same = (found_best >= best).mean()
    click.echo(f"{len(records)} questions × {len(rules)} rules, {tried.mean():.3f} of all pairs tried")
    click.echo(f"the same best rule: {same:.3f}; PPL higher by {higher:.2%}")


if __name__ == "__main__":
    main()
