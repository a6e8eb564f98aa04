"""The versions that were tested are those that users get, and no second torch: locks, and dry runs of pip."""

import json
import os
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

from malpyeong.models.environment import version
from tests.conftest import ROOT
from tests.training.test_unsloth import LISTED

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
CPU = [*EXTRAS["rules"], *EXTRAS["retrieval"]]
LOCKS = {
    "requirements.lock": CPU,
    "constraints/gpu.txt": [*CPU, *EXTRAS["gpu"]],
    "constraints/gpu-vllm.txt": [*CPU, *EXTRAS["gpu"], *EXTRAS["vllm"]],
}


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text):
    return dict(line.split("==") for line in text.splitlines())


@pytest.mark.parametrize("file", LOCKS)
def test_a_lock_has_every_dependency_in_range(file):
    """``make lock`` writes them again."""
    found = pins((ROOT / file).read_text("utf-8"))
    for line in [*PROJECT["project"]["dependencies"], *PROJECT["dependency-groups"]["dev"], *LOCKS[file]]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(found[normal(requirement.name)]), line


def test_what_goes_with_one_torch_is_pinned_with_it():
    for file in ("constraints/gpu.txt", "constraints/gpu-vllm.txt"):
        found = pins((ROOT / file).read_text("utf-8"))
        assert [found[name] for name in ("torch", "torchvision", "triton")] == ["2.11.0", "0.26.0", "3.6.0"]
    assert found["vllm"] == "0.26.0"


@pytest.fixture
def machine(tmp_path):
    """Make a machine where other versions are installed (their metadata stands before what is here), with a GPU or
    without; run a command there."""

    def make(installed, gpu=True):
        for name, (number, requires) in installed.items():
            folder = tmp_path / "site" / f"{name}-{number}.dist-info"
            folder.mkdir(parents=True)
            lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {number}"]
            (folder / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {one}" for one in requires)]))
            (folder / "INSTALLER").write_text("pip")
        tools = tmp_path / "bin"
        tools.mkdir()
        if gpu:
            (tools / "nvidia-smi").write_text("#!/bin/sh\n")
            (tools / "nvidia-smi").chmod(0o755)
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "PATH": str(tools)}

        def run(*command):
            return subprocess.run(
                [sys.executable, *map(str, command)],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                encoding="utf-8",
                env=environment,
            )

        return run

    return make


PLATFORM = {  # as a notebook's machine may have it
    "torch": ("2.12.0+cu130", ["triton==3.7.0"]),
    "torchvision": ("0.27.0+cu130", ["torch==2.12.0"]),
    "triton": ("3.7.0", []),
}


def constraints(run, folder):
    """Return what the notebook installs with."""
    result = run(ROOT / "tools" / "constraints.py", "platform", folder / "versions.txt")
    assert result.returncode == 0, result.stderr
    return folder / "versions.txt"


def test_a_platforms_torch_is_kept_where_it_is_in_range(machine, tmp_path):
    kept = pins(constraints(machine(PLATFORM), tmp_path).read_text("utf-8"))
    assert kept == {name: number for name, (number, _) in PLATFORM.items()}


@pytest.mark.parametrize(("gpu", "file"), [(True, "constraints/gpu.txt"), (False, "requirements.lock")])
def test_a_platforms_torch_that_is_out_of_range_gives_way_to_what_was_tested(machine, tmp_path, gpu, file):
    old = {"torch": ("2.9.1+cu126", []), "torchvision": ("0.24.1", ["torch==2.9.1"])}
    found = constraints(machine(old, gpu), tmp_path).read_text("utf-8")
    assert found == (ROOT / file).read_text("utf-8")


GPU = {
    "torch": ("2.11.0", ["triton==3.6.0"]),
    "torchvision": ("0.26.0", ["torch==2.11.0"]),
    "triton": ("3.6.0", []),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("installed", "file"),
    [
        ({"torch": ("2.13.0", [])}, "requirements.lock"),
        (GPU, "constraints/gpu.txt"),
        (GPU, "constraints/gpu-vllm.txt"),
        (PLATFORM, None),
    ],
    ids=["cpu", "gpu", "gpu-vllm", "platform"],
)
def test_pip_replaces_no_torch(machine, tmp_path, installed, file):
    """What pip would install beside what is there; only metadata is fetched."""
    run = machine(installed)
    extras = LOCKS[file or "constraints/gpu.txt"]
    file = ROOT / file if file else constraints(run, tmp_path)
    command = ["pip", "install", "--quiet", "--dry-run", "--use-feature=fast-deps", "--retries=1", "--timeout=15"]
    wanted = [*PROJECT["project"]["dependencies"], *extras]
    result = run("-m", *command, "--report", "report.json", "--constraint", file, *wanted)
    if result.returncode and re.search(r"connection|timed out|name resolution", result.stderr, re.IGNORECASE):
        pytest.skip("no package index can be reached")
    assert result.returncode == 0, result.stderr[-2000:]
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    new = {normal(item["metadata"]["name"]): item["metadata"]["version"] for item in report["install"]}
    assert not new.keys() & installed.keys()
    if extras != CPU:
        assert new.get("unsloth", version("unsloth")) == LISTED["unsloth"]  # not new after make setup-unsloth
    if "vllm" in str(file):
        assert new["vllm"] == "0.26.0"
