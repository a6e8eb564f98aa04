"""Does a server do what the 2026 contest's container has to: ``python -m malpyeong.serve --check URL``."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import click
import httpx

from malpyeong.errors import printable

BODY: dict[str, Any] = {"max_tokens": 2048, "temperature": 0, "top_p": 1, "seed": 42, "stop": ["Q:", "User:"]}
QUESTION = (
    '다음 문장에서 어문 규범에 부합하지 않는 부분을 찾아 고치고, 그 이유를 설명하세요.\n"오늘은 왠지 기분이 좋찮다."'
)
ESSAY = (
    "다음 글을 채점하세요.\n"
    + "우리 동네 도서관은 아침 아홉 시에 문을 엽니다. 나는 방학 동안 그곳에서 책을 읽고 글을 썼습니다. " * 28
)
SCORES = ("content", "organisation", "expression")
SCHEMA = {
    "type": "object",
    "properties": {
        **{name: {"type": "integer", "minimum": 1, "maximum": 5} for name in SCORES},
        "rationale": {"type": "string", "maxLength": 100},
    },
    "required": [*SCORES, "rationale"],
    "additionalProperties": False,
}
SECONDS = 300.0  # a request


class _CheckError(Exception):
    pass


def check(url: str, api_key: str | None = None) -> int:
    """Print a line for each thing that the contest asks for.

    Returns:
        0 if all are there, 1 if one is not, 2 if nothing answers at the address.
    """
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    code = 0
    with httpx.Client(base_url=url.rstrip("/").removesuffix("/v1"), headers=headers, timeout=SECONDS) as client:
        for name, step in _steps(client):
            try:
                line = f"ok    {name}: {step()}"
            except (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
                click.echo(f"{printable(url)}: cannot be reached ({printable(str(error))})", err=True)
                return 2
            except (_CheckError, httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
                code, line = (
                    1,
                    f"FAIL  {name}: {printable(f'{type(error).__name__}: {error}'.removeprefix('_CheckError: '))}",
                )
            click.echo(line)
    return code


def _steps(client: httpx.Client) -> Iterator[tuple[str, Callable[[], str]]]:
    answers: list[str] = []

    def ask(content: str, **more: object) -> str:
        (model, *_) = _json(client.get("/v1/models"))["data"]
        messages = [{"role": "user", "content": content}]
        reply = _json(
            client.post("/v1/chat/completions", json={"model": model["id"], "messages": messages, **BODY, **more})
        )
        choice = reply["choices"][0]
        text, reason = choice["message"]["content"], choice["finish_reason"]
        if not isinstance(text, str) or reason not in ("stop", "length"):
            raise _CheckError(f"content is {text!r}, finish_reason {reason!r}")
        return text

    def health() -> str:
        response = client.get("/health")
        if response.status_code != 200:
            raise _CheckError(f"status {response.status_code}")
        return "200"

    def body() -> str:
        answers.append(ask(QUESTION))
        if any(stop in answers[0] for stop in BODY["stop"]):
            raise _CheckError("a stop text is in the answer")
        return f"{len(answers[0])} characters"

    def twice() -> str:
        if ask(QUESTION) != answers[0]:
            raise _CheckError("the second answer differs from the first")
        return "the same answer"

    def scores() -> str:
        wanted = {"type": "json_schema", "json_schema": {"name": "scores", "strict": True, "schema": SCHEMA}}
        text = ask(ESSAY[:300], response_format=wanted)
        value = json.loads(text)  # a code fence, a second object, a word before it: none of that is JSON
        if not isinstance(value, dict) or set(value) != {*SCORES, "rationale"}:
            raise _CheckError(f"not the schema's keys: {text}")
        return f"{len(text)} characters, {', '.join(f'{name} {value[name]}' for name in SCORES)}"

    def too_long() -> str:
        (model, *_) = _json(client.get("/v1/models"))["data"]
        messages = [{"role": "user", "content": "가 나 다 " * 400_000}]
        response = client.post("/v1/chat/completions", json={"model": model["id"], "messages": messages, **BODY})
        if response.status_code not in (400, 413) or not response.json()["error"]["message"]:
            raise _CheckError(f"status {response.status_code}")
        return f"refused with {response.status_code}"

    yield "health", health
    yield "data[0].id", lambda: str(_json(client.get("/v1/models"))["data"][0]["id"])
    yield "chat body", body
    yield "the same again", twice
    yield "one JSON object", scores
    yield f"long input, {len(ESSAY)} characters", lambda: f"{len(ask(ESSAY))} characters"
    yield "input of 2,400,000 characters", too_long


def _json(response: httpx.Response) -> Any:  # noqa: ANN401 -- JSON is Any
    if response.status_code != 200:
        raise _CheckError(f"status {response.status_code}: {response.text[:200]}")
    return response.json()
