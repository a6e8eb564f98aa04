"""Every command prints on a terminal that lacks a character, and the JSON stays exact."""

import importlib
import json
import re
import runpy
import subprocess

import click
import pytest

from malpyeong.contest.records import load_records, write_records
from malpyeong.samples import DATA
from malpyeong.terminal import Command
from tests.conftest import ROOT

CP949 = {"PYTHONIOENCODING": "cp949"}
LACKING = "[ʃ] – ᄒᆞᆫ글 𠮷"  # none of them is in CP949


def programs():
    found = subprocess.run(
        ["git", "grep", "-lE", r"click\.(command|group)\(", "--", "*.py", ":!tests"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return found.stdout.split()


def commands(command):
    yield command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from commands(command.get_command(context, name))


@pytest.mark.parametrize("path", programs())
def test_every_command_goes_through_the_one_that_bears_any_terminal(path):
    if path.startswith("malpyeong/"):
        main = importlib.import_module(path.removesuffix(".py").replace("/", ".")).main
    else:
        main = runpy.run_path(str(ROOT / path))["main"]
    for command in commands(main):
        assert isinstance(command, Command), command.name


@pytest.fixture
def files(tmp_path):
    """Gold and predicted records with what CP949 lacks, and categories."""
    records = load_records(DATA / "dev.json", answers="gold")[:4]
    gold = [
        record.with_answer(f'"{LACKING} {number}."가 옳다. {LACKING}은 그렇다.')
        for number, record in enumerate(records)
    ]
    write_records(tmp_path / "gold.json", gold)
    write_records(tmp_path / "pred.json", [record.with_answer("“아니다.”가 옳다. " + LACKING) for record in gold])
    (tmp_path / LACKING).mkdir()
    labels = {record.id: LACKING for record in records}
    (tmp_path / "labels.json").write_text(json.dumps(labels), encoding="utf-8")
    return tmp_path


def arguments(name, folder):
    gold, pred = folder / "gold.json", folder / "pred.json"
    score = [gold, pred, "--metrics", "em,rouge1", "--labels", folder / "labels.json"]
    return {
        "evaluate": ["-m", "malpyeong.evaluate", *score],
        "evaluate, JSON": ["-m", "malpyeong.evaluate", *score, "--json"],
        "doctor": [
            *["-m", "malpyeong.doctor", "recipes/tiny/sft.yaml", f"data.train={gold}", f"data.dev={gold}"],
            *[f"training.output={folder / LACKING}", "--quick"],
        ],
        "submit": ["-m", "malpyeong.submit", gold, pred, "-o", folder / f"{LACKING}.json"],
        "report": ["-m", "malpyeong.report", "errors", *score, "-o", folder / f"{LACKING}.html"],
        "search": [
            *["-m", "malpyeong.retrieval", "search", gold, "--examples", gold],
            *["-o", folder / f"{LACKING}.jsonl"],
        ],
        "predict": [
            *["-m", "malpyeong.predict", "malpyeong/samples/tiny_base", gold, "--decoding", "free"],
            *["--max-new-tokens", 4, "-o", folder / f"{LACKING}-pred.json"],
        ],
    }[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["evaluate", "doctor", "submit", "report", "search", "predict"])
def test_a_lacking_character_is_replaced(name, files, run_module):
    result = run_module(*arguments(name, files), env=CP949, encoding="cp949")
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert "?" in result.stdout


def test_json_is_exact(files, run_module):
    printed = run_module(*arguments("evaluate, JSON", files), env=CP949, encoding="cp949")
    summary = json.loads(printed.stdout)
    assert [*summary["by_category"]] == [LACKING]
    plain = run_module(*arguments("evaluate, JSON", files), env={"PYTHONIOENCODING": "utf-8"})
    assert json.loads(plain.stdout) == summary
    assert re.search(LACKING.replace("[", r"\["), plain.stdout)
