"""What a question offers: the sentence that it quotes, and the sentences among which it asks to choose.

A 선택형 question holds its choices in braces, ``"문장 {가/나} 문장" 가운데 올바른 것을 …``; some questions of either
type list whole sentences under ``다음 중 …``. Braces without a slash are the punctuation that is asked about.
"""

import itertools
import math
import re
from collections.abc import Sequence

from malpyeong.contest.answer import contest_split, format_problem, subject_particle
from malpyeong.contest.records import Record

MAX_OPTIONS = 32  # more come of no question, only of slashes in a text about slashes

_GROUP = re.compile(r"\{([^{}\n]*[/／][^{}\n]*)\}")
_ASKED_AMONG_LINES = re.compile(r"다음\s*(?:중|가운데).*(?:선택|고르|고른|골라)")
_QUOTED_CHOICE = re.compile(r"\s*[\"“](?P<sentence>.*)[\"”]\s*(?:가운데|중)\b", re.DOTALL)
_DASH = re.compile(r"\s*[―ㅡ—–]\s*")  # the contest's files have U+2015 and U+3161
_SPACES = re.compile(r"[ \u00a0]{2,}")
_SPACE_BEFORE_END = re.compile(r"[ \u00a0]+(?=[.?!,](?:[\"'”’]|\s|\Z))")


def options(record: Record) -> tuple[str, ...]:
    """Return the sentences among which a question asks to choose, in its order; () if it offers none.

    Every combination of the brace groups' alternatives is put in literally, without the spaces around an alternative
    (``{로봇이/로보트가 } 집안일`` offers ``로봇이 집안일``) and without doubled spaces.
    """
    lines = quoted_lines(record.question)
    if len(lines) > 1 and _ASKED_AMONG_LINES.search(record.question.splitlines()[0]):
        return _distinct(lines)
    if record.question_type != "선택형":
        return ()
    sentence = question_sentence(record.question)
    parts = _GROUP.split(sentence)
    if len(parts) == 1:
        return ()
    groups = [[alternative.strip() for alternative in re.split("[/／]", group)] for group in parts[1::2]]
    if math.prod(map(len, groups)) > MAX_OPTIONS:
        return ()
    return _distinct([_tidy("".join(_interleave(parts[0::2], chosen))) for chosen in itertools.product(*groups)])


def verdicts(sentences: Sequence[str]) -> tuple[str, ...]:
    """Return the verdicts that a choice among ``sentences`` can be answered with: ``"문장"가 옳다.`` and pairs.

    Two spellings may both be right. Then the gold joins two options by 혹은 or 또는, in either order, so that with four
    or fewer options all pairs are offered too. A sentence that the contest would split elsewhere gives no verdict.
    """
    single = [f'"{sentence}"{subject_particle(sentence)} 옳다.' for sentence in sentences]
    pairs = [
        f'"{first}" {joiner} "{second}"{subject_particle(second)} 옳다.'
        for first, second in itertools.permutations(sentences, 2)
        for joiner in ("혹은", "또는")
        if len(sentences) <= 4
    ]
    return tuple(verdict for verdict in (*single, *pairs) if _splits_after(verdict))


def question_sentence(question: str) -> str:
    """Return the sentence that a question is about, without its quotes or dash; "" if it quotes none."""
    choice = _QUOTED_CHOICE.match(question)
    if choice:
        return choice["sentence"].strip()
    lines = quoted_lines(question)
    return lines[0] if lines else ""


def quoted_lines(question: str) -> list[str]:
    """Return the sentences that stand on lines of their own, without their quotes or dash.

    A question of one line has its sentence between the outermost double quotes.
    """
    found = []
    for line in question.splitlines():
        line = line.strip()
        dash = _DASH.match(line)
        if dash:
            line = line[dash.end() :].strip()
        quoted = re.fullmatch(r"[\"“](.+)[\"”]", line)
        if quoted:
            found.append(quoted[1].strip())
        elif dash and line:
            found.append(line)
    if not found:
        quoted = re.search(r"[\"“](.+)[\"”]", question, re.DOTALL)
        found = [quoted[1].strip()] if quoted else []
    return found


def _splits_after(verdict: str) -> bool:
    answer = f"{verdict} 이유다."
    return format_problem(answer) is None and contest_split(answer)[1] == "이유다."


def _tidy(sentence: str) -> str:
    return _SPACE_BEFORE_END.sub("", _SPACES.sub(" ", sentence)).strip()


def _interleave(fixed: Sequence[str], chosen: Sequence[str]) -> list[str]:
    return [part for pair in itertools.zip_longest(fixed, chosen, fillvalue="") for part in pair]


def _distinct(sentences: Sequence[str]) -> tuple[str, ...]:
    distinct = tuple(dict.fromkeys(sentence for sentence in sentences if sentence))
    return distinct if len(distinct) > 1 else ()
