"""The Dockerfile, step by step, where no engine can build it: in an empty folder and environment, without a network.

What a step installs comes from the packages that the tests run with (a .pth file); this one is built and installed as
the Dockerfile says. COPY takes what .dockerignore lets through. Creating a user and becoming it is left out.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time

import httpx
import pytest
from click.testing import CliRunner

from malpyeong.samples import TINY_BASE
from malpyeong.serve.__main__ import bind, main
from tests.conftest import ROOT

pytestmark = pytest.mark.slow


def instructions():
    """Yield (instruction, rest) of the Dockerfile."""
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text("utf-8"))
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            instruction, _, rest = line.partition(" ")
            yield instruction, rest.strip()


def build(root, arguments):
    """Run the steps with ``/app`` and ``/model`` below ``root``; return the command and its environment."""
    build_context = root / "context"
    build_context.mkdir()
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    for name in (line[1:] for line in ignored if line.startswith("!") and "*" not in line):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, build_context / name)
    shutil.copytree(TINY_BASE, build_context / "runs" / "tiny-merged")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    known, folder = dict(arguments), root

    def below(text):
        for name, value in known.items():
            text = (
                text.replace(f"${{{name}}}", value).replace(f'"${name}"', shlex.quote(value)).replace(f"${name}", value)
            )
        return re.sub(r"(?<![\w.])/(app|model|home/serve)\b", rf"{root}/\1", text)

    for instruction, rest in instructions():
        if instruction == "FROM":
            assert rest == "python:3.11"
            python = root / "venv" / "bin" / "python"
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", root / "venv"], check=True)
            (site,) = (root / "venv" / "lib").glob("python*/site-packages")
            (site / "installed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
            environment["PATH"] = f"{python.parent}:{environment['PATH']}"
            (python.parent / "pip").write_text(f'#!/bin/sh\nexec {python} -m pip "$@"\n')
            (python.parent / "pip").chmod(0o755)
        elif instruction == "ARG":
            name, given, default = rest.partition("=")
            assert given or name in known
            known.setdefault(name, default)
        elif instruction == "WORKDIR":
            folder = root / rest.lstrip("/")
            folder.mkdir(parents=True, exist_ok=True)
        elif instruction == "COPY":
            *sources, target = shlex.split(below(rest))
            for source in sources:
                if (build_context / source).is_dir():
                    shutil.copytree(build_context / source, folder / target)
                else:
                    shutil.copy(build_context / source, folder / target)
        elif instruction == "RUN" and rest.startswith("useradd"):
            (root / "home" / "serve").mkdir(parents=True)
        elif instruction == "RUN":
            offline = "--no-index --no-deps --no-build-isolation --ignore-installed"
            step = below(rest).replace("pip install", f"pip install {offline}")
            subprocess.run(step, shell=True, cwd=folder, env=environment, check=True, capture_output=True)
        elif instruction == "ENV":
            environment.update(word.split("=", 1) for word in shlex.split(rest))
        elif instruction == "CMD":
            return json.loads(below(rest)), folder, environment
        else:
            assert instruction in ("USER", "EXPOSE", "HEALTHCHECK"), instruction
    raise AssertionError("no CMD")


def test_the_image_serves_and_a_changed_weight_stops_it(tmp_path):
    command, folder, environment = build(
        tmp_path, {"MODEL": "runs/tiny-merged", "LOCK": "requirements.lock", "EXTRAS": "serve,retrieval"}
    )
    where = [tmp_path / "venv" / "bin" / "python", "-c", "import malpyeong; print(malpyeong.__file__)"]
    installed = subprocess.run(where, cwd=folder, env=environment, capture_output=True, text=True).stdout
    assert installed.startswith(str(tmp_path / "venv")), installed
    with bind("127.0.0.1", 0) as free:
        port = str(free.getsockname()[1])
    command = [str(tmp_path / "venv" / "bin" / "python"), *command[1:-1], port]
    with subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True) as server:
        try:
            for _ in range(600):
                try:
                    httpx.get(f"http://127.0.0.1:{port}/health")
                    break
                except httpx.ConnectError:
                    assert server.poll() is None, server.stderr.read()
                    time.sleep(0.5)
            result = CliRunner().invoke(main, ["--check", f"http://127.0.0.1:{port}"])
            print(result.output)
            assert result.exit_code == 0, result.output
        finally:
            server.terminate()
        assert server.wait(60) == 0
    weights = tmp_path / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    refused = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.strip().count("\n") == 0
    assert "model.safetensors" in refused.stderr
