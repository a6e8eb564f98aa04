"""Self-consistency: one answer out of several of the same model.

The sentence is put to the vote (Wang et al. 2023, arXiv:2203.11171); among the answers of the winning sentence the one
is kept whose reason is nearest to the others' (minimum Bayes risk with the contest's reason score as utility: Eikema &
Aziz 2022, arXiv:2108.04718).
"""

from collections.abc import Callable, Sequence

from malpyeong.contest.answer import contest_split, format_problem
from malpyeong.metrics.exact_match import normalise

# (candidates, references) -> score of each pair; higher is nearer.
ReasonScore = Callable[[Sequence[str], Sequence[str]], Sequence[float]]


def rouge_score(candidates: Sequence[str], references: Sequence[str]) -> list[float]:
    """Return the contest's ROUGE-1 of each pair."""
    from malpyeong.metrics.rouge import rouge_1

    return [rouge_1(candidate, reference) for candidate, reference in zip(candidates, references, strict=True)]


def choose(answers: Sequence[str], score: ReasonScore = rouge_score) -> str:
    """Return the answer that the answers agree on.

    Answers are counted by their sentence as Exact Match compares it. Malformed ones have a vote only if all are. The
    earlier answer wins a tie, both of sentences and of reasons.

    Raises:
        ValueError: there is no answer.
    """
    if not answers:
        raise ValueError("no answers to choose among")
    voters = [answer for answer in answers if format_problem(answer) is None] or list(answers)
    groups: dict[str, list[str]] = {}
    for answer in voters:
        groups.setdefault(normalise(contest_split(answer)[0]), []).append(answer)
    winners = max(groups.values(), key=len)  # the first of the largest
    if len(winners) == 1:
        return winners[0]
    reasons = [contest_split(answer)[1] for answer in winners]
    pairs = [(i, j) for i in range(len(reasons)) for j in range(len(reasons)) if i != j]
    scores = score([reasons[i] for i, _ in pairs], [reasons[j] for _, j in pairs])
    nearness = [0.0] * len(reasons)
    for (i, _), value in zip(pairs, scores, strict=True):
        nearness[i] += value
    return winners[max(range(len(winners)), key=nearness.__getitem__)]
