"""The one thread that the model runs in: it takes what is waiting as a batch, and answers."""

import asyncio
import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click
from jinja2 import TemplateError

from malpyeong.contest.answer import parse_answer
from malpyeong.contest.nfd import compose
from malpyeong.contest.question import asked
from malpyeong.contest.records import Record
from malpyeong.decoding.answers import repaired
from malpyeong.decoding.constrain import token_ids
from malpyeong.decoding.engines import BatchEngine, Request
from malpyeong.errors import counted, printable
from malpyeong.prompts.context import Context
from malpyeong.prompts.messages import Prompt, fit_prompts, prompt_ids
from malpyeong.prompts.rule_choice import split_choice
from malpyeong.retrieval.finder import Finder
from malpyeong.serve.protocol import Answer, Chat, RefusalError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_TEMPERATURE = 0.01  # below it an answer is greedy
CHARACTERS = 32  # a token has no more of them on average: a longer text is refused before it is read


class Job:
    """A request on its way; made in the event loop, worked on in the worker's thread.

    Attributes:
        chat: its body.
        grammar: whether the last user message is a grammar question.
        events: what the worker sends: pieces of text where they are streamed, then the answer or a refusal.
        deadline: by :func:`time.monotonic`.
        cancelled: whether nobody waits for it any more.
        begun: whether a piece of it was sent.
    """

    def __init__(self, chat: Chat, grammar: bool, seconds: float) -> None:
        self.chat, self.grammar, self.deadline = chat, grammar, time.monotonic() + seconds
        self.cancelled = self.begun = False
        self.events: asyncio.Queue[str | Answer | RefusalError] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    @property
    def dropped(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.cancelled or time.monotonic() > self.deadline

    @property
    def alone(self) -> bool:
        """Whether it is answered in a batch of its own.

        What else is in a batch can decide near ties, so that a request that states a seed shares it with none; and a
        schema that cannot be kept to must not spoil others' answers.
        """
        return self.chat.seed is not None or self.chat.wanted_schema is not None

    def send(self, event: str | Answer | RefusalError) -> None:
        """Hand something over to the event loop."""
        self.begun = self.begun or isinstance(event, str)
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)


class Writer:
    """Makes text of a growing list of tokens, up to a stop text.

    Args:
        tokenizer: of the model.
        stops: texts that end the answer and are no part of it.
        send: is handed each new piece of text, or None.

    Attributes:
        text: what was written.
        stopped: whether a stop text has ended it.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", stops: Sequence[str], send: Callable[[str], None] | None
    ) -> None:
        self._tokenizer, self._stops, self._send = tokenizer, stops, send
        self.text, self.stopped = "", False

    def read(self, ids: list[int], last: bool = False) -> None:
        """Take all tokens so far; what may yet change with the next one is held back unless these are the last."""
        if not (last or self._send or self._stops):
            return
        text = str(self._tokenizer.decode(ids, skip_special_tokens=True))
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            text, self.stopped = text[: min(places)], True
        elif not last:
            text = text.rstrip("\ufffd")  # the beginning of a character
            held = [size for stop in self._stops for size in range(1, len(stop)) if text.endswith(stop[:size])]
            text = text[: len(text) - max(held, default=0)]
        if last or len(text) > len(self.text):
            if self._send and len(text) > len(self.text):
                self._send(text[len(self.text) :])
            self.text = text


class Worker:
    """Answers jobs, one batch after the other.

    Args:
        engine: one that constrains answers.
        finder: of rules and examples for grammar questions.
        choose: whether the model names a rule before it answers them.
        batch_size: requests that are answered at once.
        max_length: tokens of the longest prompt and answer together.

    Attributes:
        closing: whether the server is on its way out.
    """

    def __init__(
        self, engine: BatchEngine, finder: Finder, choose: bool = False, batch_size: int = 8, max_length: int = 8_192
    ) -> None:
        self._engine, self._finder, self._choose, self._batch_size = engine, finder, choose, batch_size
        self._max_length = min(max_length, engine.max_length)
        self._jobs: list[Job] = []
        self._ready = threading.Condition()
        self.closing = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive() and not self.closing

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def close(self) -> None:
        """End what runs at its next token, and the thread."""
        self.closing = True
        with self._ready:
            self._ready.notify()
        self._thread.join(10)

    def submit(self, job: Job) -> None:
        """Put a job at the end of the queue."""
        with self._ready:
            self._jobs.append(job)
            self._ready.notify()

    def cancel(self, job: Job) -> None:
        """Take a job out of the queue, or end it at its next token."""
        job.cancelled = True
        with self._ready:
            if job in self._jobs:
                self._jobs.remove(job)

    def _work(self) -> None:
        while not self.closing:
            self._run(self._take())

    def _take(self) -> list[Job]:
        with self._ready:
            self._ready.wait_for(lambda: self._jobs or self.closing)
            waiting = [job for job in self._jobs if not job.dropped]
            batch = waiting[:1]
            if batch and not batch[0].alone:
                kind = batch[0].grammar
                batch = [job for job in waiting if not job.alone and job.grammar == kind][: self._batch_size]
            self._jobs = [job for job in waiting if job not in batch]
        return batch

    def _run(self, jobs: list[Job]) -> None:
        try:
            if jobs:
                (self._answer if jobs[0].grammar else self._complete)(jobs)
        except Exception as error:  # whatever it is, the server goes on
            click.echo(
                f"{counted(len(jobs), 'request')} failed: {type(error).__name__}: {printable(str(error))}", err=True
            )
            for job in jobs:
                if len(jobs) > 1 and not job.begun:  # it may have been another one's fault
                    self._run([job])
                else:
                    job.send(RefusalError(500, "the model failed on this request; the server's log says why"))

    def _complete(self, jobs: Sequence[Job]) -> None:
        """Answer chats as they are."""
        begun: list[tuple[Job, Request, Writer]] = []
        for job in jobs:
            writer = Writer(self._engine.tokenizer, job.chat.stops, job.send if job.chat.stream else None)
            try:
                begun.append((job, self._request(job, writer), writer))
            except RefusalError as refusal:
                job.send(refusal)
        completions = self._engine.generate([request for _, request, _ in begun]) if begun else []
        for (job, request, writer), ids in zip(begun, completions, strict=True):
            writer.read(ids, last=True)
            whole = writer.stopped or len(ids) < request.max_tokens
            self._finish(job, Answer(writer.text, "stop" if whole else "length", len(request.prompt), len(ids)))

    def _request(self, job: Job, writer: Writer) -> Request:
        chat, tokenizer = job.chat, self._engine.tokenizer
        turns = [("system" if one.role == "developer" else one.role, one.text) for one in chat.messages]
        self._check_characters(sum(len(text) for _, text in turns))
        try:
            prompt = prompt_ids(tokenizer, [{"role": role, "content": text} for role, text in turns])
        except TemplateError as error:
            message = f"the model's chat template does not take these messages: {printable(str(error))}"
            raise RefusalError(400, message, "messages") from None
        room = self._max_length - len(prompt)
        if room < 1:
            raise self._too_long(f"{len(prompt)} tokens")
        limit, temperature, grammar = min(room, chat.limit or room), chat.temperature or 0.0, None
        if chat.wanted_schema is not None:
            try:
                grammar = self._engine.json_grammar(chat.wanted_schema)
            except ValueError as error:
                raise RefusalError(400, f"response_format: {printable(str(error))}", "response_format") from None
        seed = secrets.randbits(63) if chat.seed is None else chat.seed % 2**63
        drawn = seed if temperature >= MIN_TEMPERATURE else None

        def watch(ids: list[int]) -> bool:
            if len(ids) < limit:
                writer.read(ids)
            return len(ids) >= limit or writer.stopped or job.dropped or self.closing

        return Request(prompt, limit, grammar, drawn, temperature, chat.top_p or 1.0, watch, chat.stops)

    def _answer(self, jobs: Sequence[Job]) -> None:
        """Answer grammar questions: our prompt and context, well-formed answers, repaired."""
        fitting: list[tuple[Job, Prompt]] = []
        for job in jobs:
            try:
                fitting.append((job, self._prompt(job)))
            except RefusalError as refusal:
                job.send(refusal)
        prompts = [prompt for _, prompt in fitting]
        watches = [lambda ids, job=job: job.dropped or self.closing for job, _ in fitting]
        answers = self._engine.answers(prompts, watches) if fitting else []
        for (job, prompt), (text,) in zip(fitting, answers, strict=True):
            named, text = split_choice(text) if self._choose else (None, text)
            (record,), _ = repaired([prompt.record.with_answer(text)])
            answer = record.answer or ""
            tokens = len(token_ids(self._engine.tokenizer, answer))
            self._finish(job, Answer(answer, "stop", len(prompt.ids), tokens, _used(record, prompt.context, named)))

    def _finish(self, job: Job, answer: Answer) -> None:
        """Send an answer, unless it was ended before its time."""
        if self.closing:
            job.send(RefusalError(503, "the server is shutting down"))
        elif not job.dropped:
            job.send(answer)

    def _prompt(self, job: Job) -> Prompt:
        questions = [message.text for message in job.chat.messages if message.role == "user"]
        if not questions or not questions[-1].strip():
            raise RefusalError(400, "messages: there is no question; put it into the last user message", "messages")
        if job.chat.wanted_schema is not None:
            raise RefusalError(400, "response_format: a grammar question has a form of its own", "response_format")
        self._check_characters(len(questions[-1]))
        record = Record("", *asked(compose(questions[-1])[0]))
        (rules,), (examples,) = self._finder.rules([record]), self._finder.examples([record])
        shown = () if self._choose else tuple(example for _, example in examples)
        context = Context(tuple(rule for _, rule in rules), shown, self._choose)
        room = self._max_length - self._engine.decoding.max_new_tokens
        (prompt,) = fit_prompts(self._engine.tokenizer, [record], [context], [room])
        if len(prompt.ids) > room:
            raise self._too_long(f"{len(prompt.ids)} tokens, and {self._engine.decoding.max_new_tokens} for the answer")
        return prompt

    def _check_characters(self, count: int) -> None:
        if count > CHARACTERS * self._max_length:
            raise self._too_long(f"{count} characters")

    def _too_long(self, length: str) -> RefusalError:
        message = f"this model takes at most {self._max_length} tokens, prompt and answer together; these messages "
        return RefusalError(400, f"{message}have {length}: shorten them", "messages", "context_length_exceeded")


def _used(record: Record, context: Context, named: str | None) -> dict[str, Any]:
    answer = parse_answer(record.answer or "")
    return {
        "question_type": record.question_type,
        "question": record.question,
        "sentences": list(answer.sentences),
        "reason": answer.reason,
        "named_rule": named,
        "rules": [{"id": rule.id, "text": rule.full_text} for rule in context.rules],
        "examples": [{"question": one.question, "answer": one.answer} for one in context.examples],
    }
