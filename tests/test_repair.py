"""Repair: mends the wrapping, keeps the content, and leaves alone what is right."""

import unicodedata

import pytest
from hypothesis import given, settings

from malpyeong.contest.answer import contest_split, format_problem, parse_answer
from malpyeong.contest.records import Record, load_records
from malpyeong.contest.repair import close_reason, finish, repair, restore_jamo
from malpyeong.metrics.exact_match import exact_match
from malpyeong.report.causes import Cause, find_cause
from malpyeong.samples import DATA
from malpyeong.submit import problems, warnings
from tests.test_answer import ANSWERLIKE


@pytest.mark.parametrize(
    ("answer", "mended", "kinds"),
    [
        ('정답: "가."가 옳다. 이유다.', '"가."가 옳다. 이유다.', {"text before"}),
        ('```\n"가."가 옳다. 이유다.\n```', '"가."가 옳다. 이유다.', {"code fence"}),
        ('<think>음</think>\n"가."가 옳다. 이유다.', '"가."가 옳다. 이유다.', {"thinking"}),
        ("“그는 ‘가.’라고 했다.”가 옳다. 이유다.", '"그는 ‘가.’라고 했다."가 옳다. 이유다.', {"quotes"}),
        ("'가.'가 옳다. 이유다.", '"가."가 옳다. 이유다.', {"quotes"}),
        ('"서울"으가 옳다. 이유다.', '"서울"가 옳다. 이유다.', {"으가"}),
        ('"집에 감."으가 옳다. 이유다.', '"집에 감."이 옳다. 이유다.', {"으가"}),
        ('"이것이 옳다는 말."이 옳다. 이유다.', '"이것이 옳다는 말."가 옳다. 이유다.', {"particle"}),
        ('"배."가 아니라 "사과."가 옳다. 이유다.', '"사과."가 옳다. 이유다.', {"text before"}),
        ('"가\u1102\u1161."가 옳다. \u1105로 적는다.', '"가나."가 옳다. ㄹ로 적는다.', {"jamo"}),
        ('"가." 가 옳다. 이유다.', '"가."가 옳다. 이유다.', {"space"}),
        ('"가. "가 옳다. 이유다.', '"가."가 옳다. 이유다.', {"space"}),
        ('"가."로 고쳐 쓴다. 이유다.', '"가."가 옳다. 이유다.', {"고쳐 쓴다"}),
        (
            "\"집에 감.\"으로 고쳐 쓴다. '나'가 옳다.",
            "\"집에 감.\"이 옳다. '나'가 맞다.",
            {"고쳐 쓴다", "second 가 옳다"},
        ),
        ("\"감.\"이 옳다. '나'가 옳다.", "\"감.\"이 옳다. '나'가 맞다.", {"second 가 옳다"}),
        ('"가."가 옳다.\n이유다.\n둘째.', '"가."가 옳다. 이유다. 둘째.', {"line break"}),
        ('"가."가 옳다 이유다.', '"가."가 옳다. 이유다.', {"verdict"}),
        ("“갑.” 혹은 “을.”으가 옳다. 이유다.", '"갑." 혹은 "을."이 옳다. 이유다.', {"quotes", "으가"}),
    ],
)
def test_what_is_mended(answer, mended, kinds):
    assert repair(answer)[0] == mended
    assert set(repair(answer)[1]) == kinds
    assert format_problem(mended) is None


@pytest.mark.parametrize(
    "answer",
    [
        *("", "모르겠다.", '"가게에', '"가."', '""가 옳다. 이유다.'),  # nothing to go on: nothing is invented
        '"가."가 옳다.',  # no reason is made up
        '"가."가 옳다. 이유는 의존 명',
        '"네가 옳다고 했다."가 옳다. 이유다.',  # the sentence's own words stay, though the contest splits there
        '"가."가 옳다.이유다.',  # the contest splits it rightly
        # The model's own particle is evidence.
        *('"집에 감."가 옳다. 이유다.', '"갔다."이 옳다. 이유다.', '"케이블"이 옳다. 이유다.', '"bus"이 옳다. 이유다.'),
        '"이것이 옳다는 말."가 옳다. 이유다.',
        '"옛말 \u1112\u119e\u11ab과 ㅿ."가 옳다. ㆍ와 ㄹ.',  # whole old syllables, letters as the contest has them
    ],
)
def test_what_is_left_alone(answer):
    assert repair(answer) == (answer, ())


def test_gold_answers_are_right_as_they_are():
    for split in ("train", "explore", "dev", "test", "unseen"):
        for record in load_records(DATA / f"{split}.json", "gold"):
            assert repair(record.answer) == (record.answer, ())
            assert problems(record) == []


@settings(max_examples=5_000, deadline=None)
@given(ANSWERLIKE)
def test_repair_is_idempotent_and_keeps_the_content(answer):
    mended, kinds = repair(answer)
    assert (mended == answer) == (not kinds)
    assert repair(mended) == (mended, ())
    before, after = parse_answer(answer), parse_answer(mended)
    assert after.sentences == (tuple(map(restore_jamo, before.sentences)) if kinds else before.sentences)
    if kinds:
        reason = restore_jamo(" ".join(before.reason.split())).replace("가 옳다", "가 맞다")
        assert " ".join(after.reason.split()).replace("가 옳다", "가 맞다") == reason
        assert contest_split(mended)[1] == after.reason
    elif format_problem(answer) is None:
        assert mended == answer


@pytest.mark.parametrize(
    ("reason", "closed"),
    [
        ("이유다. 그러므로", "이유다."),
        ("이유는 의존 명", "이유는 의존 명."),
        ("이유다.", "이유다."),
        ("앞말과 띄어 띄어 띄어 띄어 쓴다.", "앞말과 띄어 쓴다."),
        ("꼬꼬꼬꼬꼬꼬꼬꼬", "꼬."),
        ("가나 " * 400, "가나."),
        ("ㅋㅋㅋㅋ! 이유다ㅋㅋㅋㅋ.", "이유다 ."),
        ("!" * 700 + "이유다.", "이유다."),
        ("! ! ! ! 이유다.", "! 이유다."),
        ("ㅋㅋ", "ㅋㅋ."),
    ],
)
def test_close_reason(reason, closed):
    assert close_reason(reason) == closed
    assert close_reason(closed) == closed


def test_finish():
    assert finish("\"감.\"이 옳다. '나'가 옳다.") == "\"감.\"이 옳다. '나'가 맞다."
    assert finish("\"감.\"가 옳다. '나'가 옳다.") == "\"감.\"가 옳다. '나'가 옳다."
    assert finish('"가게에 갔') == '"가게에 갔'
    assert finish('"" 혹은 "나옴."가 옳다. 이유다.') == '"나옴."가 옳다. 이유다.'
    assert finish('"\' 혹은 ‘\' 또는 ""가 옳다. 이유다.') == '"또는"가 옳다. 이유다.'
    assert finish('"배."가 아니라 "사과."가 옳다. 이유다. 그') == '"사과."가 옳다. 이유다.'
    assert finish('"\u1105."가 옳다. 이유다.') == '"ㄹ."가 옳다. 이유다.'
    assert finish('"\u1105."가 옳다. 이유다.', '"\u1105"을 고치세요.') == '"\u1105."가 옳다. 이유다.'


def test_restored_jamo():
    letters = [chr(code) for code in range(0x3131, 0x318F) if code != 0x3164]
    for letter in letters:
        assert restore_jamo(unicodedata.normalize("NFKC", letter)) == letter
    for text in ("값을 치렀다. 뷁 ㄹ ㆍ ㅿ", "닭, 흙"):
        assert restore_jamo(unicodedata.normalize("NFD", text)) == text
        assert restore_jamo(text) == text
    assert restore_jamo("\u11af") == "ㄹ"
    for old in ("\u1112\u119e\u11ab", "\u1121\u119e\u11af", "\u1100\u1161\u11eb"):
        assert restore_jamo(old) == old


ADVERSARIAL = {
    "html": '<script>alert("x")</script><b>"가."가 옳다. <img src=x onerror=alert(1)>',
    "a megabyte in the sentence": f'"{"가나 " * 330_000}다."가 옳다. 이유다.',
    "a megabyte in the reason": f'정답: "가."가 옳다. {"이유 " * 330_000}',
    "a megabyte of verdicts": '"가"가 옳다. ' * 90_000,
    "a megabyte of quotes": '"' * 1_000_000,
    "a megabyte of joiners": '" 혹은 "' * 160_000,
    "a megabyte of braces": f'"{"{가/나}" * 200_000}"가 옳다. 이유다.',
    "control characters": '\x07\x1b[31m"가.\x00"가 옳다.\x08 이유다.',
    "direction marks": '\u202e"가.\u202c"\u200f가 옳다. \u2067이유다.',
}


@pytest.mark.parametrize("case", ADVERSARIAL)
@pytest.mark.parametrize(
    "question",
    [("선택형", '"{가/나}." 가운데 올바른 것을 선택하세요.'), ("교정형", '고치세요.\n"가나."')],
)
def test_adversarial_answers_break_nothing(case, question):
    answer = ADVERSARIAL[case]
    mended, _ = repair(answer)
    assert repair(mended) == (mended, ())
    record = Record("1", *question, mended)
    shown = problems(record) + warnings(record)
    assert all(len(text) < 1_000 and "\x1b" not in text and "\u202e" not in text for text in shown)
    assert exact_match(mended, '"가."가 옳다. 이유다.') in (0.0, 1.0)
    assert isinstance(find_cause(record.with_answer('"가."가 옳다. 이유다.'), answer), Cause | None)
