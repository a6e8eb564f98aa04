"""Commands, on terminals that lack a character: a Korean Windows prints CP949, which has no ``–`` and no old Hangul."""

import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click


class Command(click.Command):
    """A command that prints ``?`` in the place of what the terminal's encoding lacks; the base of all commands here."""

    def main(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 -- what click takes
        """Run the command; see :meth:`click.Command.main`."""
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # stderr prints an escape there anyway
        return super().main(*args, **kwargs)


class Group(Command, click.Group):
    """A group of such commands."""

    command_class = Command


def make(product: Path, *command: str | Path) -> Path:
    """Run a command with this Python, offline, unless what it makes is there; end with its code if it fails."""
    if not product.exists():
        words = [str(word) for word in command]
        click.secho(f"\n$ python {shlex.join(words)}", bold=True)
        code = subprocess.run([sys.executable, *words], env={**os.environ, "HF_HUB_OFFLINE": "1"}).returncode
        if code:
            raise SystemExit(code)
    return product


def json_text(value: Any) -> str:  # noqa: ANN401 -- what JSON can hold
    """Return JSON to print: exact on every terminal, with ``\\u`` escapes where its encoding lacks a character."""
    text = json.dumps(value, ensure_ascii=False, indent=2)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, indent=2)
    return text
