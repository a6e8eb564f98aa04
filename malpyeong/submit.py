"""Write and check a submission: ``python -m malpyeong.submit TEST PRED -o FILE``."""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path

import click

from malpyeong.contest.answer import Answer, contest_split, format_problem, parse_answer
from malpyeong.contest.options import options, question_sentence
from malpyeong.contest.records import Record, check_same_questions, load_records, write_records
from malpyeong.contest.repair import right_particle
from malpyeong.errors import InputError, printable
from malpyeong.terminal import Command

# Conjoining jamo that NFD makes of ordinary syllables; NFKC makes them of compatibility jamo such as ㄹ.
_CONJOINING_JAMO = re.compile("[\u1100-\u1112\u1161-\u1175\u11a8-\u11c2]")
_CURLY_QUOTES = re.compile("[“”‘’]")
_COMPARABLE = 1_000  # characters; comparing longer sentences takes long and says nothing
_SAME_REGION = 6  # changes with fewer unchanged characters between them are one


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
    parsed = parse_answer(answer)
    if parsed.complete and parsed.sentences:
        found += _sentence_problems(record, parsed)
    return found


def warnings(record: Record) -> list[str]:
    """Return what is unusual in one predicted answer to a 교정형 question: it may be right, and deserves a look."""
    before, sentences = question_sentence(record.question), parse_answer(record.answer or "").sentences
    if record.question_type != "교정형" or options(record) or not before or not sentences:
        return []
    if before in sentences:
        return ["the question's sentence is unchanged"]
    if max(map(len, (before, *sentences))) > _COMPARABLE:
        return [f"sentence has more than {_COMPARABLE:,} characters"]
    regions = min(changed_regions(before, sentence) for sentence in sentences)
    return [f"the sentence differs from the question's in {regions} places"] if regions > 1 else []


def changed_regions(before: str, after: str) -> int:
    """Return in how many places two sentences differ; what is but a few characters apart is one place."""
    regions, end = 0, -_SAME_REGION
    for kind, start, stop, _, _ in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if kind != "equal":
            regions += start - end >= _SAME_REGION
            end = stop
    return regions


def _sentence_problems(record: Record, parsed: Answer) -> list[str]:
    found = []
    offered = options(record)
    for sentence in parsed.sentences if offered else ():
        if sentence not in offered:
            nearest = max(offered, key=lambda option: SequenceMatcher(None, option, sentence[:_COMPARABLE]).ratio())
            found.append(f'"{printable(sentence, 60)}" is none of the options; the nearest is "{nearest}"')
    particle = right_particle(parsed)
    if parsed.particle in ("가", "이") and parsed.particle != particle:
        found.append(f"particle {parsed.particle} where the sentence calls for {particle}")
    return found


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
    for source in (test, prediction):
        if output.exists() and source.exists() and output.samefile(source):
            raise InputError(f"{output}: would overwrite an input file; choose another name")
    questions = load_records(test)
    answers = load_records(prediction, answers="prediction")
    check_same_questions(questions, answers, test, prediction)
    submission = make_submission(questions, answers)
    found = [(record.id, problem) for record in submission for problem in problems(record)]
    unusual = [(record.id, warning) for record in submission for warning in warnings(record)]
    _list(prediction, found)
    _list(prediction, unusual, "warning: ")
    bad = len({id_ for id_, _ in found})
    if bad and strict:
        raise InputError(f"{output}: not written; {bad} of {len(submission)} answers have problems (see above)")
    write_records(output, submission)
    click.echo(
        f"{output}: {len(submission)} records, {len(submission) - bad} without problems, {bad} with, "
        f"{len(unusual)} warnings"
    )


def _list(prediction: Path, found: Sequence[tuple[str, str]], label: str = "") -> None:
    for id_, text in found[:20]:
        click.echo(f'{prediction}: id "{printable(id_)}": {label}{text}', err=True)
    if len(found) > 20:
        click.echo(f"… and {len(found) - 20} more", err=True)


if __name__ == "__main__":
    main()
