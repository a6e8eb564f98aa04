"""What a model reads beside a question: a JSONL file, a line a record, that ``malpyeong.retrieval search`` makes.

A line is ``{"id": …, "question": …, "rules": [{"score": …, "rule": {…}}], "examples": [{"score": …, "record": {…}}]}``,
best first; rules as in a rule book, solved questions as in a contest file. A line belongs to the record with its id and
its question, so one file may serve several splits even where their ids coincide.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from malpyeong.contest.records import Record, json_lines, record_from_json
from malpyeong.contest.rulebook import Rule, rule_from_json
from malpyeong.errors import InputError, printable
from malpyeong.files import read_text, write_text
from malpyeong.prompts.rule_choice import is_readable

EXPECTED = "the output of python -m malpyeong.retrieval search"


@dataclass(frozen=True, slots=True)
class Context:
    """Rules and solved questions for one question, best first.

    Attributes:
        rules: of the rule book.
        examples: solved questions.
        choose: the model is asked to name one of the rules before it answers (``malpyeong.prompts.rule_choice``).
            There are no examples then: their answers name no rule.
    """

    rules: tuple[Rule, ...] = ()
    examples: tuple[Record, ...] = ()
    choose: bool = False

    def __len__(self) -> int:
        return len(self.rules) + len(self.examples)

    def without_worst(self) -> "Context":
        """Return the context less one: the lowest of the longer list, a rule where both are as long."""
        if len(self.examples) > len(self.rules):
            return replace(self, examples=self.examples[:-1])
        return replace(self, rules=self.rules[:-1])


NO_CONTEXT = Context()


def load_contexts(path: str | Path, records: Sequence[Record], choose: bool = False) -> list[Context]:
    """Read the contexts of ``records``, in their order; with ``choose`` their rules, to choose among.

    Raises:
        InputError: a line is defective, a record has no line, or a question that has an answer is among its own
            examples.
    """
    path = Path(path)
    found: dict[tuple[str, str], Context] = {}
    for place, line in json_lines(path, read_text(path, EXPECTED)):
        key, context = _context(f"{path}: {place}", line)
        if key in found:
            raise InputError(f'{path}: {place}: id "{printable(key[0], 40)}" has a line already; keep one of them')
        found[key] = context
    missing = [record.id for record in records if (record.id, record.question) not in found]
    if missing:
        raise InputError(
            f"{path}: {len(missing)} of {len(records)} questions have no line (the first: id "
            f'"{printable(missing[0], 40)}"); remove it and make it again with python -m malpyeong.retrieval search '
            "from every question file that is used"
        )
    contexts = [found[record.id, record.question] for record in records]
    for record, context in zip(records, contexts, strict=True):
        # A question without an answer may have a solved twin: nothing of its own can leak.
        if record.answer is not None and any(_same_question(record.question, one) for one in context.examples):
            raise _leak(f'{path}: id "{printable(record.id, 40)}"')
    if choose:
        for record, context in zip(records, contexts, strict=True):
            for rule in context.rules:
                if not is_readable(rule.id):
                    raise InputError(
                        f'{path}: id "{printable(record.id, 40)}": its rule "{printable(rule.id, 40)}" cannot be named '
                        "in a tag; give it an id of at most 100 characters without brackets in the rule book"
                    )
        contexts = [Context(context.rules, choose=True) for context in contexts]
    return contexts


def write_contexts(
    path: Path,
    records: Sequence[Record],
    rules: Sequence[Sequence[tuple[float, Rule]]],
    examples: Sequence[Sequence[tuple[float, Record]]],
) -> None:
    """Write a line for each record, from (score, rule) and (score, solved question) pairs; whole or not at all."""
    lines = []
    for record, its_rules, its_examples in zip(records, rules, examples, strict=True):
        line = {
            "id": record.id,
            "question": record.question,
            "rules": [{"score": score, "rule": rule.to_json()} for score, rule in its_rules],
            "examples": [{"score": score, "record": example.to_json()} for score, example in its_examples],
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))


def _context(where: str, line: Any) -> tuple[tuple[str, str], Context]:  # noqa: ANN401 -- JSON is Any
    try:
        id_, question = line["id"], line["question"]
        rules = tuple(rule_from_json(where, entry["rule"]) for entry in line["rules"])
        examples = tuple(record_from_json(where, entry["record"], "gold") for entry in line["examples"])
    except (TypeError, KeyError):
        raise InputError(f"{where}: is not a line of a context file; expected {EXPECTED}") from None
    if any(example.id == id_ and _same_question(str(question), example) for example in examples):
        raise _leak(where)
    return (str(id_), str(question)), Context(rules, examples)


def _same_question(question: str, example: Record) -> bool:
    return example.question.split() == question.split()


def _leak(where: str) -> InputError:
    return InputError(f"{where}: the question itself is among its solved examples; make the file again")
