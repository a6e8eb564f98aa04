"""The notebook runs from the first cell to the last with the tiny model, and a second start trains nothing again."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from malpyeong.contest.records import load_records, write_records
from malpyeong.samples import DATA
from tests.conftest import ROOT

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "malpyeong_grpo.ipynb"


def load():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_notebook_is_committed_without_outputs():
    notebook = load()
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


@pytest.fixture
def session(tmp_path):
    """A clone, and a Python of its own that has everything but malpyeong and some packages; run the notebook's first
    cells in the clone's root there."""
    clone, site = tmp_path / "저장소 복사", tmp_path / "site"
    shutil.copytree(ROOT / "malpyeong", clone / "malpyeong", ignore=shutil.ignore_patterns("__pycache__"))
    files = ("pyproject.toml", "README.md", "LICENSE", "recipes/grpo.py", "tools/constraints.py", "requirements.lock")
    for name in (*files, *(f"constraints/{path.name}" for path in (ROOT / "constraints").iterdir())):
        (clone / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, clone / name)
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site.mkdir()
    for folder in (Path(entry) for entry in sys.path if entry.endswith("site-packages")):
        for entry in folder.iterdir():
            if "malpyeong" not in entry.name and not (site / entry.name).exists():
                (site / entry.name).symlink_to(entry)
    library = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    (library / "site.pth").write_text(f"{site}\n", encoding="utf-8")

    def run(wheels, without=(), new_session=False):
        for entry in library.glob("*malpyeong*") if new_session else ():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        for name in without:
            for entry in site.glob(f"{name}*"):
                entry.unlink()
        cells = {cell.id: cell.source for cell in load().cells}
        code = "\n".join([f"SOURCE, WHEELS = '', {str(wheels)!r}", cells["run"], cells["install"], "print(REPO)"])
        # No index can be reached: what is not here comes from WHEELS or not at all.
        env = {**os.environ, "HOME": f"{tmp_path}", "PIP_INDEX_URL": "http://127.0.0.1:9", "PIP_RETRIES": "0"}
        env.pop("PYTHONPATH", None)
        result = subprocess.run([python, "-c", code], cwd=clone, env=env, capture_output=True, text=True)
        found = subprocess.run([python, "-P", "-c", "import malpyeong"], env=env, capture_output=True)
        return result, clone, found.returncode == 0

    return run


def wheel(name, folder):
    """Pack an installed package into a wheel again."""
    distribution = metadata.distribution(name)
    folder.mkdir(exist_ok=True)
    stem = f"{distribution.name.replace('-', '_')}-{distribution.version}"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
        for file in distribution.files:
            if ".." not in file.parts and "__pycache__" not in file.parts:
                archive.write(file.locate(), f"{file}")


@pytest.mark.slow
def test_the_clones_source_does_not_count_as_installed(session, tmp_path):
    wheel("setuptools", tmp_path / "wheels")
    result, clone, installed = session(tmp_path / "wheels")
    assert installed, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == f"{clone}"
    assert "--editable" in result.stdout
    assert "--editable" not in session(tmp_path / "wheels")[0].stdout
    # The clone has the build's metadata now (malpyeong.egg-info); a new session's Python has none.
    assert "--editable" in session(tmp_path / "wheels", new_session=True)[0].stdout


@pytest.mark.slow
def test_without_internet_all_comes_from_the_attached_wheels(session, tmp_path):
    wheel("setuptools", tmp_path / "붙인 자료")
    missing = ["cachetools"]
    result, _, installed = session(tmp_path / "붙인 자료", missing)
    assert not installed
    assert "cachetools" in result.stdout
    wheel("cachetools", tmp_path / "붙인 자료")
    result, _, installed = session(tmp_path / "붙인 자료")
    assert installed, result.stdout + result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Short questions and a few rules, in a folder whose name has a space and Hangul."""
    folder = tmp_path_factory.mktemp("대회 자료")
    records = load_records(DATA / "train.json", answers="gold")
    records.sort(key=lambda record: len(record.question + (record.answer or "")))
    for name, part in {"train": records[:48], "dev": records[48:50], "test": records[50:52]}.items():
        write_records(folder / f"{name}.json", part)
    rules = json.loads((DATA / "rules.json").read_text("utf-8"))[:20]
    (folder / "rules.json").write_text(json.dumps(rules, ensure_ascii=False), "utf-8")
    return folder


# SFT until it knows the form, without which GRPO learns nothing; GRPO with small groups.
SHORT = """
SFT += ["training.epochs=2.5", "training.batch_size=8", "training.warmup_steps=2", "training.eval_steps=15"]
GRPO += ["training.batch_size=8", "training.num_generations=4", "training.max_completion_length=80"]
SFT.append("model.max_length=320")
GRPO.append("model.max_length=320")
"""


def execute(data, runs):
    """Run every cell with the settings of a first try; return the notebook and the error that stopped it, if any."""
    notebook = load()
    settings = f"MODEL, GPU, DATA, RUNS, SOURCE, SMALL = 'tiny', '', {str(data)!r}, {str(runs)!r}, '', True"
    place = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(settings))
    place = next(i for i, cell in enumerate(notebook.cells) if cell.id == "stages")
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(SHORT))
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    try:
        client.execute()
    except nbclient.exceptions.CellExecutionError as error:
        return notebook, error
    return notebook, None


def printed(notebook):
    return "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()) if "text" in output
    )


def times(runs):
    """Return when each file of the trained and merged models was written."""
    folders = [runs / "tiny-small" / name for name in ("sft", "grpo/adapter", "grpo/checkpoint-2", "merged")]
    return {file: file.stat().st_mtime_ns for folder in folders for file in folder.rglob("*") if file.is_file()}


@pytest.mark.slow
def test_the_notebook_runs_and_a_second_start_trains_nothing_again(folder, tmp_path):
    runs = tmp_path / "실행 결과"
    notebook, error = execute(folder, runs)
    assert error is None, printed(notebook)[-3000:]
    out = runs / "tiny-small"
    assert [record.id for record in load_records(out / "submission.json", answers="prediction")] == [
        record.id for record in load_records(folder / "test.json")
    ]
    log = json.loads((out / "grpo" / "log.json").read_text("utf-8"))
    assert len([row for row in log if "reward" in row]) == 2
    text = printed(notebook)
    assert "contest score" in text
    # Both the doctor and the training read the context file, and so does prediction.
    assert f"{out / 'context.jsonl'}: 52 questions, 156 rules, 156 examples" in text
    assert "prompts with 150 rules and 150 solved examples for 50 questions" in text  # SFT: train and dev
    assert "prompts with 144 rules and 144 solved examples for 48 questions" in text
    assert text.count("rules and examples do not fit the model's 320 tokens with answers of 64") == 2
    written = times(runs)

    # As if the time limit had come after GRPO's last checkpoint: nothing that follows from it is there yet.
    shutil.rmtree(out / "grpo" / "adapter")
    (out / "submission.json").unlink()
    notebook, error = execute(folder, runs)
    text = printed(notebook)
    assert error is None, text[-3000:]
    assert f"resuming from {out / 'grpo' / 'checkpoint-2'}" in text
    assert f"이미 있습니다: {out / 'sft' / 'adapter'}" in text
    assert not re.search(r"step \d+: ", text)  # what a training step prints
    again = times(runs)
    assert again.keys() == written.keys()
    changed = {file for file in written if again[file] != written[file]}
    assert changed == set((out / "grpo" / "adapter").iterdir())
    assert (out / "submission.json").exists()


@pytest.mark.slow
def test_a_failing_command_stops_the_notebook_with_its_message(folder, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    (data / "train.json").write_text("[{}]", encoding="utf-8")
    notebook, error = execute(data, tmp_path / "runs")
    assert error is not None
    assert "명령이 실패했습니다(종료 코드" in str(error)
    assert f"{data / 'train.json'}: record 1" in printed(notebook)
    assert not (tmp_path / "runs" / "tiny-small" / "merged").exists()
    assert notebook.cells[-1].execution_count is None
