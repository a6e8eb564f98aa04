"""What retrieval makes of a question and its answer: the words that a solved question is about, and its readings."""

from malpyeong.contest.answer import parse_answer
from malpyeong.contest.question import Question as Question
from malpyeong.contest.question import differing, read_record
from malpyeong.contest.question import read_question as read_question
from malpyeong.contest.records import Record


def changed_words(record: Record) -> tuple[str, ...]:
    """Return the words that a solved question is about: its options, or what its answer changes."""
    question = read_record(record)
    answers = parse_answer(record.answer or "").sentences
    if question.focus or not answers or not question.sentences:
        return question.focus
    return differing([sentence.split() for sentence in (*question.sentences, *answers)])


def readings(record: Record) -> frozenset[str]:
    """Return the sentences that a question may be about, without white space, and the one that its answer gives.

    Two records with a sentence in common ask about the same sentence, be it once as a choice and once as a correction.
    """
    question = read_record(record)
    sentences = (question.options or question.sentences or (record.question,)) + parse_answer(
        record.answer or ""
    ).sentences
    return frozenset("".join(sentence.split()) for sentence in sentences)
