"""The contest's records: load them from JSON or JSONL, check every field, write them back.

A file is a UTF-8 JSON list, or one JSON object a line, of
``{"id": str, "input": {"question_type": str, "question": str}, "output": {"answer": str}}``; the test split
has no ``output``. Text is never normalised: what comes in goes out, character by character.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from malpyeong.contest.nfd import check_composed
from malpyeong.errors import InputError, printable
from malpyeong.files import read_text, write_text

QUESTION_TYPES = ("선택형", "교정형")
_OF_OTHER_TASKS = ("선다형", "단답형", "서술형")  # malpyeong.tasks reads those
MAX_TEXT_CHARS = 1_000_000

_BROKEN = re.compile("[\0\ud800-\udfff]")

Value = TypeVar("Value")
Answers = Literal["gold", "prediction", "none"]


@dataclass(frozen=True, slots=True)
class Record:
    """One question, with its answer where there is one.

    Attributes:
        id: unique within a file.
        question_type: ``선택형`` (choose) or ``교정형`` (correct).
        question: the question as shown to participants.
        answer: gold or predicted answer, or None in a test file.
        raw: the JSON object that the record was read from; fields that this project does not know are kept
            in it and written back.
    """

    id: str
    question_type: str
    question: str
    answer: str | None = None
    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def with_answer(self, answer: str) -> "Record":
        """Return a copy with another answer."""
        return replace(self, answer=answer)

    def to_json(self) -> dict[str, Any]:
        """Return the contest's JSON object for this record."""
        body = {
            **self.raw,
            "id": self.id,
            "input": {
                **self.raw.get("input", {}),
                "question_type": self.question_type,
                "question": self.question,
            },
        }
        body.pop("output", None)
        if self.answer is not None:
            old = self.raw.get("output")
            body["output"] = {**(old if isinstance(old, dict) else {}), "answer": self.answer}
        return body


def load_records(
    path: str | Path, answers: Answers = "none", read: Callable[[str, Any, Answers], Record] | None = None
) -> list[Record]:
    """Read and check a contest file.

    Args:
        path: a JSON list or JSONL file (told apart by content, not by name).
        answers: ``gold`` wants a non-empty answer in every record; ``prediction`` wants an answer that may be
            empty; ``none`` takes records with or without one.
        read: :func:`record_from_json`, or what reads records of other tasks than grammar.

    Raises:
        InputError: the file cannot be read or any record is defective; names file, record and cure.
    """
    path = Path(path)
    records: list[Record] = []
    seen: dict[str, str] = {}
    for where, item in _json_objects(path, read_text(path, "a JSON list of records or JSONL")):
        record = (read or record_from_json)(f"{path}: {where}", item, answers)
        if record.id in seen:
            raise InputError(f'{path}: {where}: id "{record.id}" is already used by {seen[record.id]}; make ids unique')
        seen[record.id] = where
        records.append(record)
    return records


def write_records(path: str | Path, records: Iterable[Record]) -> None:
    """Write records as JSONL if ``path`` ends in ``.jsonl``, else as a JSON list; whole or not at all."""
    path = Path(path)
    objects = [record.to_json() for record in records]
    if path.suffix.lower() == ".jsonl":
        text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in objects)
    else:
        text = json.dumps(objects, ensure_ascii=False, indent=2) + "\n"
    write_text(path, text)


def check_same_questions(
    gold: Sequence[Record], predictions: Sequence[Record], gold_path: str | Path, path: str | Path
) -> None:
    """Make sure that two files hold the same ids in the same order, as the contest's scorer demands.

    Raises:
        InputError: names the first id that is missing, unexpected or out of place, or is a question of another task.
    """
    expected, ids = [record.id for record in gold], [record.id for record in predictions]
    if expected == ids:
        for one, other in zip(gold, predictions, strict=True):
            types = {one.question_type, other.question_type}
            if len(types) > 1 and not types <= {*QUESTION_TYPES}:
                raise InputError(
                    f'{path}: id "{one.id}" is a {other.question_type}, and in {gold_path} a {one.question_type}; '
                    "is this the prediction of another file?"
                )
        return
    missing = [id_ for id_ in expected if id_ not in set(ids)]
    unknown = [id_ for id_ in ids if id_ not in set(expected)]
    if missing:
        raise InputError(
            f'{path}: {len(missing)} of {len(expected)} records of {gold_path} are missing, first id "{missing[0]}"; '
            "predict every record"
        )
    if unknown:
        raise InputError(
            f'{path}: {len(unknown)} records are not in {gold_path}, first id "{unknown[0]}"; '
            "is this the prediction of another split?"
        )
    index = next(index for index, (a, b) in enumerate(zip(expected, ids, strict=True)) if a != b)
    raise InputError(
        f'{path}: record {index + 1} has id "{ids[index]}" where {gold_path} has "{expected[index]}"; '
        "keep the order of the question file"
    )


def parse_json(where: str, text: str) -> Any:  # noqa: ANN401 -- JSON is Any
    """Parse JSON in which no key stands twice in one object.

    Raises:
        InputError: begins with ``where`` and names the line.
    """

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        item: dict[str, Any] = {}
        for key, value in pairs:
            if key in item:
                raise InputError(f'{where}: the key "{_short(key)}" stands twice in one object; keep one of them')
            item[key] = value
        return item

    try:
        return json.loads(text, object_pairs_hook=no_duplicates)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}: not valid JSON at line {error.lineno}, column {error.colno} ({error.msg}); "
            "is the file cut off or a comma missing?"
        ) from None
    except RecursionError:
        raise InputError(f"{where}: JSON is nested too deeply to be a contest file") from None
    except ValueError as error:  # an integer of over 4,300 digits
        raise InputError(f"{where}: not valid JSON ({error})") from None


def json_lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Yield (``line N``, value) for every line of JSONL that is not blank; see :func:`parse_json`."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {number}", parse_json(f"{path}: line {number}", line)


def _json_objects(path: Path, text: str) -> list[tuple[str, Any]]:
    """Return (place, value) pairs: a JSON list's items, or one value a line."""
    if text.lstrip()[0] == "[":
        items = parse_json(f"{path}", text)
        if not items:
            raise InputError(f"{path}: holds an empty list; expected at least one record")
        return [(f"record {index}", item) for index, item in enumerate(items, 1)]
    if text.lstrip().split("\n", 1)[0].strip() == "{":  # an indented object, where JSONL has one whole object a line
        parse_json(f"{path}", text)
        raise InputError(f'{path}: the top level is one object; expected a list "[{{…}}, …]" or JSONL')
    return list(json_lines(path, text))


def text_by_id(path: Path, values: Mapping[str, Any], key: str, expected: str) -> dict[str, str]:
    """Return what a file says of each record: a text, or an object that has it under ``key``.

    Raises:
        InputError: a record has none; names its id and what is ``expected``.
    """
    texts: dict[str, str] = {}
    for id_, value in values.items():
        text = value.get(key) if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise InputError(f'{path}: id "{printable(id_, 40)}" has no {key}; expected {expected}')
        texts[id_] = text
    return texts


def record_from_json(
    where: str,
    item: Any,  # noqa: ANN401 -- JSON is Any
    answers: Answers,
    types: tuple[str, ...] = QUESTION_TYPES,
) -> Record:
    """Check one JSON object of a contest file, a question of one of some ``types``; see :func:`load_records`.

    Raises:
        InputError: begins with ``where`` and names the defect.
    """
    if not isinstance(item, dict):
        raise InputError(f'{where}: is {_kind(item)}; expected an object {{"id": …, "input": …}}')
    if "id" not in item:
        keys = ", ".join(list(item)[:5]) or "none"
        raise InputError(f'{where}: has no "id" (its keys: {keys}); is this a contest file?')
    id_ = item["id"]
    if not isinstance(id_, str):
        raise InputError(f'{where}: "id" is {_kind(id_)}; write it as a string, like "id": "{_short(id_)}"')
    if not id_.strip():
        raise InputError(f'{where}: "id" is empty; give every record an id')
    _check_text(where, "id", id_)
    where = f'{where} (id "{_short(id_)}")'
    if "input" not in item and "essay" in item:
        raise InputError(f"{where}: is an essay of another task; this is only for the task grammar")
    body = _field(where, item, "input", dict, "an object")
    question_type = _field(where, body, "question_type", str, "a string", "input.")
    check_composed(where, "input.question_type", question_type)
    if question_type not in types:
        other = " (it is of another task; this is only for grammar)" if question_type in _OF_OTHER_TASKS else ""
        raise InputError(
            f'{where}: input.question_type is "{_short(question_type)}"; expected {" or ".join(types)}{other}'
        )
    question = _field(where, body, "question", str, "a string", "input.")
    if not question.strip():
        raise InputError(f"{where}: input.question is empty; fill it in or remove the record")
    _check_text(where, "input.question", question)
    check_composed(where, "input.question", question)
    answer = _check_answer(where, item, answers)
    try:
        json.dumps(item, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except ValueError:
        raise InputError(
            f"{where}: a field holds NaN, infinity or half a surrogate pair, which JSON in UTF-8 cannot; mend it"
        ) from None
    return Record(id_, question_type, question, answer, item)


def _check_answer(where: str, item: dict[str, Any], answers: Answers) -> str | None:
    if answers == "none" and item.get("output") is None:
        return None
    output = _field(where, item, "output", dict, 'an object {"answer": …}')
    if answers == "none" and output.get("answer") is None:
        return None
    answer: str = _field(where, output, "answer", str, "a string", "output.")
    if answers == "gold" and not answer.strip():
        raise InputError(f"{where}: output.answer is empty; a gold file needs an answer in every record")
    if answers == "gold":
        check_composed(where, "output.answer", answer)
    _check_text(where, "output.answer", answer)
    return answer


def _field(where: str, item: dict[str, Any], key: str, kind: type[Value], name: str, prefix: str = "") -> Value:
    if key not in item:
        raise InputError(f'{where}: "{prefix}{key}" is missing; expected {name}')
    value = item[key]
    if not isinstance(value, kind):
        raise InputError(f'{where}: "{prefix}{key}" is {_kind(value)}; expected {name}')
    return value


def _check_text(where: str, name: str, text: str) -> None:
    if len(text) > MAX_TEXT_CHARS:
        raise InputError(
            f"{where}: {name} has {len(text):,} characters; a contest text has at most a few hundred, "
            f"the limit here is {MAX_TEXT_CHARS:,}: cut it or remove the record"
        )
    broken = _BROKEN.search(text)
    if broken:
        raise InputError(
            f"{where}: {name} holds half a surrogate pair or a NUL (\\u{ord(broken[0]):04x}) at character "
            f"{broken.start() + 1}; mend the text"
        )


def _kind(value: Any) -> str:  # noqa: ANN401 -- any JSON value
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true/false"
    if isinstance(value, int):
        return "a number"
    if isinstance(value, float):
        return "NaN or infinity" if not math.isfinite(value) else "a number"
    return "a string" if isinstance(value, str) else "a list" if isinstance(value, list) else "an object"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:40] + "…"
