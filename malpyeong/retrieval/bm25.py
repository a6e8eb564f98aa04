"""BM25 over Korean morphemes, with the words that a question is about weighted."""

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from malpyeong.errors import needs
from malpyeong.retrieval.question import Question

if TYPE_CHECKING:
    import numpy as np
    from kiwipiepy import Kiwi
    from numpy.typing import NDArray

    from malpyeong.retrieval.search import Document

# Chosen on the dev split of the sample data (docs/retrieval.md).
FOCUS_WEIGHT = 4
_MANY = 500  # questions from which on a progress bar is worth its line


class BM25:
    """Lucene's BM25 (k1 1.5, b 0.75; bm25s) over :func:`terms`.

    Args:
        documents: what is searched.
        bigrams: also use pairs of characters. Misspelt words and wrong spaces are what the questions are about, and
            a morpheme analyser cuts those into other morphemes than the right ones.
        focus_weight: how many times more the focus of a question and of a document counts.
    """

    def __init__(self, documents: Sequence["Document"], bigrams: bool = True, focus_weight: int = FOCUS_WEIGHT) -> None:
        needs("bm25s", "retrieval")
        import bm25s

        self._bigrams, self._focus_weight = bigrams, focus_weight
        self._size = len(documents)
        self._index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
        self._index.index([self._terms(document.text, document.focus) for document in documents], show_progress=False)

    def scores(self, questions: Sequence[Question]) -> "NDArray[np.float32]":
        """Return scores of shape (questions, documents); -inf where no term is shared."""
        import numpy as np
        from tqdm import tqdm

        scores = np.full((len(questions), self._size), -np.inf, dtype=np.float32)
        shown = tqdm(questions, desc="BM25", unit="question", disable=len(questions) < _MANY)
        for row, question in zip(scores, shown, strict=True):
            known = [term for term in self._terms(question.text, question.focus) if term in self._index.vocab_dict]
            if known:
                found = self._index.get_scores(known)
                row[found > 0] = found[found > 0]
        return scores

    def _terms(self, text: str, focus: Sequence[str]) -> list[str]:
        found = list(terms(text, self._bigrams))
        for words in focus:
            found += terms(words, self._bigrams) * max(1, self._focus_weight)
        return found


@lru_cache(maxsize=65_536)
def terms(text: str, bigrams: bool) -> tuple[str, ...]:
    """Return the morphemes of a text (Kiwi) and, if asked for, its pairs of characters; a space is written ``_``."""
    found = [token.form for token in _kiwi().tokenize(text)]
    if bigrams:
        spaced = f"_{'_'.join(text.split())}_"
        found += [spaced[place : place + 2] for place in range(len(spaced) - 1)]
    return tuple(found)


@cache
def _kiwi() -> "Kiwi":
    needs("kiwipiepy", "retrieval")
    from kiwipiepy import Kiwi

    return Kiwi(num_workers=1)
