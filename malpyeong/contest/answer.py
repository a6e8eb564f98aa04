"""The answer format, defined once: the prompt's instruction, the writer, two readers, the verdict and the grammar.

An answer is ``"{sentence}"가 옳다. {reason}``. Two readers are kept apart:

* :func:`contest_split` is the contest's own literal split. Only it decides a score.
* :func:`parse_answer` is ours and tolerant: it finds the sentence in answers with text before it, curly or
  nested quotes, two sentences, a missing quote. It serves repair, votes and reports, never a score.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Answer:
    """What :func:`parse_answer` found.

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
        head, found, tail = text.partition(marker)
        if found:
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
    found = parse_answer(text)
    if not all((*sentences, reason)) or (found.sentences, found.reason) != (sentences, reason):
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


def format_problem(text: str) -> str | None:
    """Return why ``text`` is not exactly in the contest's form, or None if it is.

    Stricter than the parser and stricter than the contest: what passes here is split by the contest's scorer
    where it should be, with straight quotes at both ends and a reason that ends.
    """
    if not text.strip():
        return "empty answer"
    if "<think>" in text or "</think>" in text:
        return "a <think> block is left in the answer"
    if "```" in text:
        return "code fence around the answer"
    if "\n" in text.strip() or "\r" in text.strip():
        return "more than one line"
    if text != text.strip():
        return "space before or after the answer"
    if text[0] in "“”‘’'":
        return f"sentence is opened by {text[0]} instead of a straight double quote"
    if text[0] != '"':
        return "text before the sentence"
    answer = parse_answer(text)
    if not answer.complete:
        return "cut off before the verdict (가 옳다)"
    if answer.particle not in ("가", "이"):
        return f"verdict written with {answer.particle or 'no particle'} instead of 가/이 옳다"
    if not all(sentence.strip() for sentence in answer.sentences) or not answer.sentences:
        return "empty sentence"
    verdict = f'"{answer.particle} 옳다.'
    head, found, reason = text[1:].partition(verdict)
    if not found:
        return 'verdict is not written exactly as `"가 옳다.`'
    if head.strip() != head:
        return "space inside the quotes"
    if _NOT_BUT.search(head):
        return 'another sentence before the right one (`"A"가 아니라 "B"가 옳다`)'
    if not reason.strip("., "):
        return "no reason"
    if contest_split(text) != (f'"{head}"{answer.particle} 옳다', answer.reason):
        return "the contest's split falls elsewhere (a second 가 옳다 / 이 옳다)"
    if not SENTENCE_END.search(reason):
        return "reason is cut off (does not end in a period)"
    return _reason_problem(reason)


def answer_grammar(verdicts: Sequence[str] = ()) -> str:
    """Return the format as a grammar for constrained decoding, in llguidance's dialect of Lark (& and ~ on terminals).

    What it lets through has no :func:`format_problem`, but for what such a grammar cannot say: a reason that is too
    long, that repeats itself or that is mostly loose jamo, a pair (혹은) of which one is empty, and another sentence
    before the right one (``"A"가 아니라 "B"``). Those are mended by :func:`malpyeong.contest.repair.finish`.

    Well-formed answers that it does not let through have doubled spaces or none behind the verdict, control or
    direction characters, or a reason that has no syllable, begins with a mark or has a space before its last one.

    Args:
        verdicts: ``"문장"가 옳다.`` of the sentences to choose among; any sentence if empty.
    """
    if not verdicts:
        return f"start: verdict_ga REASON | verdict_i REASON_I\n{_TERMINALS}"
    alternatives = " | ".join(
        f"{json.dumps(verdict, ensure_ascii=False)} {_reason_after(verdict)}" for verdict in verdicts
    )
    return f"start: {alternatives}\n{_TERMINALS}"


def reason_grammar(verdict: str) -> str:
    """Return the grammar (see :func:`answer_grammar`) of what follows a ``verdict``: a space and a reason."""
    return f"start: {_reason_after(verdict)}\n{_TERMINALS}"


def _reason_after(verdict: str) -> str:
    return "REASON_I" if verdict.endswith("이 옳다.") else "REASON"


# Few terminals with few, flat conditions each: the costliest step of these takes half of the library's default limit
# ("fuel"). The particle that a sentence's last letter calls for, or what a pair needs, would take more than there is.
_ANY = "(?s:.*)"
_HIDDEN = (
    r"\s\u{0}-\u{1f}\u{7f}-\u{9f}\u{ad}\u{61c}\u{200b}-\u{200f}\u{202a}-\u{202e}\u{2060}-\u{2069}"
    r"\u{feff}\u{fff9}-\u{fffd}"
)
_VISIBLE = f"[^{_HIDDEN}]"
_TEXT = rf"{_VISIBLE}([ \u{{a0}}]?{_VISIBLE})*"
_BROKEN = r"[\u{1100}-\u{1112}][\u{1161}-\u{1175}]"
_MARKUP = r"<\/?think>|```"
# A verdict within the sentence, as `parse_answer` would find it; the quote at the very start closes nothing.
_INNER_VERDICT = r"""(?s:.)["'”’“‘]\s?((으가|[가이])\s옳다|(으로|로)\s?(고쳐|바꾸어|바꿔)\s?(쓴다|써야\s?한다))"""
_TERMINALS = rf"""
verdict_ga[lazy]: VERDICT_GA
verdict_i[lazy]: VERDICT_I
VERDICT_GA: /"{_TEXT}"가 옳다[.]/ & ~/{_ANY}({_MARKUP}|(가 옳다|{_INNER_VERDICT}){_ANY} 옳다){_ANY}/
VERDICT_I: /"{_TEXT}"이 옳다[.]/ & ~/{_ANY}({_MARKUP}|([가이] 옳다|{_INNER_VERDICT}){_ANY} 옳다){_ANY}/
REASON: / [^.,{_HIDDEN}]([ \u{{a0}}]?{_VISIBLE})*[.!?。…]["'”’)\]」』]*/ & /{_ANY}[가-힣]{_ANY}/ & ~UNFIT
UNFIT: /{_ANY}({_MARKUP}|{_BROKEN}){_ANY}/
REASON_I: REASON & ~/{_ANY}가 옳다{_ANY}/
"""


def _reason_problem(reason: str) -> str | None:
    if len(reason) > MAX_REASON_CHARS:
        return f"reason has more than {MAX_REASON_CHARS} characters"
    if REPEATED.search(reason):
        return "reason repeats the same words"
    if _DECOMPOSED.search(reason):
        return "reason has syllables in pieces (text that went through NFD)"
    if hardly_text(reason):
        return "reason is mostly loose jamo" if JAMO.search(reason) else "no reason"
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
        found = re.search(pattern, text)
        if found:
            return found.end()
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
