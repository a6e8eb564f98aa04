"""What all commands share: they print on terminals that lack a character (a Korean Windows prints CP949, which has no
``–``, no ``ʃ`` and no old Hangul), and end in one line where the disk is full or a place is not writable."""

import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from malpyeong.errors import InputError
from malpyeong.files import write_problem


class Command(click.Command):
    """The base of all commands: prints ``?`` in the place of what the terminal's encoding lacks, and names in one line
    what cannot be written."""

    def main(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 -- what click takes
        """Run the command; see :meth:`click.Command.main`."""
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # stderr prints an escape there anyway
        return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 -- what click returns
        """Run the command's function.

        Raises:
            InputError: the disk is full or a place not writable, where nothing nearer to it has said so.
        """
        try:
            return super().invoke(ctx)
        except click.ClickException:
            _close_progress_bars()
            raise
        except OSError as error:
            _close_progress_bars()
            reason = write_problem(error)
            if reason is None:
                raise
            place = error.filename or "a file"
            raise InputError(f"{place}: {reason}; make room, or choose a place where you may read and write") from None


def _close_progress_bars() -> None:
    """End the line that an open progress bar stands on, so that an error begins one."""
    if "tqdm" in sys.modules:
        for bar in list(sys.modules["tqdm"].tqdm._instances):
            bar.close()


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
