"""The HTTP side: OpenAI's endpoints, a page, and every way of saying no."""

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from malpyeong.report.pages import render
from malpyeong.serve.protocol import GRAMMAR, Answer, RefusalError, Reply, read_chat
from malpyeong.serve.worker import Job, Worker

TEMPLATES = Path(__file__).parent / "templates"
MAX_BODY = 1 << 20
DRAINED = 64 << 20  # of a longer body so much is read and thrown away, so that the client gets to see the refusal
BODY_SECONDS = 30.0
POLL_SECONDS = 0.25  # how often it is looked whether a waiting client is still there


class Server:
    """The state behind the endpoints.

    Args:
        worker: answers.
        name: of the model; its grammar twin has :data:`GRAMMAR` behind it.
        api_key: that clients have to state, or None.
        queue: requests that may be there at once, running ones included.
        timeout: seconds that a request may take.
    """

    def __init__(self, worker: Worker, name: str, api_key: str | None, queue: int, timeout: float) -> None:
        self.worker, self.name, self._key, self._queue, self._timeout = worker, name, api_key, queue, timeout
        self.models = [
            {"id": id_, "object": "model", "created": int(time.time()), "owned_by": "malpyeong"}
            for id_ in (name, name + GRAMMAR)
        ]
        self._present = 0

    def check_key(self, request: Request) -> None:
        """Refuse a client that does not state the key."""
        stated = request.headers.get("authorization", "").removeprefix("Bearer ").encode("latin-1")
        if self._key and not hmac.compare_digest(stated, self._key.encode()):
            raise RefusalError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")

    async def complete(self, request: Request) -> Response:
        """Answer a chat."""
        self.check_key(request)
        if self._present >= self._queue:
            await _read(request, 0)
            raise RefusalError(429, "all places in the queue are taken; try again in a moment", code="queue_full")
        self._present += 1
        job: Job | None = None
        response: Response | None = None
        try:
            body = await _read(request, MAX_BODY)
            if body is None:
                raise RefusalError(413, f"the body has more than {MAX_BODY} bytes", code="body_too_large")
            chat = read_chat(body)
            if chat.model not in (self.name, self.name + GRAMMAR):
                known = f"there are {self.name} and {self.name}{GRAMMAR}"
                raise RefusalError(404, f"there is no model {chat.model[:100]}; {known}", "model", "model_not_found")
            job = Job(chat, chat.model != self.name, self._timeout)
            self.worker.submit(job)
            first = await self._event(request, job)
            response = self._reply(request, job, first)
            return response
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        finally:
            if not isinstance(response, _Stream):
                self._leave(job)

    def _reply(self, request: Request, job: Job, first: str | Answer) -> Response:
        reply = Reply(job.chat.model)
        if job.chat.stream:
            return _Stream(self._stream(request, job, first, reply), lambda: self._leave(job))
        assert isinstance(first, Answer), "pieces are sent of streamed answers alone"
        return JSONResponse(reply.whole(first))

    async def _stream(self, request: Request, job: Job, event: str | Answer, reply: Reply) -> AsyncIterator[str]:
        yield _line(reply.chunk({"role": "assistant", "content": ""}))
        try:
            while not isinstance(event, Answer):
                yield _line(reply.chunk({"content": event}))
                event = await self._event(request, job)
        except RefusalError as refusal:  # the status has been sent
            yield _line(refusal.body)
            return
        except ClientDisconnect:
            return
        if job.grammar:
            yield _line(reply.chunk({"content": event.text}))
        yield _line(reply.chunk({}, event))
        if job.chat.stream_options and job.chat.stream_options.include_usage:
            yield _line(reply.counts(event))
        yield "data: [DONE]\n\n"

    async def _event(self, request: Request, job: Job) -> str | Answer:
        """Return the next thing that the worker sends.

        Raises:
            RefusalError: it refuses, or time is up, or the server is closing.
            ClientDisconnect: nobody is there any more.
        """
        while True:
            left = job.deadline - time.monotonic()
            try:
                event = await asyncio.wait_for(job.events.get(), max(0.0, min(POLL_SECONDS, left)))
            except TimeoutError:
                if left <= 0:
                    raise RefusalError(504, f"no answer within {self._timeout:g} seconds", code="timeout") from None
                if self.worker.closing:
                    raise RefusalError(503, "the server is shutting down") from None
                if await request.is_disconnected():
                    raise ClientDisconnect from None
                continue
            if isinstance(event, RefusalError):
                raise event
            return event

    def _leave(self, job: Job | None) -> None:
        self._present -= 1
        if job:
            self.worker.cancel(job)


class _Stream(StreamingResponse):
    """Server-sent events that tell when they are over, however that came."""

    def __init__(self, lines: AsyncIterator[str], over: Any) -> None:  # noqa: ANN401 -- a function without arguments
        super().__init__(lines, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._over = over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except ClientDisconnect:
            pass
        finally:
            self._over()


def make_app(worker: Worker, name: str, api_key: str | None = None, queue: int = 64, timeout: float = 120.0) -> FastAPI:
    """Return the application; see :class:`Server`."""
    server = Server(worker, name, api_key, queue, timeout)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.close)

    app = FastAPI(lifespan=lifespan, openapi_url=None)
    page = render("ask.html.j2", "ask.js", TEMPLATES, title=name, model=name + GRAMMAR, key=bool(api_key))

    @app.exception_handler(RefusalError)
    async def refuse(_: Request, refusal: RefusalError) -> JSONResponse:
        headers = {429: {"retry-after": "1"}, 401: {"www-authenticate": "Bearer"}}.get(refusal.status)
        return JSONResponse(refusal.body, refusal.status, headers)

    @app.exception_handler(HTTPException)
    async def refuse_path(request: Request, error: HTTPException) -> JSONResponse:
        refusal = RefusalError(error.status_code, f"{error.detail}: {request.method} {request.url.path[:200]}")
        return JSONResponse(refusal.body, refusal.status, error.headers)

    @app.exception_handler(Exception)
    async def fail(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(RefusalError(500, "the server failed on this request; its log says why").body, 500)

    @app.get("/")
    async def ask() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/health")
    async def health() -> dict[str, str]:
        if not worker.alive:
            raise RefusalError(503, "the model's thread has ended")
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        server.check_key(request)
        return {"object": "list", "data": server.models}

    @app.get("/v1/models/{id_:path}")
    async def model(request: Request, id_: str) -> dict[str, Any]:
        server.check_key(request)
        for one in server.models:
            if one["id"] == id_:
                return one
        raise RefusalError(404, f"there is no model {id_[:100]}", "model", "model_not_found")

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        return await server.complete(request)

    return app


async def _read(request: Request, limit: int) -> bytes | None:
    """Return the body, None if it has more bytes than ``limit``; never holds more than that."""
    size, pieces = 0, list[bytes]()
    if int(request.headers.get("content-length", 0)) > DRAINED:
        return None
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                size += len(piece)
                if size <= limit:
                    pieces.append(piece)
                elif size > DRAINED:
                    break
    except TimeoutError:
        raise RefusalError(408, f"the body did not come within {BODY_SECONDS:g} seconds") from None
    return b"".join(pieces) if size <= limit else None


def _line(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
