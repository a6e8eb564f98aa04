"""Repair: mends the wrapping, keeps the content, and leaves alone what is right."""

import pytest
from hypothesis import given, settings

from malpyeong.contest.answer import contest_split, format_problem, parse_answer
from malpyeong.contest.records import Record, load_records
from malpyeong.contest.repair import repair
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
        ('"서울"으가 옳다. 이유다.', '"서울"이 옳다. 이유다.', {"으가"}),
        ('"집에 감."가 옳다. 이유다.', '"집에 감."이 옳다. 이유다.', {"particle"}),
        ('"갔다."이 옳다. 이유다.', '"갔다."가 옳다. 이유다.', {"particle"}),
        ('"가." 가 옳다. 이유다.', '"가."가 옳다. 이유다.', {"space"}),
        ('"가. "가 옳다. 이유다.', '"가."가 옳다. 이유다.', {"space"}),
        ('"가."로 고쳐 쓴다. 이유다.', '"가."가 옳다. 이유다.', {"고쳐 쓴다"}),
        ("\"감.\"이 옳다. '나'가 옳다.", "\"감.\"이 옳다. '나'가 맞다.", {"second 가 옳다"}),
        ('"가."가 옳다.\n이유다.\n둘째.', '"가."가 옳다. 이유다. 둘째.', {"line break"}),
        ('"가."가 옳다 이유다.', '"가."가 옳다. 이유다.', {"verdict"}),
        ("“갑.” 혹은 “을.”가 옳다. 이유다.", '"갑." 혹은 "을."이 옳다. 이유다.', {"quotes", "particle"}),
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
        '"bus"이 옳다. 이유다.',  # spelling does not decide
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
    assert after.sentences == before.sentences
    if kinds:
        reason = " ".join(before.reason.split()).replace("가 옳다", "가 맞다")
        assert " ".join(after.reason.split()).replace("가 옳다", "가 맞다") == reason
        assert contest_split(mended)[1] == after.reason
    elif format_problem(answer) is None:
        assert mended == answer


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
