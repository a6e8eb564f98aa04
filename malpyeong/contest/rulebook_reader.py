"""The reference document (docx, PDF or text), read into the rules of a rule book.

Its sections are headed ``<범주 - 규범 제N항>``. A section is taken over to the letter, its examples included, in
``text``: where they begin is not marked in the document.
"""

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from malpyeong.contest.nfd import compose
from malpyeong.contest.rulebook import BROKEN, Rule
from malpyeong.errors import InputError, counted, needs, printable
from malpyeong.files import read_bytes, read_text

_UNREADABLE = re.compile("[\0\ud800-\udfff\ufffd\ue000-\uf8ff]")  # PUA: how PDFs made by old HWP carry old letters

# Headings. A PDF dump breaks them anywhere, so white space is allowed wherever a line may end.
_OPEN, _CLOSE, _DASH = "<‹〈＜", ">›〉＞", "-–—‐‑−―"
_HEADING = re.compile(rf"[{_OPEN}](?P<category>[^{_OPEN}{_CLOSE}]+?)[{_DASH}](?P<rest>[^{_OPEN}{_CLOSE}]+)[{_CLOSE}]")
_NUMBERED = re.compile(
    r"(?P<norm>.*?)(?P<article>(?:제\s*\d[\d\s]*(?:의[\d\s]+)?[부장절관조항호목]\s*)+(?:표\s*\d+)?)(?P<title>.*)"
)
_UNNUMBERED = re.compile(r"(?P<norm>.*?)(?P<article>규\s*정|총\s*칙|부\s*칙|표\s*\d+)(?P<title>)")
_HEADING_LEFT = re.compile(rf"^\s*[{_OPEN}][^{_CLOSE}]*\s[{_DASH}]\s|제\s*\d+\s*항\s*[{_CLOSE}]")
_MAX_HEADING_LINES, _MAX_HEADING_CHARS = 5, 100
# What follows a reference to a section within a sentence, and no heading.
_REFERENCE = re.compile(r"\s*(?:참조|참고)|[)\]」』,.]|(?:에서?는?|의|을|를|은|는|이|가|과|와|도|으로)(?=[\s,.])")
# Dumps of PDFs that keep the space between two words have it at line ends too (contest's document: 1,515 of 1,719).
_ENDS_WITH_SPACE = 0.5
# How broken headings are spelled where the document never has them on one line.
_SPELLINGS = (
    "한글 맞춤법",
    "표준어 규정",
    "표준 발음법",
    "외래어 표기법",
    "문장 부호",
    "국어의 로마자 표기법",
    "외래어 표기",
    "한글 맞춤법·표준어 규정",
)

_PAGE_NUMBER = re.compile(rf"\s*[{_DASH}]?\s*(\d{{1,4}})\s*[{_DASH}]?\s*")


class _Line(NamedTuple):
    place: str
    text: str


class _Heading(NamedTuple):
    first: int  # position of its first line
    end: int  # position after its last line
    category: str
    norm: str
    article: str
    title: str


def build_rule_book(path: Path) -> tuple[list[Rule], list[str]]:
    """Read the sections of a reference document (docx, PDF or text, told apart by content).

    Returns:
        The rules in the document's order, and a line for everything that could not be placed or was decided:
        text before the first heading, suspicious and empty headings, ids that several sections share, page headers
        that were dropped, characters that cannot be read.

    Raises:
        InputError: the file cannot be read, no section is found, or fewer than there are other places that look like
            headings.
    """
    pages, paragraphs = _read_document(path)
    composed = [[(line, *compose(line.text)) for line in page] for page in pages]
    pages = [[line._replace(text=text) for line, text, _ in page] for page in composed]
    lines, notes = _without_page_furniture(pages)
    if in_pieces := sum(count for page in composed for *_, count in page):
        notes.append(f"{counted(in_pieces, 'syllable')} in pieces (NFD, from macOS) were put together")
    lines = _split_at_headings(lines)
    headings = _find_headings(lines)
    if not headings:
        raise InputError(f"{path}: no heading like <띄어쓰기 - 한글 맞춤법 제41항> was found; is this the document?")
    before = [line for line in lines[: headings[0].first] if line.text.strip()]
    if before:
        characters = sum(len(line.text.strip()) for line in before)
        notes.append(
            f"{before[0].place} to {before[-1].place}: {characters} characters before the first heading are left out "
            f'("{printable(before[0].text.strip(), 30)}")'
        )
    spelling = _Spelling(headings)
    rules: list[tuple[_Line, Rule]] = []
    ends = [heading.first for heading in headings[1:]] + [len(lines)]
    bodies = [lines[heading.end : end] for heading, end in zip(headings, ends, strict=True)]
    left = [(line, len(_HEADING_LEFT.findall(line.text))) for body in bodies for line in body]
    left = [(line, count) for line, count in left if count]
    more = sum(count for _, count in left)
    if more > len(headings):
        raise InputError(
            f"{path}: {len(headings)} sections were found, but {more} other places look like headings, the first at "
            f'{left[0][0].place}: "{printable(left[0][0].text.strip(), 60)}"; write each as <띄어쓰기 - 한글 맞춤법 '
            "제41항> on a line of its own, or use the document as docx or PDF"
        )
    notes += [
        f'{line.place}: looks like a heading but is read as text: "{printable(line.text.strip(), 60)}"'
        for line, _ in left
    ]
    words_are_cut = not paragraphs and _line_ends_tell_words(bodies)
    for heading, body in zip(headings, bodies, strict=True):
        place = lines[heading.first]
        text = _text_of(body, words_are_cut)
        category = spelling(heading.category)
        id_ = f"{spelling(heading.norm) or category} {_article(heading.article)}".strip()
        if not text:
            notes.append(f"{place.place}: {id_} has no text and is left out")
            continue
        unreadable = len(_UNREADABLE.findall(text))
        if unreadable:
            notes.append(f"{place.place}: {id_} has {unreadable} characters that cannot be read (�, private use)")
        rules.append((place, Rule(id_, category, BROKEN.sub("�", text), heading.title)))
    if not rules:
        raise InputError(f"{path}: none of the {len(headings)} sections has any text")
    return _with_unique_ids(rules, notes), notes


def _line_ends_tell_words(bodies: Iterable[Sequence[_Line]]) -> bool:
    """Tell whether a space stands at the end of most lines, so that one without it ends within a word."""
    spaced = [line.text != line.text.rstrip() for body in bodies for line in body if line.text.strip()]
    return sum(spaced) >= _ENDS_WITH_SPACE * max(1, len(spaced))


def _text_of(body: Sequence[_Line], words_are_cut: bool) -> str:
    """Return the text of a section; where ``words_are_cut``, lines are joined that end in no space and no full stop."""
    text = ""
    for line in body:
        cut = words_are_cut and re.search(r"[^\s.?!]\Z", text) and line.text.strip()
        text += line.text if cut else f"\n{line.text}"
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _with_unique_ids(rules: Sequence[tuple[_Line, Rule]], notes: list[str]) -> list[Rule]:
    """Number the sections that share a heading; of sections that share the text as well, keep the first."""
    places: dict[str, list[str]] = defaultdict(list)
    kept: list[Rule] = []
    seen: dict[Rule, str] = {}
    for line, rule in rules:
        if rule in seen:
            notes.append(f"{line.place}: {rule.id} stands at {seen[rule]} already, word for word, and is left out")
            continue
        seen[rule] = line.place
        places[rule.id].append(line.place)
        kept.append(rule)
    for id_, shared in places.items():
        if len(shared) > 1:
            notes.append(f"{len(shared)} sections are headed {id_}; their ids end in (1) to ({len(shared)})")
    numbers: Counter[str] = Counter()
    unique = []
    for rule in kept:
        numbers[rule.id] += 1
        unique.append(replace(rule, id=f"{rule.id} ({numbers[rule.id]})") if len(places[rule.id]) > 1 else rule)
    return unique


def _split_at_headings(lines: Sequence[_Line]) -> list[_Line]:
    """Put every heading that names an article on lines of its own.

    In the dumps that some participants have, headings stand in the middle of a line. ``…제41항>에 따라`` and
    ``…제41항> 참조`` are references and stay.
    """
    text = "\n".join(line.text for line in lines)
    cuts: list[int] = []
    for heading in _HEADING.finditer(text):
        short = len(heading[0]) <= _MAX_HEADING_CHARS and heading[0].count("\n") < _MAX_HEADING_LINES
        if short and not re.search(r"\n\s*\n", heading[0]) and not _REFERENCE.match(text, heading.end()):
            names = _heading_names(" ".join(heading[0].split()))
            cuts += heading.span() if names and names[2] else ()
    split: list[_Line] = []
    start = 0
    for line in lines:
        end = start + len(line.text)
        bounds = [0, *(cut - start for cut in cuts if start < cut < end), len(line.text)]
        pieces = [line.text[first:last] for first, last in itertools.pairwise(bounds)]
        split += [_Line(line.place, piece) for piece in pieces if piece.strip() or len(pieces) == 1]
        start = end + 1
    return split


def _find_headings(lines: Sequence[_Line]) -> list[_Heading]:
    """Return every heading that begins and ends with a line.

    A heading names an article; one that does not (``<외래어 표기법 - 일러두기>``) counts if its category is that of
    a heading that does. So ``〈한국의 미 - 백자〉`` in an example stays text.
    """
    headings = []
    position = 0
    while position < len(lines):
        heading = _heading_at(lines, position)
        if heading:
            headings.append(heading)
        position = heading.end if heading else position + 1
    categories = {_squeezed(heading.category) for heading in headings if heading.article}
    return [heading for heading in headings if heading.article or _squeezed(heading.category) in categories]


def _heading_at(lines: Sequence[_Line], first: int) -> _Heading | None:
    text = ""
    for end in range(first + 1, min(first + _MAX_HEADING_LINES, len(lines)) + 1):
        line = lines[end - 1].text.strip()
        if not line or (line[0] in _OPEN) != (end == first + 1):  # only its first line opens a bracket
            return None
        text = f"{text} {line}".strip()
        if len(text) > _MAX_HEADING_CHARS:
            return None
        if line[-1] in _CLOSE:
            break
    names = _heading_names(text)
    return _Heading(first, end, *names) if names else None


def _heading_names(text: str) -> tuple[str, str, str, str] | None:
    """Return category, norm, article and title of a heading that is written on one line; None if it is none."""
    whole = _HEADING.fullmatch(text)
    if whole is None:
        return None
    category, rest = whole["category"].strip(), whole["rest"].strip()
    parts = _NUMBERED.fullmatch(rest) or _UNNUMBERED.fullmatch(rest)
    if parts is None:
        return category, rest, "", ""
    return category, parts["norm"].strip(), parts["article"], parts["title"].strip(" :")


class _Spelling:
    """Names as the document spells them on one line, for those that a line break has cut."""

    def __init__(self, headings: Sequence[_Heading]) -> None:
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for heading in headings:
            if heading.end == heading.first + 1:
                for name in (heading.category, heading.norm):
                    counts[_squeezed(name)][" ".join(name.split())] += 1
        self._names = {_squeezed(name): name for name in _SPELLINGS}
        self._names |= {key: spelled.most_common(1)[0][0] for key, spelled in counts.items()}

    def __call__(self, name: str) -> str:
        return self._names.get(_squeezed(name), " ".join(name.split()))


def _article(text: str) -> str:
    return re.sub(r"(?<=[부장절관조항호목])(?=[제표])|(?<=표)(?=\d)", " ", _squeezed(text))


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _without_page_furniture(pages: Sequence[Sequence[_Line]]) -> tuple[list[_Line], list[str]]:
    """Drop the page headers, footers and numbers: first or last lines that at least half of the pages share, digits
    aside. A line with a heading's bracket is none."""
    left = [list(page) for page in pages if any(line.text.strip() for line in page)]
    dropped: Counter[str] = Counter()
    for edge in (0, 0, -1, -1):  # at most two lines: a header and a number
        if len(left) < 2:
            break
        at_edge = [[place for place, line in enumerate(page) if line.text.strip()][edge] for page in left]
        masks = [re.sub(r"\d+", "#", page[place].text.strip()) for page, place in zip(left, at_edge, strict=True)]
        counts = Counter(mask for mask in masks if not any(bracket in mask for bracket in _OPEN + _CLOSE))
        for page, place, mask in zip(left, at_edge, masks, strict=True):
            if counts[mask] >= max(2, len(left) / 2):
                del page[place]
                dropped[mask] += 1
        left = [page for page in left if any(line.text.strip() for line in page)]
    notes = [f'"{printable(mask, 40)}" on {count} pages is dropped as page header' for mask, count in dropped.items()]
    return [line for page in left for line in page], notes


def _read_document(path: Path) -> tuple[list[list[_Line]], bool]:
    """Return the pages' lines, and whether each line is a whole paragraph."""
    data = read_bytes(path, "a reference document")
    if data.startswith(b"%PDF"):
        return _read_pdf(path), False
    if data.startswith(b"PK\x03\x04"):
        return [_read_docx(path)], True
    if data.startswith(b"\xd0\xcf\x11\xe0"):
        raise InputError(f"{path}: is an old doc or hwp file; save it as docx, PDF or text")
    return _read_plain(read_text(path, "a reference document")), False


def _read_pdf(path: Path) -> list[list[_Line]]:
    needs("pypdf", "rules")
    from pypdf import PdfReader

    try:
        texts = [page.extract_text() for page in PdfReader(path).pages]
    except Exception as error:  # a damaged file may break pypdf anywhere
        raise InputError(f"{path}: cannot be read as PDF ({error}); save it again or use docx or text") from None
    if not any(text.strip() for text in texts):
        raise InputError(f"{path}: the PDF holds no text (scanned pages?); use docx or text")
    return [
        [_Line(f"page {page}, line {number}", line) for number, line in enumerate(text.splitlines(), 1)]
        for page, text in enumerate(texts, 1)
    ]


def _read_docx(path: Path) -> list[_Line]:
    needs("docx", "rules")
    import docx
    from docx.table import Table

    def blocks(container: Any) -> Iterator[tuple[str, str]]:  # noqa: ANN401 -- python-docx's document or cell
        for number, block in enumerate(container.iter_inner_content(), 1):
            if isinstance(block, Table):
                for row in block.rows:
                    cells = {id(cell._tc): cell.text.replace("\n", " ") for cell in row.cells}  # merged: several times
                    yield f"block {number}", "\t".join(cells.values())
            else:
                yield f"block {number}", block.text

    try:
        return [_Line(place, line) for place, text in blocks(docx.Document(str(path))) for line in text.split("\n")]
    except Exception as error:  # a damaged file, or a zip of another kind, may break python-docx anywhere
        raise InputError(f"{path}: cannot be read as docx ({error}); save it again or use PDF or text") from None


def _read_plain(text: str) -> list[list[_Line]]:
    """Cut text into pages at form feeds or, if there are none, after page numbers that count up from line to line."""
    pages: list[list[_Line]] = [[]]
    for number, line in enumerate(text.split("\n"), 1):
        first, *others = line.split("\f")
        pages[-1].append(_Line(f"line {number}", first))
        pages += [[_Line(f"line {number}", other)] for other in others]
    if len(pages) > 1:
        return pages
    (lines,) = pages
    numbers = [
        (place, int(match[1])) for place, line in enumerate(lines) if (match := _PAGE_NUMBER.fullmatch(line.text))
    ]
    if len(numbers) < 3 or any(number != numbers[0][1] + step for step, (_, number) in enumerate(numbers)):
        return pages
    breaks = [place + 1 for place, _ in numbers]
    return [lines[start:end] for start, end in zip([0, *breaks], [*breaks, len(lines)], strict=True)]
