"""The server with the sample model: a real uvicorn, the real openai client."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import openai
import pytest
import uvicorn
from click.testing import CliRunner

from malpyeong.contest.answer import format_problem
from malpyeong.contest.question import asked, options
from malpyeong.contest.records import Record, load_records
from malpyeong.contest.rulebook import load_rule_book
from malpyeong.decoding.answers import predict, repaired
from malpyeong.decoding.engines import Decoding, load_engine
from malpyeong.errors import InputError
from malpyeong.prompts.context import Context
from malpyeong.prompts.messages import fit_prompts
from malpyeong.retrieval.finder import Finder
from malpyeong.samples import DATA, TINY_BASE
from malpyeong.serve.__main__ import bind, check_manifest, main
from malpyeong.serve.app import MAX_BODY, make_app
from malpyeong.serve.worker import Worker, Writer
from tests.conftest import ROOT

GOLD = load_records(DATA / "dev.json", "gold")
RULES = load_rule_book(DATA / "rules.json")
CHOICE = next(record for record in GOLD if options(record))
LONG = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "string", "minLength": 1_500}}}
MARK = {"temperature": 0, "max_tokens": 40}


@pytest.fixture(scope="module")
def engine():
    """An engine that notes how many requests each call has, and how many tokens each of them got."""
    engine = load_engine("transformers", str(TINY_BASE), None, "float32", False, Decoding(True, max_new_tokens=96))
    generate, engine.calls = engine.generate, []

    def noting(requests):
        completions = generate(requests)
        engine.calls.append([len(ids) for ids in completions])
        return completions

    engine.generate = noting
    return engine


@contextmanager
def serving(engine, finder=None, batch_size=8, **settings):
    worker = Worker(engine, finder or Finder([], []), batch_size=batch_size)
    place = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(make_app(worker, "tiny", **settings), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
    thread.start()
    url = f"http://127.0.0.1:{place.getsockname()[1]}"
    try:
        while not server.started:
            time.sleep(0.01)
        yield url
    finally:
        worker.closing = server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def url(engine):
    with serving(engine, Finder(RULES, GOLD[:200])) as url:
        yield url


def client_of(url, key="none"):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def client(url):
    return client_of(url)


def ask(client, text, model="tiny", **more):
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model=model, messages=messages, **{**MARK, **more})


def text_of(reply):
    return reply.choices[0].message.content


def test_an_openai_client_is_answered_whole_and_in_pieces(client):
    models = client.models.list().data
    assert [model.id for model in models] == ["tiny", "tiny-grammar"]
    assert client.models.retrieve("tiny").id == "tiny"
    reply = ask(client, CHOICE.question)
    assert text_of(reply)
    assert reply.choices[0].finish_reason in ("stop", "length")
    assert reply.usage.completion_tokens <= 40
    assert ask(client, CHOICE.question, max_tokens=3).choices[0].finish_reason == "length"
    *chunks, counts = ask(client, CHOICE.question, stream=True, stream_options={"include_usage": True})
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert len(pieces) > 5
    assert "".join(pieces) == text_of(reply)
    assert chunks[-1].choices[0].finish_reason == reply.choices[0].finish_reason
    assert counts.usage == reply.usage
    parts = [{"type": "text", "text": CHOICE.question[:10]}, {"type": "text", "text": CHOICE.question[10:]}]
    assert text_of(ask(client, parts)) == text_of(reply)


def test_a_seed_gives_the_same_answer_in_any_company(client, engine):
    others = [record.question for record in GOLD[:6]]
    drawn = {"temperature": 1.0, "top_p": 0.9, "seed": 7}
    for settings in ({"seed": 42}, drawn, {}):
        alone = text_of(ask(client, CHOICE.question, **settings))
        engine.calls.clear()
        with ThreadPoolExecutor(7) as pool:
            company = [pool.submit(ask, client, question) for question in others]
            again = pool.submit(ask, client, CHOICE.question, **settings)
            assert all(text_of(one.result()) for one in company)
        assert text_of(again.result()) == alone
        assert sum(map(len, engine.calls)) == 7
        assert len(engine.calls) < 7, "nothing was batched"
    assert len({text_of(ask(client, CHOICE.question, **{**drawn, "seed": seed})) for seed in range(4)}) > 1
    assert text_of(ask(client, CHOICE.question, **drawn)) != text_of(ask(client, CHOICE.question))


def test_a_stop_text_ends_the_answer_and_is_not_in_it(client, engine):
    whole = text_of(ask(client, CHOICE.question))
    stop = whole[9:13]
    cut = ask(client, CHOICE.question, stop=["Q:", stop])
    assert text_of(cut) == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert engine.calls[-1][0] < 40  # and no more is generated
    chunks = ask(client, CHOICE.question, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text_of(cut)


def test_what_may_change_is_held_back():
    class Bytes:
        """A tokenizer with a token for each byte."""

        def decode(self, ids, skip_special_tokens):
            return bytes(ids).decode("utf-8", errors="replace")

    pieces = []
    writer = Writer(Bytes(), ["끝.", "Q:"], pieces.append)
    ids = list("가나 끝 Q 끝.다".encode())
    for count in range(1, len(ids) + 1):
        if not writer.stopped:
            writer.read(ids[:count])
            assert "\ufffd" not in writer.text
    assert writer.stopped
    assert "".join(pieces) == writer.text == "가나 끝 Q "
    whole = Writer(Bytes(), ["Q:"], pieces.append)
    whole.read(ids[:-4], last=True)
    assert whole.text == "가나 끝 Q 끝"


def test_json_is_one_object_that_keeps_to_the_schema(client):
    schema = {
        "type": "object",
        "properties": {"score": {"type": "integer", "minimum": 1, "maximum": 5}, "why": {"enum": ["가", "나"]}},
        "required": ["score", "why"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    value = json.loads(text_of(ask(client, "채점", response_format=wanted)))
    assert value["score"] in range(1, 6)
    assert value["why"] in ("가", "나")
    assert text_of(ask(client, "채점", response_format={"type": "json_object"}))[0] == "{"
    with pytest.raises(openai.BadRequestError) as refused:
        ask(
            client,
            "채점",
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "?"}}},
        )
    assert refused.value.param == "response_format"


def test_the_grammar_model_answers_as_predict_does(client, engine):
    for record in (CHOICE, next(record for record in GOLD if not options(record))):
        reply = ask(client, record.question, "tiny-grammar")
        used = reply.model_extra["malpyeong"]
        assert format_problem(text_of(reply)) is None
        assert used["question_type"] == record.question_type
        assert len(used["rules"]) == len(used["examples"]) == 3
        bare, finder = Record("", record.question_type, record.question), Finder(RULES, GOLD[:200])
        (rules,), (examples,) = finder.rules([bare]), finder.examples([bare])
        context = Context(tuple(rule for _, rule in rules), tuple(one for _, one in examples))
        prompts = fit_prompts(engine.tokenizer, [bare], [context], [engine.max_length - 96])
        ((_, answer),) = predict(engine, prompts)
        (expected,), _ = repaired([bare.with_answer(answer)])
        assert text_of(reply) == expected.answer
    assert used["sentences"][0] in text_of(reply)
    chunks = list(ask(client, CHOICE.question, "tiny-grammar", stream=True))
    assert chunks[-1].model_extra["malpyeong"]["rules"]


@pytest.mark.parametrize(
    ("text", "kind", "same"),
    [
        (CHOICE.question, "선택형", True),
        (next(record.question for record in GOLD if record.question_type == "교정형"), "교정형", True),
        ("[교정형] 무엇이 {a/b}?", "교정형", False),
        ("나는 선생님이 {되고/돼고} 싶다.", "선택형", False),
        ("오늘은 왠지 기분이 좋찮다.", "교정형", False),
        ('"오늘은 왠지 기분이 좋찮다."', "교정형", False),
        ("안녕하세요.\n다음에 뵈요.", "교정형", False),
        ("비를 맞는 사람이 우산을 고치고 있다.", "교정형", False),
        ('그는 "가자."라고 말했다.', "교정형", False),
        ("'되'와 '돼'는 어떻게 다른지 설명하세요.", "교정형", True),
    ],
)
def test_a_bare_sentence_becomes_a_question(text, kind, same):
    question_type, question = asked(text)
    assert question_type == kind
    assert (question == text) == same
    assert not text.startswith('"오늘') or question.count('"') == 2


def post(url, body, **more):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(f"{url}/v1/chat/completions", content=content, timeout=60, **more)


HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "안녕"}], "max_tokens": 2}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"", 400),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        (b"[" * 100_000, 400),
        (b"x" * 10 * MAX_BODY, 413),
        ({"model": "tiny"}, 400),
        ({**HELLO, "messages": []}, 400),
        ({**HELLO, "messages": [{"role": "user"}]}, 400),
        ({**HELLO, "messages": [{"role": "user", "content": "가" * 3_000}]}, 400),
        ({**HELLO, "messages": [{"role": "user", "content": "가" * 100_000}]}, 400),
        ({**HELLO, "model": "tiny-grammar", "messages": [{"role": "system", "content": "가"}]}, 400),
        ({**HELLO, "model": "tiny-grammar", "messages": [{"role": "user", "content": "가" * 3_000}]}, 400),
        ({**HELLO, "model": "다른 것"}, 404),
        ({**HELLO, "n": 2}, 400),
        ({**HELLO, "max_tokens": 0}, 400),
        ({**HELLO, "temperature": "뜨겁게"}, 400),
        ({**HELLO, "temperature": -1}, 400),
        ({**HELLO, "tools": [{"type": "function"}]}, 400),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_wrong_is_an_openai_error(url, body, status):
    response = post(url, body)
    assert response.status_code == status
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text


def test_other_paths_are_openai_errors_too(url):
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    for response in (
        httpx.get(f"{url}/v1/nothing"),
        httpx.get(f"{url}/v1/chat/completions"),
        httpx.get(f"{url}/v1/models/x"),
    ):
        assert response.status_code in (404, 405)
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_max_tokens_is_cut_to_the_room_that_there_is(client):
    reply = ask(client, CHOICE.question, max_tokens=100_000)
    assert reply.usage.total_tokens <= 2_048


def test_the_key_is_asked_for(engine):
    with serving(engine, api_key="비밀") as url:
        assert httpx.get(f"{url}/health").status_code == 200
        for headers in ({}, {"authorization": "Bearer wrong"}):
            assert post(url, HELLO, headers=headers).status_code == 401
            assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 401
        key = {"authorization": "Bearer 비밀".encode()}
        assert post(url, HELLO, headers=key).status_code == 200


def test_a_late_request_is_504_and_the_next_one_is_answered(engine):
    with serving(engine, timeout=0.5) as url:
        late = post(url, {**HELLO, "max_tokens": 2_000, "response_format": LONG})
        assert late.status_code == 504
        assert late.json()["error"]["code"] == "timeout"
        engine.calls.clear()
    with serving(engine) as url:
        assert post(url, HELLO).status_code == 200


def test_a_full_queue_is_429_and_a_client_that_leaves_makes_room(engine):
    with serving(engine, queue=1) as url:
        long = {**HELLO, "max_tokens": 2_000, "response_format": LONG, "stream": True}
        engine.calls.clear()
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=long, timeout=60) as response:
            lines = response.iter_lines()  # which closes the connection when it is forgotten
            assert next(lines).startswith("data: ")
            full = post(url, HELLO)
            assert full.status_code == 429
            assert int(full.headers["retry-after"]) > 0
        while (response := post(url, HELLO)).status_code == 429:
            time.sleep(0.05)
        assert response.status_code == 200
        assert engine.calls[0][0] < 1_500  # it was ended before its time


def test_an_error_of_one_request_is_not_the_others(engine, monkeypatch, capfd):
    """Whatever fails in a batch, the others of the batch are answered."""
    generate = engine.generate

    def failing(requests):
        if any(request.max_tokens == 13 for request in requests):
            raise RuntimeError("no memory\nat all")
        return generate(requests)

    monkeypatch.setattr(engine, "generate", failing)
    with serving(engine) as url, ThreadPoolExecutor(4) as pool:
        slow = pool.submit(post, url, {**HELLO, "max_tokens": 60})
        bad = pool.submit(post, url, {**HELLO, "max_tokens": 13})
        good = [pool.submit(post, url, HELLO) for _ in range(2)]
        assert bad.result().status_code == 500
        assert {one.result().status_code for one in (slow, *good)} == {200}
    assert "RuntimeError: no memory at all" in capfd.readouterr().err


def hashes(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  ./{path.relative_to(folder)}\n" for path in files)


def test_another_byte_and_it_does_not_start(tmp_path):
    folder, manifest = tmp_path / "모델", tmp_path / "model.sha256"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((TINY_BASE / name).read_bytes())
    manifest.write_text(hashes(folder))
    check_manifest(folder, manifest)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    result = CliRunner().invoke(main, [str(folder), "--manifest", str(manifest)])
    assert result.exit_code == 2
    assert result.output.count("\n") == 1
    assert str(weights) in result.output
    (folder / "more.bin").touch()
    with pytest.raises(InputError, match=r"more\.bin"):
        check_manifest(folder, manifest)
    (folder / "more.bin").unlink()
    weights.unlink()
    with pytest.raises(InputError, match="missing"):
        check_manifest(folder, manifest)


def test_what_cannot_be_served_is_one_line(tmp_path, run_module):
    taken = bind("127.0.0.1", 0)
    taken.listen()
    port = taken.getsockname()[1]
    for arguments in (
        [],
        [str(TINY_BASE), "--check", "http://127.0.0.1:1"],
        ["--check", "http://127.0.0.1:1"],
        [str(TINY_BASE), "--choose"],
        [str(TINY_BASE), "--labels", str(DATA / "labels.json")],
        [str(TINY_BASE), "--port", str(port)],
        [str(TINY_BASE), "--rules", str(tmp_path / "none.json")],
    ):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 2, arguments
        assert result.output.strip().count("\n") == 0
    taken.close()
    missing = (
        "import sys, importlib.util as util; real = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'fastapi' else real(name, *rest)\n"
        f"sys.argv = ['serve', {str(TINY_BASE)!r}]\n"
        "from malpyeong.serve.__main__ import main; main()"
    )
    result = run_module("-c", missing)
    assert result.returncode == 2
    assert "[serve]" in result.stderr


@contextmanager
def process(*arguments):
    """Run the command; yield the process and the address that it prints."""
    command = [sys.executable, "-m", "malpyeong.serve", *map(str, arguments), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            line = server.stdout.readline()
            address = re.search(r"http://\S+", line)
            assert address, line + server.stderr.read()
            yield server, address[0]
        finally:
            server.kill()


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_the_command_passes_its_own_check_and_ends_cleanly(stop):
    with process(TINY_BASE, "--name", "tiny", "--dtype", "float32") as (server, url):
        if stop == signal.SIGTERM:
            result = CliRunner().invoke(main, ["--check", url])
            assert result.exit_code == 0, result.output
            assert [line.split()[0] for line in result.output.splitlines()] == ["ok"] * 7
        while_running = {**HELLO, "max_tokens": 2_000, "response_format": LONG}
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(post, url, while_running)
            time.sleep(0.3)
            server.send_signal(stop)
            assert running.result().status_code == 503
        assert server.wait(60) == 0
        assert "Traceback" not in server.stderr.read()


def test_the_check_names_what_is_missing(engine):
    with serving(engine, api_key="key") as url:
        result = CliRunner().invoke(main, ["--check", url])
        assert result.exit_code == 1
        lines = result.output.splitlines()
        assert lines[0].startswith("ok ")
        assert all(line.startswith("FAIL") for line in lines[1:])
        assert "401" in lines[1]
