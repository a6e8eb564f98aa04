"""The page in a real browser."""

import pytest

from malpyeong.samples import DATA, TINY_BASE
from tests.serve.test_serve import CHOICE, process


@pytest.fixture
def visit(browser):
    """Open an address; the page may ask for nothing from elsewhere and may not complain, but of refused keys."""
    complaints, page = [], browser.new_page()
    page.on("console", lambda message: "401" in message.text or complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))

    def open_(url):
        page.on("request", lambda request: request.url.startswith(url) or complaints.append(request.url))
        page.goto(url)
        return page

    yield open_
    page.close()
    assert [line for line in complaints if "favicon" not in line] == []


def test_a_question_is_answered_with_what_was_used(visit):
    with process(
        TINY_BASE, "--name", "tiny", "--dtype", "float32", "--max-new-tokens", "96", "--api-key", "key",
        "--rules", DATA / "rules.json", "--examples", DATA / "dev.json", "--rules-k", "2",
    ) as (_, url):  # fmt: skip
        page = visit(url)
        page.fill("#question", CHOICE.question)
        page.click("#ask")
        page.wait_for_function("document.getElementById('status').textContent.includes('401')")
        page.fill("#key", "key")
        page.click("#ask")
        page.wait_for_selector("#answer:not([hidden])", timeout=60_000)
        assert page.inner_text("#sentence")
        assert page.inner_text("#reason")
        assert page.inner_text("#sentence") in page.inner_text("#whole")
        assert page.locator("#rules details").count() == 2
        assert page.locator("#examples details").count() == 3


def test_it_works_without_rules_and_markup_is_text(visit):
    with process(TINY_BASE, "--name", "<b>tiny</b>", "--dtype", "float32", "--max-new-tokens", "96") as (_, url):
        page = visit(url)
        assert page.inner_text("h1") == "<b>tiny</b>"
        page.fill("#question", "나는 선생님이 {되고/<img src=x onerror=alert(1)>} 싶다.")
        page.click("#ask")
        page.wait_for_selector("#answer:not([hidden])", timeout=60_000)
        assert page.inner_text("#rules") == "없음"
        assert page.inner_text("#sentence") in (
            "나는 선생님이 되고 싶다.",
            "나는 선생님이 <img src=x onerror=alert(1)> 싶다.",
        )
