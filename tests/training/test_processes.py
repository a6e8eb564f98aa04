"""The recipes in several processes: two on a CPU (gloo) train as one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pyarrow.parquet import read_table
from safetensors.torch import load_file

from malpyeong.contest.records import load_records, write_records
from malpyeong.samples import DATA

ROOT = Path(__file__).parents[2]
LAUNCH = {1: [], 2: ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]}


def run(processes, script, *arguments):
    command = [sys.executable, *LAUNCH[processes], script, *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, encoding="utf-8"
    )


def finished(result):
    assert result.returncode == 0, (result.stdout[-2000:], result.stderr[-5000:])
    return result.stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("자료")
    records = sorted(load_records(DATA / "train.json"), key=lambda record: len(record.question + record.answer))
    write_records(folder / "train.json", records[:6])
    write_records(folder / "dev.json", records[6:8])
    reward = "def vowels(completions, **_):\n    return [sum(c in '가이다' for c in one) / 24 for one in completions]\n"
    (folder / "own.py").write_text(reward, encoding="utf-8")
    return folder


def files(data, output):
    return (f"data.train={data / 'train.json'}", f"data.dev={data / 'dev.json'}", f"training.output={output}")


def grpo(processes, data, output, steps, *more):
    size = ("training.batch_size=8", "training.num_generations=8", "training.max_completion_length=24")
    rate = ("training.lr_scheduler_type=constant_with_warmup", "training.warmup_steps=0")
    rewards = json.dumps({f"{data / 'own.py'}:vowels": 1.0, "rouge_1": 0.5})
    return run(
        processes, "tests/training/seeded_grpo.py", "recipes/tiny/grpo.yaml", *files(data, output), *size, *rate,
        "model.adapter=null", f"data.rewards={rewards}", "training.eval_steps=2", f"training.max_steps={steps}", *more,
    )  # fmt: skip


def completions(output):
    return [read_table(file).to_pylist() for file in sorted((output / "completions").glob("*.parquet"))]


def steps_of(output):
    return [row for row in json.loads((output / "log.json").read_text("utf-8")) if "loss" in row]


@pytest.mark.slow
def test_one_process_with_8_completions_is_two_with_4_and_each_resumes_as_the_other(data, tmp_path):
    """The group of 8 is spread over both processes. Compared: completions, rewards, advantages, what is logged, dev
    scores, and the weights after the last step."""
    runs = {(1, 2): tmp_path / "then-two", (2, 1): tmp_path / "then-one"}
    for (first, then), output in runs.items():
        finished(grpo(first, data, output, 2))
        suffix = "" if first == 1 else "_1"
        assert (output / "checkpoint-2" / f"rng_state{suffix}.pth").exists()
        said = finished(grpo(then, data, output, 4, "--resume", "auto"))
        assert said.count("resuming from") == 1
    one, two = runs.values()
    for step, (left, right) in enumerate(zip(completions(one), completions(two), strict=True), 1):
        assert len(left) == 8
        for a, b in zip(left, right, strict=True):
            for key in ("record_id", "completion"):
                assert a[key] == b[key], step
            for key in ("own.py:vowels" if "own.py:vowels" in a else "rouge_1", "rouge_1", "advantage"):
                assert a[key] == pytest.approx(b[key], abs=1e-4), (step, key)
    for a, b in zip(steps_of(one), steps_of(two), strict=True):
        for key in ("loss", "grad_norm", "reward", "dead_groups", "group_std/rouge_1", "completions/mean_length"):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-6), (a["step"], key)
    assert [json.loads((output / "scores.json").read_text("utf-8")) for output in runs.values()]
    (first, second) = (load_file(output / "checkpoint-4" / "adapter_model.safetensors") for output in (one, two))
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)
    assert (two / "adapter" / "adapter_model.safetensors").exists()
