"""Repair: the last step on a predicted answer. What a scorer trips over is mended, content is never made up.

Only the wrapping is touched: what stands before the sentence, its quotes, the particle and the verdict. The sentence's
characters stay, and so does the reason but for line breaks and for a second ``가 옳다`` behind an ``이 옳다``, at which
the contest would split. An answer without a verdict is left as it is.
"""

import re

from malpyeong.contest.answer import (
    Answer,
    contest_split,
    format_problem,
    parse_answer,
    quote,
    subject_particle,
    unwrap,
)

_QUOTES = "\"'“”‘’"
_CLOSING = re.compile(rf"\s*[{_QUOTES}]?\s*")


def repair(answer: str) -> tuple[str, tuple[str, ...]]:
    """Return the mended answer and the kinds of what was mended: () if nothing was wrong or could be mended.

    Deterministic and idempotent; a well-formed answer with the right particle comes back byte for byte.
    """
    found = parse_answer(answer)
    if not found.complete or not found.sentences or not all(found.sentences):
        return answer, ()
    particle = right_particle(found)
    if format_problem(answer) is None and found.particle == particle:
        return answer, ()
    kinds, reason = _kinds(answer, found, particle), found.reason
    if "\n" in reason or "\r" in reason:
        reason = " ".join(reason.split())
        kinds.append("line break")
    if particle == "이" and "가 옳다" in reason:
        reason = without_second_verdict(reason)
        kinds.append("second 가 옳다")
    quoted = quote(found.sentences, found.joiner)
    mended = f"{quoted}{particle} 옳다. {reason}".rstrip()
    again = parse_answer(mended)
    if (
        mended == answer
        or (again.sentences, again.reason) != (found.sentences, reason)
        or contest_split(mended) != (f"{quoted}{particle} 옳다", reason)
    ):
        return answer, ()
    return mended, tuple(kinds) or ("verdict",)


def right_particle(found: Answer) -> str:
    """Return the particle that belongs behind the last sentence.

    Behind a letter that Korean spelling does not decide on (``bus``, 歷史) the particle that is there stays.
    """
    letters = [character for character in found.sentences[-1] if character.isalnum()]
    decided = not letters or re.match("[0-9가-힣ㄱ-ㆎ]", letters[-1])
    return subject_particle(found.sentences[-1]) if decided or found.particle not in ("가", "이") else found.particle


def without_second_verdict(reason: str) -> str:
    """Return a reason that stands behind an ``이 옳다`` without ``가 옳다``, at which the contest would split."""
    return reason.replace("가 옳다", "가 맞다")


def _kinds(answer: str, found: Answer, particle: str) -> list[str]:
    """Name what is wrong around the sentence."""
    kinds = ["thinking"] if "think>" in answer else []
    if "```" in answer:
        kinds.append("code fence")
    text = unwrap(answer)
    before, _, rest = text.partition(found.sentences[0])
    if before.strip(_QUOTES + " \t\n"):
        kinds.append("text before")
    tail = rest if len(found.sentences) == 1 else rest.partition(found.sentences[-1])[2]
    closing = _CLOSING.match(tail)
    assert closing is not None  # it matches the empty string
    if before.strip()[-1:] != '"' or closing[0].strip() != '"':
        kinds.append("quotes")
    if closing[0] != closing[0].strip() or before[-1:].isspace():
        kinds.append("space")
    if found.particle != particle:
        wrong = {"으가": "으가", "로": "고쳐 쓴다", "으로": "고쳐 쓴다"}
        kinds.append(wrong.get(found.particle, "particle"))
    return kinds
