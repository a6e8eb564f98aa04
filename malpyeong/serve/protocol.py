"""What is read from clients and what they are answered: OpenAI's chat completions, as far as they go here."""

import time
import uuid
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

GRAMMAR = "-grammar"  # behind the model's name: its last user message is a grammar question

_TYPES = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error"}


class RefusalError(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: what is wrong and what to do.
        param: the field of the body that is wrong.
        code: for programs.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self._message, self._param, self._code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The error as OpenAI writes it."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self._message, "type": kind, "param": self._param, "code": self._code}}


class _Part(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of a chat; text alone."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]

    @property
    def text(self) -> str:
        """The content."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class _JsonSchema(BaseModel):
    schema_: dict[str, Any] = Field(alias="schema")


class _TextFormat(BaseModel):
    type: Literal["text", "json_object"]


class _SchemaFormat(BaseModel):
    type: Literal["json_schema"]
    json_schema: _JsonSchema


class _StreamOptions(BaseModel):
    include_usage: bool = False


class Chat(BaseModel):
    """The body of a request. Fields that would change the answer and are not known here are refused, others ignored."""

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    response_format: _TextFormat | _SchemaFormat | None = None
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    presence_penalty: float | None = Field(None, ge=0, le=0)
    tools: list[Any] | None = Field(None, max_length=0)

    @property
    def limit(self) -> int | None:
        """How many tokens the answer may have; None: as many as there is room for."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end the answer and are no part of it."""
        return tuple(filter(None, [self.stop] if isinstance(self.stop, str) else self.stop or ()))

    @property
    def wanted_schema(self) -> dict[str, Any] | None:
        """The JSON schema that the answer has to keep to, if any."""
        if isinstance(self.response_format, _SchemaFormat):
            return self.response_format.json_schema.schema_
        wanted = self.response_format is not None and self.response_format.type == "json_object"
        return {"type": "object"} if wanted else None


def read_chat(body: bytes) -> Chat:
    """Read the body of a request.

    Raises:
        RefusalError: it is not JSON, or not such a body.
    """
    try:
        return Chat.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = ".".join(map(str, first["loc"])) or None
        raise RefusalError(400, f"{param or 'the body'}: {first['msg']}", param) from None


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request is answered.

    Attributes:
        text: the whole of it.
        finish_reason: ``stop``, or ``length`` where the limit cut it off.
        prompt_tokens: of the prompt.
        completion_tokens: of the answer.
        used: of a grammar question: what was asked, with which rules and examples, and the parts of the answer.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    used: dict[str, Any] | None = None

    @property
    def usage(self) -> dict[str, int]:
        """The counts of tokens."""
        total = self.prompt_tokens + self.completion_tokens
        counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
        return {**counts, "total_tokens": total}


class Reply:
    """The JSON objects of one answer, in one piece or streamed."""

    def __init__(self, model: str) -> None:
        self._base = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, answer: Answer) -> dict[str, Any]:
        """Return the answer in one piece."""
        message = {"role": "assistant", "content": answer.text}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish_reason}
        extra = {"malpyeong": answer.used} if answer.used else {}
        return {**self._base, "object": "chat.completion", "choices": [choice], "usage": answer.usage, **extra}

    def chunk(self, delta: dict[str, str], answer: Answer | None = None) -> dict[str, Any]:
        """Return a piece of a streamed answer; the last one comes with the ``answer``."""
        choice = {"index": 0, "delta": delta, "finish_reason": answer.finish_reason if answer else None}
        extra = {"malpyeong": answer.used} if answer and answer.used else {}
        return {**self._base, "object": "chat.completion.chunk", "choices": [choice], **extra}

    def counts(self, answer: Answer) -> dict[str, Any]:
        """Return the chunk of ``stream_options.include_usage``."""
        return {**self._base, "object": "chat.completion.chunk", "choices": [], "usage": answer.usage}
