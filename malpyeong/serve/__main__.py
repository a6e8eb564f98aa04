"""``python -m malpyeong.serve MODEL`` and ``python -m malpyeong.serve --check URL``."""

import re
import signal
import socket
from pathlib import Path, PurePosixPath
from types import FrameType
from typing import TYPE_CHECKING

import click

from malpyeong.contest.records import load_records
from malpyeong.contest.rulebook import load_rule_book
from malpyeong.errors import InputError, needs, printable
from malpyeong.files import digest, read_text
from malpyeong.prompts.rule_choice import find_labels, is_readable
from malpyeong.retrieval.finder import Finder
from malpyeong.terminal import Command

if TYPE_CHECKING:
    from fastapi import FastAPI

    from malpyeong.serve.worker import Worker

_PATH = click.Path(path_type=Path)


def check_manifest(folder: Path, manifest: Path) -> None:
    """Compare a model folder with what ``sha256sum`` wrote of it.

    Raises:
        InputError: a file is missing, is not listed, or has another content.
    """
    listed = {}
    for number, line in enumerate(read_text(manifest, "lines of sha256sum").splitlines(), 1):
        if not (parts := re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)):
            raise InputError(f"{manifest}: line {number} is none of sha256sum; write the manifest again")
        listed[str(PurePosixPath(parts[2]))] = parts[1]
    here = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    for name in sorted(here ^ listed.keys()):
        raise InputError(f"{folder / name}: is {'not in' if name in here else 'missing, and listed in'} {manifest}")
    for name in sorted(here):
        if digest(folder / name) != listed[name]:
            raise InputError(f"{folder / name}: is not the file that {manifest} lists; build the image again")


def bind(host: str, port: int) -> socket.socket:
    """Return a socket at an address, before anything is loaded.

    Raises:
        InputError: the address is in use, or is none of this machine.
    """
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        place = socket.socket(family, kind, protocol)
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind(address)
    except OSError as error:
        raise InputError(f"{host}:{port}: cannot be listened at ({error.strerror}); choose another --port") from None
    return place


def run(app: "FastAPI", worker: "Worker", place: socket.socket, line: str) -> None:
    """Serve until Ctrl-C or SIGTERM; requests that are there then are refused, and the process ends with 0.

    ``line`` is printed as soon as clients are answered.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            click.echo(line)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            worker.closing = True
            self.force_exit = self.should_exit and sig == signal.SIGINT
            self.should_exit = True

    settings = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=15)
    Server(settings).run(sockets=[place])


@click.command(cls=Command)
@click.argument("model", required=False)
@click.option("--adapter", help="Folder or hub id of a LoRA adapter to put on MODEL.")
@click.option("--check", "url", metavar="URL", help="Check a running server as the 2026 contest uses it; no MODEL.")
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0: whoever reaches this machine.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65_535), help="0: a free one.")
@click.option("--name", help="Of the model, for clients.  [default: the last part of MODEL]")
@click.option("--api-key", envvar="MALPYEONG_API_KEY", help="That clients have to state; MALPYEONG_API_KEY does too.")
@click.option("--rules", "rule_book", type=_PATH, help="Rule book of python -m malpyeong.rules build.")
@click.option("--examples", "solved", type=_PATH, help="Contest file with answers, such as train.json.")
@click.option("--labels", "label_file", type=_PATH, help="Rules of the examples, given or mined, to find rules by.")
@click.option("--rules-k", default=3, show_default=True, type=click.IntRange(min=1), help="Rules a question.")
@click.option("--examples-k", default=3, show_default=True, type=click.IntRange(min=1), help="Examples a question.")
@click.option("--choose", is_flag=True, help="For a model that was trained to name one of the rules first.")
@click.option("--engine", default="auto", type=click.Choice(["auto", "transformers", "vllm"]), show_default=True)
@click.option("--dtype", default="auto", type=click.Choice(["auto", "float32", "float16", "bfloat16"]))
@click.option("--load-in-4bit", is_flag=True, help="Hold MODEL in 4-bit NF4.")
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(min=1), help="Answers at once.")
@click.option(
    "--max-new-tokens", default=320, show_default=True, type=click.IntRange(min=1), help="Of grammar answers."
)
@click.option("--max-length", default=8_192, show_default=True, type=click.IntRange(min=1), help="Prompt and answer.")
@click.option("--queue", default=64, show_default=True, type=click.IntRange(min=1), help="Requests there at once.")
@click.option("--timeout", default=120.0, show_default=True, type=click.FloatRange(min=0.1), help="Seconds a request.")
@click.option("--manifest", type=_PATH, help="What sha256sum wrote of MODEL's files: another byte, and no start.")
def main(
    model: str | None,
    adapter: str | None,
    url: str | None,
    host: str,
    port: int,
    name: str | None,
    api_key: str | None,
    rule_book: Path | None,
    solved: Path | None,
    label_file: Path | None,
    rules_k: int,
    examples_k: int,
    choose: bool,
    engine: str,
    dtype: str,
    load_in_4bit: bool,
    batch_size: int,
    max_new_tokens: int,
    max_length: int,
    queue: int,
    timeout: float,
    manifest: Path | None,
) -> None:
    """Serve MODEL (a folder or hub id) with OpenAI's chat API, and a page to ask on.

    The model NAME takes chats as they are; NAME-grammar takes a grammar question or a bare sentence, and answers it as
    malpyeong.predict does, with what --rules and --examples hold about it.
    """
    if (model is None) == (url is None):
        raise InputError("name a MODEL to serve, or --check URL")
    if url:
        needs("httpx", "serve")
        from malpyeong.serve.check import check

        raise SystemExit(check(url, api_key))
    assert model
    if label_file and not (rule_book and solved):
        raise InputError("--labels are rules of examples: name --rules and --examples too")
    if choose and not rule_book:
        raise InputError("--choose needs --rules, the rules to choose among")
    for package in ("fastapi", "uvicorn"):
        needs(package, "serve")
    rules = load_rule_book(rule_book) if rule_book else []
    examples = load_records(solved, answers="gold") if solved else []
    labels = find_labels(label_file, examples) if label_file else []
    for rule in rules if choose else ():
        if not is_readable(rule.id):
            raise InputError(f'{rule_book}: the rule "{printable(rule.id, 40)}" cannot be named in a tag')
    if manifest:
        check_manifest(Path(model), manifest)
    finder = Finder(rules, examples, labels, rules_k, examples_k)
    place = bind(host, port)
    from malpyeong.decoding.engines import Decoding, load_engine
    from malpyeong.models.memory import out_of_memory
    from malpyeong.serve.app import make_app
    from malpyeong.serve.worker import Worker

    decoding = Decoding(constrained=True, max_new_tokens=max_new_tokens)
    with out_of_memory("serve a smaller model, or add --load-in-4bit"):
        loaded = load_engine(engine, model, adapter, dtype, load_in_4bit, decoding)
    worker = Worker(loaded, finder, choose, batch_size, max_length)
    name = name or Path(model).resolve().name
    app = make_app(worker, name, api_key, queue, timeout)
    shown = f"[{host}]" if ":" in host else host
    if api_key is None and not host.startswith(("127.", "localhost", "::1")):
        click.echo("whoever reaches this address may use it: --api-key asks for a key", err=True)
    line = f"{name}: http://{shown}:{place.getsockname()[1]} ({type(loaded).__name__}); Ctrl-C ends it"
    run(app, worker, place, line)


if __name__ == "__main__":
    main()
