"""Mending of predicted answers: :func:`finish` ends what constrained decoding wrote, :func:`repair` is the last step.

What a scorer trips over is mended, content is never made up. Only the wrapping is touched: what stands before the
sentence, its quotes, the particle and the verdict. The sentence's characters stay, and so does the reason but for line
breaks and for a second ``가 옳다`` behind an ``이 옳다``, at which the contest would split. Syllables that NFD took to
pieces and letters that NFKC replaced come back. An answer without a verdict is left as it is.
"""

import re
import unicodedata
from dataclasses import replace

from malpyeong.contest.answer import (
    JAMO,
    MAX_REASON_CHARS,
    REPEATED,
    SENTENCE_END,
    Answer,
    contest_split,
    format_problem,
    hardly_text,
    parse_answer,
    quote,
    unwrap,
)
from malpyeong.contest.particles import subject_particle

_QUOTES = "\"'“”‘’"
_CLOSING = re.compile(rf"\s*[{_QUOTES}]?\s*")
_WHOLE_SENTENCES = re.compile(r".*[가-힣][.!?。…](?:[\"'”’)\]」』])*(?=\s)", re.DOTALL)
_CONJOINING = re.compile("[\u1100-\u115f][\u1160-\u11a7][\u11a8-\u11ff]?|[\u1100-\u11ff]")
# Conjoining jamo → the letter that stands for itself. NFKC makes ᄅ of ㄹ and ᆞ of ㆍ; NFD leaves final ones like ᆯ.
_LETTERS = {unicodedata.normalize("NFKC", chr(code)): chr(code) for code in range(0x3131, 0x318F) if code != 0x3164}
_LETTERS |= {
    chr(0x11A8 + place): letter for place, letter in enumerate("ㄱㄲㄳㄴㄵㄶㄷㄹㄺㄻㄼㄽㄾㄿㅀㅁㅂㅄㅅㅆㅇㅈㅊㅋㅌㅍㅎ")
}


def repair(answer: str, question: str = "") -> tuple[str, tuple[str, ...]]:
    """Return the mended answer and the kinds of what was mended: () if nothing was wrong or could be mended.

    Deterministic and idempotent; a well-formed answer comes back byte for byte.

    Args:
        answer: what a model wrote.
        question: what it was asked; conjoining jamo that stand in it are no damage.
    """
    parsed = parse_answer(answer)
    if not parsed.complete or not parsed.sentences or not all(parsed.sentences):
        return answer, ()
    mended = _mended(parsed, question)
    if mended == parsed and format_problem(answer) is None:
        return answer, ()
    text = _written(mended)
    again = parse_answer(text)
    if (
        text == answer
        or (again.sentences, again.reason) != (mended.sentences, mended.reason)
        or contest_split(text) != (f"{quote(mended.sentences, mended.joiner)}{mended.particle} 옳다", mended.reason)
    ):
        return answer, ()
    return text, tuple(_kinds(answer, question, parsed, mended)) or ("verdict",)


def finish(text: str, question: str = "") -> str:
    """Return a constrained answer with a reason that ends, and mended where the grammar could not be more exact.

    A text that has no verdict (there was not even room to close the sentence) comes back as it is.
    """
    answer = parse_answer(text)
    if not answer.complete or not answer.reason or not "".join(answer.sentences) + answer.joiner:
        return text
    while answer.joiner and not all(answer.sentences):  # of a pair one is empty, or both
        answer = parse_answer(f'"{"".join(answer.sentences) or answer.joiner}"{answer.particle} 옳다. {answer.reason}')
    while True:
        mended = _mended(answer, question)
        mended = replace(mended, reason=close_reason(mended.reason))
        if mended == answer:
            return _written(answer)
        answer = mended


def close_reason(reason: str) -> str:
    """Mend a reason that is too long, repeats itself, is mostly loose jamo or stops within a sentence.

    Nothing is added but a period. Of a loop the first round is kept; an unfinished sentence goes if another one stands
    before it; of what is hardly text the syllables are kept. Where there is a syllable in it, the result is one in
    which :func:`format_problem` finds nothing of these.
    """
    while True:
        closed = reason[: MAX_REASON_CHARS - 1].strip()
        if hardly_text(closed):
            syllables = re.search("[가-힣].*", JAMO.sub(" ", reason), re.DOTALL)
            closed = " ".join(syllables[0].split())[: MAX_REASON_CHARS - 1] if syllables else closed
        closed = REPEATED.sub(lambda loop: loop[1] or loop[2], closed)
        if not SENTENCE_END.search(closed):
            whole = _WHOLE_SENTENCES.match(closed)
            closed = whole[0] if whole else closed.rstrip(" ,") + "."
        if closed == reason:
            return closed
        reason = closed


def restore_jamo(text: str, question: str = "") -> str:
    """Return ``text`` without the damage that NFD and NFKC do to Hangul.

    Syllables in pieces are put together, and conjoining jamo that stand alone become the letters that the contest
    writes (ㄹ, ㆍ). Whole old syllables stay, and so does what the question has.
    """

    def restore(piece: re.Match[str]) -> str:
        if piece[0] in question:
            return piece[0]
        whole = unicodedata.normalize("NFC", piece[0])
        return _LETTERS.get(whole, whole) if len(whole) == 1 else piece[0]

    return _CONJOINING.sub(restore, text)


def _mended(answer: Answer, question: str) -> Answer:
    """Return the parts of an answer as they should be written.

    The particle that is there stays, unless it is impossible: 으가, 로, none, or 이 behind a sentence that has
    ``이 옳다`` in it, where the contest would split.
    """
    sentences = tuple(restore_jamo(sentence, question) for sentence in answer.sentences)
    reason = restore_jamo(answer.reason, question)
    if "\n" in reason or "\r" in reason:
        reason = " ".join(reason.split())
    quoted, particle = quote(sentences, answer.joiner), answer.particle
    if particle != "가" and (particle != "이" or "이 옳다" in quoted):
        particle = subject_particle(quoted)
    if particle == "이":
        reason = reason.replace("가 옳다", "가 맞다")
    return replace(answer, sentences=sentences, particle=particle, reason=reason)


def _written(answer: Answer) -> str:
    return f"{quote(answer.sentences, answer.joiner)}{answer.particle} 옳다. {answer.reason}".rstrip()


def _kinds(answer: str, question: str, parsed: Answer, mended: Answer) -> list[str]:
    """Name what is wrong in an answer."""
    kinds = ["thinking"] if "think>" in answer else []
    if "```" in answer:
        kinds.append("code fence")
    text = unwrap(answer)
    before, _, rest = text.partition(parsed.sentences[0])
    if before.strip(_QUOTES + " \t\n"):
        kinds.append("text before")
    tail = rest if len(parsed.sentences) == 1 else rest.partition(parsed.sentences[-1])[2]
    closing = _CLOSING.match(tail)
    assert closing is not None  # it matches the empty string
    if before.strip()[-1:] != '"' or closing[0].strip() != '"':
        kinds.append("quotes")
    if closing[0] != closing[0].strip() or before[-1:].isspace():
        kinds.append("space")
    if parsed.particle != mended.particle:
        wrong = {"으가": "으가", "로": "고쳐 쓴다", "으로": "고쳐 쓴다"}
        kinds.append(wrong.get(parsed.particle, "particle"))
    if "\n" in parsed.reason or "\r" in parsed.reason:
        kinds.append("line break")
    if mended.particle == "이" and "가 옳다" in parsed.reason:
        kinds.append("second 가 옳다")
    if parsed.sentences != mended.sentences or restore_jamo(parsed.reason, question) != parsed.reason:
        kinds.append("jamo")
    return kinds
