"""What a question is about, letter by letter: the jamo, spaces and marks that change, and what stands around them."""

import difflib
import itertools
import os
from collections.abc import Sequence
from typing import NamedTuple

from malpyeong.contest.answer import parse_answer
from malpyeong.contest.question import read_record
from malpyeong.contest.records import Record

SPACE = "@SPACE"
_START, _END = "@START", "@END"
_INITIALS = "ㄱㄲㄴㄷㄸㄹㅁㅂㅃㅅㅆㅇㅈㅉㅊㅋㅌㅍㅎ"
_VOWELS = "ㅏㅐㅑㅒㅓㅔㅕㅖㅗㅘㅙㅚㅛㅜㅝㅞㅟㅠㅡㅢㅣ"
_FINALS = " ㄱㄲㄳㄴㄵㄶㄷㄹㄺㄻㄼㄽㄾㄿㅀㅁㅂㅄㅅㅆㅇㅈㅊㅋㅌㅍㅎ"
_LENGTHS = (2, 3)  # of the pieces around a change
_MAX_SENTENCES = 8  # more are never compared pair by pair


class Edit(NamedTuple):
    """What differs between sentences.

    Attributes:
        changed: each letter that differs, and all of a place together, whichever way they change: ``ㄱ``, ``ㄲ``,
            ``ㄱ|ㄲ``; ``@SPACE`` for a space.
        around: pieces of two and three letters that hold the change or touch it. Of a single sentence, in which it
            is not known what changes, all pieces.
    """

    changed: tuple[str, ...] = ()
    around: tuple[str, ...] = ()


NO_EDIT = Edit()


def asked_edit(record: Record) -> Edit:
    """Return what a question itself shows of its edit: how its options or its listed sentences differ."""
    question = read_record(record)
    return edit_between(question.options or question.sentences or (record.question,))


def solved_edit(record: Record) -> Edit:
    """Return the edit of a solved question: between its options, or between its sentence and its answer's."""
    question = read_record(record)
    sentences = question.options or question.sentences
    if len(sentences) == 1:
        sentences += parse_answer(record.answer or "").sentences
    return edit_between(sentences)


def edit_between(sentences: Sequence[str]) -> Edit:
    """Return what differs between any two of the sentences."""
    texts = [[_START, *letters(sentence), _END] for sentence in sentences[:_MAX_SENTENCES]]
    if len(texts) == 1:
        return Edit(around=tuple(dict.fromkeys(_pieces(texts[0], 0, len(texts[0])))))
    changed: dict[str, None] = {}
    around: dict[str, None] = {}
    for one, other in itertools.combinations(texts, 2):
        for first, last, start, end in _changes(one, other):
            sides = one[first:last], other[start:end]
            changed |= dict.fromkeys([*sides[0], *sides[1], "|".join(sorted(map("".join, sides)))])
            around |= dict.fromkeys([*_pieces(one, first, last), *_pieces(other, start, end)])
    return Edit(tuple(changed), tuple(around))


def letters(text: str) -> list[str]:
    """Return a text's letters: Hangul syllables as compatibility jamo, white space as one :data:`SPACE`."""
    jamo: list[str] = []
    for character in " ".join(text.split()):
        if "가" <= character <= "힣":
            number = ord(character) - ord("가")
            jamo += [_INITIALS[number // 588], _VOWELS[number // 28 % 21], *_FINALS[number % 28].strip()]
        else:
            jamo.append(SPACE if character == " " else character)
    return jamo


def _changes(one: list[str], other: list[str]) -> list[tuple[int, int, int, int]]:
    """Return (start, end) in ``one`` and in ``other`` of each place where they differ."""
    head = len(os.path.commonprefix([one, other]))
    tail = len(os.path.commonprefix([one[head:][::-1], other[head:][::-1]]))
    matcher = difflib.SequenceMatcher(
        None, one[head : len(one) - tail], other[head : len(other) - tail], autojunk=False
    )
    return [
        (head + first, head + last, head + start, head + end)
        for kind, first, last, start, end in matcher.get_opcodes()
        if kind != "equal"
    ]


def _pieces(text: list[str], start: int, end: int) -> list[str]:
    """Return the pieces that share a letter with ``text[start:end]``; of an empty span those that reach over it."""
    return [
        "".join(text[place : place + length])
        for length in _LENGTHS
        for place in range(max(0, start - length + 1), min(end, len(text) - length + 1))
    ]
