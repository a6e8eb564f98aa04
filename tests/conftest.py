"""Shared by all tests: no hub, no GPU needed, and models small enough to make on the spot."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

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
    """Run ``python …`` in the repository's root, with ``env`` beside the environment; return what it printed."""

    def run(
        *arguments: object, env: Mapping[str, str] | None = None, encoding: str = "utf-8"
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            encoding=encoding,
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


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A real Chromium; where there is none the tests that need one are skipped, but in CI they fail."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        reason = "no chromium on the PATH (apt-get install chromium)"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Root, as in a container, has no sandbox.
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open an HTML file; at the end no page may have complained, opened a dialog or asked for anything but itself."""
    pages, complaints = [], []

    def open_(path: Path, width: int = 1280, color_scheme: str = "light") -> Any:
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=color_scheme)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: request.url == path.as_uri() or complaints.append(request.url))
        page.goto(path.as_uri())
        pages.append(page)
        return page

    yield open_
    for page in pages:
        page.close()
    assert complaints == []


# What takes longest comes first, so that no process is left with it when the other has ended.
FIRST = ("test_training", "test_resume", "test_notebook", "test_gpu_check", "test_prediction", "test_doctor")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files; whatever needs a browser is slow."""
    order = {f"{name}.py": place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order) + (item.path.parent.name != "training")))
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
