"""The GPU check itself, on a CPU: the smallest shape through the real commands, one of them really killed."""

import json
import shutil

import pytest

from benchmarks.gpu_check import Check, Step, limits, speed, table
from malpyeong.config.load import read_recipe
from malpyeong.config.recipe import PromptData
from malpyeong.contest.records import load_records
from malpyeong.models.tokenizer import load_tokenizer
from malpyeong.prompts.messages import prompt_ids
from malpyeong.training.data import grpo_dataset, load_questions

TRAINED = ("SFT", "GRPO, killed", "GRPO, resumed")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("일 터")


def rows(work):
    return {row["step"]: row for row in map(json.loads, (work / "results.jsonl").read_text("utf-8").splitlines())}


@pytest.mark.slow
def test_every_step_runs_and_the_figures_are_those_of_the_logs(work, run_module):
    result = run_module("-m", "benchmarks.gpu_check", "--tiny", "--work", work)
    assert result.returncode == 0, result.stdout + result.stderr
    found = rows(work)
    assert {name: row["status"] for name, row in found.items() if "vllm" not in name.lower()} == {
        "SFT": "ok", "GRPO, killed": "killed", "GRPO, resumed": "ok", "GRPO, KL, gold, dev": "ok", "export": "ok",
        "predict, transformers": "ok",
    }  # fmt: skip
    steps = [row for row in json.loads((work / "grpo" / "log.json").read_text("utf-8")) if "step_seconds" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert 2 <= found["GRPO, killed"]["figures"]["steps"] < 4
    assert found["GRPO, resumed"]["figures"]["first_step_seconds"] == round(steps[0]["step_seconds"], 2)
    assert all(found[name]["figures"]["step_seconds"] > 0 for name in TRAINED)
    assert "8 well formed, 8 as transformers gives" in found["predict, transformers"]["figures"]["note"]
    assert max(row["group_std/exact_match"] for row in steps) > 0  # the model's answers differ
    for name in found:
        assert f"| {name} |" in result.stdout


@pytest.mark.slow
def test_a_step_that_fails_is_named(work, run_module):
    shutil.move(work / "merged", work / "moved")
    result = run_module("-m", "benchmarks.gpu_check", "--tiny", "--work", work, "--only", "predict, transformers")
    shutil.move(work / "moved", work / "merged")
    assert result.returncode == 1
    assert "failed: predict, transformers" in result.stderr
    assert rows(work)["predict, transformers"]["status"] == "failed"


def test_what_takes_too_long_is_killed_and_what_is_absent_is_no_failure(tmp_path):
    check = Check(tmp_path / "results.jsonl", tmp_path, tiny=True)
    command = ["-c", "import time; time.sleep(60)"]
    for absent in ("", "not installed"):
        check.run(Step("slow", command, tmp_path / "none", lambda *_: {}, "tiny", limit=0.2, absent=absent))
    assert [row["status"] for row in check.rows] == ["out of time", "not installed"]
    assert table(check.rows).count("| slow |") == 2


def test_grpo_asks_the_questions_of_the_search_from_the_shortest_on(work):
    check = Check(work / "other.jsonl", work, tiny=True)
    model = check.model("tiny", 24)
    path = check.questions(model, [130, 110, 100, 120, 90])
    assert len({record.answer for record in load_records(path)}) == 1
    tokenizer = load_tokenizer(str(model))
    dataset = grpo_dataset(tokenizer, load_questions(str(path), PromptData()), 200, 20, prompts=5, seed=0)
    assert [len(prompt_ids(tokenizer, row["prompt"])) for row in dataset] == [90, 100, 110, 120, 130]


@pytest.mark.parametrize("steps", [speed, limits])
def test_the_commands_of_the_measurements_are_valid(steps, tmp_path):
    """Without their models, which would be large."""

    class Planned(Check):
        def model(self, name, syllables):
            return tmp_path / name

        def questions(self, model, lengths):
            return tmp_path / "questions.json"

        def five(self, whole):
            return ["data.scorers={bertscore: b, bleurt: c}"]

    planned = list(steps(Planned(tmp_path / "results.jsonl", tmp_path, tiny=True)))
    assert len({step.name for step in planned}) == len(planned)
    for step in planned:
        overrides = [str(part) for part in step.command[2:] if "=" in str(part)]
        recipe = read_recipe(str(step.command[1]), overrides)
        training = recipe.training
        assert training.batch_size * training.gradient_accumulation_steps % training.num_generations == 0
