"""Score a model on questions with gold answers, and what its own samples hold: ``python -m malpyeong.score``.

RL can only strengthen what the model samples. So beside the greedy answer stand the mean of n samples, which GRPO
raises, and the best of the n by their gold answer, which it cannot pass.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from malpyeong.contest.records import Record, load_records
from malpyeong.metrics.aggregate import METRICS, RecordScore, combined_score, score_records, summarise
from malpyeong.models.adapter import adapter_folder, check_adapter
from malpyeong.predict import fitted
from malpyeong.prompts.context import NO_CONTEXT, load_contexts
from malpyeong.prompts.rule_choice import split_choice
from malpyeong.terminal import Command, json_text

if TYPE_CHECKING:
    from malpyeong.metrics.pairs import PairScorer

_COLUMNS = {"exact_match": "EM", "rouge_1": "ROUGE-1", "bertscore": "BERTScore", "bleurt": "BLEURT", "score": "score"}


def record_score(score: RecordScore) -> float:
    """Return a record's combined score, of what was scored."""
    reason = [value for value in (score.rouge_1, score.bertscore, score.bleurt) if value is not None]
    return float(combined_score(score.exact_match or 0.0, reason))


def sample_scores(
    golds: Sequence[Record],
    answers: Sequence[Sequence[str]],
    metrics: Sequence[str] = ("em", "rouge1"),
    scorers: Mapping[str, "PairScorer"] | None = None,
) -> dict[str, dict[str, float]]:
    """Score greedy answers and samples.

    Args:
        golds: records with answers.
        answers: for each record its greedy answer, then its samples.
        metrics: of :data:`malpyeong.metrics.aggregate.METRICS`.
        scorers: the loaded models of ``bertscore`` and ``bleurt``, where those are asked for.

    Returns:
        Rows ``greedy`` and, where there are n samples, ``mean of n`` and ``best of n``: the contest's averages of each
        metric, and ``score``, the mean of EM and of the others' mean: the contest's final score where all are there.
    """
    columns = [score_records(golds, column, metrics, scorers) for column in zip(*answers, strict=True)]
    rows = [_averages(column, metrics) for column in columns]
    found = {"greedy": rows[0]}
    samples = columns[1:]
    if samples:
        found[f"mean of {len(samples)}"] = {key: sum(row[key] for row in rows[1:]) / len(samples) for key in rows[0]}
        best = [max(scores, key=record_score) for scores in zip(*samples, strict=True)]
        found[f"best of {len(samples)}"] = _averages(best, metrics)
    return found


def _averages(scores: Sequence[RecordScore], metrics: Sequence[str]) -> dict[str, float]:
    summary = summarise(scores, metrics)
    averages = {key: float(summary[key]) for name, key in METRICS.items() if name in metrics}
    reason = [value for key, value in averages.items() if key != "exact_match"]
    return {**averages, "score": combined_score(averages["exact_match"], reason)}


@click.command(cls=Command)
@click.argument("model")
@click.argument("gold", type=click.Path(path_type=Path))
@click.option("--samples", default=8, show_default=True, type=click.IntRange(min=0), help="0: the greedy answer alone.")
@click.option("--temperature", default=0.9, show_default=True, type=click.FloatRange(min=0, min_open=True))
@click.option("--seed", default=0, show_default=True, help="Of the samples.")
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(min=1), help="Answers at once.")
@click.option("--max-new-tokens", default=320, show_default=True, type=click.IntRange(min=1))
@click.option("--dtype", default="auto", type=click.Choice(["auto", "float32", "float16", "bfloat16"]))
@click.option("--load-in-4bit", is_flag=True, help="Hold the base in 4-bit NF4.")
@click.option("--context", type=click.Path(path_type=Path), help="As for python -m malpyeong.predict.")
@click.option("--choose", "choose_rule", is_flag=True, help="As for python -m malpyeong.predict.")
@click.option("--bertscore-model", help="Hub id or folder: score reasons by BERTScore too.")
@click.option("--bleurt-model", help="Hub id or folder: score reasons by BLEURT too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def main(
    model: str,
    gold: Path,
    samples: int,
    temperature: float,
    seed: int,
    batch_size: int,
    max_new_tokens: int,
    dtype: str,
    load_in_4bit: bool,
    context: Path | None,
    choose_rule: bool,
    bertscore_model: str | None,
    bleurt_model: str | None,
    as_json: bool,
) -> None:
    """Score MODEL (an adapter's folder, or a model's folder or hub id) on GOLD: greedy, mean and best of its samples.

    Answers are generated freely, as in GRPO, and not repaired: this shows what training has to work with.
    """
    records = load_records(gold, answers="gold")
    contexts = load_contexts(context, records, choose_rule) if context else [NO_CONTEXT] * len(records)
    adapter = model if (adapter_folder(model) / "adapter_config.json").is_file() else None
    base = str(check_adapter(adapter)["base_model_name_or_path"]) if adapter else model
    from tqdm import tqdm

    from malpyeong.decoding.answers import sample
    from malpyeong.decoding.engines import Decoding, TransformersEngine
    from malpyeong.metrics.rouge import load_dictionary
    from malpyeong.metrics.scorers import load_scorer
    from malpyeong.models.load import load_for_prediction, tokenizer_for_prediction
    from malpyeong.models.memory import out_of_memory

    load_dictionary()
    named = {"bertscore": bertscore_model, "bleurt": bleurt_model}
    scorers = {name: load_scorer(name, scorer) for name, scorer in named.items() if scorer}
    prompts = fitted(tokenizer_for_prediction(base, adapter), records, contexts, max_new_tokens)
    decoding = Decoding(False, samples + 1, temperature, seed, max_new_tokens)
    answers: list[list[str]] = [[] for _ in records]
    with out_of_memory(f"lower --batch-size={batch_size}, or add --load-in-4bit"):
        engine = TransformersEngine(*load_for_prediction(base, adapter, dtype, load_in_4bit), decoding)
        for row, given in tqdm(sample(engine, prompts, batch_size), total=len(records), desc="score", unit="record"):
            answers[row] = [split_choice(answer)[1] if choose_rule else answer for answer in given]
    table = sample_scores(records, answers, ("em", "rouge1", *scorers), scorers)
    if as_json:
        click.echo(json_text(table))
        return
    _print(table, len(records))


def _print(table: Mapping[str, Mapping[str, float]], records: int) -> None:
    shown = Table(title=f"{records} questions (0–1)", box=SIMPLE, show_edge=False, pad_edge=False)
    keys = list(table["greedy"])
    for name in ("", *(_COLUMNS[key] for key in keys)):
        shown.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, row in table.items():
        shown.add_row(name, *(f"{row[key]:.3f}" for key in keys))
    Console().print(shown)
    greedy, *_, last = (row["score"] for row in table.values())
    if len(table) > 1:
        click.echo(
            f"the samples hold {max(0.0, last - greedy):.3f} more than the greedy answers: what RL can win at most"
        )


if __name__ == "__main__":
    main()
