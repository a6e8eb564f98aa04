"""What a question offers to choose among, and the verdicts that it can be answered with."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from malpyeong.contest.answer import format_problem, parse_answer
from malpyeong.contest.question import MAX_OPTIONS, PARTICLE_MARGIN, options, pick_verdict, read_question, verdicts
from malpyeong.contest.records import Record, load_records
from malpyeong.samples import DATA

CHOOSE = " 가운데 올바른 것을 선택하고, 그 이유를 설명하세요."


@pytest.mark.parametrize(
    ("question", "offered"),
    [
        ('"{알코올/알콜}이 든 음료."' + CHOOSE, ("알코올이 든 음료.", "알콜이 든 음료.")),
        ('"{로봇이/로보트가 } 돕는다."' + CHOOSE, ("로봇이 돕는다.", "로보트가 돕는다.")),
        ('"비율은 { 3 대 1 /3대1}  이다."' + CHOOSE, ("비율은 3 대 1 이다.", "비율은 3대1 이다.")),
        ('"곧 {갈게/갈께} ."' + CHOOSE, ("곧 갈게.", "곧 갈께.")),
        ('"{가/나/다}."' + CHOOSE, ("가.", "나.", "다.")),
        ('"{가/나} {다/라}."' + CHOOSE, ("가 다.", "가 라.", "나 다.", "나 라.")),
        ('"이것{은/} 책이다."' + CHOOSE, ("이것은 책이다.", "이것 책이다.")),
        ('"그는 "{네 제가/네, 제가} 할게요."라고 했다."' + CHOOSE, None),
        ("“{가/나}.” 중 올바른 것을 선택하세요.", ("가.", "나.")),
        ('다음 문장에서 올바른 것을 선택하세요.\n"{가/나}."', ("가.", "나.")),
        (
            '다음 중 맞는 문장을 선택하세요.\n"우유{를, 도} 샀다."\n"우유“를, 도” 샀다."',
            ("우유{를, 도} 샀다.", "우유“를, 도” 샀다."),
        ),
        ("다음 중 올바른 것을 고르세요.\n― 가.\nㅡ 나.\n― 다.", ("가.", "나.", "다.")),
        ("다음 중 올바른 것을 고르세요.\n- 가.\n- 나.", ("가.", "나.")),
        ("다음 중 올바른 것을 고르세요.\n가.\n나.", ("가.", "나.")),
        ("다음 중 올바른 것을 고르세요. - 가. - 나.", ("가.", "나.")),
        ('다음 중 올바른 것을 고르세요. "가." "나."', ("가.", "나.")),
        ("다음 중 올바른 것을 고르세요.\n'가.'\n'나.'", ("가.", "나.")),
        ('다음 두 문장 중 올바른 것을\n선택하고,\n그 이유를 설명하세요.\n"가."\n"나."', ("가.", "나.")),
        ('다음 중 올바른 것은?\n"가."\n"나."', ("가.", "나.")),
        ('다음 중 올바른 것을 고르세요.\n"가."\n"가."', ("가.",)),
        ('"문장이\n{길다/길다란}." 가운데\n올바른 것을 선택하세요.', ("문장이\n길다.", "문장이\n길다란.")),
        ('"낡은 {우산/우산}을 챙겼다."' + CHOOSE, ("낡은 우산을 챙겼다.",)),
        ('"{램푸/램프}가(이) 밝다."' + CHOOSE, ("램푸가 밝다.", "램프가 밝다.")),
        ('"{형광등/램프}가(이) 밝다."' + CHOOSE, ("형광등이 밝다.", "램프가 밝다.")),
        ('"{서울/부산/대구} (으)로 간다."' + CHOOSE, ("서울로 간다.", "부산으로 간다.", "대구로 간다.")),
        ('"{가/나}씨(님)다."' + CHOOSE, ("가씨(님)다.", "나씨(님)다.")),
        ('"{가／나}."' + CHOOSE, ("가.", "나.")),
        ("'{가/나}.'" + CHOOSE, ("가.", "나.")),
        ("'그는 '{네/예}'라고 했다.'" + CHOOSE, ("그는 '네'라고 했다.", "그는 '예'라고 했다.")),
        ('다음에서 올바른 것을 고르세요.\n"보기이다."\n"{가/나}."', ("가.", "나.")),
        # What is chosen may have to be corrected.
        ('다음 중 어문 규범에 부합하지 않는 것은?\n"가."\n"나."', ()),
        ('다음 중 틀린 것을 골라 고치세요.\n"가."\n"나."', ()),
        # Punctuation that is asked about, no brace, a flood of combinations
        ('"우유{를, 도} 샀다."' + CHOOSE, ()),
        ('"줄은 {/} 로 나눈다."' + CHOOSE, ()),
        ('"{ }과 { / }를 쓴다."' + CHOOSE, ()),
        ('"가."' + CHOOSE, ()),
        ('"' + "{가/나}" * 6 + '"' + CHOOSE, ()),
        ("질문", ()),
    ],
)
def test_options(question, offered):
    found = options(Record("1", "선택형", question))
    if offered is None:
        offered = ('그는 "네 제가 할게요."라고 했다.', '그는 "네, 제가 할게요."라고 했다.')
    assert found == offered


@pytest.mark.parametrize(
    ("question", "sentences"),
    [
        ("다음 문장을 고치세요.\n'그는 갔다.'", ("그는 갔다.",)),
        ("다음 문장 '그는 갔다.'에서 틀린 곳을 고치세요.", ("그는 갔다.",)),
        ("다음 문장을 고치세요.\n‘그는 '네.'라고 했다.’", ("그는 '네.'라고 했다.",)),
        ("'ㄱ'의 이름을 쓰고 'ㄴ'의 이름을 쓰세요.", ()),
        ('다음 문장을 고치세요. "그는 "네."라고 했다."', ('그는 "네."라고 했다.',)),
        ("다음 문장을 고치세요. ― 그는 갔다.", ("그는 갔다.",)),
        ("다음 문장을 고치세요.\n- 그는 '-던지'를 썼다.", ("그는 '-던지'를 썼다.",)),
        ("다음 문장을 고치고,\n그 이유를 설명하세요.\n그는 갔다.\n나도 갔다.", ("그는 갔다.", "나도 갔다.")),
        ('다음 문장을 고치세요.\n"그는 갔다.\n나도 갔다."', ("그는 갔다.\n나도 갔다.",)),
        ('다음 중 어문 규범에 부합하지 않는 것은?\n"가."\n"나."', ("가.", "나.")),
        ("다음 중 바른 것을 고르세요.\n- 그는 - 그도 - 갔다.\n- 나는 갔다.", ("그는 - 그도 - 갔다.", "나는 갔다.")),
        ('"우유{를, 도} 샀다."를 고치세요.', ("우유{를, 도} 샀다.",)),
        ("", ()),
    ],
)
def test_sentences(question, sentences):
    assert read_question(question, "교정형").sentences == sentences


def test_corrections_offer_options_only_in_lines():
    assert options(Record("1", "교정형", '다음 문장을 고치세요.\n"km/h {가/나}"')) == ()
    assert options(Record("1", "교정형", '다음 중 알맞은 것을 선택하세요.\n"가."\n"나."')) == ("가.", "나.")


@pytest.mark.parametrize("split", ["train", "explore", "dev", "test", "unseen"])
def test_gold_sentences_are_among_the_options(split):
    asked = [record for record in load_records(DATA / f"{split}.json", "gold") if record.question_type == "선택형"]
    for record in asked:
        offered = options(record)
        assert set(parse_answer(record.answer).sentences) <= set(offered), record
        assert any(record.answer.startswith(verdict) for verdict in verdicts(record)), record


def test_verdicts():
    assert verdicts(Record("1", "교정형", "질문")) == ()
    single = ('"감."가 옳다.', '"감."이 옳다.', '"가."가 옳다.', '"가."이 옳다.')
    assert verdicts(Record("1", "선택형", f'"{{감/가}}."{CHOOSE}')) == single
    pairs = [f'"{first}." {joiner} "{second}."' for first, second in ("감가", "가감") for joiner in ("혹은", "또는")]
    assert verdicts(Record("1", "선택형", '다음 중 맞는 것을 고르세요.\n"감."\n"가."')) == (
        *single,
        *(f"{pair}{particle} 옳다." for pair in pairs for particle in "가이"),
    )
    # The contest would split within such a sentence.
    asked = Record("1", "선택형", '다음 중 맞는 것을 고르세요.\n"그것"가 옳다. 나"\n"이것이 옳다는 말."')
    assert verdicts(asked)[0] == '"이것이 옳다는 말."가 옳다.'
    assert not any("그것" in verdict or verdict.endswith("이 옳다.") for verdict in verdicts(asked))


def test_the_rule_decides_where_both_particles_are_about_as_likely():
    offered = ('"감."가 옳다.', '"감."이 옳다.', '"봄"가 옳다.', '"봄"이 옳다.')
    near, far = PARTICLE_MARGIN - 0.1, PARTICLE_MARGIN + 0.1
    assert pick_verdict(offered, (-1, -1 - near, -9, -9)) == '"감."이 옳다.'
    assert pick_verdict(offered, (-1, -1 - far, -9, -9)) == '"감."가 옳다.'
    assert pick_verdict(offered, (-9, -9, -1 - near, -1)) == '"봄"가 옳다.'
    assert pick_verdict(offered, (-9, -9, -1 - far, -1)) == '"봄"이 옳다.'
    assert (
        pick_verdict(('"가." 혹은 "감."가 옳다.', '"가." 혹은 "감."이 옳다.'), (-1, -2)) == '"가." 혹은 "감."이 옳다.'
    )
    assert pick_verdict(('"이것이 옳다는 말."가 옳다.',), (-1,)) == '"이것이 옳다는 말."가 옳다.'


@given(
    st.lists(st.text(alphabet="가나 /{}\"'“.\n", max_size=12), max_size=6).map("".join),
    st.sampled_from(["선택형", "교정형"]),
)
def test_no_question_breaks_it(text, kind):
    record = Record("1", kind, text or "?")
    offered = options(record)
    assert len(offered) <= max(MAX_OPTIONS, text.count("\n") + 1)
    assert len(set(offered)) == len(offered)
    assert all(sentence == sentence.strip() for sentence in offered)
    assert all(format_problem(f"{verdict} 이유다.") is None for verdict in verdicts(record))


WORD = st.text(alphabet="가나다라마 ", min_size=1, max_size=8).map(str.strip).filter(bool)


@given(WORD, st.lists(WORD, min_size=2, max_size=4, unique=True), WORD)
def test_options_are_literal_substitutions(before, alternatives, after):
    question = f'"{before} {{{" / ".join(alternatives)}}}{after}."{CHOOSE}'
    expected = [" ".join(f"{before} {one}{after}.".split()) for one in alternatives]
    assert list(options(Record("1", "선택형", question))) == [*dict.fromkeys(expected)]
