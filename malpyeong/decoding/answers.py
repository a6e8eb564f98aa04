"""From prompts to answers, a batch after the other, and their repair."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from malpyeong.contest.question import options
from malpyeong.contest.records import Record
from malpyeong.contest.repair import repair
from malpyeong.decoding.vote import ReasonScore, choose, rouge_score
from malpyeong.prompts.messages import Prompt
from malpyeong.prompts.rule_choice import split_choice

if TYPE_CHECKING:
    from malpyeong.decoding.engines import Engine


def predict(
    engine: "Engine",
    prompts: Sequence[Prompt],
    batch_size: int = 16,
    done: Collection[int] = (),
    score: ReasonScore = rouge_score,
) -> Iterator[tuple[int, str]]:
    """Yield (position, answer) for every prompt: of its samples, the one that most agree with.

    Args:
        engine: as for :func:`sample`.
        prompts: as there.
        batch_size: as there.
        done: as there.
        score: of reasons, to choose among samples with (see :func:`malpyeong.decoding.vote.choose`).
    """
    for row, samples in sample(engine, prompts, batch_size, done):
        voters = [split_choice(answer)[1] for answer in samples]
        yield row, samples[voters.index(choose(voters, score))]


def sample(
    engine: "Engine", prompts: Sequence[Prompt], batch_size: int = 16, done: Collection[int] = ()
) -> Iterator[tuple[int, list[str]]]:
    """Yield (position, its samples) for every prompt, the longest first.

    Constrained answers to questions with options are given one after another: their verdicts are there at the start, so
    that such a batch ends sooner than one in which other questions take part.

    Batches are fixed before anything is skipped, because what else is in a batch can decide near ties: an interrupted
    run goes on to the answers of an uninterrupted one.

    Args:
        engine: see ``malpyeong.decoding.engines``.
        prompts: of the questions.
        batch_size: answers that are generated at once; a question with n samples counts n times.
        done: positions that are not needed again; a batch is skipped if all of its questions are done.
    """
    lengths = [len(prompt.ids) for prompt in prompts]
    chosen = [engine.decoding.constrained and bool(options(prompt.record)) for prompt in prompts]
    longest = {
        kind: max(length for length, own in zip(lengths, chosen, strict=True) if own == kind) for kind in set(chosen)
    }
    order = sorted(range(len(prompts)), key=lambda row: (-longest[chosen[row]], chosen[row], -lengths[row]))
    size = max(1, batch_size // engine.decoding.samples)
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        if not all(row in done for row in rows):
            yield from zip(rows, engine.answers([prompts[row] for row in rows]), strict=True)


def repaired(records: Sequence[Record]) -> tuple[list[Record], Counter[str]]:
    """Return records with mended answers, and how often each kind of repair was made."""
    counts: Counter[str] = Counter()
    mended = []
    for record in records:
        answer, kinds = repair(record.answer or "", record.question)
        counts.update(kinds)
        mended.append(record.with_answer(answer))
    return mended, counts
