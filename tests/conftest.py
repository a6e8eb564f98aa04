"""Shared by all tests: no hub, no GPU needed, and models small enough to make on the spot."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples on every run: what passes here passes in CI.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run_module() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``python …`` in the repository's root and return what it printed."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
        )

    return run


@pytest.fixture
def contest_file(tmp_path: Path) -> Callable[..., Path]:
    """Write a contest file of (id, answer) pairs."""

    def write(name: str, answers: dict[str, str | None]) -> Path:
        records = []
        for id_, answer in answers.items():
            record: dict[str, object] = {
                "id": id_,
                "input": {
                    "question_type": "선택형",
                    "question": f'"{id_}번 {{가/나}}." 가운데 올바른 것을 선택하세요.',
                },
            }
            if answer is not None:
                record["output"] = {"answer": answer}
            records.append(record)
        path = tmp_path / name
        path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
        return path

    return write
