"""The one error that a user's mistake ends in."""

from importlib.util import find_spec

import click


class InputError(click.ClickException):
    """Something in the user's files, configuration or environment is wrong.

    The message is one line: what is wrong, where (file, record id), and what to do. On the command line it
    is printed without a traceback and the process exits with code 2.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(printable(message, limit=2_000))


def printable(text: str, limit: int = 300) -> str:
    """Return text that is safe to print on a terminal: one line, no control or direction characters."""
    text = " ".join(text[: 10 * limit].split())
    shown = "".join(character if character.isprintable() else "�" for character in text[:limit])
    return shown + ("…" if len(text) > limit else "")


def counted(number: int, noun: str) -> str:
    """Return a number and what it counts: ``1 record``, ``2 records``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def needs(package: str, extra: str) -> None:
    """Make sure, before it is imported, that a package is there which only some commands need.

    Raises:
        InputError: it is not installed; names the extra that brings it.
    """
    if find_spec(package) is None:
        raise InputError(f"{package} is not installed; run pip install -e '.[{extra}]' in the repository")
