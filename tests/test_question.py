"""What a question offers to choose among, and the verdicts that it can be answered with."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from malpyeong.options import MAX_OPTIONS, options, question_sentence, verdicts

from malpyeong.answer import format_problem, parse_answer
from malpyeong.records import Record, load_records
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
        # Punctuation that is asked about, one alternative twice, no brace, a flood of combinations
        ('"우유{를, 도} 샀다."' + CHOOSE, ()),
        ('"{가/가 }."' + CHOOSE, ()),
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


def test_corrections_offer_options_only_in_lines():
    assert options(Record("1", "교정형", '다음 문장을 고치세요.\n"km/h {가/나}"')) == ()
    assert options(Record("1", "교정형", '다음 중 알맞은 것을 선택하세요.\n"가."\n"나."')) == ("가.", "나.")


@pytest.mark.parametrize("split", ["train", "explore", "dev", "test", "unseen"])
def test_gold_sentences_are_among_the_options(split):
    asked = [record for record in load_records(DATA / f"{split}.json", "gold") if record.question_type == "선택형"]
    for record in asked:
        offered = options(record)
        assert set(parse_answer(record.answer).sentences) <= set(offered), record
        assert any(record.answer.startswith(verdict) for verdict in verdicts(offered)), record


def test_verdicts():
    assert verdicts(()) == ()
    assert verdicts(("감.", "가.")) == (
        '"감."이 옳다.',
        '"가."가 옳다.',
        '"감." 혹은 "가."가 옳다.',
        '"감." 또는 "가."가 옳다.',
        '"가." 혹은 "감."이 옳다.',
        '"가." 또는 "감."이 옳다.',
    )
    # The contest would split within such a sentence.
    assert verdicts(('그것"가 옳다. 나', "나.")) == ('"나."가 옳다.',)


@given(
    st.lists(st.text(alphabet="가나 /{}\"'“.\n", max_size=12), max_size=6).map("".join),
    st.sampled_from(["선택형", "교정형"]),
)
def test_no_question_breaks_it(text, kind):
    offered = options(Record("1", kind, text or "?"))
    assert len(offered) != 1
    assert len(offered) <= max(MAX_OPTIONS, text.count("\n") + 1)
    assert len(set(offered)) == len(offered)
    assert all(sentence == sentence.strip() for sentence in offered)
    assert all(format_problem(f"{verdict} 이유다.") is None for verdict in verdicts(offered))
    question_sentence(text)


WORD = st.text(alphabet="가나다라마 ", min_size=1, max_size=8).map(str.strip).filter(bool)


@given(WORD, st.lists(WORD, min_size=2, max_size=4, unique=True), WORD)
def test_options_are_literal_substitutions(before, alternatives, after):
    question = f'"{before} {{{" / ".join(alternatives)}}}{after}."{CHOOSE}'
    expected = [" ".join(f"{before} {one}{after}.".split()) for one in alternatives]
    assert list(options(Record("1", "선택형", question))) == [*dict.fromkeys(expected)]
