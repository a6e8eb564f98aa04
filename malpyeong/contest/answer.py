"""The answer format, defined once: the prompt's instruction, the writer, two readers and what may be wrong with it.

An answer is ``"{sentence}"가 옳다. {reason}``. Two readers are kept apart:

* :func:`contest_split` is the contest's own literal split. Only it decides a score.
* :func:`parse_answer` is ours and tolerant: it finds the sentence in answers with text before it, curly or
  nested quotes, two sentences, a missing quote. It serves repair, votes and reports, never a score.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from malpyeong.contest.particles import subject_particle

INSTRUCTION = (
    "한국어 어문 규범에 맞는 문장을 고르거나 바르게 고치고 그 이유를 설명하세요. "
    '답은 반드시 "올바른 문장"가 옳다. 이유 의 형식으로만 쓰세요.'
)

_OPEN, _CLOSE = "\"'“‘", "\"'”’"
_PAIRS = {'"': '"', "'": "'", "“": "”", "‘": "’"}

# The closing quote, the particle and the verb, as models and people write them.
_MARKER = re.compile(
    rf"(?P<close>[{_CLOSE}“‘])\s*(?P<particle>으가|[가이]|으로|로)\s*"
    r"(?:(?<=[가이])\s+옳다|(?<=로)\s*(?:고쳐|바꾸어|바꿔)\s*(?:쓴다|써야\s*한다))"
)
_BARE_MARKER = re.compile(r"(?P<particle>[가이])\s+옳다")
_JOINER = re.compile(rf"[{_CLOSE}]\s*(?P<word>혹은|또는)\s*[{_OPEN}]")
# `"A"가 아니라 "B"가 옳다`: A is text before the sentence. Quotes within a sentence come in pairs; here one is left.
_NOT_BUT = re.compile(rf"[{_CLOSE}]\s*[가이]\s*아니(?:라|고),?\s*[{_OPEN}](?=[^{_OPEN}{_CLOSE}]+\Z)")
SENTENCE_END = re.compile(r"[.!?。…](?:[\"'”’)\]」』])*\Z")

# What no reason that means something looks like: ways to be paid for overlap without explaining anything.
MAX_REASON_CHARS = 600  # the contest's longest gold reason has 305
REPEATED = re.compile(r"(?<!\S)(\S+(?:\s+\S+){0,9}?)(?:\s+\1){2,}(?!\S)|([가-힣]{1,10}?)\2{5,}")
_DECOMPOSED = re.compile("[\u1100-\u1112][\u1161-\u1175]")  # one syllable block in pieces; old Hangul is not matched
JAMO = re.compile("[\u1100-\u11ff\u3131-\u318e]")


class FormatProblem(Enum):
    """Why an answer is not in the contest's form: (English, for commands; Korean, for pages)."""

    EMPTY = "empty answer", "빈 답"
    THINKING = "a <think> block is left in the answer", "<think>가 남아 있음"
    CODE_FENCE = "code fence around the answer", "코드 울타리(```)로 둘러쌈"
    LINES = "more than one line", "여러 줄"
    OUTER_SPACE = "space before or after the answer", "답 앞이나 뒤에 빈칸"
    OPENING_QUOTE = "sentence is not opened by a straight double quote", "곧은 큰따옴표로 시작하지 않음"
    TEXT_BEFORE = "text before the sentence", "문장 앞에 다른 말이 있음"
    NO_VERDICT = "cut off before the verdict (가 옳다)", "판정(가 옳다)이 없음"
    PARTICLE = "verdict is written otherwise than 가/이 옳다", "판정의 조사가 이/가가 아님"
    EMPTY_SENTENCE = "empty sentence", "빈 문장"
    VERDICT = 'verdict is not written exactly as `"가 옳다.`', '판정이 “"가 옳다.” 꼴이 아님'
    INNER_SPACE = "space inside the quotes", "따옴표 안쪽에 빈칸"
    NOT_BUT = (
        'another sentence before the right one (`"A"가 아니라 "B"가 옳다`)',
        "옳은 문장 앞에 다른 문장이 있음(A가 아니라 B가 옳다)",
    )
    NO_REASON = "no reason", "이유가 없음"
    SPLIT = (
        "the contest's split falls elsewhere (a second 가 옳다 / 이 옳다)",
        "채점기가 다른 곳에서 나눔(또 다른 ‘가 옳다’)",
    )
    REASON_CUT_OFF = "reason is cut off (does not end in a period)", "이유가 끝맺지 못하고 끊김"
    REASON_TOO_LONG = f"reason has more than {MAX_REASON_CHARS} characters", "이유가 너무 김"
    REASON_REPEATS = "reason repeats the same words", "이유가 같은 말을 되풀이함"
    REASON_DECOMPOSED = "reason has syllables in pieces (text that went through NFD)", "이유의 글자가 풀어져 있음(NFD)"
    REASON_JAMO = "reason is mostly loose jamo", "이유가 거의 낱자임"

    def __init__(self, english: str, korean: str) -> None:
        self.english, self.korean = english, korean

    def __str__(self) -> str:
        return self.english


@dataclass(frozen=True, slots=True)
class Answer:
    """What :func:`parse_answer` reads.

    Attributes:
        sentences: the sentence called right; two where they are joined by 혹은 or 또는; empty if none was found.
        particle: what stood between sentence and 옳다 (``가``, ``이``, ``으가``, …), "" if nothing did.
        reason: the text after the verdict, "" if none.
        joiner: ``혹은`` or ``또는`` between two sentences, else "".
        complete: False where the text stops before its verdict (``"문장``, ``"문장"가``).
    """

    sentences: tuple[str, ...]
    particle: str
    reason: str
    joiner: str = ""
    complete: bool = True

    @property
    def sentence(self) -> str:
        """The first sentence, or "" if none was found."""
        return self.sentences[0] if self.sentences else ""


def contest_split(text: str) -> tuple[str, str]:
    """Split an answer into verdict and reason as the contest's scorer does, to the letter.

    At the first ``가 옳다`` anywhere; only if there is none, at the first ``이 옳다``. The verdict runs up to
    and including it. Without either, the whole text is the verdict and the reason is empty.

    Returns:
        (verdict, reason), both stripped; the reason without leading periods, commas and spaces.
    """
    for marker in ("가 옳다", "이 옳다"):
        head, marked, tail = text.partition(marker)
        if marked:
            return (head + marker).strip(), tail.strip().lstrip("., ")
    return text.strip(), ""


def quote(sentences: Sequence[str], joiner: str) -> str:
    """Return the sentences of an answer in straight quotes, with ``joiner`` between them."""
    return f" {joiner} ".join(f'"{sentence}"' for sentence in sentences)


def write_answer(sentences: str | tuple[str, ...], reason: str, joiner: str = "혹은") -> str:
    """Write an answer in the contest's form, with the particle that belongs there.

    Raises:
        ValueError: the parts do not come back from :func:`parse_answer` (empty, padded with spaces, a
            sentence that itself contains a verdict or a joiner between quotes).
    """
    if isinstance(sentences, str):
        sentences = (sentences,)
    quoted = quote(sentences, joiner)
    text = f"{quoted}{subject_particle(quoted)} 옳다. {reason}"
    answer = parse_answer(text)
    if not all((*sentences, reason)) or (answer.sentences, answer.reason) != (sentences, reason):
        raise ValueError(f"not an answer that reads back as it was written: {text!r}")
    return text


def parse_answer(text: str) -> Answer:
    """Find sentence, particle and reason in a model's answer, whatever surrounds them.

    Never raises; a text without any verdict gives an :class:`Answer` with ``complete=False``.
    """
    text = unwrap(text)
    marker = _MARKER.search(text, 1)  # a quote at the very start opens, it does not close
    if marker is None:
        return _parse_without_quote(text)
    quoted = text[: marker.start()]
    body = quoted[_opening(quoted, marker["close"]) :].strip()
    not_but = _NOT_BUT.search(body)
    if not_but:
        body = body[not_but.end() :].strip()
    sentences, joiner = _split_joined(body)
    return Answer(sentences, marker["particle"], _reason(text[marker.end() :]), joiner)


def format_problem(text: str) -> FormatProblem | None:
    """Return why ``text`` is not exactly in the contest's form, or None if it is.

    Stricter than the parser and stricter than the contest: what passes here is split by the contest's scorer
    where it should be, with straight quotes at both ends and a reason that ends.
    """
    if not text.strip():
        return FormatProblem.EMPTY
    if "<think>" in text or "</think>" in text:
        return FormatProblem.THINKING
    if "```" in text:
        return FormatProblem.CODE_FENCE
    if "\n" in text.strip() or "\r" in text.strip():
        return FormatProblem.LINES
    if text != text.strip():
        return FormatProblem.OUTER_SPACE
    if text[0] in "“”‘’'":
        return FormatProblem.OPENING_QUOTE
    if text[0] != '"':
        return FormatProblem.TEXT_BEFORE
    answer = parse_answer(text)
    if not answer.complete:
        return FormatProblem.NO_VERDICT
    if answer.particle not in ("가", "이"):
        return FormatProblem.PARTICLE
    if not all(sentence.strip() for sentence in answer.sentences) or not answer.sentences:
        return FormatProblem.EMPTY_SENTENCE
    verdict = f'"{answer.particle} 옳다.'
    head, marked, reason = text[1:].partition(verdict)
    if not marked:
        return FormatProblem.VERDICT
    if head.strip() != head:
        return FormatProblem.INNER_SPACE
    if _NOT_BUT.search(head):
        return FormatProblem.NOT_BUT
    if not reason.strip("., "):
        return FormatProblem.NO_REASON
    if contest_split(text) != (f'"{head}"{answer.particle} 옳다', answer.reason):
        return FormatProblem.SPLIT
    if not SENTENCE_END.search(reason):
        return FormatProblem.REASON_CUT_OFF
    return _reason_problem(reason)


def _reason_problem(reason: str) -> FormatProblem | None:
    if len(reason) > MAX_REASON_CHARS:
        return FormatProblem.REASON_TOO_LONG
    if REPEATED.search(reason):
        return FormatProblem.REASON_REPEATS
    if _DECOMPOSED.search(reason):
        return FormatProblem.REASON_DECOMPOSED
    if hardly_text(reason):
        return FormatProblem.REASON_JAMO if JAMO.search(reason) else FormatProblem.NO_REASON
    return None


def hardly_text(reason: str) -> bool:
    """Tell whether a reason has no letters, or more loose jamo than others."""
    letters = sum(character.isalpha() for character in reason)
    return not letters or 2 * len(JAMO.findall(reason)) > letters


def unwrap(text: str) -> str:
    """Drop thinking and a code fence around the answer."""
    kept, rest = "", text
    while True:
        before, opened, after = rest.partition("<think>")
        kept += before
        if not opened:
            break
        _, closed, rest = after.partition("</think>")
        if not closed:  # cut off while thinking: nothing after it is an answer
            break
    text = kept.rpartition("</think>")[2].strip()  # the opening tag may have been part of the prompt
    if text.startswith("```"):
        first, line_end, rest = text.partition("\n")
        text = (rest if line_end else first.removeprefix("```")).rstrip().removesuffix("```")
    return text.strip()


def _opening(text: str, close: str) -> int:
    """Return where the sentence that is closed after ``text`` begins.

    An answer that starts with a quote starts with its sentence, which may hold further quotes. Otherwise the
    sentence starts at the first opening quote of the closing one's kind that follows a space or a colon, or
    at any quote, or, with none at all, after a leading label such as ``정답:``.
    """
    if text[:1] and text[0] in _OPEN + _CLOSE:
        return 1
    kinds = [quote for quote in _PAIRS if _PAIRS[quote] == close] or [close]
    for pattern in (rf"(?:(?<=\s)|(?<=[:：]))[{''.join(kinds)}]", f"[{''.join(kinds)}]", f"[{_OPEN}]"):
        if opening := re.search(pattern, text):
            return opening.end()
    label = re.match(r"\s*[\w ]{1,10}[:：]\s*", text)
    return label.end() if label else 0


def _split_joined(body: str) -> tuple[tuple[str, ...], str]:
    joiner = _JOINER.search(body)
    if joiner is None:
        return (body,), ""
    return (body[: joiner.start()].strip(), body[joiner.end() :].strip()), joiner["word"]


def _parse_without_quote(text: str) -> Answer:
    """Read an answer in which no quote stands before the particle, or that has no verdict at all."""
    marker = _BARE_MARKER.search(text)
    if marker:
        body = text[: marker.start()]
        start = _opening(body, '"')
        return Answer((body[start:].strip(),), marker["particle"], _reason(text[marker.end() :]))
    if text and text[0] in _OPEN:
        close = _PAIRS[text[0]]
        end = text.rfind(close, 1)
        if end > 0:
            return Answer((text[1:end].strip(),), "", "", complete=False)
        return Answer((text[1:].strip(),), "", "", complete=False)
    return Answer((), "", "", complete=False)


def _reason(text: str) -> str:
    return text.strip().lstrip("., ")
