"""What README and docs print: every command is taken by the program that it names, every link and file is there."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import click
import pytest

from malpyeong.config.load import read_recipe
from malpyeong.contest.records import load_records, write_records
from malpyeong.samples import DATA
from tests.conftest import ROOT

PAGES = [*ROOT.glob("README*.md"), *(ROOT / "docs").glob("*.md")]
# Of other programs.
OTHERS = {
    "accelerate",
    "trl",
    "hf",
    "pip",
    "docker",
    "export",
    "cd",
    "nvidia-smi",
    "git",
    "source",
    "apt-get",
    "ollama",
}


def commands():
    for page in PAGES:
        for block in re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.strip(), comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words = words[1:]
                if words:
                    yield pytest.param(words, id=f"{page.name}: {' '.join(words)[:60]}")


def program(words):
    """Return the click command that ``python …`` runs, and its arguments."""
    if words[1] == "-m":
        name = words[2] if words[2] != "malpyeong" else "malpyeong.__main__"
        module = __import__(name, fromlist=["main"])
        if hasattr(module, "__path__"):
            module = __import__(f"{name}.__main__", fromlist=["main"])
        return module.main, words[3:]
    return runpy.run_path(str(ROOT / words[1]))["main"], words[2:]


def parse(command, words):
    """Let click read the words as it would, without running anything; return the innermost context."""
    context = command.make_context("x", list(words))
    if isinstance(command, click.Group) and words:
        _, inner, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        return parse(inner, rest)
    return context


def written_out(words):
    """Return the words without what a page leaves to the reader: ``[…]`` and ``a|b``."""
    text = " ".join(shlex.quote(word) for word in words)
    text = re.sub(r"'?\[[^\]]*\]…?'?", "", text)
    return [word.split("|")[0] for word in shlex.split(text)]


@pytest.mark.parametrize("words", [*commands()])
def test_every_command_is_taken(words):
    words = written_out(words)
    if words[0] in OTHERS:
        return
    if words[0] == "make":
        command = ["make", "-n", "-s", "-o", ".venv/.installed", *(word.replace("NAME", "qwen") for word in words[1:])]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
        assert result.returncode == 0, result.stderr
        return
    assert words[0] == "python", f"whose command is {words[0]}?"
    if "--help" in words:
        words.remove("--help")
        assert program(words)
        return
    context = parse(*program(words))
    if "recipe_file" in context.params and "RECIPE" not in words:
        recipe, overrides = ROOT / context.params["recipe_file"], context.params.get("overrides", ())
        card = [] if re.search(r"^gpu: auto", recipe.read_text("utf-8"), re.MULTILINE) is None else ["gpu=24gb"]
        assert read_recipe(recipe, [*card, *overrides])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), target
    for path in re.findall(r"`((?:malpyeong|recipes|tests|benchmarks|tools|docs)/[\w./-]+\.\w+)`", text):
        assert "NAME" in path or (ROOT / path).exists(), path


def test_the_front_page_is_one():
    for name in ("README.md", "README.en.md"):
        assert len((ROOT / name).read_bytes()) <= 8 * 1024


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_from_the_contests_files_to_a_submission_as_the_readme_says(tmp_path):
    """The README's five commands, with the tiny model and a few questions of one's own, on a CPU."""
    data, runs = tmp_path / "내 자료", tmp_path / "결 과"
    data.mkdir()
    records = sorted(load_records(DATA / "train.json", answers="gold"), key=lambda record: len(record.question))[:60]
    for name, part in {"train": records[:48], "dev": records[48:52], "test": records[52:60]}.items():
        write_records(data / f"korean_language_rag_V1.0_{name}.json", part)
    short = "model.max_length=512"
    steps = {
        "sft-tiny": f"{short} training.epochs=2 training.eval_steps=6 training.warmup_steps=2",
        "doctor-tiny": f"{short} training.max_completion_length=96 training.num_generations=4 --quick",
        "grpo-tiny": f"{short} training.max_completion_length=96 training.batch_size=8 training.max_steps=2 "
        "training.warmup_steps=0 training.save_steps=1",
        "export-tiny": "--dtype float32 --check-records 2",
        "submit-tiny": "--max-new-tokens 96",
    }
    for target, arguments in steps.items():
        run = f"RUN={shlex.quote(sys.executable)}"
        command = ["make", "-s", "-o", ".venv/.installed", run, f"DATA={data}", f"RUNS={runs}"]
        result = subprocess.run(
            [*command, target, f"ARGS={arguments}"], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
        )
        assert result.returncode == 0, f"{target}: {result.stderr[-2000:]}"
    submission = json.loads((runs / "tiny-submission.json").read_text("utf-8"))
    assert [record["id"] for record in submission] == [record.id for record in records[52:60]]
    assert all(record["output"]["answer"] for record in submission)
