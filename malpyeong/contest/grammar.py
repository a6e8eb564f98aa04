"""The answer format as a grammar for constrained decoding, in llguidance's dialect of Lark (& and ~ on terminals)."""

import json
from collections.abc import Sequence


def answer_grammar(verdicts: Sequence[str] = ()) -> str:
    """Return the grammar of a whole answer.

    What it lets through has no :class:`malpyeong.contest.answer.FormatProblem`, but for what such a grammar cannot say:
    a reason that is too long, that repeats itself or that is mostly loose jamo, a pair (혹은) of which one is empty,
    and another sentence before the right one (``"A"가 아니라 "B"``). Those are mended by
    :func:`malpyeong.contest.repair.finish`.

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
