"""What a question asks, read once: its sentences, the sentences it offers, the words it is about, its text for search.

A 선택형 question holds its choices in braces, ``"문장 {가/나} 문장" 가운데 올바른 것을 …``; some questions of either
type list whole sentences under ``다음 중 …``. Braces without a slash are the punctuation that is asked about.
"""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from malpyeong.contest.answer import contest_split, format_problem
from malpyeong.contest.particles import VOWEL_FORMS, attach, subject_particle
from malpyeong.contest.records import Record

MAX_OPTIONS = 32  # more come of no question, only of slashes in a text about slashes
MAX_PAIRED = 4  # of more options no pairs are offered
# How much likelier (in nats) the other particle has to be than the one of the rule (docs/prediction.md). A model that
# has learnt nothing but how often gold answers have 가 (97.6 %) favours it by 3.7.
PARTICLE_MARGIN = 4.0

# The two instructions that nearly every question carries tell nothing about it; any other wording is kept.
_STANDING = re.compile(
    r"가운데 올바른 것을 선택하고|다음 문장에서 어문 규범에 부합하지 않는 부분을 찾아 고치고"
    r"|,?\s*그 이유를 설명하세요\."
)
_GROUP = re.compile(r"\{(?=[^{}\n]*[^{}\s/／])([^{}\n]*[/／][^{}\n]*)\}")
_SLASH = re.compile("[/／]")
_QUOTED_CHOICE = re.compile(r"\s*(?P<quoted>[\"“'‘].*[\"”'’])\s*(?:가운데|중)(?:에서)?(?!\w)", re.DOTALL)
_DASH = re.compile(r"(?:[―ㅡ—–]\s*|-\s+)")  # the contest's files have U+2015 and U+3161
_RUN_ON = re.compile(r"[\"”](?:\s*[,/／]\s*|\s+)[\"“]|\s+(?:[―ㅡ—–]|-)\s+")
_ASKS = re.compile(r"(?:세요|시오|것은|것인가|무엇인가|까요?)\s*[.?:]*\Z")
_AMONG = re.compile(r"다음(?:(?:\s+\S+){0,2}\s+|\s*)(?:중|가운데).*(?:선택|고르|고른|골라|것은)", re.DOTALL)
_AMONG_WRONG = re.compile(r"않[는은]|틀린|잘못|어긋|어색|아닌")  # the answer may correct what was chosen
_EITHER = re.compile(
    r"\s*(?P<one>[가-힣]{1,3})\((?P<other>[가-힣]{1,3})\)|\s*\((?P<optional>[으이])\)(?P<rest>[가-힣]+)"
)
_ABOUT_NORMS = re.compile(
    r"규범|맞춤법|띄어쓰기|부호|(올바른|옳은|맞는|틀린) (것|말|표기|문장)|(설명하|선택하|고르|고치)[세시십]|골라"
)
_SPACES = re.compile(r"[ \u00a0]{2,}")
_SPACE_BEFORE_END = re.compile(r"[ \u00a0]+(?=[.?!,](?:[\"'”’]|\s|\Z))")


@dataclass(frozen=True, slots=True)
class Question:
    """A question as it is read; nothing of an answer is in it.

    Attributes:
        text: the question for search, without standing phrases, double quotes and options.
        focus: the words that differ: alternatives in braces, or words that not all of several sentences share.
        sentences: what it quotes or lists, without quotes or dashes; braces stay.
        options: the sentences among which it asks to choose, in its order; () if it offers none.
        pairs: whether two of the options may be right together (``"A" 혹은 "B"``): of whole sentences, never of braces.
    """

    text: str
    focus: tuple[str, ...]
    sentences: tuple[str, ...]
    options: tuple[str, ...]
    pairs: bool


@lru_cache(maxsize=8_192)
def read_question(question: str, question_type: str = "선택형") -> Question:
    """Read a question; never raises.

    Args:
        question: its text.
        question_type: braces hold alternatives only in a 선택형.
    """
    sentences, among = _sentences(question)
    groups = _GROUP if question_type == "선택형" else None
    text = " ".join(_STANDING.sub(" ", groups.sub(" ", question) if groups else question).replace('"', " ").split())
    words = tuple(
        word.strip() for group in (groups.findall(question) if groups else ()) for word in _SLASH.split(group)
    )
    focus = tuple(filter(None, words)) or differing([sentence.split() for sentence in sentences])
    options = tuple(dict.fromkeys(sentences)) if among else ()
    if groups and not among:
        options = _substituted(next(filter(groups.search, sentences), ""))
    return Question(text, focus, tuple(sentences), options, among)


def read_record(record: Record) -> Question:
    """Read the question of a record."""
    return read_question(record.question, record.question_type)


def options(record: Record) -> tuple[str, ...]:
    """Return the sentences among which a question asks to choose, in its order; () if it offers none.

    Every combination of the brace groups' alternatives is put in literally, without the spaces around an alternative
    (``{로봇이/로보트가 } 집안일`` offers ``로봇이 집안일``), without doubled spaces, and with the form of a following
    ``가(이)`` that fits it.
    """
    return read_record(record).options


def verdicts(record: Record) -> tuple[str, ...]:
    """Return the verdicts that a question with options can be answered with: ``"문장"가 옳다.``, and the same with 이.

    Where whole sentences are offered two may be right. Then the gold joins them by 혹은 or 또는, in either order, so
    that all pairs of up to four are offered too. A verdict at which the contest would not split is left out.
    """
    question = read_record(record)
    quoted = [f'"{sentence}"' for sentence in question.options]
    if question.pairs and len(quoted) <= MAX_PAIRED:
        pairs = itertools.permutations(quoted, 2)
        quoted += [f"{first} {joiner} {second}" for first, second in pairs for joiner in ("혹은", "또는")]
    offered = (f"{sentences}{particle} 옳다." for sentences in quoted for particle in "가이")
    return tuple(verdict for verdict in offered if _splits_after(verdict))


def pick_verdict(verdicts: Sequence[str], scores: Sequence[float]) -> str:
    """Return the likeliest verdict, with the particle of the rule where that one is about as likely.

    Args:
        verdicts: see :func:`verdicts`.
        scores: log-likelihood of each, in nats.
    """
    score_of = dict(zip(verdicts, scores, strict=True))
    best = max(score_of, key=score_of.__getitem__)
    quoted = best.removesuffix("가 옳다.").removesuffix("이 옳다.")
    by_rule = f"{quoted}{subject_particle(quoted)} 옳다."
    return by_rule if score_of.get(by_rule, -math.inf) >= score_of[best] - PARTICLE_MARGIN else best


def asked(text: str) -> tuple[str, str]:
    """Return (question type, question) of what somebody typed: a question as it is, a bare sentence as one about it.

    A sentence with alternatives in braces (``{되/돼}``) becomes a 선택형, any other one a 교정형.
    """
    text = text.strip()
    for kind in ("선택형", "교정형"):
        if text.startswith(f"[{kind}]"):
            return kind, text.removeprefix(f"[{kind}]").strip()
    if _ABOUT_NORMS.search(text) is None:
        inner = _own_line(text)
        bare = " ".join(text.split()) if not inner or '"' in inner else inner
        text = f'다음 문장에서 어문 규범에 부합하지 않는 부분을 찾아 고치고, 그 이유를 설명하세요.\n"{bare}"'
        if _GROUP.search(bare):
            text = f'"{bare}" 가운데 올바른 것을 선택하고, 그 이유를 설명하세요.'
    return "선택형" if read_question(text).options else "교정형", text


def differing(sentences: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Return the words, in order, that not every sentence has."""
    if len(sentences) < 2:
        return ()
    shared = set.intersection(*map(set, sentences))
    return tuple(dict.fromkeys(word for sentence in sentences for word in sentence if word not in shared))


def _sentences(question: str) -> tuple[list[str], bool]:
    """Return the sentences of a question, and whether it asks to choose one of them."""
    lines = [line for line in map(str.strip, question.splitlines()) if line]
    sentences = [sentence for line in lines for sentence in [_own_line(line)] if sentence]
    if not sentences:
        choice = _QUOTED_CHOICE.match(question)
        if choice and (sentence := _own_line(choice["quoted"])):
            return [sentence], False
        sentences = _within(question) or _after_the_asking(lines)
    wording = question
    for sentence in sentences:
        wording = wording.replace(sentence, "", 1)
    if not _AMONG.search(wording):
        return sentences, False
    if len(sentences) == 1:  # a list that runs on
        sentences = [part.strip() for part in _RUN_ON.split(sentences[0])]
    return sentences, len(sentences) > 1 and not _AMONG_WRONG.search(wording)


def _own_line(line: str) -> str:
    """Return the sentence of a line that holds nothing else, "" if it is no such line."""
    dash = _DASH.match(line)
    text = line[dash.end() :].strip() if dash else line
    quoted = re.fullmatch(r"[\"“](.+)[\"”]|['‘]([^'‘’]+|[^'‘’]*\s['‘].*)['’]", text, re.DOTALL)
    if quoted:
        return (quoted[1] or quoted[2]).strip()
    return text if dash else ""


def _within(question: str) -> list[str]:
    """Return the sentence that stands between the outermost quotes of a question, or behind a dash after its asking."""
    for pattern in (rf"\A[^\"“]*?[.?:]\s+{_DASH.pattern}(.+)", r"[\"“](.+)[\"”]", r"(?<!\w)['‘]([^'‘’]+[.?!…])['’]"):
        quoted = re.search(pattern, question, re.DOTALL)
        if quoted and quoted[1].strip():
            return [quoted[1].strip()]
    return []


def _after_the_asking(lines: Sequence[str]) -> list[str]:
    """Return the lines after the one that asks."""
    asking = next((place for place, line in enumerate(lines) if _ASKS.search(line)), len(lines))
    return list(lines[asking + 1 :])


def _substituted(sentence: str) -> tuple[str, ...]:
    """Return the sentence with every combination of its groups' alternatives; () if it has no group, or too many."""
    parts = _GROUP.split(sentence)
    groups = [list(dict.fromkeys(word.strip() for word in _SLASH.split(group))) for group in parts[1::2]]
    if not groups or math.prod(map(len, groups)) > MAX_OPTIONS:
        return ()
    sentences = []
    for words in itertools.product(*groups):
        text = parts[0]
        for word, after in zip(words, parts[2::2], strict=True):
            text = _followed(text + word, after)
        sentences.append(_SPACE_BEFORE_END.sub("", _SPACES.sub(" ", text)).strip())
    return tuple(dict.fromkeys(filter(None, sentences)))


def _followed(text: str, after: str) -> str:
    """Return ``text`` and what comes after it, of ``가(이)`` and ``(으)로`` the form that fits."""
    either = _EITHER.match(after)
    if not either:
        return text + after
    forms = (either["one"], either["other"]) if either["one"] else (either["rest"], either["optional"] + either["rest"])
    consonant = next((form for form in forms if VOWEL_FORMS.get(form) in forms), None)
    return attach(text, consonant) + after[either.end() :] if consonant else text + after


def _splits_after(verdict: str) -> bool:
    answer = f"{verdict} 이유다."
    return format_problem(answer) is None and contest_split(answer)[1] == "이유다."
