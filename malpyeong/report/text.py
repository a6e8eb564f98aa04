"""Text as a page shows it: cut to a length, with differences marked and invisible characters made visible."""

import difflib
import re
from dataclasses import dataclass

from markupsafe import Markup, escape

MAX_SHOWN_CHARS = 1_000  # the contest's longest gold answer has 342

# Characters that show nothing or turn the text around them: controls, odd spaces, Hangul fillers, direction marks.
_INVISIBLE = re.compile(
    "[\0-\x09\x0b-\x1f\x7f-\xa0\xad\u034f\u061c\u115f\u1160\u1680\u180b-\u180e\u2000-\u200f\u2028-\u202f\u205f-\u206f"
    "\u3000\u3164\ufeff\uffa0\ufff9-\ufffb]"
)


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of text that is the same on both sides, or not.

    Attributes:
        text: the run; may be empty where the other side has something that this one lacks.
        differs: True if the other side has something else here.
    """

    text: str
    differs: bool


def cut(text: str) -> str:
    """Return at most :data:`MAX_SHOWN_CHARS` characters."""
    return text[:MAX_SHOWN_CHARS]


def differences(first: str, second: str, shortest: int = 1) -> tuple[list[Piece], list[Piece]]:
    """Compare two texts character by character.

    Args:
        first: one text.
        second: the other.
        shortest: runs of equal characters between two differences count as equal from this length on; in two reasons
            that say the same in other words, shorter ones are chance.

    Returns:
        Pieces of the first and pieces of the second; joined, each gives its text back.
    """
    # [first's start, first's end, second's start, second's end] of what differs
    regions: list[list[int]] = []
    for tag, *bounds in difflib.SequenceMatcher(None, first, second, autojunk=False).get_opcodes():
        if tag == "equal":
            continue
        if regions and bounds[0] - regions[-1][1] < shortest:
            regions[-1][1], regions[-1][3] = bounds[1], bounds[3]
        else:
            regions.append(bounds)
    return (
        _pieces(first, [(region[0], region[1]) for region in regions]),
        _pieces(second, [(region[2], region[3]) for region in regions]),
    )


def _pieces(text: str, regions: list[tuple[int, int]]) -> list[Piece]:
    pieces, done = [], 0
    for start, end in regions:
        if start > done:
            pieces.append(Piece(text[done:start], differs=False))
        pieces.append(Piece(text[start:end], differs=True))
        done = end
    if done < len(text):
        pieces.append(Piece(text[done:], differs=False))
    return pieces


def visible(text: str, spaces: bool = False) -> Markup:
    """Return text as safe HTML in which invisible characters stand as their code points.

    Args:
        text: anything.
        spaces: draw spaces as open boxes, where a space is what matters.
    """
    html = str(escape(text))
    if spaces:
        html = html.replace(" ", '<i class="space"> </i>')
    html = _INVISIBLE.sub(lambda character: f'<b class="code">U+{ord(character[0]):04X}</b>', html)
    return Markup(html)
