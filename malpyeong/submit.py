"""Write and check a submission: ``python -m malpyeong.submit TEST PRED -o FILE``."""

import re
from collections.abc import Sequence
from pathlib import Path

import click

from malpyeong.answer import contest_split, format_problem
from malpyeong.errors import InputError, printable
from malpyeong.records import Record, check_same_questions, load_records, write_records

# Conjoining jamo that NFD makes of ordinary syllables; NFKC makes them of compatibility jamo such as ㄹ.
_CONJOINING_JAMO = re.compile("[ᄀ-하-ᅵᆨ-ᇂ]")
_CURLY_QUOTES = re.compile("[“”‘’]")


def problems(record: Record) -> list[str]:
    """Return what would lose points, or looks damaged, in one predicted answer."""
    answer = record.answer or ""
    if not answer.strip():
        return ["empty answer"]
    found = []
    verdict = contest_split(answer)[0]
    if not is_split(record):
        found.append(
            "no reason under the contest's split"
            if "옳다" in verdict
            else "no 가 옳다 / 이 옳다: the contest takes the whole text as the sentence"
        )
    if _CONJOINING_JAMO.search(answer) and not _CONJOINING_JAMO.search(record.question):
        found.append("damaged jamo (the text went through NFD or NFKC; do not normalise answers)")
    if _CURLY_QUOTES.search(verdict) and not _CURLY_QUOTES.search(record.question):
        found.append("curly quotes in the sentence lose Exact Match")
    if "�" in answer:
        found.append("replacement character � (broken decoding)")
    problem = format_problem(answer)
    if problem and not found:
        found.append(problem)
    return found


def is_split(record: Record) -> bool:
    """Tell whether the contest's scorer finds both a verdict and a reason in the answer."""
    return bool(contest_split(record.answer or "")[1])


def make_submission(test: Sequence[Record], predictions: Sequence[Record]) -> list[Record]:
    """Return the test records with the predicted answers filled in; both are in the same order."""
    return [
        question.with_answer(prediction.answer or "") for question, prediction in zip(test, predictions, strict=True)
    ]


@click.command()
@click.argument("test", type=click.Path(path_type=Path))
@click.argument("prediction", metavar="PRED", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="File to write.")
@click.option("--strict", is_flag=True, help="Write nothing and exit with 2 if any answer has a problem.")
def main(test: Path, prediction: Path, output: Path, strict: bool) -> None:
    """Fill the answers of PRED into the questions of TEST and check every answer.

    Ids, their order and their number must agree. Answers that would lose points are listed.
    """
    if output.suffix.lower() not in (".json", ".jsonl"):
        raise InputError(f"{output}: name a .json or .jsonl file")
    for source in (test, prediction):
        if output.exists() and source.exists() and output.samefile(source):
            raise InputError(f"{output}: would overwrite an input file; choose another name")
    questions = load_records(test)
    answers = load_records(prediction, answers="prediction")
    check_same_questions(questions, answers, test, prediction)
    submission = make_submission(questions, answers)
    found = [(record.id, problem) for record in submission for problem in problems(record)]
    for id_, problem in found[:20]:
        click.echo(f'{prediction}: id "{printable(id_)}": {problem}', err=True)
    if len(found) > 20:
        click.echo(f"… and {len(found) - 20} more", err=True)
    bad = len({id_ for id_, _ in found})
    if bad and strict:
        raise InputError(f"{output}: not written; {bad} of {len(submission)} answers have problems (see above)")
    write_records(output, submission)
    click.echo(f"{output}: {len(submission)} records, {len(submission) - bad} without problems, {bad} with")


if __name__ == "__main__":
    main()
