"""The answer format: the contest's literal split, our tolerant parser, the writer and the verdict."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from malpyeong.contest.answer import FormatProblem, contest_split, format_problem, parse_answer, quote, write_answer
from malpyeong.contest.particles import subject_particle
from malpyeong.metrics.exact_match import exact_match
from malpyeong.metrics.rouge import rouge_1

# text, sentences, particle, reason
PARSED = {
    "plain": ('"가게에 갔다."가 옳다. 이유다.', ("가게에 갔다.",), "가", "이유다."),
    "particle 이": ('"집에 감."이 옳다. 이유다.', ("집에 감.",), "이", "이유다."),
    "quotes in the sentence": (
        '""내일 만나자."라고 말했다."가 옳다. 이유다.',
        ('"내일 만나자."라고 말했다.',),
        "가",
        "이유다.",
    ),
    "sentence ends in a quotation": (
        '"그가 말했다. "가자.""가 옳다. 이유다.',
        ('그가 말했다. "가자."',),
        "가",
        "이유다.",
    ),
    "curly quotes": ("“가게에 갔다.”가 옳다. 이유다.", ("가게에 갔다.",), "가", "이유다."),
    "curly within curly": ("“그는 ‘가자.’라고 했다.”가 옳다. 이유다.", ("그는 ‘가자.’라고 했다.",), "가", "이유다."),
    "single quotes": ("'가게에 갔다.'가 옳다. 이유다.", ("가게에 갔다.",), "가", "이유다."),
    "mismatched closing quote": ("\"가게에 갔다.'가 옳다. 이유다.", ("가게에 갔다.",), "가", "이유다."),
    "two answers, 혹은": ('"갑이다." 혹은 "을이다."가 옳다. 이유다.', ("갑이다.", "을이다."), "가", "이유다."),
    "two answers, 또는": ('"갑이다."또는 "을이다."가 옳다. 이유다.', ("갑이다.", "을이다."), "가", "이유다."),
    "no-break space": ('"갑이다."\u00a0혹은\u00a0"을이다."가 옳다. 이유다.', ("갑이다.", "을이다."), "가", "이유다."),
    "으가": ('"서울"으가 옳다. 이유다.', ("서울",), "으가", "이유다."),
    "space before the particle": ('"가게에 갔다." 가 옳다. 이유다.', ("가게에 갔다.",), "가", "이유다."),
    "two spaces": ('"가게에 갔다."가  옳다. 이유다.', ("가게에 갔다.",), "가", "이유다."),
    "leading space": (' "가게에 갔다."가 옳다. 이유다.', ("가게에 갔다.",), "가", "이유다."),
    "space inside the quotes": ('" 가게에 갔다. "가 옳다. 이유다.', ("가게에 갔다.",), "가", "이유다."),
    "label before": ('정답: "가게에 갔다."가 옳다. 이유다.', ("가게에 갔다.",), "가", "이유다."),
    "sentence before": ('주어진 문장에서는 "가게에 갔다."가 옳다. 이유다.', ("가게에 갔다.",), "가", "이유다."),
    "thinking": ('<think>음 "나"가 옳다.</think>\n\n"가."가 옳다. 이유다.', ("가.",), "가", "이유다."),
    "thinking, tag opened in the prompt": ('음…</think>"가."가 옳다. 이유다.', ("가.",), "가", "이유다."),
    "code fence": ('```text\n"가."가 옳다. 이유다.\n```', ("가.",), "가", "이유다."),
    "code fence in one line": ('```"가."가 옳다. 이유다.```', ("가.",), "가", "이유다."),
    "고쳐 쓴다": ('"가게에 갔다."로 고쳐 쓴다. 이유다.', ("가게에 갔다.",), "로", "이유다."),
    "으로 고쳐 쓴다": ('"서울"으로 고쳐 쓴다. 이유다.', ("서울",), "으로", "이유다."),
    "no quotes": ("가게에 갔다.가 옳다. 이유다.", ("가게에 갔다.",), "가", "이유다."),
    "옳다 in the sentence": ('"네 말이 옳다."가 옳다. 이유다.', ("네 말이 옳다.",), "가", "이유다."),
    "옳다 in the reason": ("\"가.\"가 옳다. '나'가 옳다.", ("가.",), "가", "'나'가 옳다."),
    "no reason": ('"가."가 옳다.', ("가.",), "가", ""),
    "A가 아니라 B": ('"가게예 갔다."가 아니라 "가게에 갔다."가 옳다. 이유다.', ("가게에 갔다.",), "가", "이유다."),
    "single quotes, A가 아니고 B": ("'감.'이 아니고, '갔다.'가 옳다. 이유다.", ("갔다.",), "가", "이유다."),
    "아니라 in the sentence": (
        '""배"가 아니라 "사과"를 샀다."가 옳다. 이유다.',
        ('"배"가 아니라 "사과"를 샀다.',),
        "가",
        "이유다.",
    ),
    "no space behind the verdict": ('"가."가 옳다.이유다.', ("가.",), "가", "이유다."),
    "old jamo and hanja": ('"ㆍ와 歷史[역싸]"가 옳다. ㄹ이다.', ("ㆍ와 歷史[역싸]",), "가", "ㄹ이다."),
}


@pytest.mark.parametrize("case", PARSED)
def test_parse(case):
    text, sentences, particle, reason = PARSED[case]
    answer = parse_answer(text)
    assert (answer.sentences, answer.particle, answer.reason) == (sentences, particle, reason)
    assert answer.complete


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('"가게에', "가게에"),
        ('"가게에 갔다."', "가게에 갔다."),
        ('"가."가', "가."),
        ("가게", ""),
        ("", ""),
        ("<think>음", ""),
    ],
)
def test_parse_of_a_cut_off_answer(text, sentence):
    answer = parse_answer(text)
    assert not answer.complete
    assert answer.sentence == sentence
    assert answer.reason == ""


@pytest.mark.parametrize(
    ("text", "verdict", "reason"),
    [
        ('"가."가 옳다. 이유.', '"가."가 옳다', "이유."),
        # 가 옳다 wins wherever it stands, also behind an earlier 이 옳다
        ("\"감.\"이 옳다. '나'가 옳다. 끝.", "\"감.\"이 옳다. '나'가 옳다", "끝."),
        ('"감."이 옳다., . 이유.', '"감."이 옳다', "이유."),
        ("판정이 없다.", "판정이 없다.", ""),
        ('"가."가  옳다. 이유.', '"가."가  옳다. 이유.', ""),
        ("", "", ""),
    ],
)
def test_contest_split(text, verdict, reason):
    assert contest_split(text) == (verdict, reason)


@pytest.mark.parametrize(
    ("text", "particle"),
    [
        ("접수 기간: 5월 2일", "가"),
        ("케이블", "가"),
        ("파란 우산 하나", "가"),
        ("나는 밥을 먹음.", "이"),
        ("그가 왔어?", "가"),
        ("이제 그만할걸.", "이"),
        ("그게 참말인감?", "이"),
        ("가게에 갔다.", "가"),
        ('그가 "나는 갔음."', "이"),
        ("(청소를 끝냄.)", "이"),
        ("(청소를 끝냄).", "가"),
        ("청소를 '끝냄'.", "가"),
        ("청소를 끝냄!", "가"),
        ("끝냄……", "가"),
        ("ㄹ.", "가"),
        ("2024. 3. 1.", "가"),
        ("歷史.", "가"),
        ("bus.", "가"),
        ("이것이 옳다는 말.", "가"),  # behind 이 the contest would split in the sentence
        ('"네 말이 옳다." 혹은 "내 말."', "가"),
        ("", "가"),
        (".", "가"),
    ],
)
def test_subject_particle(text, particle):
    assert subject_particle(text) == particle


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('"가게에 갔다."가 옳다. 이유다.', None),
        ('""가자."라고 했다."가 옳다. 이유다.', None),
        ('"갑이다." 혹은 "을이다."가 옳다. 이유다.', None),
        ('"가."가 옳다.이유다.', None),
        ('""배"가 아니라 "사과"를 샀다."가 옳다. 이유다.', None),
        ('"배."가 아니라 "사과."가 옳다. 이유다.', FormatProblem.NOT_BUT),
        ('"배."가 아니라 "사과"를 샀다."가 옳다. 이유다.', None),  # quotes within a sentence are its own affair
        ("\"가.\"가 옳다. 그러므로 '나'가 옳다.", None),
        ("", FormatProblem.EMPTY),
        (" \n", FormatProblem.EMPTY),
        ('<think>\n</think>"가."가 옳다. 이유다.', FormatProblem.THINKING),
        ('```"가."가 옳다. 이유다.```', FormatProblem.CODE_FENCE),
        ('"가."가 옳다.\n이유다.', FormatProblem.LINES),
        ('"가."가 옳다. 이유이고\r이유다.', FormatProblem.LINES),
        (' "가."가 옳다. 이유다.', FormatProblem.OUTER_SPACE),
        ("“가.”가 옳다. 이유다.", FormatProblem.OPENING_QUOTE),
        ("'가.'가 옳다. 이유다.", FormatProblem.OPENING_QUOTE),
        ('정답: "가."가 옳다. 이유다.', FormatProblem.TEXT_BEFORE),
        ('"가.', FormatProblem.NO_VERDICT),
        ('"가."으가 옳다. 이유다.', FormatProblem.PARTICLE),
        ('"가."로 고쳐 쓴다. 이유다.', FormatProblem.PARTICLE),
        ('""가 옳다. 이유다.', FormatProblem.EMPTY_SENTENCE),
        ('" "가 옳다. 이유다.', FormatProblem.EMPTY_SENTENCE),
        ('"가." 가 옳다. 이유다.', FormatProblem.VERDICT),
        ('"가."가 옳다.', FormatProblem.NO_REASON),
        ('"가."가 옳다 이유다.', FormatProblem.VERDICT),
        ('"가."가 옳다. ', FormatProblem.OUTER_SPACE),
        ('" 가."가 옳다. 이유다.', FormatProblem.INNER_SPACE),
        ("\"감.\"이 옳다. '나'가 옳다.", FormatProblem.SPLIT),
        ('"가."가 옳다. .', FormatProblem.NO_REASON),
        ('"가 옳다. 나."가 옳다. 이유다.', FormatProblem.SPLIT),
        ('"가 옳다. "가 옳다. 이유다.', FormatProblem.INNER_SPACE),
        ('"가."가 옳다. 이유는 의존 명', FormatProblem.REASON_CUT_OFF),
    ],
)
def test_format_problem(text, problem):
    assert format_problem(text) is problem


# Texts that look like answers, and texts that do not.
FRAGMENTS = st.sampled_from(
    (
        *(
            '"',
            "'",
            "“",
            "”",
            "‘",
            "’",
            "가 옳다",
            "이 옳다",
            "으가 옳다",
            "으로 고쳐 쓴다",
            ". ",
            " ",
            "\u00a0",
            "\n",
            "#",
        ),
        *(
            "혹은",
            "또는",
            "<think>",
            "</think>",
            "```",
            "정답:",
            "가게에 갔다.",
            "ㄹ",
            "ㆍ",
            "歷",
            "{가/나}",
            "옳다",
            "…",
        ),
        *("\u202e", "\0"),
    )
)
ANSWERLIKE = st.one_of(
    st.lists(FRAGMENTS, max_size=14).map("".join),
    st.lists(st.one_of(FRAGMENTS, st.text(max_size=8)), max_size=10).map("".join),
)


@pytest.mark.slow
@settings(max_examples=20_000, deadline=None)
@given(ANSWERLIKE)
def test_no_text_breaks_parser_or_scorer(text):
    answer = parse_answer(text)
    verdict, reason = contest_split(text)
    # Nothing is invented: what was found stands in the text, and the split only cuts and strips.
    unwrapped = "think>" not in text and "```" not in text
    assert all(sentence in text for sentence in answer.sentences) or not unwrapped
    assert answer.reason in text or not unwrapped
    assert verdict in text
    assert reason in text
    assert exact_match(text, text) in (0.0, 1.0)
    assert 0.0 <= rouge_1(reason, "의존 명사는 앞말과 띄어 쓴다.") <= 1.0
    if format_problem(text) is None:
        # What passes the strict verdict is split by the contest where our parser splits it.
        assert reason == answer.reason
        assert verdict.endswith(f'"{answer.particle} 옳다')
        assert answer.complete
        assert answer.sentences


@settings(max_examples=5_000, deadline=None)
@given(
    st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=2).map(tuple),
    st.text(min_size=1, max_size=60),
    st.sampled_from(["혹은", "또는"]),
)
def test_what_is_written_is_read_back(sentences, reason, joiner):
    try:
        text = write_answer(sentences, reason, joiner)
    except ValueError:
        # Refused only for parts that could not come back: padded or empty, or with quotes or verdicts inside.
        parts = "".join((*sentences, reason))
        awkward = any(mark in parts for mark in ("\"'“”‘’`<")) or any(
            part != part.strip() for part in (*sentences, reason)
        )
        assert awkward or reason[0] in "., " or "옳다" in parts or "쓴다" in parts
        return
    answer = parse_answer(text)
    assert (answer.sentences, answer.reason) == (sentences, reason)
    assert answer.particle == subject_particle(quote(sentences, joiner))


@settings(max_examples=2_000, deadline=None)
@given(
    st.text(alphabet="가나다감을 .,?!ab12ㄹㅏ", min_size=1, max_size=40),
    st.text(alphabet="가나다 이유", min_size=1, max_size=40),
)
def test_ordinary_parts_are_never_refused(sentence, reason):
    assume(sentence == sentence.strip() and reason == reason.strip())
    text = write_answer(sentence, f"{reason}.")
    assert format_problem(text) is None
    assert contest_split(text)[1] == f"{reason}."
    assert exact_match(text, text) == 1.0


@pytest.mark.parametrize(
    ("sentences", "reason"), [((), "이유다."), ("가.", ""), ("", "이유다."), ('가"가 옳다. 나', "이유다.")]
)
def test_writer_refuses_what_it_could_not_read_back(sentences, reason):
    with pytest.raises(ValueError, match="reads back"):
        write_answer(sentences, reason)


def test_a_megabyte_is_parsed():
    for text in ('"' + "가" * 1_000_000 + '"가 옳다. 이유.', '"' * 100_000, "가 옳다" * 100_000, "<think>" * 100_000):
        parse_answer(text)
        format_problem(text)
        contest_split(text)
