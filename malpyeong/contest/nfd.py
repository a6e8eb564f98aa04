"""Hangul in decomposed form (NFD), as macOS writes file names and some programs write text: a syllable in two or three
characters. A model takes such text at three times the tokens, and no text of whole syllables equals it.
"""

import re
import unicodedata

from malpyeong.errors import InputError

# A modern syllable in pieces. Beside old letters nothing is one: old Hangul is written in pieces.
_PIECES = re.compile(
    "(?<![\u1100-\u115f\ua960-\ua97c])[\u1100-\u1112][\u1161-\u1175][\u11a8-\u11c2]?(?![\u1160-\u11ff\ud7b0-\ud7fb])"
)
_WHOLE = re.compile("[가-힣]")


def compose(text: str) -> tuple[str, int]:
    """Put modern syllables together that are in pieces.

    Everything else stays: jamo that stand alone (ㄹ, ᄅ), old Hangul, hanja, accents.

    Returns:
        The text, and how many syllables were put together.
    """
    return _PIECES.subn(lambda piece: unicodedata.normalize("NFC", piece[0]), text)


def check_composed(where: str, name: str, text: str) -> None:
    """Make sure that most of a text's syllables are whole; single ones in pieces may be meant.

    Raises:
        InputError: begins with ``where`` and names the cure.
    """
    if len(_PIECES.findall(text)) > len(_WHOLE.findall(text)):
        raise InputError(
            f"{where}: {name} is in decomposed form (NFD, as macOS writes Hangul): each syllable is in two or three "
            "pieces; put the file's syllables together with python -m malpyeong.nfd FILE -o OUTPUT"
        )
