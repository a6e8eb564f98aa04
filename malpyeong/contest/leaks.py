"""Data that is not what it says: held-out questions in train, a question with two answers, answers out of form.

Questions are compared without white space, whatever their ids are.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from malpyeong.contest.answer import format_problem
from malpyeong.contest.records import Record
from malpyeong.errors import printable

_IDS_SHOWN = 5


def shared_questions(records: Sequence[Record], others: Sequence[Record]) -> list[Record]:
    """Return those of ``records`` whose question is among ``others`` too."""
    questions = {_squeezed(record.question) for record in others}
    return [record for record in records if _squeezed(record.question) in questions]


def answer_problems(
    records: Sequence[Record],
    problem_of: Callable[[Record], object | None] = lambda record: format_problem(record.answer or ""),
) -> Iterator[str]:
    """Yield a line for questions with different answers, and one for answers out of form, with the first ids.

    Records without an answer are passed over. ``problem_of`` returns what is wrong with the form of one.
    """
    answers: dict[str, dict[str, Record]] = defaultdict(dict)
    for record in records:
        if record.answer is not None:
            answers[_squeezed(record.question)].setdefault(_squeezed(record.answer), record)
    twice = [list(given.values()) for given in answers.values() if len(given) > 1]
    if twice:
        shown = ids([record for records_of_one in twice for record in records_of_one])
        yield f"{len(twice)} questions stand there with different answers ({shown})"
    odd = [(record, problem) for record in records if record.answer and (problem := problem_of(record))]
    if odd:
        shown = ids([record for record, _ in odd])
        yield f"{len(odd)} answers are not in the contest's form ({shown}; the first: {odd[0][1]})"


def ids(records: Sequence[Record]) -> str:
    """Return the first ids, for a message: ``id "3", "17"``."""
    shown = ", ".join(f'"{printable(record.id, 40)}"' for record in records[:_IDS_SHOWN])
    return f"id {shown}" + (", …" if len(records) > _IDS_SHOWN else "")


def _squeezed(text: str) -> str:
    return "".join(text.split())
