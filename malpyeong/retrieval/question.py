"""What a question of the contest asks about: its text without the standing phrases, its sentences, its options."""

import itertools
import re
from dataclasses import dataclass

from malpyeong.contest.answer import parse_answer
from malpyeong.contest.records import Record

# The two instructions that nearly every question carries tell nothing about it; any other wording is kept.
_STANDING = re.compile(
    r"가운데 올바른 것을 선택하고|다음 문장에서 어문 규범에 부합하지 않는 부분을 찾아 고치고"
    r"|,?\s*그 이유를 설명하세요\."
)
_OPTIONS = re.compile(r"\{([^{}]*/[^{}]*)\}")  # `{` `}` without a slash are punctuation that is asked about
_SENTENCE = re.compile(r"^\s*(?:[\"“](?P<quoted>.+)[\"”]|[―ㅡ—–-]\s*(?P<dashed>\S.*))", re.M)
_MOST_READINGS = 64


@dataclass(frozen=True, slots=True)
class Question:
    """A question as retrieval sees it; nothing of an answer is in it.

    Attributes:
        text: the question without standing phrases, quotes at its ends and options.
        focus: the words that differ: options in braces, or words that not all of several listed sentences share.
    """

    text: str
    focus: tuple[str, ...]


def read_question(question: str) -> Question:
    """Read the text of a question; never raises."""
    text = " ".join(_STANDING.sub(" ", _OPTIONS.sub(" ", question)).replace('"', " ").split())
    options = tuple(
        option.strip() for group in _OPTIONS.findall(question) for option in group.split("/") if option.strip()
    )
    return Question(text, options or _differing([sentence.split() for sentence in _sentences(question)]))


def changed_words(record: Record) -> tuple[str, ...]:
    """Return the words that a solved question is about: its options, or what its answer changes."""
    focus = read_question(record.question).focus
    answers = [sentence.split() for sentence in parse_answer(record.answer or "").sentences]
    sentences = [sentence.split() for sentence in _sentences(record.question)]
    return focus or (_differing([*sentences, *answers]) if answers and sentences else ())


def readings(record: Record) -> frozenset[str]:
    """Return the sentences that a question may be about, without white space, and the one that its answer gives.

    Two records with a sentence in common ask about the same sentence, be it once as a choice and once as a correction.
    """
    found = [
        reading
        for sentence in _sentences(record.question) or [record.question]
        for reading in itertools.islice(_with_each_option(sentence), _MOST_READINGS)
    ]
    found += parse_answer(record.answer or "").sentences
    return frozenset("".join(sentence.split()) for sentence in found)


def _sentences(question: str) -> list[str]:
    return [(found["quoted"] or found["dashed"]).strip() for found in _SENTENCE.finditer(question)]


def _with_each_option(sentence: str) -> "itertools.chain[str]":
    parts = _OPTIONS.split(sentence)  # text, options, text, options, …, text
    choices = [part.split("/") if place % 2 else [part] for place, part in enumerate(parts)]
    return itertools.chain("".join(choice) for choice in itertools.product(*choices))


def _differing(sentences: list[list[str]]) -> tuple[str, ...]:
    """Return the words, in order, that not every sentence has."""
    if len(sentences) < 2:
        return ()
    shared = set.intersection(*map(set, sentences))
    return tuple(dict.fromkeys(word for sentence in sentences for word in sentence if word not in shared))
