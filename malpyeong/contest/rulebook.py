"""A rule book: the sections of the reference document as checked JSON.

A UTF-8 JSON list of ``{"id": str, "category": str, "title": str, "text": str, "examples": [str]}`` (title and examples
may be left out). An id is norm and article (``한글 맞춤법 제41항``), because the article alone is ambiguous.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from malpyeong.contest.nfd import check_composed
from malpyeong.contest.records import parse_json
from malpyeong.errors import InputError
from malpyeong.files import read_text, write_text

EXPECTED = 'a rule book like [{"id": "한글 맞춤법 제41항", "category": …, "text": …}]'
_TEXTS = ("id", "category", "title", "text")
BROKEN = re.compile("[\0\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Rule:
    """One section of the reference document.

    Attributes:
        id: norm and article, unique within a rule book.
        category: 띄어쓰기, 문장 부호, ….
        title: what the section is about, "" if the document does not say.
        text: the section, with its examples unless they are listed apart.
        examples: examples that are listed apart.
    """

    id: str
    category: str
    text: str
    title: str = ""
    examples: tuple[str, ...] = ()

    @property
    def full_text(self) -> str:
        """Title, text and examples, one under the other: what is searched and what a model reads."""
        return "\n".join(part for part in (self.title, self.text, ", ".join(self.examples)) if part)

    def to_json(self) -> dict[str, Any]:
        """Return the rule book's JSON object for this rule."""
        values = asdict(self)
        return {key: values[key] for key in ("id", "category", "title", "text", "examples")}


def load_rule_book(path: str | Path) -> list[Rule]:
    """Read and check a rule book.

    Raises:
        InputError: the file cannot be read or a rule is defective; names file, rule and cure.
    """
    path = Path(path)
    items = parse_json(str(path), read_text(path, EXPECTED))
    if not isinstance(items, list) or not items:
        raise InputError(f"{path}: expected {EXPECTED}; make one with python -m malpyeong.rules build DOCUMENT")
    rules: list[Rule] = []
    seen: dict[str, int] = {}
    for number, item in enumerate(items, 1):
        rule = rule_from_json(f"{path}: rule {number}", item)
        if rule.id in seen:
            raise InputError(f'{path}: rule {number}: id "{rule.id}" is already used by rule {seen[rule.id]}')
        seen[rule.id] = number
        rules.append(rule)
    return rules


def rule_from_json(where: str, item: Any) -> Rule:  # noqa: ANN401 -- JSON is Any
    """Check one JSON object of a rule book.

    Raises:
        InputError: begins with ``where`` and names the defect.
    """
    if not isinstance(item, dict):
        raise InputError(f"{where}: is not an object; expected {EXPECTED}")
    unknown = [key for key in item if key not in (*_TEXTS, "examples")]
    if unknown:
        raise InputError(f'{where}: unknown key "{unknown[0]}"; known: {", ".join(_TEXTS)}, examples')
    examples = item.get("examples", [])
    if not isinstance(examples, list) or not all(isinstance(example, str) for example in examples):
        raise InputError(f"{where}: examples is not a list of strings")
    texts = {"title": "", **{key: item[key] for key in _TEXTS if key in item}}
    for key in _TEXTS:
        if key not in texts:
            raise InputError(f'{where}: "{key}" is missing; expected {EXPECTED}')
        if not isinstance(texts[key], str):
            raise InputError(f'{where}: "{key}" is not a string')
        if key != "title" and not texts[key].strip():
            raise InputError(f'{where}: "{key}" is empty')
    if any(BROKEN.search(text) for text in (*texts.values(), *examples)):
        raise InputError(f"{where}: holds half a surrogate pair or a NUL; mend the text")
    for name, text in texts.items():
        check_composed(where, f'"{name}"', text)
    return Rule(**texts, examples=tuple(examples))


def write_rule_book(path: Path, rules: Iterable[Rule]) -> None:
    """Write a rule book; whole or not at all."""
    write_text(path, json.dumps([rule.to_json() for rule in rules], ensure_ascii=False, indent=2) + "\n")
