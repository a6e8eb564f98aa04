"""What the Makefile's targets hand to the commands, in a folder whose name has a space and Hangul."""

import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def make(tmp_path):
    """Run targets with a command in Python's place that shows its arguments; return those of each call."""
    shown = f"{shlex.quote(sys.executable)} -c 'import json, sys; print(json.dumps(sys.argv[1:]))'"
    data = tmp_path / "대회 자료"
    data.mkdir()
    for name in ("train", "dev", "test"):
        (data / f"{name}.json").touch()

    def run(*arguments):
        command = ["make", "-s", "-o", ".venv/.installed", f"RUN={shown}", f"DATA={data}", f"RUNS={tmp_path / '결 과'}"]
        result = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
        assert result.returncode == 0, result.stderr
        return [json.loads(line) for line in result.stdout.splitlines()]

    return run


def test_every_stage_gets_the_context(make, tmp_path):
    data, runs = tmp_path / "대회 자료", tmp_path / "결 과"
    train, context = data / "train.json", runs / "context.jsonl"
    search, sft = make("sft-qwen", "GPU=t4", "ARGS=training.epochs=1 --quick")
    files = [f"{train}", f"{data / 'dev.json'}", "--examples", f"{train}"]
    assert search == ["-m", "malpyeong.retrieval", "search", *files, "-o", f"{context}"]
    assert sft[:3] == ["recipes/sft.py", "recipes/sft.yaml", "recipes/models/qwen.yaml"]
    assert sft[3:6] == [f"data.{name}={data / f'{name}.json'}" for name in ("train", "dev", "test")]
    assert sft[6:] == [
        f"data.context={context}", "data.mode=context",
        f"training.output={runs / 'qwen-sft'}", "gpu=t4", "training.epochs=1", "--quick",
        "--resume", "auto",
    ]  # fmt: skip

    # The doctor looks at what GRPO will be given.
    (searched, grpo), (_, doctor) = make("grpo-qwen", "MODEL=내 모형"), make("doctor-qwen", "MODEL=내 모형")
    assert searched == search
    assert doctor[:2] == ["-m", "malpyeong.doctor"]
    assert [*doctor[2:], "--resume", "auto"] == grpo[1:]
    assert f"data.context={context}" in grpo
    assert "model.name=내 모형" in grpo

    # So does what looks for the hard questions.
    _, hard = make("hard-qwen", "MODEL=내 모형")
    assert hard == ["recipes/hard_questions.py", *grpo[1:-2], "-o", f"{runs / 'qwen-hard.json'}"]

    search, predict, submit = make("submit-qwen", "ARGS=--batch-size 4")
    files = [f"{data / 'test.json'}", "--examples", f"{train}"]
    assert search == ["-m", "malpyeong.retrieval", "search", *files, "-o", f"{runs / 'context-test.jsonl'}"]
    assert predict[-4:] == ["--context", f"{runs / 'context-test.jsonl'}", "--batch-size", "4"]
    assert submit[-1] == f"{runs / 'qwen-submission.json'}"


def test_what_is_served_gets_what_it_was_trained_with(make, tmp_path):
    data, runs = tmp_path / "대회 자료", tmp_path / "결 과"
    served = ["-m", "malpyeong.serve"]
    (plain,) = make("serve-qwen", "ARGS=--port 9000")
    assert plain == [*served, f"{runs / 'qwen-merged'}", "--examples", f"{data / 'train.json'}", "--port", "9000"]
    (data / "rules.json").touch()
    (choice,) = make("serve-qwen-choice")
    assert choice[2] == f"{runs / 'qwen-choice-merged'}"
    assert choice[-2:] == ["--rules", f"{data / 'rules.json'}"]
    assert "--choose" in choice


def test_a_model_that_chooses_gets_the_rules_that_mined_labels_vote_for(make, tmp_path):
    data, runs = tmp_path / "대회 자료", tmp_path / "결 과"
    (data / "rules.json").touch()
    (mine,) = make("mine-qwen", "MODEL=내 모형")
    assert mine == [
        "recipes/mine.py", "recipes/mine.yaml", "recipes/models/qwen.yaml",
        f'data.questions=["{data / "train.json"}", "{data / "dev.json"}"]', f"data.rules={data / 'rules.json'}",
        f"mining.output={runs / 'qwen-mined'}", "model.name=내 모형", "--resume", "auto",
    ]  # fmt: skip

    command = ["make", "-s", "-o", ".venv/.installed", "RUN=false", f"DATA={data}", f"RUNS={runs}", "sft-qwen-choice"]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert refused.returncode == 2
    assert "run make mine-qwen first" in refused.stderr

    labels = runs / "qwen-mined" / "contexts.jsonl"
    labels.parent.mkdir(parents=True)
    labels.touch()
    for stage in ("sft", "grpo", "doctor", "hard"):
        search, trained = make(f"{stage}-qwen-choice")
        assert search[search.index("--labels") + 1] == f"{labels}"
        assert f"data.labels={labels}" in trained
        assert f"data.context={search[-1]}" in trained
        other, plain = make(f"{stage}-qwen")
        assert f"data.labels={labels}" not in plain
        assert other[-1] != search[-1]
        assert "--labels" not in other
    search, predict, _ = make("submit-qwen-choice")
    assert predict[-3:] == ["--context", search[-1], "--choose"]
    assert search[search.index("--labels") + 1] == f"{labels}"
    assert "--choose" not in make("submit-qwen")[1]


def test_the_contests_files_are_found_as_they_come(make, tmp_path):
    data = tmp_path / "대회 자료"
    (data / "train.json").rename(data / "korean_language_rag_V1.0_train.json")
    (data / "dev.json").rename(data / "dev.jsonl")
    (data / "test.json").rename(data / "korean_language_rag_V1.0_test.jsonl")
    search, sft = make("sft-qwen")
    assert search[3:6] == [f"{data / 'korean_language_rag_V1.0_train.json'}", f"{data / 'dev.jsonl'}", "--examples"]
    assert sft[3:6] == [
        f"data.train={data / 'korean_language_rag_V1.0_train.json'}",
        f"data.dev={data / 'dev.jsonl'}",
        f"data.test={data / 'korean_language_rag_V1.0_test.jsonl'}",
    ]
    _, predict, submit = make("submit-qwen")
    assert f"{data / 'korean_language_rag_V1.0_test.jsonl'}" in predict
    assert f"{data / 'korean_language_rag_V1.0_test.jsonl'}" in submit

    (data / "train.json").touch()  # the short name comes first
    (data / "korean_language_rag_V1.0_test.jsonl").unlink()  # not out yet
    _, grpo = make("grpo-qwen")
    assert f"data.train={data / 'train.json'}" in grpo
    assert f"data.dev={data / 'dev.jsonl'}" in grpo
    assert not any(argument.startswith("data.test") for argument in grpo)


def test_a_context_is_made_once_and_again_when_the_data_is_newer(make, tmp_path):
    data, context = tmp_path / "대회 자료", tmp_path / "결 과" / "context.jsonl"
    context.parent.mkdir()
    context.touch()
    assert len(make("grpo-qwen")) == 1
    rules = data / "rules.json"
    rules.touch()
    os.utime(rules, (0, 0))
    assert len(make("grpo-qwen")) == 1
    for name in ("rules", "train", "dev"):
        later = context.stat().st_mtime + 10
        os.utime(data / f"{name}.json", (later, later))
        search, _ = make("grpo-qwen")
        assert search[-4:] == ["--rules", f"{rules}", "-o", f"{context}"]
        os.utime(context, (later, later))
        assert len(make("grpo-qwen")) == 1


def test_setup_looks_for_a_python_that_everything_installs_on(tmp_path):
    for name in ("make", "sh"):
        (tmp_path / name).symlink_to(shutil.which(name))

    def setup():
        command = ["make", "-n", f"VENV={tmp_path / 'venv'}", "setup"]
        return subprocess.run(command, cwd=ROOT, env={"PATH": f"{tmp_path}"}, capture_output=True, text=True)

    def add(name, code):
        (tmp_path / name).write_text(f"#!/bin/sh\n{code}\n")
        (tmp_path / name).chmod(0o755)

    add("python3.13", "exit 127")  # a shim of a version that is not installed
    add(
        "python3",
        f"{shlex.quote(sys.executable)} -c 'import sys; sys.version_info = (3, 10, 0); exec(sys.argv[1])' \"$2\"",
    )
    result = setup()
    assert result.returncode == 2
    (line, *_) = result.stderr.splitlines()
    assert "Python 3.11, 3.12, 3.13 or 3.14 is needed" in line
    add("python3.12", f'exec {shlex.quote(sys.executable)} "$@"')
    assert setup().stdout.startswith(f'python3.12 -m venv "{tmp_path / "venv"}"')
