"""Runs that are resumed after something has changed, and what a run bears while it lasts. Real runs of the recipes."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from pyarrow.parquet import read_table
from safetensors.torch import load_file

from malpyeong.answer import contest_split
from malpyeong.curves import plot, read_log, series
from malpyeong.records import load_records, write_records
from malpyeong.report.run_page import read_run, run_page
from malpyeong.samples import DATA

ROOT = Path(__file__).parent.parent


def recipe(stage, *arguments):
    """Run a recipe of the tiny model in this process."""
    spec = importlib.util.spec_from_file_location(stage, ROOT / "recipes" / f"{stage}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    name = {"train_retriever": "retriever"}.get(stage, stage)
    command = [str(ROOT / "recipes" / "tiny" / f"{name}.yaml"), *map(str, arguments)]
    return CliRunner().invoke(script.main, command)


def finished(result):
    assert result.exit_code == 0, (result.output[-3000:], result.exception)
    return result.output


def refused(result, code=2):
    """Return the one line that a command ended in."""
    assert result.exit_code == code, (result.output[-3000:], result.exception)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    return line


def weights(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(bool((first[name] == second[name]).all()) for name in first)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sixty short questions, of which every third gold answer has no reason, and eight for dev loss."""
    folder = tmp_path_factory.mktemp("자료")
    records = sorted(load_records(DATA / "train.json"), key=lambda record: len(record.question + record.answer))[:68]
    write_records(folder / "dev.jsonl", records[60:])
    verdicts = [record.answer[: record.answer.index("옳다.") + 3] for record in records[:60]]
    some = [
        record if place % 3 else record.with_answer(verdict)
        for place, (record, verdict) in enumerate(zip(records[:60], verdicts, strict=True))
    ]
    write_records(folder / "some.jsonl", some)
    return folder


def sft(data, output, *overrides):
    files = (f"data.train={data / 'some.jsonl'}", f"data.dev={data / 'dev.jsonl'}", f"training.output={output}")
    size = ("training.batch_size=10", "training.eval_steps=6", "training.epochs=5", "training.warmup_steps=2")
    return recipe("sft", *files, *size, *overrides)


def grpo(data, output, adapter, *overrides):
    files = (f"data.train={data / 'some.jsonl'}", f"model.adapter={adapter}", f"training.output={output}")
    size = ("training.batch_size=4", "training.num_generations=2", "training.max_completion_length=96")
    steps = ("training.max_steps=4", "training.save_steps=2", "training.lr_scheduler_type=constant_with_warmup")
    return recipe("grpo", *files, *size, *steps, *overrides)


@pytest.fixture(scope="module")
def adapter(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "sft"
    finished(sft(data, run))
    return run / "adapter"


def test_a_reward_that_applies_to_no_completion_of_a_step(data, adapter, tmp_path):
    run = tmp_path / "run"
    output = finished(grpo(data, run, adapter, "training.max_steps=12", "training.save_steps=4"))
    steps = [row for row in read_log(run) if "reward" in row]
    assert len(steps) == 12
    applies = []
    for step in range(1, 13):
        rows = read_table(run / "completions" / f"completions_{step:05}.parquet").to_pylist()
        applies.append(any(contest_split(row["reference"])[1] for row in rows))
    assert applies.count(False) > 0
    for row, it_does in zip(steps, applies, strict=True):
        assert ("spread/rouge_1" in row) == it_does
        assert (row["rewards/rouge_1/mean"] is not None) == it_does
    assert output.count("rouge_1 ") == applies.count(True)
    assert series(steps)["rouge_1"][0] == [step for step, it_does in enumerate(applies, 1) if it_does]
    plot(run, tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 0
    page = run_page(read_run(run))
    assert not re.search(r"\bnan\b", page, re.IGNORECASE)


def test_readers_of_logs_bear_none_and_nan(tmp_path):
    """As a log may be: JSON has both null and NaN."""
    rows = [
        {"step": 1, "loss": None, "reward": float("nan"), "rewards/rouge_1/mean": None, "dead_groups": None},
        {"step": 2, "loss": float("nan"), "reward": 1.0, "rewards/rouge_1/mean": float("nan"), "grad_norm": 0.5},
        {"step": 3, "loss": 0.5, "reward": 2.0, "rewards/rouge_1/mean": 0.25, "completions/clipped_ratio": None},
    ]
    (tmp_path / "log.json").write_text(json.dumps(rows))
    assert series(read_log(tmp_path)) == {"rouge_1": ([3], [0.25])}
    plot(tmp_path, tmp_path / "run.png")
