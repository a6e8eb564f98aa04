"""The GPU benchmark's own machinery, on a CPU: tiny shapes through the real recipes."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_case import ROOT, is_out_of_memory, made_up_answers
from benchmarks.gpu_table import table
from benchmarks.random_models import SHAPES, empty_model
from malpyeong.contest.answer import contest_split, format_problem
from malpyeong.contest.records import load_records
from malpyeong.samples import DATA


def measure(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )


def test_parts_run_and_are_not_run_again(tmp_path):
    places = ("--tiny", "--out", tmp_path / "결과", "--work", tmp_path / "일 터")
    first = measure("b", "d", *places)
    assert first.returncode == 0, first.stdout + first.stderr
    rows = {row["key"]: row for row in gpu.load(tmp_path / "결과" / "gpu.jsonl")}
    assert {row["status"] for row in rows.values()} == {"ok"}

    search = rows["b/tiny/hf/G2/1GiB/coarse"]
    assert [step["prompt_tokens"] for step in search["figures"]["steps"]] == [64, 128]
    assert all(step["completion_tokens"] == 2 * 16 for step in search["figures"]["steps"])
    assert not any(str(tmp_path) in argument for argument in search["arguments"])

    agreement = rows["d/tiny/agreement"]["figures"]
    assert agreement["same_4bit_weights"]
    (pair,) = agreement["pairs"]
    assert pair["relative_error"] < 1e-3  # float32 both times, on a CPU
    assert pair["cosine"] == pytest.approx(1)

    report = (tmp_path / "결과" / "gpu.md").read_text("utf-8")
    assert "no GPU: a trial of the benchmark on a CPU" in report
    assert "| tiny | 1GiB | 2 | hf | ≥ 128 | – |" in report

    second = measure("b", "d", *places)
    assert second.returncode == 0
    assert len(gpu.load(tmp_path / "결과" / "gpu.jsonl")) == len(rows)


class LimitedBench(gpu.Bench):
    """Stands for a card on which prompts of more than ``limit`` tokens do not fit."""

    limit = 0

    def grpo(self, key, shape, backend, lengths, values, **options):
        fit = [{"prompt_tokens": length} for length in lengths if length <= self.limit]
        status = "ok" if len(fit) == len(lengths) else "out of memory"
        return self.add(key, status, {"steps": fit})


def test_the_search_finds_the_longest_prompt(tmp_path):
    for limit, expected in ((200, "none"), (256, "256"), (2_047, "1,792"), (2_048, "2,048"), (10_000, "≥ 8,192")):
        out = tmp_path / str(limit)
        bench = LimitedBench(out, out, gpu.Scale(backends=("hf",), limits=(("4b", 15, 8),)), "", 1)
        bench.limit = limit
        gpu.part_b(bench)
        assert f"| 4b | 15GiB | 8 | hf | {expected} |" in table(gpu.load(out / "gpu.jsonl"))


def test_a_failing_case_is_told_and_measured_again(tmp_path):
    bench = gpu.Bench(tmp_path, tmp_path, gpu.TINY, "", 1)
    assert bench.run(gpu.Case("a/x/hf/G2", "grpo.py", ("no-such-recipe.yaml",))) is None
    assert bench.failed == ["a/x/hf/G2"]
    (row,) = gpu.load(tmp_path / "gpu.jsonl")
    assert row["status"] == "failed"
    assert "no-such-recipe.yaml: cannot be read" in row["figures"]["log"]
    assert bench.known("a/x/hf/G2") is None
    assert "`a/x/hf/G2`" in table([row])


def test_a_result_that_a_kill_cut_off_is_left_out(tmp_path):
    (tmp_path / "gpu.jsonl").write_text('{"key": "a", "status": "ok"}\n{"key": "b", "sta', encoding="utf-8")
    assert [row["key"] for row in gpu.load(tmp_path / "gpu.jsonl")] == ["a"]


def test_running_out_of_memory_is_told_from_other_errors():
    def stop(cause):
        try:
            raise cause
        except RuntimeError:
            raise ValueError("stopped") from None  # as malpyeong.training.callbacks does

    for cause, expected in ((torch.OutOfMemoryError("CUDA out of memory"), True), (RuntimeError("another"), False)):
        with pytest.raises(ValueError, match="stopped") as caught:
            stop(cause)
        assert is_out_of_memory(caught.value) is expected


def test_made_up_answers_are_well_formed_and_all_different():
    golds = [
        record.answer
        for record in load_records(DATA / "train.json", answers="gold")
        if format_problem(record.answer) is None
    ][:8]
    answers = [
        answer for step in range(4) for answer in made_up_answers([gold for gold in golds for _ in range(4)], step)
    ]
    assert all(format_problem(answer) is None for answer in answers)
    assert len({contest_split(answer)[1] for answer in answers}) > 0.9 * len(answers)


def test_shapes_have_the_size_of_their_models():
    for shape, billions in (("4b", 4.02), ("8b", 8.19), ("11.5b", 11.5)):
        model = empty_model(shape)
        assert abs(sum(p.numel() for p in model.parameters()) / 1e9 - billions) < 0.06
        assert json.loads(model.config.to_json_string())["hidden_size"] == SHAPES[shape]["hidden_size"]
