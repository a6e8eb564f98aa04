"""Write and check a submission: ``python -m malpyeong.submit TEST PRED -o FILE``."""

import itertools
import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path

import click

from malpyeong.contest.answer import FormatProblem, contest_split, format_problem, parse_answer, quote
from malpyeong.contest.particles import subject_particle
from malpyeong.contest.question import options, read_record
from malpyeong.contest.records import Record, check_same_questions, write_records
from malpyeong.contest.repair import restore_jamo
from malpyeong.errors import InputError, counted, printable
from malpyeong.files import check_writable
from malpyeong.tasks import grammar
from malpyeong.tasks.task import load, task_of
from malpyeong.terminal import Command

_CURLY_QUOTES = re.compile("[“”‘’]")
_COMPARABLE = 1_000  # characters; comparing longer sentences takes long and says nothing
_SAME_REGION = 6  # changes with fewer unchanged characters between them are one
# difflib's ratio of two sentences. Below it are 3 of 749 of the contest's gold corrections.
_ALIKE = 0.6


def problems(record: Record) -> list[str]:
    """Return what would lose points, or looks damaged, in one predicted answer."""
    answer, task = record.answer or "", task_of(record)
    if task is not grammar:
        return [str(problem)] if (problem := task.format_problem(record.question_type, answer)) else []
    if not answer.strip():
        return [str(FormatProblem.EMPTY)]
    lines = []
    if not is_split(record):
        lines.append(
            "no reason under the contest's split"
            if "옳다" in contest_split(answer)[0]
            else "no 가 옳다 / 이 옳다: the contest takes the whole text as the sentence"
        )
    if restore_jamo(answer, record.question) != answer:
        lines.append("damaged jamo (the text went through NFD or NFKC; do not normalise answers)")
    if "�" in answer:
        lines.append("replacement character � (broken decoding)")
    problem = format_problem(answer)
    if problem and not lines:
        lines.append(str(problem))
    parsed, offered = parse_answer(answer), options(record)
    for sentence in parsed.sentences if parsed.complete and offered else ():
        if sentence not in offered:
            nearest = max(offered, key=lambda option: _alike(option, sentence[:_COMPARABLE]))
            lines.append(f'"{printable(sentence, 60)}" is none of the options; the nearest is "{nearest}"')
    return lines


def warnings(record: Record) -> list[str]:
    """Return what is unusual in one predicted answer of grammar: it may be right, and deserves a look."""
    if task_of(record) is not grammar:
        return []
    answer, question = parse_answer(record.answer or ""), read_record(record)
    quoted = quote(answer.sentences, answer.joiner)
    unusual = []
    particle = subject_particle(quoted)
    if answer.particle in ("가", "이") and answer.particle != particle:
        unusual.append(f"particle {answer.particle}, where nearly all gold answers have {particle}")
    if _CURLY_QUOTES.search(quoted) and not _CURLY_QUOTES.search(record.question):
        unusual.append("curly quotes in the sentence")
    if record.question_type == "교정형" and not question.options and question.sentences and answer.sentences:
        unusual += _unusual_correction(question.sentences, answer.sentences)
    return unusual


def _unusual_correction(before: Sequence[str], after: Sequence[str]) -> list[str]:
    if set(before) & set(after):
        return ["the question's sentence is unchanged"]
    if max(map(len, (*before, *after))) > _COMPARABLE:
        return [f"sentence has more than {_COMPARABLE:,} characters"]
    source, sentence = max(itertools.product(before, after), key=lambda pair: _alike(*pair))
    if _alike(source, sentence) < _ALIKE:
        return ["the sentence is unlike the question's"]
    regions = changed_regions(source, sentence)
    return [f"the sentence differs from the question's in {regions} places"] if regions > 1 else []


def _alike(first: str, second: str) -> float:
    return SequenceMatcher(None, first, second, autojunk=False).ratio()


def changed_regions(before: str, after: str) -> int:
    """Return in how many places two sentences differ; what is but a few characters apart is one place."""
    regions, end = 0, -_SAME_REGION
    for kind, start, stop, _, _ in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if kind != "equal":
            regions += start - end >= _SAME_REGION
            end = stop
    return regions


def is_split(record: Record) -> bool:
    """Tell whether the contest's scorer finds both a verdict and a reason in the answer."""
    return bool(contest_split(record.answer or "")[1])


def make_submission(test: Sequence[Record], predictions: Sequence[Record]) -> list[Record]:
    """Return the test records with the predicted answers filled in; both are in the same order."""
    return [
        question.with_answer(prediction.answer or "") for question, prediction in zip(test, predictions, strict=True)
    ]


@click.command(cls=Command)
@click.argument("test", type=click.Path(path_type=Path))
@click.argument("prediction", metavar="PRED", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="File to write.")
@click.option("--strict", is_flag=True, help="Write nothing and exit with 2 if any answer has a problem.")
def main(test: Path, prediction: Path, output: Path, strict: bool) -> None:
    """Fill the answers of PRED into the questions of TEST and check every answer.

    Ids, their order and their number must agree. Answers that would lose points are listed, and after them those that
    are unusual (warnings, which --strict lets pass).
    """
    if output.suffix.lower() not in (".json", ".jsonl"):
        raise InputError(f"{output}: name a .json or .jsonl file")
    check_writable(output, test, prediction)
    questions = load(test)
    answers = load(prediction, answers="prediction")
    check_same_questions(questions, answers, test, prediction)
    submission = make_submission(questions, answers)
    defects = [(record.id, problem) for record in submission for problem in problems(record)]
    unusual = [(record.id, warning) for record in submission for warning in warnings(record)]
    _list(prediction, defects)
    _list(prediction, unusual, "warning: ")
    bad = len({id_ for id_, _ in defects})
    if bad and strict:
        raise InputError(f"{output}: not written; {bad} of {len(submission)} answers have problems (see above)")
    write_records(output, submission)
    click.echo(
        f"{output}: {counted(len(submission), 'record')}, {len(submission) - bad} without problems, {bad} with, "
        f"{counted(len(unusual), 'warning')}"
    )


def _list(prediction: Path, lines: Sequence[tuple[str, str]], label: str = "") -> None:
    for id_, text in lines[:20]:
        click.echo(f'{prediction}: id "{printable(id_)}": {label}{text}', err=True)
    if len(lines) > 20:
        click.echo(f"… and {len(lines) - 20} more", err=True)


if __name__ == "__main__":
    main()
