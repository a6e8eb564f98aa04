"""The ceiling of constrained decoding, on the sample data and on the forms of the contest's files."""

import pytest

from malpyeong.contest.records import Record, load_records, write_records
from malpyeong.metrics.ceiling import ceiling
from malpyeong.samples import DATA

CHOOSE = " 가운데 올바른 것을 선택하고, 그 이유를 설명하세요."
FIX = "다음 문장에서 어문 규범에 부합하지 않는 부분을 찾아 고치고, 그 이유를 설명하세요.\n"
LINES = "다음 중 어문 규범에 맞는 문장을 선택하고, 그 이유를 설명하세요.\n"

# question type, question, gold answer, and Reach's literal, sentence, verdict, kept
FORMS = {
    "options": ("선택형", f'"낡은 {{우산/우싼}}을 챙겼다."{CHOOSE}', '"낡은 우산을 챙겼다."가 옳다. 뜻.', "1111"),
    "equal options": ("선택형", f'"낡은 {{우산/우산}}을 챙겼다."{CHOOSE}', '"낡은 우산을 챙겼다."가 옳다. 뜻.', "1111"),
    "either particle": ("선택형", f'"{{램푸/램프}}가(이) 밝다."{CHOOSE}', '"램프가 밝다."가 옳다. 뜻.', "1111"),
    "a phrase": ("선택형", f'"{{케이블/케이불}}"{CHOOSE}', '"케이블"가 옳다. 뜻.', "1111"),
    "against the rule": ("선택형", f'"{{케이블/케이불}}"{CHOOSE}', '"케이블"이 옳다. 뜻.', "1111"),
    "not literal": ("선택형", f'"{{낡은/날근}} 우산."{CHOOSE}', '"낡은 우산이다."가 옳다. 뜻.', "0000"),
    "a pair of braces": ("선택형", f'"{{낡은/헌}} 옷."{CHOOSE}', '"낡은 옷." 혹은 "헌 옷."이 옳다. 뜻.', "1000"),
    "a pair of lines": ("선택형", f'{LINES}"낡은 옷."\n"헌 옷."', '"낡은 옷." 혹은 "헌 옷."이 옳다. 뜻.', "1111"),
    "lines to correct": ("교정형", f'{LINES}"가게에 갔다."\n"가게예 갔다."', '"가게에 갔다."가 옳다. 뜻.', "0111"),
    "a title": ("교정형", f'{FIX}"접수 기간 5월 2일"', '"접수 기간: 5월 2일"가 옳다. 뜻.', "0111"),
    "a noun": ("교정형", f"{FIX}― 나는 밥을 먹슴.", '"나는 밥을 먹음."이 옳다. 뜻.', "0111"),
    "a noun with 가": ("교정형", f'{FIX}"나는 밥을 먹슴."', '"나는 밥을 먹음."가 옳다. 뜻.', "0111"),
    "quotes within": ("교정형", f'{FIX}"가자.라고 했다."', '""가자."라고 했다."가 옳다. 뜻.', "0111"),
    "two answers": ("교정형", f'{FIX}"옥수시."', '"옥수수." 또는 "강냉이."가 옳다. 뜻.', "0111"),
    "another closing quote": ("교정형", f'{FIX}"그가 왔서?"', "\"그가 왔어?'가 옳다. 뜻.", "0111"),
    "a leading space": ("교정형", f'{FIX}"그가 왔서?"', ' "그가 왔어?"가 옳다. 뜻.', "0111"),
    "no space behind it": ("교정형", f'{FIX}"그가 왔서?"', '"그가 왔어?"가 옳다.뜻.', "0111"),
    "old letters": ("교정형", f'{FIX}"아래아는 ㅣ."', '"아래아는 ㆍ."가 옳다. 뜻.', "0111"),
    "space before 가": ("교정형", f'{FIX}"그가 왔서?"', '"그가 왔어?" 가 옳다. 뜻.', "0100"),
    "으가": ("교정형", f'{FIX}"그가 왔서?"', '"그가 왔어?"으가 옳다. 뜻.', "0100"),
    "고쳐 쓴다": ("교정형", f'{FIX}"그가 왔서?"', '"그가 왔어?"로 고쳐 쓴다. 뜻.', "0100"),
    "이 and a 가 옳다": ("교정형", f'{FIX}"먹슴."', "\"먹음.\"이 옳다. '음'가 옳다.", "0100"),
}


@pytest.mark.parametrize("form", FORMS)
def test_how_far_a_gold_answer_is_reached(form):
    question_type, question, answer, expected = FORMS[form]
    [reach] = ceiling([Record("1", question_type, question, answer)])
    assert "".join(str(int(step)) for step in (reach.literal, reach.sentence, reach.verdict, reach.kept)) == expected


@pytest.mark.parametrize("path", sorted(DATA.glob("*.json")), ids=lambda path: path.stem)
def test_the_sample_data_is_in_reach(path):
    if path.stem in ("labels", "rules") or path.stem.endswith("questions"):
        pytest.skip("no gold answers")
    reached = ceiling(load_records(path, "gold"))
    assert sum(one.kept for one in reached) / len(reached) >= (0.97 if path.stem == "contest_like" else 1)
    assert all(one.kept for one in reached if one.literal)
    assert sum(one.literal for one in reached) > 0.9 * sum(one.record.question_type == "선택형" for one in reached)


def test_the_command(run_module, tmp_path):
    gold = tmp_path / "정답.json"
    forms = [FORMS[name] for name in ("options", "a title", "으가")]
    write_records(gold, [Record(str(n), kind, question, answer) for n, (kind, question, answer, _) in enumerate(forms)])
    result = run_module("-m", "malpyeong.evaluate", "--ceiling", gold)
    assert result.returncode == 0, result.stderr
    rows = [line.split()[-4:] for line in result.stdout.splitlines() if line.startswith(("all", "선택형", "교정형"))]
    assert rows[:3] == [["3", "1.000", "0.667", "0.667"], ["1", *["1.000"] * 3], ["2", "1.000", "0.500", "0.500"]]
    assert rows[3] == rows[1]
    assert 'id "2"' in result.stdout
    assert 'id "1"' not in result.stdout
    missing = run_module("-m", "malpyeong.evaluate", "--ceiling", tmp_path / "none.json")
    assert missing.returncode == 2
    assert "Traceback" not in missing.stderr
