"""The recipes in several processes: two on a CPU (gloo) train as one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from pyarrow.parquet import read_table
from safetensors.torch import load_file

from malpyeong.config.load import load_recipe
from malpyeong.config.recipe import SFTRecipe
from malpyeong.contest.records import load_records, write_records
from malpyeong.errors import InputError
from malpyeong.models.load import choose_backend
from malpyeong.samples import DATA
from malpyeong.training.session import batches

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
        "model.adapter=null", f"data.rewards={rewards}", "training.eval_steps=2", f"training.max_steps={steps}",
        "training.gold_advantage=1", *more,
    )  # fmt: skip


def completions(output):
    return [read_table(file).to_pylist() for file in sorted((output / "completions").glob("*.parquet"))]


def steps_of(output):
    return [row for row in json.loads((output / "log.json").read_text("utf-8")) if "loss" in row]


@pytest.mark.slow
def test_one_process_with_8_completions_is_two_with_4_and_each_resumes_as_the_other(data, tmp_path):
    """The group of 8 is spread over both processes. Compared: completions, rewards, advantages, what is logged, dev
    scores, and the weights of the last step and of the best."""
    runs = {(1, 2): tmp_path / "then-two", (2, 1): tmp_path / "then-one"}
    for (first, then), output in runs.items():
        finished(grpo(first, data, output, 2))
        suffix = "" if first == 1 else "_1"
        assert (output / "checkpoint-2" / f"rng_state{suffix}.pth").exists()
        said = finished(grpo(then, data, output, 4, "--resume", "auto"))
        assert said.count("resuming from") == 1
    one, two = runs.values()
    for step, (left, right) in enumerate(zip(completions(one), completions(two), strict=True), 1):
        assert [row["vowels"] is None for row in left] == [False] * 7 + [True]  # the last one is the gold answer
        for a, b in zip(left, right, strict=True):
            for key in ("record_id", "completion"):
                assert a[key] == b[key], step
            for key in ("vowels", "rouge_1", "advantage"):
                assert a[key] == pytest.approx(b[key], abs=1e-4), (step, key)
    for a, b in zip(steps_of(one), steps_of(two), strict=True):
        for key in ("loss", "grad_norm", "reward", "dead_groups", "group_std/rouge_1", "completions/mean_length"):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-6), (a["step"], key)
    scores = [json.loads((output / "scores.json").read_text("utf-8")) for output in runs.values()]
    assert scores[0] == scores[1]
    assert [row["step"] for row in scores[0]] == [0, 2, 4]
    for folder in ("checkpoint-4", "adapter"):
        (first, second) = (load_file(output / folder / "adapter_model.safetensors") for output in (one, two))
        assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)


@pytest.mark.parametrize(
    ("batch", "accumulation", "count", "expected"),
    [(8, 4, 1, (8, 4)), (8, 1, 2, (4, 1)), (2, 8, 2, (2, 4)), (16, 4, 8, (8, 1)), (2, 3, 2, (1, 3)), (2, 1, 4, None)],
)
def test_processes_share_the_effective_batch(batch, accumulation, count, expected, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(count))
    size = (f"training.batch_size={batch}", f"training.gradient_accumulation_steps={accumulation}")
    training = load_recipe(ROOT / "recipes" / "tiny" / "sft.yaml", size, SFTRecipe).training
    if expected is None:
        with pytest.raises(InputError, match="gradient_accumulation_steps=4"):
            batches(training)
    else:
        assert tuple(batches(training).values()) == expected


def test_unsloth_is_for_one_process(monkeypatch):
    model = load_recipe(ROOT / "recipes" / "tiny" / "sft.yaml", ["model.dtype=auto"], SFTRecipe).model
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert choose_backend(model) == "hf"
    with pytest.raises(InputError, match="one process"):
        choose_backend(model.model_copy(update={"backend": "unsloth"}))


@pytest.mark.parametrize("file", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda file: file.name)
def test_accelerate_reads_our_configurations(file):
    config = load_config_from_file(str(file))
    assert config.num_processes == 8
    engine = config.fsdp_config or config.deepspeed_config
    assert 2 in (engine.get("fsdp_version"), engine.get("zero_stage", 0) - 1)


@pytest.mark.slow
def test_sft_of_two_processes_is_that_of_one(data, tmp_path):
    logs = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        size = ("training.batch_size=2", "training.epochs=1", "training.eval_steps=2", "training.logging_steps=1")
        finished(run(processes, "recipes/sft.py", "recipes/tiny/sft.yaml", *files(data, output), *size))
        logs.append(json.loads((output / "log.json").read_text("utf-8")))
    for a, b in zip(*logs, strict=True):
        assert {"loss", "eval_loss"} & a.keys() == {"loss", "eval_loss"} & b.keys() != set()
        for key in {"loss", "eval_loss", "grad_norm"} & a.keys():
            assert a[key] == pytest.approx(b[key], rel=1e-3 if key == "grad_norm" else 1e-4), (a["step"], key)
