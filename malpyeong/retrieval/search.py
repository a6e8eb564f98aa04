"""Ranking documents for questions: one or several scorers, fusion, reranking, and no record that is its own example."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from malpyeong.contest.answer import parse_answer
from malpyeong.contest.records import Record
from malpyeong.contest.rulebook import Rule
from malpyeong.retrieval.question import Question, changed_words, read_question, readings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from malpyeong.retrieval.neural import Reranker

# Reciprocal rank fusion (Cormack, Clarke & Büttcher 2009): the sum over scorers of 1 / (60 + rank).
_RRF = 60
RERANKED = 30


@dataclass(frozen=True, slots=True)
class Document:
    """Something to find: a rule, or a solved question.

    Attributes:
        id: of the rule or record.
        text: what is searched.
        focus: the words that it is about, where they are known.
        record: the solved question, None for a rule.
    """

    id: str
    text: str
    focus: tuple[str, ...] = ()
    record: Record | None = None


@dataclass(frozen=True, slots=True)
class Hit:
    """A document that was found.

    Attributes:
        id: of the document.
        position: of the document in the searched list.
        score: of the only scorer, of fusion, or of the reranker: it orders one search's hits and means nothing else.
    """

    id: str
    position: int
    score: float


class Scorer(Protocol):
    """Scores documents for questions."""

    def scores(self, questions: Sequence[Question]) -> "NDArray[np.float32]":
        """Return scores of shape (questions, documents); -inf where a document is not found."""
        ...


def rule_documents(rules: Sequence[Rule]) -> list[Document]:
    """Return the rules as documents: title, text and examples."""
    return [Document(rule.id, rule.full_text) for rule in rules]


def example_documents(records: Sequence[Record]) -> list[Document]:
    """Return solved questions as documents: question and reason, with the words that the answer is about.

    Raises:
        ValueError: a record has no answer.
    """
    documents = []
    for record in records:
        if record.answer is None:
            raise ValueError(f"record {record.id} has no answer")
        text = f"{read_question(record.question).text}\n{parse_answer(record.answer).reason}"
        documents.append(Document(record.id, text, changed_words(record), record))
    return documents


class Retriever:
    """Finds documents for questions.

    The order is the same on every run: equal scores keep the order of the documents. A solved question is never
    found for itself: one with the record's id, or one about the same sentence (see
    :func:`malpyeong.retrieval.question.readings`), is passed over, because in the contest no test question has such a
    twin, and a model that meets its own answer among the examples learns to copy it.

    Args:
        documents: what is searched.
        scorers: built over the same documents; several are fused by their ranks.
        reranker: orders the best :data:`RERANKED` anew.
    """

    def __init__(
        self, documents: Sequence[Document], scorers: Sequence[Scorer], reranker: "Reranker | None" = None
    ) -> None:
        self._documents, self._scorers, self._reranker = documents, scorers, reranker
        self._positions: dict[str, list[int]] = {}
        for position, document in enumerate(documents):
            if document.record is not None:
                for key in self._keys(document.record):
                    self._positions.setdefault(key, []).append(position)

    def search(self, record: Record, k: int) -> list[Hit]:
        """Return the best ``k`` documents (fewer if fewer are found), best first."""
        return self.search_all([record], k)[0]

    def search_all(self, records: Sequence[Record], k: int) -> list[list[Hit]]:
        """Return the best ``k`` documents for each record. Its answer, if it has one, is not looked at, except to
        know which solved questions are about the same sentence."""
        import numpy as np

        questions = [read_question(record.question) for record in records]
        matrices = [scorer.scores(questions) for scorer in self._scorers]
        found: list[list[Hit]] = []
        for row, record in enumerate(records):
            twins = list(self.twins(record))
            rows = [matrix[row].astype(np.float64) for matrix in matrices]
            for scores in rows:
                scores[twins] = -np.inf
            scores = rows[0] if len(rows) == 1 else _fused(rows)
            best = np.argsort(-scores, kind="stable")[: k if self._reranker is None else max(k, RERANKED)]
            best = best[np.isfinite(scores[best])]
            found.append([Hit(self._documents[place].id, int(place), round(float(scores[place]), 6)) for place in best])
        if self._reranker is not None:
            found = self._reranked(self._reranker, questions, found)
        return [hits[:k] for hits in found]

    def twins(self, record: Record) -> set[int]:
        """Return the positions of the solved questions that are this record or about the same sentence."""
        return {position for key in self._keys(record) for position in self._positions.get(key, ())}

    @staticmethod
    def _keys(record: Record) -> list[str]:
        return [f"id {record.id}", *(f"sentence {reading}" for reading in readings(record))]

    def _reranked(
        self, reranker: "Reranker", questions: Sequence[Question], found: Sequence[Sequence[Hit]]
    ) -> list[list[Hit]]:
        pairs = [
            (question, self._documents[hit.position].text)
            for question, hits in zip(questions, found, strict=True)
            for hit in hits[:RERANKED]
        ]
        scores = iter(reranker.scores(pairs) if pairs else ())
        ordered = []
        for hits in found:
            scored = [Hit(hit.id, hit.position, float(next(scores))) for hit in hits[:RERANKED]]
            ordered.append(sorted(scored, key=lambda hit: -hit.score) + list(hits[RERANKED:]))
        return ordered


def _fused(rows: Sequence["NDArray[np.float64]"]) -> "NDArray[np.float64]":
    """Return the reciprocal rank fusion of several scorers' scores; -inf where none found the document."""
    import numpy as np

    fused = np.zeros_like(rows[0])
    for scores in rows:
        order = np.argsort(-scores, kind="stable")
        ranks = np.empty(len(scores))
        ranks[order] = np.arange(1, len(scores) + 1)
        fused += np.where(np.isfinite(scores), 1 / (_RRF + ranks), 0)
    return np.where(fused > 0, fused, -np.inf)
