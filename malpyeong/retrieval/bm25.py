"""BM25 over Korean morphemes and letters, with the words and the edit that a question is about weighted."""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from malpyeong.errors import needs

if TYPE_CHECKING:
    import numpy as np
    from kiwipiepy import Kiwi
    from numpy.typing import NDArray

    from malpyeong.retrieval.search import Document, Query

K1, B = 1.5, 0.75
# Chosen on the dev split of the sample data (docs/retrieval.md).
FOCUS_WEIGHT = 4
CHANGED_WEIGHT, AROUND_WEIGHT, SAME_TYPE = 12, 1, 4


class Index:
    """Lucene's BM25 over bags of terms.

    Args:
        bags: the terms of each document, and how often it has each.
    """

    def __init__(self, bags: Sequence[Mapping[str, int]]) -> None:
        import numpy as np

        self.size = len(bags)
        self._bags = bags
        self._lengths = np.array([sum(bag.values()) for bag in bags], dtype=np.int64)
        positions: dict[str, list[int]] = {}
        for position, bag in enumerate(bags):
            for term in bag:
                positions.setdefault(term, []).append(position)
        self._postings = {
            term: (np.array(places), np.array([bags[place][term] for place in places], dtype=np.float64))
            for term, places in positions.items()
        }

    def scores(self, query: Mapping[str, int], left_out: Collection[int] = ()) -> "NDArray[np.float64]":
        """Return a score for each document, 0 where it has no term of the query.

        Documents that are left out score 0, and the others score as if those had never been in the index.
        """
        import numpy as np

        scores = np.zeros(self.size)
        gone = sorted(left_out)
        size = self.size - len(gone)
        mean = (self._lengths.sum() - self._lengths[gone].sum()) / max(1, size)
        norms = K1 * (1 - B + B * self._lengths / max(1, mean))
        for term, weight in query.items():
            if term in self._postings:
                places, counts = self._postings[term]
                frequency = len(places) - sum(term in self._bags[place] for place in gone)
                idf = math.log(1 + (size - frequency + 0.5) / (frequency + 0.5))
                scores[places] += weight * idf * counts / (counts + norms[places])
        scores[gone] = 0
        return scores


class BM25:
    """BM25 of the words of a question and a document: :func:`terms`.

    Args:
        documents: what is searched.
        bigrams: also use pairs of characters. Misspelt words and wrong spaces are what the questions are about, and
            a morpheme analyser cuts those into other morphemes than the right ones.
        focus_weight: how many times more the focus of a question and of a document counts.
    """

    def __init__(self, documents: Sequence["Document"], bigrams: bool = True, focus_weight: int = FOCUS_WEIGHT) -> None:
        self._bigrams, self._focus_weight = bigrams, focus_weight
        self._index = Index([self._bag(document.text, document.focus) for document in documents])

    def scores(
        self, queries: Sequence["Query"], left_out: Sequence[Collection[int]] | None = None
    ) -> "NDArray[np.float64]":
        """Return scores of shape (queries, documents); -inf where no term is shared. See :class:`Index`."""
        import numpy as np

        bags = [self._bag(query.text, query.focus) for query in queries]
        scores = _of_all(self._index, bags, left_out)
        return np.where(scores > 0, scores, -np.inf)

    def _bag(self, text: str, focus: Sequence[str]) -> Counter[str]:
        bag = Counter(terms(text, self._bigrams))
        for words in focus:
            for term in terms(words, self._bigrams):
                bag[term] += max(1, self._focus_weight)
        return bag


class EditBM25:
    """What is asked: BM25 of the words (:class:`BM25`) and of the edit (:mod:`malpyeong.retrieval.edits`), added up
    with a little for the same question type.

    Args:
        documents: solved questions.
    """

    def __init__(self, documents: Sequence["Document"]) -> None:
        self._types = [document.record.question_type if document.record else "" for document in documents]
        self._words = BM25(documents)
        self._changed = Index([Counter(document.edit.changed) for document in documents])
        self._around = Index([Counter(document.edit.around) for document in documents])

    def scores(
        self, queries: Sequence["Query"], left_out: Sequence[Collection[int]] | None = None
    ) -> "NDArray[np.float64]":
        """Return scores of shape (queries, documents); -inf where nothing is shared."""
        import numpy as np

        words = self._words.scores(queries, left_out)
        changed = _of_all(self._changed, [Counter(query.edit.changed) for query in queries], left_out)
        around = _of_all(self._around, [Counter(query.edit.around) for query in queries], left_out)
        types = np.array([[query.question_type == kind for kind in self._types] for query in queries], dtype=np.float64)
        scores = np.where(np.isfinite(words), words, 0) + CHANGED_WEIGHT * changed + AROUND_WEIGHT * around
        return np.where(scores > 0, scores + SAME_TYPE * types, -np.inf)


def _of_all(
    index: Index, bags: Sequence[Mapping[str, int]], left_out: Sequence[Collection[int]] | None
) -> "NDArray[np.float64]":
    import numpy as np

    scores = np.zeros((len(bags), index.size))
    for row, bag, gone in zip(scores, bags, left_out if left_out is not None else [()] * len(bags), strict=True):
        row[:] = index.scores(bag, gone)
    return scores


@lru_cache(maxsize=65_536)
def terms(text: str, bigrams: bool) -> tuple[str, ...]:
    """Return the morphemes of a text (Kiwi) and, if asked for, its pairs of characters; a space is written ``_``."""
    tokens = [token.form for token in _kiwi().tokenize(text)]
    if bigrams:
        spaced = f"_{'_'.join(text.split())}_"
        tokens += [spaced[place : place + 2] for place in range(len(spaced) - 1)]
    return tuple(tokens)


@cache
def _kiwi() -> "Kiwi":
    needs("kiwipiepy", "retrieval")
    from kiwipiepy import Kiwi

    return Kiwi(num_workers=1)
