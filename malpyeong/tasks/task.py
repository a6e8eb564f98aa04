"""Which task a record is of. It is seen from the record itself, so that no command and no recipe has to be told."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from malpyeong.contest.records import Answers, Record, load_records, record_from_json
from malpyeong.errors import InputError
from malpyeong.tasks import culture, essay, grammar

if TYPE_CHECKING:
    from malpyeong.metrics.pairs import PairScorer


class Task(Protocol):
    """What a module of this room holds.

    Attributes:
        NAME: for messages.
        TYPES: the question types that are of this task.
        REWARDS: reward name → function of completions' texts and, by name, TRL's columns; empty for those of
            ``malpyeong.training.rewards``. A name has to be in ``REWARD_MODELS`` of ``malpyeong.config.recipe`` too.
        STAND_IN: what ``score`` is where there is no final score.
    """

    NAME: str
    TYPES: tuple[str, ...]
    REWARDS: dict[str, Callable[..., list[float | None]]]
    STAND_IN: str

    def instruction(self, record: Record) -> str:
        """Return the system prompt."""

    def question(self, record: Record) -> str:
        """Return what the user asks."""

    def target(self, record: Record) -> str:
        """Return the gold answer as a model should write it."""

    def format_problem(self, question_type: str, text: str) -> object | None:
        """Return what is wrong with the form of an answer, or None."""

    def scores(
        self, golds: Sequence[Record], answers: Sequence[str], scorers: Mapping[str, "PairScorer"]
    ) -> dict[str, float]:
        """Return the contest's metrics, ``final`` where all parts of it are there, and ``score``, which decides."""


TASKS: tuple[Task, ...] = (grammar, culture, essay)


def task_of(record: Record) -> Task:
    """Return the task that a record is of."""
    return next(task for task in TASKS if record.question_type in task.TYPES)


def load(path: str | Path, answers: Answers = "none") -> list[Record]:
    """Read a file of any task, as :func:`malpyeong.contest.records.load_records` reads one of grammar.

    Raises:
        InputError: also if its records are of several tasks.
    """
    records = load_records(path, answers, _read)
    for record in records:
        if task_of(record) is not task_of(records[0]):
            raise InputError(
                f'{path}: id "{record.id}" is of the task {task_of(record).NAME}, id "{records[0].id}" of '
                f"{task_of(records[0]).NAME}; keep them in files of their own"
            )
    return records


def gold_problem(record: Record) -> object | None:
    """Return what is wrong with the form of a record's gold answer, or None."""
    task = task_of(record)
    return task.format_problem(record.question_type, task.target(record))


def grammar_only(task: Task, used: Mapping[str, object]) -> None:
    """Refuse what only grammar has: options by their names, those that are used with a true value.

    Raises:
        InputError: one is used, and the task is another.
    """
    for name, value in used.items():
        if value and task is not grammar:
            raise InputError(f"{name}: only for the task grammar, and these records are of the task {task.NAME}")


def _read(where: str, item: Any, answers: Answers) -> Record:  # noqa: ANN401 -- JSON is Any
    if isinstance(item, dict) and "essay" in item and "input" not in item:
        return essay.record_from_json(where, item, answers)
    return record_from_json(where, item, answers, grammar.TYPES + culture.TYPES)
