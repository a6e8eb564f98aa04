"""The submission: filled into the question file, checked, and never in the place of an input."""

import json
import random
import unicodedata

import llguidance
import pytest

from malpyeong.contest.grammar import answer_grammar, reason_grammar
from malpyeong.contest.question import verdicts
from malpyeong.contest.records import Record
from malpyeong.contest.repair import finish, repair
from malpyeong.submit import changed_regions, problems, warnings


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ('"가게에 갔다."가 옳다. 이유다.', None),
        ("", "empty"),
        ("모르겠다.", "takes the whole text"),
        ('"가."가 옳다.', "no reason"),
        ("“가.”가 옳다. 이유다.", "straight double quote"),
        ('"\u1100\u1161."가 옳다. 이유다.', "damaged jamo"),
        ('"가."가 옳다. \u119e와 \u1140과 \u114c과 \u1159은 이제 쓰지 않는다.', "damaged jamo"),
        ('"가."가 옳다. ㆍ와 ㅿ과 ㆁ과 ㆆ은 이제 쓰지 않는다.', None),
        ('"가."가 옳다. 옛말은 \u1121\u119e\u11af이다.', None),
        ('"배."가 아니라 "사과."가 옳다. 이유다.', "another sentence"),
        ('"가."가 옳다.이유다.', None),
        ('"\ufffd."가 옳다. 이유다.', "replacement character"),
        ('정답: "가."가 옳다. 이유다.', "text before"),
    ],
)
def test_problems(answer, problem):
    found = problems(Record("1", "선택형", "질문", answer))
    assert found == [] if problem is None else any(problem in text for text in found)


@pytest.mark.parametrize("letter", "ㄹㅡㆍㅿㆁㆆㅸㆎ")
def test_letters_that_nfkc_replaces_are_damage_unless_the_question_has_them(letter):
    damaged = unicodedata.normalize("NFKC", letter)
    answer = f'"가."가 옳다. {damaged}의 이름이다.'
    assert problems(Record("1", "교정형", f"{letter}의 이름은?", answer)) == [
        "damaged jamo (the text went through NFD or NFKC; do not normalise answers)"
    ]
    assert problems(Record("1", "교정형", f"{damaged}의 이름은?", answer)) == []
    assert problems(Record("1", "교정형", f"{letter}의 이름은?", repair(answer)[0])) == []


CHOICE = ("선택형", '"{가다가/가다}." 가운데 올바른 것을 선택하세요.')


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ('"가다."가 옳다. 이유다.', None),
        ('"가다가." 혹은 "가다."가 옳다. 이유다.', None),
        ('"가다가"가 옳다. 이유다.', 'none of the options; the nearest is "가다가."'),
        ('"나다."가 옳다. 이유다.', 'the nearest is "가다."'),
        ('"가다."이 옳다. 이유다.', None),
        ('"가다."가 아니라 "가다가."가 옳다. 이유다.', "another sentence"),
    ],
)
def test_an_answer_is_held_to_the_options(answer, problem):
    found = problems(Record("1", *CHOICE, answer))
    assert found == [] if problem is None else len(found) == 1 and problem in found[0]


@pytest.mark.parametrize(
    ("answer", "warning"),
    [
        *(('"나는 밥을 먹음."이 옳다. 이유다.', None), ('"나는 밥을 먹음."가 옳다. 이유다.', "particle 가")),
        *(('"케이블"가 옳다. 이유다.', None), ('"케이블"이 옳다. 이유다.', "particle 이")),
        *(('"접수 기간: 5월 2일"가 옳다. 이유다.', None), ('"그가 왔어?"이 옳다. 이유다.', "particle 이")),
        ('"“가.”"가 옳다. 이유다.', "curly quotes"),
    ],
)
def test_what_may_be_right_is_no_problem(answer, warning):
    record = Record("1", "선택형", "질문", answer)
    found = warnings(record)
    assert found == [] if warning is None else len(found) == 1 and warning in found[0]
    assert problems(record) == []


@pytest.mark.parametrize(
    ("sentence", "warning"),
    [
        ("할 수 있는 일은 많다.", None),
        ("할수있는 일은 많다.", "unchanged"),
        ("할 수 있는 일은 없지만 좋다.", "2 places"),
        ("해야 할 말이 없다.", "unlike"),
        ("가" * 2_000, "more than"),
    ],
)
def test_unusual_corrections_are_warnings(sentence, warning):
    record = Record("1", "교정형", '고치세요.\n"할수있는 일은 많다."', f'"{sentence}"가 옳다. 이유다.')
    found = warnings(record)
    assert found == [] if warning is None else len(found) == 1 and warning in found[0]
    assert problems(record) == []


# What format, split and parser trip over, to be put together by chance.
AWKWARD = (
    *('"', "'", "“", "”", "‘", "’", " ", "\u00a0", "\n", "#", "```", "<think>", "\u202e", "\ufffd", "ㄹ", "ㅋㅋ"),
    *("…", "!", ". ", "a", "1"),
    *("가 옳다", "이 옳다", "으가 옳다", "옳다", "으로 고쳐 쓴다", '"가 옳다. ', '"이 옳다. ', "가", "이", " 가 가 가"),
    *("혹은", '" 혹은 "', "' 또는 “", '"가 아니라 "', "\"이 아니고 '", "갔다.", "감", "감.", "가" * 7),
    *("\u1100", "\u1161", "\u119e", "\u11af", "\u1112\u119e\u11ab"),
)


def test_nothing_that_constrained_decoding_writes_is_a_problem():
    tokenizer, chance = llguidance.LLTokenizer("byte"), random.Random(0)
    choice = Record("1", "선택형", '"나는 {갔음/“감”}." 가운데 올바른 것을 선택하세요.')
    correction = Record("2", "교정형", '다음 문장을 고치세요.\n"나는 갔음."')

    def accepted(matcher, text):
        fresh, ids = matcher.deep_copy(), tokenizer.tokenize_str(text)
        return fresh.try_consume_tokens(ids) == len(ids) and fresh.is_accepting()

    free = llguidance.LLMatcher(tokenizer, answer_grammar())
    after = {verdict: llguidance.LLMatcher(tokenizer, reason_grammar(verdict)) for verdict in verdicts(choice)}
    assert len(after) == 4
    seen = 0
    for _ in range(12_000):
        head, tail = ("".join(chance.choices(AWKWARD, k=chance.randint(1, 6))) for _ in range(2))
        reason = f" {tail}{chance.choice(['.', '!”', '…', ''])}"
        verdict = chance.choice(list(after))
        for record, text, matcher, rest in (
            (correction, f'"{head}"{chance.choice("가이")} 옳다.{reason}', free, None),
            (choice, verdict + reason, after[verdict], reason),
        ):
            if accepted(matcher, rest or text):
                seen += 1
                answer = finish(text, record.question)
                assert problems(record.with_answer(answer)) == [], (text, answer)
                assert repair(answer, record.question) == (answer, ()), text
                assert finish(answer, record.question) == answer
    assert seen > 2_000


def test_nothing_that_repair_mends_is_a_problem():
    chance = random.Random(0)
    record = Record("1", "교정형", "다음 문장을 고치세요.")
    sentences = (
        "나는 밥을 먹음.",
        "케이블",
        "그가 왔어?",
        "이것이 옳다는 말.",
        '"네."라고 했다.',
        "ㄹ은 \u1105이다.",
        "“가.”",
    )
    reasons = ("이유다.", "'나'가 옳다.", "첫째.\n둘째이다.", "\u1102\u1161는 '다'이 옳다.")
    kinds = set()
    for _ in range(2_000):
        opening, closing = chance.choice(
            [('"', '"'), ("“", "”"), ("'", "'"), ('정답: "', '" '), ('"배."가 아니라 "', '"')]
        )
        particle = chance.choice(["가", "이", "으가", "로 고쳐 쓴다", "으로 고쳐 쓴다"])
        verdict = particle if "쓴다" in particle else f"{particle} 옳다"
        text = f"{opening}{chance.choice(sentences)}{closing}{verdict}.{chance.choice(['', ' ', chr(10)])}"
        text = chance.choice(["%s", "```\n%s\n```", "<think>음</think>%s", " %s "]) % (text + chance.choice(reasons))
        mended, mends = repair(text, record.question)
        kinds.update(mends)
        if mends:
            assert problems(record.with_answer(mended)) == [], (text, mended)
    assert len(kinds) >= 9


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


def test_one_of_a_thing_is_not_called_several(contest_file, run_module, tmp_path):
    test = contest_file("test.json", {"1": None})
    records = json.loads(test.read_text("utf-8"))
    records[0]["input"] = {"question_type": "교정형", "question": '고치세요.\n"할수있는 일은 많다."'}
    test.write_text(json.dumps(records), "utf-8")
    records[0]["output"] = {"answer": '"할수있는 일은 많다."가 옳다. 이유다.'}
    (tmp_path / "pred.json").write_text(json.dumps(records), "utf-8")
    result = run_module("-m", "malpyeong.submit", test, tmp_path / "pred.json", "-o", tmp_path / "out.json")
    assert result.stdout.endswith("out.json: 1 record, 1 without problems, 0 with, 1 warning\n")


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
