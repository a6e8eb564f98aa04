"""The error page: causes, marked differences, and the page itself in a real browser."""

import html
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from malpyeong.contest.records import Record, load_records, write_records
from malpyeong.metrics.aggregate import score_records
from malpyeong.metrics.exact_match import exact_match
from malpyeong.report.causes import Cause, find_cause
from malpyeong.report.charts import chart, number
from malpyeong.report.error_page import error_page
from malpyeong.report.text import MAX_SHOWN_CHARS, differences, visible
from malpyeong.samples import DATA

FIX = "다음 문장에서 어문 규범에 부합하지 않는 부분을 찾아 고치고, 그 이유를 설명하세요.\n"
CHOOSE = " 가운데 올바른 것을 선택하고, 그 이유를 설명하세요."
RADIO = Record(
    "1",
    "교정형",
    f'{FIX}"동생은 라디오의 밧데리가 다 닳아 울었다."',
    '"동생은 라디오의 배터리가 다 닳아 울었다."가 옳다. 까닭.',
)
SPACE = Record("2", "교정형", f'{FIX}"벌써 열시가 넘었다."', '"벌써 열 시가 넘었다."가 옳다. 까닭.')
MARK = Record("3", "교정형", f"{FIX}― 여러분( ) 이제 가자.", '"여러분, 이제 가자."가 옳다. 까닭.')
PICK = Record(
    "4", "선택형", f'"누나는 {{며칠/몇 일}} 동안 쉬었다."{CHOOSE}', '"누나는 며칠 동안 쉬었다."가 옳다. 까닭.'
)
TWO_PICKS = Record(
    "5", "선택형", f'"봄{{이에요/이예요}} , 꽃이 {{폈다/피었다}} ."{CHOOSE}', '"봄이에요, 꽃이 피었다."가 옳다. 까닭.'
)
LINES = Record(
    "6",
    "교정형",
    '다음 중 올바른 것을 선택하고, 그 이유를 설명하세요.\n"ㅅ은 시옷이다."\n"ㅅ은 시읏이다."',
    '"ㅅ은 시옷이다."가 옳다. 까닭.',
)
BOTH = Record("7", "교정형", f'{FIX}"비가 올 듯 하다."', '"비가 올 듯하다." 혹은 "비가 올듯하다."가 옳다. 까닭.')
ALREADY = Record("8", "교정형", f'{FIX}"하늘이 맑다."', '"하늘이 맑다."가 옳다. 까닭.')
NOUN = Record("9", "교정형", f'{FIX}"가깝고 친한 사람임."', '"가깝고 친한 사람."이 옳다. 까닭.')
HASH = Record("10", "교정형", f'{FIX}"책을 일것다."', '"책을 읽었다."#"책을 읽었었다."가 옳다. 까닭.')


@pytest.mark.parametrize(
    ("record", "sentence", "cause"),
    [
        (RADIO, "동생은 라디오의 배터리가 다 닳아 울었다.", None),
        (RADIO, "동생은 라디오의 밧데리가 다 닳아 울었다.", Cause.UNCHANGED),
        (RADIO, "동생은 라디오의 밧터리가 다 닳아 울었다.", Cause.WRONG_CORRECTION),
        (RADIO, "동생은 라디오의 배터리가 다 닳아 웃었다.", Cause.ELSEWHERE),
        (RADIO, "누나는 라디오의 배터리가 다 닳아 울었다.", Cause.ELSEWHERE),
        (RADIO, "동생은 라디오의 배터리가 다 닳아 울었다", Cause.PUNCTUATION),
        (RADIO, "동생은 라디오의 배터리가 다닳아 울었다.", Cause.SPACING),
        (SPACE, "벌써 열시가 넘었다.", Cause.UNCHANGED),
        (SPACE, "벌써 열 시 가 넘었다.", Cause.SPACING),
        (SPACE, "벌써 열흘이 넘었다.", Cause.WRONG_CORRECTION),
        (MARK, "여러분! 이제 가자.", Cause.PUNCTUATION),
        (MARK, "여러분( ) 이제 가자.", Cause.UNCHANGED),
        (MARK, "여러분, 이제 갑시다.", Cause.ELSEWHERE),
        (PICK, "누나는 몇 일 동안 쉬었다.", Cause.OTHER_OPTION),
        (PICK, "누나는 몇날 동안 쉬었다.", Cause.NOT_OFFERED),
        (PICK, "누나는 며칠 동안 놀았다.", Cause.ELSEWHERE),
        (PICK, "누나는 며칠동안 쉬었다.", Cause.SPACING),
        (TWO_PICKS, "봄이예요, 꽃이 피었다.", Cause.OTHER_OPTION),
        (TWO_PICKS, "봄이에요, 꽃이 폈다.", Cause.OTHER_OPTION),
        (LINES, "ㅅ은 시읏이다.", Cause.OTHER_OPTION),
        (LINES, "ㅅ은 시웃이다.", Cause.OTHER),
        (BOTH, "비가 올 듯하다.", Cause.JOINED),
        (BOTH, '비가 올듯하다." 혹은 "비가 올 듯하다.', Cause.JOINED),
        (BOTH, '비가 올 듯하다." 또는 "비가 올듯하다.', Cause.JOINED),
        (BOTH, "비가 올 듯 하다.", Cause.UNCHANGED),
        (ALREADY, "하늘이 많다.", Cause.ELSEWHERE),
        (HASH, "책을 읽었다.", None),
        (HASH, "책을 일것다.", Cause.UNCHANGED),
    ],
)  # fmt: skip
def test_cause_in_the_sentence(record, sentence, cause):
    # Of several golds the contest compares all but the last without their verdict.
    prediction = sentence if record is HASH and cause is None else f'"{sentence}"가 옳다. 까닭.'
    assert find_cause(record, prediction) is cause


@pytest.mark.parametrize(
    ("prediction", "cause"),
    [
        ('"가깝고 친한 사람."가 옳다. 까닭.', Cause.PARTICLE),
        ('"가깝고 친한 사람."으가 옳다. 까닭.', Cause.PARTICLE),
        ('"가깝고 친한 사람." 이 옳다. 까닭.', Cause.SPACING),
        ('정답: "가깝고 친한 사람."이 옳다. 까닭.', Cause.NO_VERDICT),
        ("“가깝고 친한 사람.”이 옳다. 까닭.", Cause.NO_VERDICT),
        ("\"가깝고 친한 사람.\"이 옳다. '사람'가 옳다.", Cause.NO_VERDICT),
        ('"가깝고 친한 사람."이 맞다. 까닭.', Cause.NO_VERDICT),
        ('"가깝고 친한', Cause.NO_VERDICT),
        ("", Cause.NO_VERDICT),
    ],
)
def test_cause_beside_the_sentence(prediction, cause):
    assert find_cause(NOUN, prediction) is cause


text = st.text(st.sampled_from("가나 \"'{/}#.,옳다이\n―“”"), max_size=40)


@given(text, text.filter(str.strip), st.one_of(text, text.map('"{}"가 옳다. 까닭.'.format)))
def test_every_answer_that_loses_em_has_a_cause(question, gold, prediction):
    record = Record("1", "선택형", question, gold)
    assert (find_cause(record, prediction) is None) == bool(exact_match(prediction, gold))


def test_causes_of_the_sample_golds():
    for record in load_records(DATA / "test.json", answers="gold"):
        assert find_cause(record, record.answer) is None


@given(st.text("가나다 .", max_size=30), st.text("가나다 .", max_size=30), st.integers(1, 4))
def test_differences_give_both_texts_back(first, second, shortest):
    for whole, pieces in zip((first, second), differences(first, second, shortest), strict=True):
        assert "".join(piece.text for piece in pieces) == whole
    same = ["".join(p.text for p in pieces if not p.differs) for pieces in differences(first, second, shortest)]
    assert same[0] == same[1]
    assert (first == second) == (not any(piece.differs for piece in differences(first, second, shortest)[0]))


def test_differences_mark_a_space_and_where_it_is_missing():
    gold, prediction = differences("열 시가", "열시가")
    assert [(piece.text, piece.differs) for piece in gold] == [("열", False), (" ", True), ("시가", False)]
    assert [(piece.text, piece.differs) for piece in prediction] == [("열", False), ("", True), ("시가", False)]


@given(st.text(), st.booleans())
def test_visible_text_is_escaped_and_complete(text, spaces):
    shown = str(visible(text, spaces))
    bare = re.sub(r'<i class="space"> </i>', " ", shown)
    bare = re.sub(r'<b class="code">U\+([0-9A-F]{4,})</b>', lambda found: chr(int(found[1], 16)), bare)
    assert "<" not in bare
    assert html.unescape(bare) == text


def test_chart_leaves_out_what_is_no_number_and_keeps_its_ticks_round():
    made = chart("손실", "", {"a": ([1, 2, 3], [0.5, float("nan"), 1.5]), "b": ([2], [float("inf")])}, 0)
    assert [(line.name, line.steps) for line in made.lines] == [("a", [1, 3])]
    assert [tick.label for tick in made.y_ticks] == ["0", "0.5", "1", "1.5"]
    assert made.lines[0].path == "M0.00 66.67L100.00 0.00"
    curve = {"a": (list(range(30)), [1.0] * 30)}
    assert [bool(chart("", "", curve, average=average).lines[0].smooth) for average in (True, False)] == [True, False]
    assert chart("빈", "", {"a": ([1], [float("nan")])}) is None
    assert chart("같은 값", "", {"a": ([5], [-3.0])}).lines[0].path.startswith("M50.00 ")
    assert [number(value) for value in (None, -0.25, 1234567.0, 0.000012345)] == [
        "–",
        "−0.25",
        "1,234,567",
        "1.234e−05",
    ]


# ---- the page


def write_files(folder, pairs):
    """Write gold records and (as prediction) their answers; return both paths."""
    write_records(folder / "gold.json", [record for record, _ in pairs])
    write_records(folder / "pred.json", [record.with_answer(prediction) for record, prediction in pairs])
    return folder / "gold.json", folder / "pred.json"


def visible_ids(page):
    return page.locator("article:visible h3").all_text_contents()


@pytest.fixture
def small_page(tmp_path, run_module):
    """A page of six records with two categories, written by the command; the folder has a space and Hangul."""
    folder = tmp_path / "보고서 폴더"
    folder.mkdir()
    pairs = [
        (RADIO, RADIO.answer),
        (SPACE, '"벌써 열 시 가 넘었다."가 옳다. 까닭이다.'),
        (MARK, '"여러분! 이제 가자."가 옳다.'),
        (PICK, '"누나는 몇 일 동안 쉬었다."가 옳다. 전혀 다른 말.'),
        (NOUN, '"가깝고 친한 사람."가 옳다. 까닭.'),
        (ALREADY, "하늘이 맑다"),
    ]
    labels = {"1": "외래어 표기", "2": "띄어쓰기", "3": "문장 부호", "4": {"category": "맞춤법"}, "9": "맞춤법"}
    (folder / "labels.json").write_text(json.dumps(labels), encoding="utf-8")
    command = ("-m", "malpyeong.report", "errors", *write_files(folder, pairs), "--labels", folder / "labels.json")
    result = run_module(*command, "-o", folder / "오답.html")
    assert result.returncode == 0, result.stderr
    return folder / "오답.html"


def test_scores_and_causes_of_the_page(small_page, open_page):
    page = open_page(small_page)
    cards = page.locator(".card").all_inner_texts()
    assert any("EM" in card and "16.67" in card and "95 %" in card for card in cards)
    assert any("이유 빠짐 2문항" in card for card in cards)
    assert "부분 보고서" in page.inner_text(".notice")
    assert not any("최종" in card for card in cards)
    causes = page.locator("section", has_text="EM을 잃은 까닭").locator("tr").all_inner_texts()
    assert {row.split("\t")[0]: row.split("\t")[1] for row in causes} == {
        "판정 없음·형식": "1", "조사만 다름": "1", "다른 선택지": "1", "띄어쓰기만 다름": "1", "문장 부호만 다름": "1"
    }  # fmt: skip
    rows = page.locator("table.stacked tbody tr th").all_inner_texts()
    assert rows == ["전체", "선택형", "교정형", "범주 모름", "띄어쓰기", "맞춤법", "문장 부호", "외래어 표기"]


def test_filters_search_and_sort_change_what_is_visible(small_page, open_page):
    page = open_page(small_page)
    assert visible_ids(page) == ["1", "2", "3", "4", "9", "8"]

    def click(name):
        page.get_by_role("button", name=name).click()
        return visible_ids(page)

    assert click("EM 실패") == ["2", "3", "4", "9", "8"]
    assert page.inner_text("#count") == "5 / 6문항"
    assert click("교정형") == ["2", "3", "9", "8"]
    assert click("선택형") == ["4"]
    assert click("선택형") == ["2", "3", "4", "9", "8"]
    assert click("조사만 다름") == ["9"]
    assert page.get_by_role("button", name="조사만 다름").get_attribute("aria-pressed") == "true"
    assert click("전체") == ["1", "2", "3", "4", "9", "8"]
    assert click("형식 문제") == ["3", "8"]
    assert click("이유 빠짐") == ["3", "8"]
    click("전체")
    assert click("맞춤법") == ["4", "9"]
    click("전체")

    page.fill("#search", "벌써 열")
    page.get_by_text("1 / 6문항", exact=True).wait_for()
    assert visible_ids(page) == ["2"]
    page.fill("#search", "없는말")
    page.get_by_text("0 / 6문항", exact=True).wait_for()
    assert click("전체") == ["1", "2", "3", "4", "9", "8"]
    assert page.input_value("#search") == ""

    page.select_option("#sort", "low")
    assert visible_ids(page)[0] == "4"
    assert visible_ids(page)[-2:] == ["3", "8"]  # without a reason there is no score
    page.select_option("#sort", "")
    assert visible_ids(page) == ["1", "2", "3", "4", "9", "8"]


def test_differences_are_marked_and_not_by_colour_alone(small_page, open_page):
    page = open_page(small_page)
    record = page.locator("article", has=page.locator("h3", has_text=re.compile("^2$")))
    assert record.locator(".gold .verdict mark.gap").count() == 1
    assert record.locator(".pred .verdict mark .space").count() == 1
    record = page.locator("article", has=page.locator("h3", has_text=re.compile("^4$")))
    assert record.locator(".gold .verdict mark").all_text_contents() == ["며칠"]
    assert record.locator(".pred .verdict mark").all_text_contents() == ["몇 일"]
    styles = [
        record.locator(f".{side} .verdict mark").evaluate("mark => getComputedStyle(mark).textDecorationStyle")
        for side in ("gold", "pred")
    ]
    assert styles == ["solid", "wavy"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_scrolling_sideways_on_a_phone_and_print_hides_the_controls(small_page, open_page, scheme):
    page = open_page(small_page, width=360, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    light = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light == (scheme == "light")
    page.emulate_media(media="print")
    assert not page.locator(".controls").is_visible()
    bar = page.locator(".bar").first  # Browsers leave backgrounds out on paper.
    assert bar.evaluate("bar => getComputedStyle(bar).printColorAdjust") == "exact"
    assert len(visible_ids(page)) == 6


EVIL = [
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    '<img src=x onerror="alert(3)">',
    "</p></article></main><h1>끝</h1>",
    "{{ 7 * 7 }} {% raw %} <!-- ",
    "a\u2028b\u2029c",
    "\u202etxet\u202c \u200f\u200b\ufeff",
    "\x01\x1b[31m\x7f\x85\r\t",
    '"' * 50 + "'" * 50 + "&lt;&amp;",
    "𝒳😀\U000e0001" * 5,
    "아주" * 5_000,  # one word
]


def test_markup_and_odd_characters_in_any_text_are_shown_and_do_nothing(tmp_path, open_page):
    kinds = ("선택형", "교정형")
    pairs = [
        (
            Record(f"{n}{evil}", kinds[n % 2], f"{evil} {{{evil}/{evil}}}\n{evil}", f'"{evil}"가 옳다. {evil}'),
            prediction,
        )
        for n, evil in enumerate(EVIL)
        for prediction in (f'"{evil}{evil}"가 옳다. {evil}.',)
    ]
    scores = score_records(*map(list, zip(*pairs, strict=True)))
    categories = {record.id: EVIL[n] for n, (record, _) in enumerate(pairs)}
    names = Path('"><script>alert(4)</script>.json'), Path("<b>.json")
    page_text = error_page(scores, ("em", "rouge1"), gold=names[0], prediction=names[1], categories=categories)
    (tmp_path / "evil.html").write_text(page_text, encoding="utf-8")
    page = open_page(tmp_path / "evil.html", width=360)
    assert page.locator("article").count() == len(EVIL)
    assert page.evaluate("document.querySelectorAll('img, script, h1').length") == 2  # the page's own
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    shown = page.locator("article").nth(0).locator(".pred .text").first.text_content()
    assert "<script>alert(1)</script><script>alert(1)</script>" in shown
    assert "U+202E" in page.locator("article").nth(6).text_content()
    assert "U+001B" in page.locator("article").nth(7).text_content()
    for button in page.locator("button[data-group=category]").all():
        button.click()
        assert page.locator("article:visible").count() == 1


@pytest.mark.slow
def test_many_records_and_megabyte_answers_stay_usable(tmp_path, open_page):
    gold = load_records(DATA / "test.json", answers="gold")
    golds = [
        Record(str(n), (record := gold[n % len(gold)]).question_type, record.question, record.answer)
        for n in range(10_000)
    ]
    answers = [record.answer.replace("다", "라", 1) if n % 7 == 0 else record.answer for n, record in enumerate(golds)]
    answers[:3] = ['"가나 다라"가 옳다. ' * 50_000, "ㅋ" * 1_000_000, '"' * 1_000_000]
    page_text = error_page(score_records(golds, answers, ("em",)), ("em",), gold=Path("a"), prediction=Path("b"))
    assert len(page_text.encode()) < 25e6
    (tmp_path / "big.html").write_text(page_text, encoding="utf-8")
    page = open_page(tmp_path / "big.html")
    assert f"앞의 {MAX_SHOWN_CHARS:,}자만" in page.locator("article").nth(1).text_content()
    page.get_by_role("button", name="EM 실패").click()
    assert (
        page.inner_text("#count")
        == f"{sum(not exact_match(a, g.answer) for a, g in zip(answers, golds, strict=True)):,} / 10,000문항"
    )


def test_full_scores_are_shown_with_all_four_metrics(tmp_path, open_page):
    class Constant:
        """Stands for a network: what the page does with the numbers is what is tested."""

        def __init__(self, value):
            self.value = value

        def score(self, candidates, references):
            return [self.value] * len(candidates)

    metrics = ("em", "rouge1", "bertscore", "bleurt")
    scores = score_records([RADIO], [RADIO.answer], metrics, {"bertscore": Constant(0.8), "bleurt": Constant(0.6)})
    (tmp_path / "full.html").write_text(error_page(scores, metrics, gold=Path("a"), prediction=Path("b")), "utf-8")
    page = open_page(tmp_path / "full.html")
    cards = {card.split("\n")[0]: card.split("\n")[1] for card in page.locator(".card").all_inner_texts()}
    assert cards["최종"] == "90.00"
    assert cards["서술 평균"] == "80.00"
    assert page.locator(".notice").count() == 0


@pytest.mark.parametrize(
    ("output", "complaint"),
    [("pred.html/x.html", "cannot be written"), ("page.json", "name an .html file"), ("folder.html", "is a folder")],
)
def test_mistakes_are_one_line_and_nothing_is_written(contest_file, run_module, tmp_path, output, complaint):
    gold, prediction = contest_file("gold.json", {"1": "가"}), contest_file("pred.html", {"1": "나"})
    (tmp_path / "folder.html").mkdir()
    before = prediction.read_bytes()
    result = run_module(
        "-m", "malpyeong.report", "errors", gold, prediction, "-o", tmp_path / output, "--metrics", "em"
    )
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert complaint in result.stderr
    result = run_module("-m", "malpyeong.report", "errors", gold, prediction, "-o", prediction, "--metrics", "em")
    assert result.returncode == 2
    assert "would overwrite" in result.stderr
    assert prediction.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"gold.json", "pred.html", "folder.html"}
