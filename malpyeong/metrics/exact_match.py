"""Exact Match, as the contest computes it."""

from malpyeong.contest.answer import contest_split


def normalise(verdict: str) -> str:
    """Remove every straight quote and strip; nothing else (particle, period and inner spaces count)."""
    return verdict.replace('"', "").replace("'", "").strip()


def exact_match(prediction: str, gold: str) -> float:
    """Return 1.0 if the predicted verdict equals any ``#``-separated part of the gold one, else 0.0.

    Both are full answers; both are cut by :func:`malpyeong.contest.answer.contest_split` first. The ``#`` is looked for
    after normalisation, so only the last of several golds carries the ``가 옳다``, exactly as in the contest.
    """
    predicted = normalise(contest_split(prediction)[0])
    return float(any(predicted == part.strip() for part in normalise(contest_split(gold)[0]).split("#")))
