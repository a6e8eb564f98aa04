"""PPL mining with one forward for each pair, as is commonly done, against ours.

    make bench-ppl

Both score the same answers with the same model and prompts, and every perplexity that the loop computes is compared.

- loop: the chat template rendered for the pair, prompt and answer in one sequence, batch 1, ``model(input_ids,
  labels=labels).loss`` (logits at every position); PPL(a|q) once for each question.
- ours: what ``recipes/mine.py`` runs, planning and tokenizing included.

A rule is the unit of time: all its questions by us, then some of them by the loop, evenly spread over the lengths; so
the two are measured side by side, and ratios are of sums over the rules.

Rules have the lengths of the contest's sections (median 329 characters, 95 % below 970, at most 2,133): text of the
sample's rules is cut to them. Models, both in float32:

- tiny: the sample model (2.2 M parameters, characters for tokens, a vocabulary of 1,664). The loop runs on all pairs.
- qwen3: random weights with Qwen3's blocks and its vocabulary of 151,936 (69 M parameters, 58 M of them embeddings):
  logits cost what they do in a small real model. The same tokens. The loop runs on a sample of the pairs.
"""

import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from malpyeong.contest.records import Record, load_records
from malpyeong.contest.rulebook import Rule, load_rule_book
from malpyeong.models.load import load_for_prediction
from malpyeong.models.tokenizer import load_tokenizer
from malpyeong.prompts.messages import build_messages, completion_ids, prompt_ids
from malpyeong.samples import DATA, TINY_BASE
from malpyeong.terminal import Command
from malpyeong.training.mining import NO_RULE, make_plan
from malpyeong.training.perplexity import perplexities, shared_prefix

TOLERANCE = 1e-3
MAX_LENGTH = 4096


def contest_length_rules(count: int) -> list[Rule]:
    """Return rules as long as the quantiles of a log-normal with the contest's median and 95th percentile."""
    text = "\n".join(rule.full_text for rule in load_rule_book(DATA / "rules.json"))
    normal = statistics.NormalDist()
    spread = math.log(970 / 329) / normal.inv_cdf(0.95)
    rules, start = [], 0
    for number in range(count):
        length = min(2133, round(329 * math.exp(spread * normal.inv_cdf((number + 0.5) / count))))
        start = start if start + length <= len(text) else 0
        rules.append(Rule(str(number), "", text[start : start + length]))
        start += length
    return rules


def make_model(name: str) -> Any:  # noqa: ANN401 -- a transformers model
    """Return one of the two models."""
    if name == "tiny":
        return load_for_prediction(str(TINY_BASE), dtype="float32")[0]
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=384,
        intermediate_size=1152,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=MAX_LENGTH,
    )
    return Qwen3ForCausalLM(config).eval()


def loop(model: Any, tokenizer: Any, record: Record, rule: Rule | None) -> float:  # noqa: ANN401
    """Return PPL(answer | rule, question) by one whole forward."""
    import torch

    prompt = prompt_ids(tokenizer, build_messages(record, rules=[rule] if rule else ()))
    answer = completion_ids(tokenizer, record.answer or "")[:-1]
    with torch.inference_mode():
        loss = model(
            input_ids=torch.tensor([prompt + answer]), labels=torch.tensor([[-100] * len(prompt) + answer])
        ).loss
    return math.exp(float(loss))


def measure(
    model: Any,  # noqa: ANN401
    tokenizer: Any,  # noqa: ANN401
    records: Sequence[Record],
    rules: Sequence[Rule],
    sample: int,
    batch_tokens: int,
) -> tuple[float, float, float]:
    """Return seconds a pair of the loop and of ours, and the largest relative difference of their perplexities.

    PPL(a|q) counts as one more rule; the options' verdicts, which we score too, are not counted as pairs.
    """
    start = time.perf_counter()
    plan = make_plan(tokenizer, records, rules, MAX_LENGTH, batch_tokens)
    planned = plan.batches(plan.all_pairs())
    mine_seconds = time.perf_counter() - start
    loop_seconds, difference, by_loop = 0.0, 0.0, 0
    by_length = sorted(range(len(records)), key=lambda row: len(plan.rows[row]))
    sampled = [by_length[(2 * number + 1) * len(records) // (2 * sample)] for number in range(sample)]
    for context in tqdm(range(len(rules) + 1), desc="rules", leave=False):
        batches = [batch for batch in planned if batch.context == context]
        start = time.perf_counter()
        prefix = shared_prefix(model, plan.heads[context])
        ours: dict[int, float] = {}
        for batch in batches:
            values = perplexities(model, prefix, [plan.rows[row] for row in batch.rows], tokenizer.pad_token_id)
            ours.update(zip(batch.rows, values, strict=True))
        mine_seconds += time.perf_counter() - start
        for row in sampled:
            start = time.perf_counter()
            value = loop(model, tokenizer, records[row], rules[context - 1] if context != NO_RULE else None)
            loop_seconds += time.perf_counter() - start
            by_loop += 1
            difference = max(difference, abs(ours[row] - value) / value)
    return loop_seconds / by_loop, mine_seconds / (len(records) * (len(rules) + 1)), difference


@click.command(cls=Command)
@click.option("--questions", default=40, show_default=True)
@click.option("--rules", default=40, show_default=True)
@click.option("--sample", default=40, show_default=True, help="Questions of each rule that the loop scores (tiny).")
@click.option("--qwen3-sample", default=1, show_default=True, help="The same for qwen3; 0 leaves it out.")
@click.option("--batch-tokens", default=4096, show_default=True)
@click.option("--repeats", default=3, show_default=True, help="Times that each is measured (qwen3: once).")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="JSON file to write the figures to.")
def main(
    questions: int, rules: int, sample: int, qwen3_sample: int, batch_tokens: int, repeats: int, output: Path | None
) -> None:
    """Print milliseconds a pair and ratios; the last line is the ratio of the qwen3 model, if it is measured."""
    import torch

    train = load_records(DATA / "train.json", answers="gold")
    tokenizer = load_tokenizer(str(TINY_BASE))
    sizes = [(q, r) for q in (questions // 2, questions) for r in (rules // 2, rules)]
    runs = [("tiny", *size, sample if size == sizes[-1] else min(sample, 4), repeats) for size in sizes]
    if qwen3_sample:
        runs.append(("qwen3", questions, rules, qwen3_sample, 1))
    rows: list[dict[str, Any]] = []
    for name, q, r, pairs, times in runs:
        model = make_model(name)
        records = [train[number * len(train) // q] for number in range(q)]
        book = contest_length_rules(r)
        measured = [measure(model, tokenizer, records, book, pairs, batch_tokens) for _ in range(times)]
        looped, mined, differences = zip(*measured, strict=True)
        if max(differences) > TOLERANCE:
            raise click.ClickException(f"{name}: the two ways differ by {max(differences):.2g}")
        plan = make_plan(tokenizer, records, book, MAX_LENGTH, batch_tokens)
        row = {
            "model": name,
            "questions": q,
            "rules": r,
            "pairs_by_loop": pairs * (r + 1),
            "loop_ms": 1000 * statistics.median(looped),
            "ours_ms": 1000 * statistics.median(mined),
            "ratio": statistics.median(a / b for a, b in zip(looped, mined, strict=True)),
            "token_ratio": plan.naive_tokens(plan.all_pairs()) / plan.tokens(plan.all_pairs()),
            "difference": max(differences),
        }
        rows.append(row)
    table = Table(title=f"{torch.get_num_threads()} threads, milliseconds a pair, medians")
    for title in ("model", "questions", "rules", "loop", "ours", "ratio", "tokens' ratio", "largest difference"):
        table.add_column(title, justify="left" if title == "model" else "right")
    for row in rows:
        numbers = [f"{row[key]:.1f}" for key in ("loop_ms", "ours_ms", "ratio", "token_ratio")]
        table.add_row(row["model"], str(row["questions"]), str(row["rules"]), *numbers, f"{row['difference']:.0e}")
    Console(width=110).print(table)
    if output:
        figures = {
            "date": str(date.today()),
            "command": f"python -m benchmarks.ppl {' '.join(sys.argv[1:])}",
            "cpu": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "versions": {name: version(name) for name in ("torch", "transformers")},
            "rows": rows,
        }
        output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    for row in rows[len(sizes) - 1 :]:
        click.echo(f"{row['model']}: {row['ratio']:.1f} times as fast")
    click.echo(f"ratio: {rows[-1]['ratio']:.1f}")


if __name__ == "__main__":
    main()
