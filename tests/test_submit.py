"""The submission: filled into the question file, checked, and never in the place of an input."""

import json

import pytest

from malpyeong.contest.records import Record
from malpyeong.submit import changed_regions, problems, warnings


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ('"가게에 갔다."가 옳다. 이유다.', None),
        ("", "empty"),
        ("모르겠다.", "takes the whole text"),
        ('"가."가 옳다.', "no reason"),
        ("“가.”가 옳다. 이유다.", "curly quotes"),
        ('"\u1100\u1161."가 옳다. 이유다.', "damaged jamo"),
        ('"\ufffd."가 옳다. 이유다.', "replacement character"),
        ('정답: "가."가 옳다. 이유다.', "text before"),
    ],
)
def test_problems(answer, problem):
    found = problems(Record("1", "선택형", "질문", answer))
    assert found == [] if problem is None else any(problem in text for text in found)


def test_marks_that_the_question_asks_about_are_no_problem():
    asked = Record("1", "교정형", "“ ”와 옛글 \u1112\u119e\u11ab", '"“ ”와 옛글 \u1112\u119e\u11ab"이 옳다. 이유다.')
    assert not any("curly" in text or "jamo" in text for text in problems(asked))


CHOICE = ("선택형", '"{가다가/가다}." 가운데 올바른 것을 선택하세요.')


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ('"가다."가 옳다. 이유다.', None),
        ('"가다가." 혹은 "가다."가 옳다. 이유다.', None),
        ('"가다가"가 옳다. 이유다.', 'none of the options; the nearest is "가다가."'),
        ('"나다."가 옳다. 이유다.', 'the nearest is "가다."'),
        ('"가다."이 옳다. 이유다.', "particle 이 where the sentence calls for 가"),
    ],
)
def test_an_answer_is_held_to_the_options(answer, problem):
    found = problems(Record("1", *CHOICE, answer))
    assert found == [] if problem is None else len(found) == 1 and problem in found[0]


@pytest.mark.parametrize(
    ("sentence", "warning"),
    [
        ("할 수 있는 일은 많다.", None),
        ("할수있는 일은 많다.", "unchanged"),
        ("할 수 있는 일은 없지만 좋다.", "2 places"),
        ("가" * 2_000, "more than"),
    ],
)
def test_unusual_corrections_are_warnings(sentence, warning):
    record = Record("1", "교정형", '고치세요.\n"할수있는 일은 많다."', f'"{sentence}"가 옳다. 이유다.')
    found = warnings(record)
    assert found == [] if warning is None else len(found) == 1 and warning in found[0]
    assert problems(record) == []


def test_changed_regions():
    assert changed_regions("가나다", "가나다") == 0
    assert changed_regions("할수있는 일은", "할 수 있는 일은") == 1
    assert changed_regions("가나다라마바사아자차", "까나다라마바사아자차카") == 2


def test_submission_is_the_test_file_with_answers(contest_file, run_module, tmp_path):
    test = contest_file("test.json", {"3": None, "1": None})
    prediction = contest_file("pred.json", {"3": '"3번 가."가 옳다. 이유다.', "1": "모르겠다."})
    output = tmp_path / "제출 파일.json"
    result = run_module("-m", "malpyeong.submit", test, prediction, "-o", output)
    assert result.returncode == 0, result.stderr
    assert 'id "1"' in result.stderr
    assert "2 records, 1 without problems, 1 with, 0 warnings" in result.stdout
    written = json.loads(output.read_text("utf-8"))
    assert [item.pop("output") for item in written] == [
        {"answer": '"3번 가."가 옳다. 이유다.'},
        {"answer": "모르겠다."},
    ]
    assert written == json.loads(test.read_text("utf-8"))


def test_strict_writes_nothing_if_an_answer_has_a_problem(contest_file, run_module, tmp_path):
    test, prediction = contest_file("test.json", {"1": None}), contest_file("pred.json", {"1": "모르겠다."})
    result = run_module("-m", "malpyeong.submit", test, prediction, "-o", tmp_path / "out.json", "--strict")
    assert result.returncode == 2
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("victim", ["test.json", "pred.json"])
def test_an_input_is_never_overwritten(victim, contest_file, run_module, tmp_path):
    contest_file("test.json", {"1": None})
    contest_file("pred.json", {"1": '"가."가 옳다. 이유다.'})
    before = (tmp_path / victim).read_bytes()
    result = run_module(
        "-m", "malpyeong.submit", tmp_path / "test.json", tmp_path / "pred.json", "-o", tmp_path / victim
    )
    assert result.returncode == 2
    assert "overwrite" in result.stderr
    assert (tmp_path / victim).read_bytes() == before
