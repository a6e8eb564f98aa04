"""Which rules to try on which questions, so that a third of all pairs finds nearly every question's best rule.

The first :data:`WIDE` rules of a question are those that its text and gold answer name (BM25). What these gave is then
completed to a table of all questions and rules, and the pairs that may beat their question's best rule are tried next,
in :data:`ROUNDS` rounds: a question whose best rule stands out costs little, an open one more. docs/mining.md has what
this finds of what trying everything finds.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from malpyeong.contest.records import Record
from malpyeong.contest.rulebook import Rule
from malpyeong.retrieval.bm25 import BM25
from malpyeong.retrieval.search import Retriever, read_query, rule_documents

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WIDE, ROUNDS = 16, 8
# Of the completed table (docs/mining.md).
FACTORS, SWEEPS, RIDGE, FITS = 5, 10, 1.0, 5
UNSEEN_ERROR = 1.3  # the error on pairs that were not tried, as a multiple of that on those that were


def named_rules(records: Sequence[Record], rules: Sequence[Rule], k: int) -> "NDArray[np.bool_]":
    """Return which ``k`` rules BM25 finds by each question and its gold answer, of shape (records, rules).

    The gold answer is looked at, as all of mining does: what it labels is training data.
    """
    import numpy as np

    documents = rule_documents(rules)
    queries = [replace(read_query(record), text=f"{record.question}\n{record.answer}") for record in records]
    scores = Retriever(documents, [BM25(documents)]).scores(queries)
    named = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(named, np.argsort(-scores, axis=1, kind="stable")[:, :k], True, axis=1)
    return named


def promising(gains: "NDArray[np.float64]", count: int) -> "NDArray[np.bool_]":
    """Return the ``count`` pairs that are worth trying next, of the shape of ``gains``.

    They are those of the highest expected improvement on their question's best rule so far (Jones, Schonlau & Welch
    1998), in units of the question's standard deviation. Means come from a low-rank completion by alternating least
    squares (Bell & Koren 2007), variances from several of them that start elsewhere and from their error.

    Args:
        gains: improvement ratios of shape (questions, rules), NaN where a pair was not tried.
        count: how many; fewer where fewer are left.
    """
    import numpy as np

    tried = np.isfinite(gains)
    count = min(count, int((~tried).sum()))
    mean = np.nanmean(gains, axis=1, keepdims=True)
    deviation = np.maximum(np.nanstd(gains, axis=1, keepdims=True), 1e-12)
    known = np.where(tried, (gains - mean) / deviation, 0)
    fits = np.array([_completed(known, tried, seed) for seed in range(FITS)])
    expected = fits.mean(0)
    error = math.sqrt(np.square((known - expected)[tried]).mean())
    spread = np.sqrt(fits.var(0) + (UNSEEN_ERROR * error) ** 2 + 1e-12)
    best = np.where(tried, known, -np.inf).max(1, keepdims=True)
    z = (expected - best) / spread
    cdf = 0.5 * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))
    improvement = spread * (z * cdf + np.exp(-np.square(z) / 2) / math.sqrt(2 * math.pi))
    improvement[tried] = -np.inf
    order = np.argsort(-improvement, axis=None, kind="stable")[:count]
    chosen = np.zeros(gains.shape, dtype=bool)
    chosen.ravel()[order] = True
    return chosen


def _completed(known: "NDArray[np.float64]", tried: "NDArray[np.bool_]", seed: int) -> "NDArray[np.float64]":
    """Return a number for each question and rule and a table of rank :data:`FACTORS`, together fitted to ``known``."""
    import numpy as np

    weights = tried.astype(float)
    ones = np.ones((max(known.shape), 1))
    offsets = np.zeros(known.shape[1])
    right = np.random.default_rng(seed).normal(size=(known.shape[1], FACTORS))
    for _ in range(SWEEPS):
        left = _least_squares((known - offsets) * weights, weights, np.hstack([ones[: len(right)], right]))
        levels, left = left[:, :1], left[:, 1:]
        right = _least_squares(((known - levels) * weights).T, weights.T, np.hstack([ones[: len(left)], left]))
        offsets, right = right[:, 0], right[:, 1:]
    completed: NDArray[np.float64] = levels + offsets + left @ right.T
    return completed


def _least_squares(
    targets: "NDArray[np.float64]", weights: "NDArray[np.float64]", factors: "NDArray[np.float64]"
) -> "NDArray[np.float64]":
    """Return the ridge solution of each row of ``targets`` on ``factors``, over the columns that have a weight."""
    import numpy as np

    size = factors.shape[1]
    products = np.einsum("ij,jk,jl->ikl", weights, factors, factors, optimize=True) + RIDGE * np.eye(size)
    solution: NDArray[np.float64] = np.linalg.solve(products, (targets @ factors)[..., None])[..., 0]
    return solution
