"""Why an answer loses Exact Match: one cause an answer, read off the question, the gold answer and the prediction."""

import os.path
import re
import unicodedata
from collections.abc import Sequence
from enum import StrEnum

from malpyeong.contest.answer import contest_split, parse_answer
from malpyeong.contest.question import read_record
from malpyeong.contest.records import Record
from malpyeong.metrics.exact_match import exact_match, normalise

_PARTICLE = re.compile(r"(?:으?가|이) 옳다\Z")


class Cause(StrEnum):
    """Why Exact Match fails, as the page names it."""

    NO_VERDICT = "판정 없음·형식"
    PARTICLE = "조사만 다름"
    OTHER_OPTION = "다른 선택지"
    UNCHANGED = "고치지 않음"
    SPACING = "띄어쓰기만 다름"
    PUNCTUATION = "문장 부호만 다름"
    ELSEWHERE = "다른 곳을 고침"
    NOT_OFFERED = "선택지에 없는 말"
    WRONG_CORRECTION = "틀리게 고침"
    JOINED = "두 답을 다르게 씀"
    OTHER = "기타"


def find_cause(gold: Record, prediction: str) -> Cause | None:
    """Return why ``prediction`` loses Exact Match, or None if it does not.

    The first of these that holds:

    - ``NO_VERDICT``: the contest finds no 가/이 옳다, or the sentence is right and something else in the verdict is not
      (text before it, curly quotes, a second 가 옳다 that moves the split).
    - ``PARTICLE``: only 이/가 of the verdict differs.
    - ``OTHER_OPTION``: the sentence is one that the question offers, and not the right one.
    - ``UNCHANGED``: the sentence is the question's own.
    - ``SPACING``, ``PUNCTUATION``: nothing but spaces, or punctuation and spaces beside it, differs from gold.
    - ``ELSEWHERE``: text is altered that the gold answer leaves as the question has it.
    - ``NOT_OFFERED`` (선택형), ``WRONG_CORRECTION`` (교정형): the right place, and something else than gold there.
    - ``JOINED``: one of the right sentences, and one too few or too many, in another order or with another 혹은/또는.
    - ``OTHER``: none of these.

    Args:
        gold: the question with its gold answer.
        prediction: the predicted answer.
    """
    if exact_match(prediction, gold.answer or ""):
        return None
    if not any(verdict in prediction for verdict in ("가 옳다", "이 옳다")):
        return Cause.NO_VERDICT
    predicted = _sentences(prediction)
    golds = [_sentences(part) for part in contest_split(gold.answer or "")[0].split("#")]
    if predicted in golds:
        return _cause_beside_the_sentence(gold.answer or "", prediction)
    right = [sentence for sentences in golds for sentence in sentences]
    if set(predicted) & set(right):
        return Cause.JOINED
    if len(predicted) != 1 or not right:
        return Cause.OTHER
    return _cause_in_the_sentence(gold, right, predicted[0])


def _cause_beside_the_sentence(gold: str, prediction: str) -> Cause:
    predicted = normalise(contest_split(prediction)[0])
    verdicts = [part.strip() for part in normalise(contest_split(gold)[0]).split("#")]
    if _PARTICLE.sub("", predicted) in [_PARTICLE.sub("", verdict) for verdict in verdicts]:
        return Cause.PARTICLE
    if _without_spaces(predicted) in map(_without_spaces, verdicts):
        return Cause.SPACING
    return Cause.JOINED if len(_sentences(prediction)) > 1 else Cause.NO_VERDICT


def _cause_in_the_sentence(gold: Record, right: Sequence[str], predicted: str) -> Cause:
    question = read_record(gold)
    offered = [normalise(sentence) for sentence in question.options]
    asked = [normalise(sentence) for sentence in question.sentences]
    if predicted in offered:
        return Cause.OTHER_OPTION
    if not offered and predicted in asked:
        return Cause.UNCHANGED
    for sentence in right:
        if _without_spaces(sentence) == _without_spaces(predicted):
            return Cause.SPACING
        if any(_without_punctuation(sentence, by) == _without_punctuation(predicted, by) for by in ("", " ")):
            return Cause.PUNCTUATION
    if _without_spaces(predicted) in map(_without_spaces, offered):  # a space beside the braces may be stray
        return Cause.OTHER_OPTION
    if len(asked) != 1:
        return Cause.OTHER
    [source] = asked
    # Where the question's sentence is right already, any other is altered in passing.
    alike = [offered] if offered else [[source, sentence] for sentence in right if sentence != source]
    if not any(_same_outside(*_common_ends(sentences), predicted) for sentences in alike):
        return Cause.ELSEWHERE
    return Cause.NOT_OFFERED if offered else Cause.WRONG_CORRECTION


def _sentences(answer: str) -> tuple[str, ...]:
    return tuple(normalise(sentence) for sentence in parse_answer(answer).sentences)


def _common_ends(sentences: Sequence[str]) -> tuple[str, str]:
    """Return how all sentences begin and end alike, in whole words."""
    head = os.path.commonprefix(sentences)
    tail = os.path.commonprefix([sentence[len(head) :][::-1] for sentence in sentences])[::-1]
    return head[: head.rfind(" ") + 1].rstrip(), tail[tail.find(" ") :].lstrip() if " " in tail else ""


def _same_outside(head: str, tail: str, predicted: str) -> bool:
    return len(head) + len(tail) <= len(predicted) and predicted.startswith(head) and predicted.endswith(tail)


def _without_spaces(text: str) -> str:
    return "".join(text.split())


def _without_punctuation(text: str, by: str) -> str:
    kept = (by if unicodedata.category(character)[0] in "PS" else character for character in text)
    return " ".join("".join(kept).split())
