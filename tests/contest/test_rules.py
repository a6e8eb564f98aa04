"""The reference document in its three forms, and the rule book's checks. Every text here is invented."""

import json
import random
import re
import unicodedata

import docx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from malpyeong.contest.rulebook import Rule, load_rule_book, write_rule_book
from malpyeong.contest.rulebook_reader import build_rule_book
from malpyeong.errors import InputError
from malpyeong.samples import DATA

SECTIONS = {  # category → (norm, how many): 115 sections with the distribution of the contest's document
    "한글 맞춤법·표준어 규정": (("한글 맞춤법", 45), ("표준어 규정", 20)),
    "외래어 표기법": (("외래어 표기법", 23),),
    "문장 부호": (("", 17),),
    "띄어쓰기": (("한글 맞춤법", 10),),
}


def invented_sections():
    """(heading, text) of 115 sections; article numbers of two norms and of two chapters coincide."""
    rng = random.Random(0)
    words = [
        "낱말",
        "소리",
        "모음",
        "받침",
        "어간",
        "어미",
        "조사",
        "명사",
        "적는다",
        "붙인다",
        "따른다",
        "갈래",
        "다만",
    ]
    sections = []
    for category, norms in SECTIONS.items():
        for norm, count in norms:
            for number in range(1, count + 1):
                if not norm:
                    name = "규정"
                elif norm == "외래어 표기법":
                    name = f"{norm} 제{1 + number // 12}장 제{1 + number % 12}항"
                else:
                    name = f"{norm} 제{number + (50 if category == '띄어쓰기' else 0)}항"
                lines = [" ".join(rng.choices(words, k=rng.randint(4, 12))) + "." for _ in range(rng.randint(1, 6))]
                sections.append((f"<{category} - {name}>", "\n".join([*lines, f"(보기) 가나 {number}, 다라 {number}"])))
    return sections


def expected_ids():
    ids = []
    for heading, _ in invented_sections():
        _, name = heading.strip("<>").split(" - ")
        ids.append(f"문장 부호 규정 ({1 + sum('문장 부호' in id_ for id_ in ids)})" if name == "규정" else name)
    return ids


def check(rules):
    assert [rule.id for rule in rules] == expected_ids()
    assert len({rule.id for rule in rules}) == len(rules) == 115
    assert [rule.text for rule in rules] == [text for _, text in invented_sections()]
    assert [rule.category for rule in rules] == [heading[1:].split(" - ")[0] for heading, _ in invented_sections()]


def test_text(tmp_path, run_module):
    source = tmp_path / "국어 지식.txt"
    body = "\n\n".join(f"{heading}\n{text}" for heading, text in invented_sections())
    source.write_text("국어 지식 자료\n일러두기 없음\n\n" + body, encoding="utf-8-sig")
    result = run_module("-m", "malpyeong.rules", "build", source, "-o", tmp_path / "새 폴더/rules.json")
    assert result.returncode == 0, result.stderr
    check(load_rule_book(tmp_path / "새 폴더/rules.json"))
    assert "line 1 to line 2: 15 characters before the first heading are left out" in result.stderr
    assert "17 sections are headed 문장 부호 규정; their ids end in (1) to (17)" in result.stderr
    assert "115 rules" in result.stdout
    assert "띄어쓰기: 10" in result.stdout


def test_docx(tmp_path):
    document = docx.Document()
    document.add_paragraph("국어 지식 자료")
    for place, (heading, text) in enumerate(invented_sections()):
        document.add_paragraph(heading)
        *lines, example = text.split("\n")
        for line in lines:
            document.add_paragraph(line)
        if place % 2:
            document.add_table(1, 1).cell(0, 0).text = example
        else:
            document.add_paragraph(example)
    document.save(str(tmp_path / "rules.docx"))
    rules, notes = build_rule_book(tmp_path / "rules.docx")
    check(rules)
    assert any(note.startswith("block 1 to block 1: 8 characters before") for note in notes)


def test_docx_table_of_merged_cells(tmp_path):
    document = docx.Document()
    document.add_paragraph("<띄어쓰기 - 한글 맞춤법 제1항>")
    table = document.add_table(2, 2)
    table.cell(0, 0).merge(table.cell(0, 1)).text = "온 줄"
    table.cell(1, 0).text, table.cell(1, 1).text = "옳음", "그름"
    document.save(str(tmp_path / "rules.docx"))
    assert build_rule_book(tmp_path / "rules.docx")[0][0].text == "온 줄\n옳음\t그름"


def test_pdf(tmp_path):
    """Headings broken at random, one of them over a page; every page with a header and a number."""
    canvas_module = pytest.importorskip("reportlab.pdfgen.canvas", reason="reportlab writes the test's PDF")
    from reportlab.pdfbase import pdfmetrics
    from reportlab.pdfbase.cidfonts import UnicodeCIDFont

    pdfmetrics.registerFont(UnicodeCIDFont("HYSMyeongJo-Medium"))
    rng = random.Random(3)
    lines = []
    for heading, text in invented_sections():
        cut = rng.randrange(2, len(heading) - 1)
        lines += [heading[:cut], heading[cut:]] if rng.random() < 0.6 else [heading]
        lines += text.split("\n")
    pages = [[]]
    for line in lines:  # a page ends, where it can, in the middle of a heading
        if len(pages[-1]) == 44 or (len(pages[-1]) > 30 and pages[-1][-1].startswith("<") and ">" not in pages[-1][-1]):
            pages.append([])
        pages[-1].append(line)
    assert any(page[-1].startswith("<") and ">" not in page[-1] for page in pages), "no heading is broken over a page"
    canvas = canvas_module.Canvas(str(tmp_path / "rules.pdf"))
    for number, page in enumerate(pages, 1):
        canvas.setFont("HYSMyeongJo-Medium", 10)
        for row, line in enumerate(["국어 지식 자료", *page, f"- {number} -"]):
            canvas.drawString(60, 800 - 17 * row, line)
        canvas.showPage()
    canvas.save()
    rules, notes = build_rule_book(tmp_path / "rules.pdf")
    check(rules)
    assert f'"국어 지식 자료" on {len(pages)} pages is dropped as page header' in notes
    assert f'"- # -" on {len(pages)} pages is dropped as page header' in notes


BODIES = ["적는다.", "붙인다.", "띄운다.", "따른다.", "밝힌다."]


@pytest.mark.parametrize("number", ["{}", "- {} -"])
def test_dump_with_page_numbers_but_no_form_feeds(tmp_path, number):
    pages = [f"머리말\n<띄어쓰기 - 한글 맞춤법 제{page}항>\n{BODIES[page]}\n{number.format(page)}" for page in range(5)]
    text = "\n".join(pages)
    (tmp_path / "dump.txt").write_text(text, encoding="utf-8")
    rules, _ = build_rule_book(tmp_path / "dump.txt")
    assert [rule.text for rule in rules] == BODIES


def test_form_feeds_and_numbers_in_the_text(tmp_path):
    pages = [f"<띄어쓰기 - 한글 맞춤법 제{page}항>\n1\n2\n{BODIES[page]}\n쪽 {page}/5" for page in range(5)]
    (tmp_path / "dump.txt").write_text("\n\f".join(pages), encoding="utf-8")
    rules, notes = build_rule_book(tmp_path / "dump.txt")
    assert [rule.text for rule in rules] == [f"1\n2\n{body}" for body in BODIES]
    assert notes == ['"쪽 #/#" on 5 pages is dropped as page header']


@given(data=st.data())
def test_headings_broken_anywhere(tmp_path_factory, data):
    sections = invented_sections()
    chosen = data.draw(st.lists(st.sampled_from(range(len(sections))), min_size=2, max_size=6, unique=True))
    lines = []
    for place in sorted(chosen):
        heading, text = sections[place]
        cuts = sorted(data.draw(st.sets(st.integers(2, len(heading) - 2), max_size=3)))
        pieces = [heading[a:b].strip() for a, b in zip([0, *cuts], [*cuts, None], strict=True)]
        lines += [piece for piece in pieces if piece] + text.split("\n")
    path = tmp_path_factory.mktemp("broken") / "dump.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    rules, _ = build_rule_book(path)
    assert [rule.text for rule in rules] == [sections[place][1] for place in sorted(chosen)]
    expected = [expected_ids()[place] for place in sorted(chosen)]
    assert [re.sub(r" \(\d+\)$", "", rule.id) for rule in rules] == [re.sub(r" \(\d+\)$", "", id_) for id_ in expected]


def build(tmp_path, text):
    path = tmp_path / "document.txt"
    path.write_text(text, encoding="utf-8")
    return build_rule_book(path)


def test_shared_headings_are_numbered_and_repeated_sections_kept_once(tmp_path):
    rules, notes = build(
        tmp_path,
        "<띄어쓰기 - 한글 맞춤법 제2항>\n하나.\n‹띄어쓰기 – 한글 맞춤법 제 2 항›\n둘.\n"
        "<띄어쓰기 - 한글 맞춤법 제2항>\n하나.",
    )
    assert [(rule.id, rule.text) for rule in rules] == [
        ("한글 맞춤법 제2항 (1)", "하나."),
        ("한글 맞춤법 제2항 (2)", "둘."),
    ]
    assert notes == [
        "line 5: 한글 맞춤법 제2항 stands at line 1 already, word for word, and is left out",
        "2 sections are headed 한글 맞춤법 제2항; their ids end in (1) to (2)",
    ]


def test_what_only_looks_like_a_heading_stays_text_and_is_reported(tmp_path):
    rules, notes = build(
        tmp_path,
        "<띄어쓰기 - 한글 맞춤법 제1항>\n〈한국의 미 - 백자〉\n<보기>\n앞말 <띄어쓰기 - 한글 맞춤법 제3항>에 따라\n"
        "<띄어쓰기 - 한글 맞춤법 제4항\n\n끝.\n"
        "<띄어쓰기 - 일러두기>\n본문.\n<띄어쓰기 - 한글 맞춤법 제5항>",
    )
    assert [rule.id for rule in rules] == ["한글 맞춤법 제1항", "일러두기"]
    assert rules[0].text.startswith("〈한국의 미 - 백자〉\n<보기>\n앞말 <띄어쓰기")
    reported = [note.split(":")[0] for note in notes]
    assert reported == ["line 2", "line 4", "line 5", "line 10"]
    assert "has no text" in notes[-1]


def test_headings_in_the_middle_of_a_line(tmp_path):
    rules, notes = build(
        tmp_path,
        "<띄어쓰기 - 한글 맞춤법 제2항> 첫 문장. 앞 문장. ‹띄어쓰기 - 한글 맞춤법 제41항> 뒤 문장.\n"
        "다음 문장 <띄어쓰기 - 한글\n맞춤법 제42항>의존 명사(<띄어쓰기 - 한글 맞춤법 제2항> 참조).\n"
        "<문장 부호 - 규정> 가나다〈한국의 미 - 백자〉 라마바",
    )
    assert [(rule.id, rule.text) for rule in rules] == [
        ("한글 맞춤법 제2항", "첫 문장. 앞 문장."),
        ("한글 맞춤법 제41항", "뒤 문장.\n다음 문장"),
        ("한글 맞춤법 제42항", "의존 명사(<띄어쓰기 - 한글 맞춤법 제2항> 참조)."),
        ("문장 부호 규정", "가나다〈한국의 미 - 백자〉 라마바"),
    ]
    assert [note.split(":")[0] for note in notes] == ["line 3"]


def test_a_document_of_one_line(tmp_path):
    rules, _ = build(tmp_path, " ".join(f"{heading} {' '.join(text.split())}" for heading, text in invented_sections()))
    assert [rule.id for rule in rules] == expected_ids()
    assert [rule.text for rule in rules] == [" ".join(text.split()) for _, text in invented_sections()]


def test_more_headings_left_than_sections_found(tmp_path, run_module):
    path = tmp_path / "document.txt"
    path.write_text(
        "<띄어쓰기 - 한글 맞춤법 제1항>\n가.\n" + "띄어쓰기 한글 맞춤법 제2항> 나. 한글 맞춤법 제3항> 다.\n", "utf-8"
    )
    result = run_module("-m", "malpyeong.rules", "build", path, "-o", tmp_path / "rules.json")
    assert result.returncode == 2
    assert "1 sections were found, but 2 other places" in result.stderr
    assert "line 3" in result.stderr
    assert not (tmp_path / "rules.json").exists()


def test_words_that_a_line_end_cuts_are_joined_where_line_ends_tell(tmp_path):
    heading = "<띄어쓰기 - 한글 맞춤법 제1항> \n"
    cut = "비가 올 듯하여 먼 길에 우\n산을 샀다. \n한 줄은 여기서 \n끝난다.\n다음 줄이다. "
    (rule,), _ = build(tmp_path, heading + cut)
    assert rule.text == "비가 올 듯하여 먼 길에 우산을 샀다.\n한 줄은 여기서\n끝난다.\n다음 줄이다."
    (rule,), _ = build(tmp_path, heading + cut.replace(" \n", "\n"))  # no evidence: every line end is a line end
    assert rule.text == "비가 올 듯하여 먼 길에 우\n산을 샀다.\n한 줄은 여기서\n끝난다.\n다음 줄이다."


@pytest.mark.parametrize(
    ("heading", "id_", "title"),
    [
        ("<외래어 표기법 - 제3장 제1절 제2항>", "외래어 표기법 제3장 제1절 제2항", ""),
        ("<외래어 표기법 - 외래어 표기법 제2장 표 1>", "외래어 표기법 제2장 표 1", ""),
        ("<표준어 - 표준어 규정 제3항>", "표준어 규정 제3항", ""),
        ("<표준어 - 표준어 규정 총칙>", "표준어 규정 총칙", ""),
        ("＜문장 부호 ― 문장 부호 제4항 쉼표＞", "문장 부호 제4항", "쉼표"),
        ("<맞춤법 - 한글 맞춤\n법 제1\n9항>", "한글 맞춤법 제19항", ""),
        ("<맞춤법\n-\n한글\n맞춤법 제19항>", "한글 맞춤법 제19항", ""),
    ],
)
def test_headings(tmp_path, heading, id_, title):
    rules, notes = build(tmp_path, f"{heading}\n본문이다.")
    assert (rules[0].id, rules[0].title, notes) == (id_, title, [])


def test_broken_name_is_spelled_as_elsewhere_in_the_document(tmp_path):
    rules, _ = build(tmp_path, "<새 갈래 - 새 규범 모음 제1항>\n가.\n<새 갈\n래 - 새 규\n범 모음 제2항>\n나.")
    assert [(rule.category, rule.id) for rule in rules] == [("새 갈래", f"새 규범 모음 제{n}항") for n in (1, 2)]


def test_characters_that_cannot_be_read_are_reported(tmp_path):
    _, notes = build(tmp_path, "<띄어쓰기 - 한글 맞춤법 제1항>\n옛말 \ue123\ufffd이다.")
    assert notes == ["line 1: 한글 맞춤법 제1항 has 2 characters that cannot be read (�, private use)"]


def test_a_document_in_pieces_is_put_together(tmp_path):
    document = "<띄어쓰기 - 한글 맞춤법 제1항>\n'ㄹ'과 ᄒᆞᆫ글이다."
    rules, notes = build(tmp_path, unicodedata.normalize("NFD", document))
    assert (rules, notes) == (
        build(tmp_path, document)[0],
        ["15 syllables in pieces (NFD, from macOS) were put together"],
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        ("그냥 글이다.".encode(), "no heading like"),
        ("띄어쓰기".encode("cp949"), "not UTF-8"),
        ("<띄어쓰기 - 한글 맞춤법 제1항>".encode(), "none of the 1 sections has any text"),
        (b"%PDF-1.7\nrubbish", "cannot be read as PDF"),
        (b"PK\x03\x04rubbish", "cannot be read as docx"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "old doc or hwp"),
    ],
)
def test_defective_documents_are_one_line(tmp_path, run_module, content, message):
    (tmp_path / "문서").write_bytes(content)
    result = run_module("-m", "malpyeong.rules", "build", tmp_path / "문서", "-o", tmp_path / "rules.json")
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "rules.json").exists()


def test_the_document_is_not_overwritten(tmp_path, run_module):
    path = tmp_path / "document.txt"
    path.write_text("<띄어쓰기 - 한글 맞춤법 제1항>\n가.", encoding="utf-8")
    assert run_module("-m", "malpyeong.rules", "build", path, "-o", path).returncode == 2
    assert path.read_text("utf-8").startswith("<")


def test_the_sample_rule_book_loads_and_is_written_back_as_it_was(tmp_path):
    rules = load_rule_book(DATA / "rules.json")
    write_rule_book(tmp_path / "rules.json", rules)
    assert (tmp_path / "rules.json").read_bytes() == (DATA / "rules.json").read_bytes()
    assert rules[0].full_text.startswith("단어별 띄어쓰기\n문장 안에서는")
    assert rules[0].full_text.endswith("무엇을 할 지(×)")


GOOD = {"id": "가 제1항", "category": "가", "text": "나"}


@pytest.mark.parametrize(
    ("book", "message"),
    [
        ({}, "expected a rule book"),
        ([], "expected a rule book"),
        (["가"], "rule 1: is not an object"),
        ([GOOD, GOOD], 'rule 2: id "가 제1항" is already used by rule 1'),
        ([{**GOOD, "example": []}], 'unknown key "example"'),
        ([{**GOOD, "examples": "가"}], "examples is not a list of strings"),
        ([{**GOOD, "text": " "}], '"text" is empty'),
        ([{**GOOD, "text": 3}], '"text" is not a string'),
        ([{"id": "가", "text": "나"}], '"category" is missing'),
        ([{**GOOD, "title": "\ud800"}], "surrogate"),
        ([{**GOOD, "text": unicodedata.normalize("NFD", "나눈다")}], 'rule 1: "text" is in decomposed form'),
    ],
)
def test_defective_rule_books(tmp_path, book, message):
    path = tmp_path / "rules.json"
    path.write_text(json.dumps(book), encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(message)):
        load_rule_book(path)


def test_title_and_examples_may_be_left_out(tmp_path):
    (tmp_path / "rules.json").write_text(json.dumps([GOOD]), encoding="utf-8")
    assert load_rule_book(tmp_path / "rules.json") == [Rule("가 제1항", "가", "나")]
