"""100,000 answers that no one would write, through everything that reads, mends and checks answers."""

import random
import re
import unicodedata

import pytest

from malpyeong.contest.answer import contest_split, parse_answer, write_answer
from malpyeong.contest.question import read_question, verdicts
from malpyeong.contest.records import Record, load_records
from malpyeong.contest.repair import finish, repair
from malpyeong.metrics.exact_match import exact_match
from malpyeong.samples import DATA
from malpyeong.submit import make_submission, problems, warnings

GOLDS = load_records(DATA / "dev.json", "gold") + load_records(DATA / "contest_like.json", "gold")
QUOTES = "\"'“”‘’「」『』«»〝〞＂`´"
MARKS = (
    *("가 옳다", "이 옳다", "으가 옳다", "로 고쳐 쓴다", "으로 바꿔 써야 한다", "가 옳다. ", '"가 옳다. '),
    *('" 혹은 "', '" 또는 "', "혹은", "또는", "<think>", "</think>", "```", "```text\n", "정답: ", "답："),
    *("{가/나}", "― ", "{", "/", "}", "가 아니라 ", "이 아니고, "),
)  # fmt: skip
LETTERS = (
    *("가게에 갔다.", "이유다.", "옳다", "집에 감", "ㄹ", "ㆍ", "ㅿ", "\u1105", "\u11af", "\u1112\u119e\u11ab"),
    *("👍", "👩‍👩‍👧", "🇰🇷", "\ufe0f", "\u200d", "\ud800", "\udfff", "\ud83d", "\ufffd", "\ue000", "\U0010ffff"),
    *("\0", "\x07", "\x1b[31m", "\x7f", "\x85", "\u2028", "\u202e", "\u200f", "\ufeff", "\u00ad"),
    *("\u3164", "\u1160", "\u115f", "歷史", "ʃ", "bus"),
    *(" ", "  ", "\u00a0", "\u3000", "\t", "\n", "\r\n", "\r", "\v", ".", "…", "。", "!", "?", ",", ", . ", "․"),
)  # fmt: skip
CONSTRAINED = re.compile(r"\"[^\"'“”‘’]*\"[가이] 옳다[.] ")  # as the grammar lets through


def soup(rng, pieces=(*QUOTES, *MARKS, *LETTERS), longest=14):
    return "".join(rng.choices(pieces, k=rng.randrange(longest + 1)))


def mutated(rng, text):
    """Return a text after one of the things that happen to texts."""
    start, end = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    end = min(end, start + 20)
    change = rng.randrange(12)
    if change == 0:
        return text[:start] + text[end:]
    if change == 1:
        return text[:end]
    if change == 2:
        return text[:start] + text[start:end] * rng.randrange(2, 8) + text[end:]
    if change == 3:
        return text.translate({ord(quote): rng.choice(QUOTES) for quote in "\"'"})
    if change == 4:
        return unicodedata.normalize(rng.choice(("NFD", "NFKC", "NFKD", "NFC")), text)
    if change == 5:
        return rng.choice(("<think>", "```\n", "정답: ", "")) + text + rng.choice(("</think>", "\n```", text, ""))
    if change == 6:
        mark = rng.choice(MARKS)
        return text.replace(mark, mark * rng.randrange(4))
    if change == 7:
        return "".join(rng.sample(text, len(text)))
    if change == 8:
        return text.replace(rng.choice(text or " "), rng.choice(LETTERS))
    return text[:start] + soup(rng, longest=3) + text[start:]


def generated(rng):
    """Return a question and an answer to it."""
    gold = rng.choice(GOLDS)
    kind, question, answer = gold.question_type, gold.question, gold.answer
    way = rng.randrange(4)
    if way == 0:
        answer = soup(rng)
    elif way == 1:
        answer = f"{rng.choice(QUOTES)}{soup(rng)}{rng.choice(QUOTES)}{soup(rng, MARKS, 2)}{soup(rng)}"
    for _ in range(rng.randrange(4)):
        answer = mutated(rng, answer)
    if not rng.randrange(10):
        question = mutated(rng, question) or question
    if not rng.randrange(500):
        answer *= rng.randrange(2, 60)
    return Record("1", kind, question, answer)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))
def test_no_answer_breaks_anything(part):
    rng = random.Random(part)
    for _ in range(20_000):
        record = generated(rng)
        answer, question = record.answer, record.question
        verdict, reason = contest_split(answer)
        assert verdict in answer
        assert reason in answer
        parse_answer(answer)
        mended, kinds = repair(answer, question)
        assert repair(mended, question) == (mended, ()), repr(answer)
        assert bool(kinds) == (mended != answer)
        ended = finish(answer, question)
        if CONSTRAINED.match(answer):
            assert finish(ended, question) == ended, repr(answer)
        for offered in verdicts(record):
            assert contest_split(f"{offered} 이유다.") == (offered.rstrip("."), "이유다.")
        for text in (answer, mended, ended):
            (submitted,) = make_submission([record], [record.with_answer(text)])
            found = problems(submitted)
            assert all(line and len(line) < 1_000 for line in found + warnings(submitted))
            assert exact_match(text, text) in (0.0, 1.0)
            if not found:
                assert repair(text, question) == (text, ()), repr(text)


@pytest.mark.slow
def test_what_is_written_is_read_back_and_is_no_problem():
    rng = random.Random(0)
    tame = (
        "가게에 갔다",
        "집에 감",
        "옛말",
        "ㄹ",
        "ㆍ",
        "ㅿ",
        "\u1112\u119e\u11ab",
        "歷史",
        "ʃ",
        "bus",
        "👍",
        " ",
        ", ",
        "‘감’",
        "2024. 3. 1",
    )
    written = 0
    for _ in range(20_000):
        wild = rng.random() < 0.5
        sentences = tuple(
            soup(rng, longest=5) if wild else (soup(rng, tame, 5).strip(" ,") or "감") + "."
            for _ in range(rng.randrange(1, 3))
        )
        reason = soup(rng, longest=6) if wild else f"앞말과 띄어 쓴다는 {''.join(rng.sample(tame, 3))}이다."
        try:
            text = write_answer(sentences, reason, rng.choice(("혹은", "또는")))
        except ValueError:
            assert wild, (sentences, reason)
            continue
        written += 1
        answer = parse_answer(text)
        assert (answer.sentences, answer.reason) == (sentences, reason)
        if not wild:
            record = Record("1", "교정형", '다음 문장을 고치세요.\n"다른 문장이다."', text)
            assert problems(record) == [], repr(text)
            assert repair(text) == (text, ())
            assert finish(text) == text
            assert read_question(text) is not None
    assert written > 10_000
