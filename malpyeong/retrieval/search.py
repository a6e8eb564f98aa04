"""Ranking documents for questions: one or several scorers, fusion, reranking, and no record that is its own example."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from malpyeong.contest.question import read_record
from malpyeong.contest.records import Record
from malpyeong.contest.rulebook import Rule
from malpyeong.retrieval.edits import NO_EDIT, Edit, asked_edit, solved_edit
from malpyeong.retrieval.question import changed_words, readings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


# Reciprocal rank fusion (Cormack, Clarke & Büttcher 2009): the sum over scorers of 1 / (60 + rank).
_RRF = 60
RERANKED = 30


@dataclass(frozen=True, slots=True)
class Query:
    """A question as search sees it; nothing of an answer is in it.

    Attributes:
        id: of its record.
        solved: whether the record has an answer, so that its twins must not be found.
        sentences: that it may be about; see :func:`malpyeong.retrieval.question.readings`.
        question_type: 선택형 or 교정형.
        text: see :class:`malpyeong.retrieval.question.Question`.
        focus: likewise.
        edit: what its options or its listed sentences differ in.
    """

    id: str
    solved: bool
    sentences: frozenset[str]
    question_type: str
    text: str
    focus: tuple[str, ...]
    edit: Edit


@dataclass(frozen=True, slots=True)
class Document:
    """Something to find: a rule, or a solved question.

    Attributes:
        id: of the rule or record.
        text: what is searched.
        focus: the words that it is about, where they are known.
        edit: what its answer or its options change.
        record: the solved question, None for a rule.
    """

    id: str
    text: str
    focus: tuple[str, ...] = ()
    edit: Edit = NO_EDIT
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

    def scores(
        self, queries: Sequence[Query], left_out: Sequence[Collection[int]] | None = None
    ) -> "NDArray[np.floating]":
        """Return scores of shape (queries, documents); -inf where a document is not found.

        The documents that are left out for a query have no influence on the others' scores.
        """
        ...


class PairScorer(Protocol):
    """Scores a question and a document together: a reranker."""

    def scores(self, pairs: Sequence[tuple[Query, str]]) -> "NDArray[np.float32]":
        """Return the score of each (query, text of a document)."""
        ...


def read_query(record: Record) -> Query:
    """Return what search may know of a record: its question."""
    unsolved = replace(record, answer=None)
    question = read_record(record)
    return Query(
        record.id,
        record.answer is not None,
        readings(unsolved),
        record.question_type,
        question.text,
        question.focus,
        asked_edit(unsolved),
    )


def rule_documents(rules: Sequence[Rule]) -> list[Document]:
    """Return the rules as documents: title, text and examples."""
    return [Document(rule.id, rule.full_text) for rule in rules]


def example_documents(records: Sequence[Record]) -> list[Document]:
    """Return solved questions as documents: the question, with the words and the edit that the answer is about.

    The reason is no part of the text: it shares words with other reasons, not with questions.

    Raises:
        ValueError: a record has no answer.
    """
    documents = []
    for record in records:
        if record.answer is None:
            raise ValueError(f"record {record.id} has no answer")
        text = read_record(record).text
        documents.append(Document(record.id, text, changed_words(record), solved_edit(record), record))
    return documents


class Retriever:
    """Finds documents for questions.

    The order is the same on every run: equal scores keep the order of the documents.

    A twin is a solved question about the same sentence (see :func:`malpyeong.retrieval.question.readings`), or one with
    the same id. Where the question has an answer itself, as in training, its twins are passed over, because a model
    that meets its own answer among the examples learns to copy it. Where it has none, nothing can leak: a twin about
    the same sentence is the best example there is, and is found first. Only one with the id as well is taken for the
    question itself.

    Args:
        documents: what is searched.
        scorers: built over the same documents; several are fused by their ranks.
        reranker: orders the best :data:`RERANKED` anew.
    """

    def __init__(
        self, documents: Sequence[Document], scorers: Sequence[Scorer], reranker: "PairScorer | None" = None
    ) -> None:
        self._documents, self._scorers, self._reranker = documents, scorers, reranker
        self._with_id: dict[str, set[int]] = {}
        self._with_sentence: dict[str, set[int]] = {}
        for position, document in enumerate(documents):
            if document.record is not None:
                self._with_id.setdefault(document.record.id, set()).add(position)
                for sentence in readings(document.record):
                    self._with_sentence.setdefault(sentence, set()).add(position)

    def search(self, record: Record, k: int) -> list[Hit]:
        """Return the best ``k`` documents (fewer if fewer are found), best first."""
        return self.search_all([record], k)[0]

    def search_all(self, records: Sequence[Record], k: int) -> list[list[Hit]]:
        """Return the best ``k`` documents for each record. Its answer, if it has one, is not looked at, except to
        know which solved questions are its twins."""
        import numpy as np

        queries = [read_query(record) for record in records]
        withheld = [self.withheld_from(record) for record in records]
        twins = [self._about(query.sentences) - gone for query, gone in zip(queries, withheld, strict=True)]
        ranked: list[list[Hit]] = []
        for scores, first in zip(self.scores(queries, withheld), twins, strict=True):
            others = np.ones(len(scores), dtype=bool)
            others[list(first)] = False
            best = np.lexsort((-scores, others))
            best = best[np.isfinite(scores[best])][: k if self._reranker is None else max(k, RERANKED)]
            ranked.append([Hit(self._documents[row].id, int(row), round(float(scores[row]), 6)) for row in best])
        if self._reranker is not None:
            ranked = self._reranked(self._reranker, queries, ranked, twins)
        return [hits[:k] for hits in ranked]

    def scores(
        self, queries: Sequence[Query], left_out: Sequence[Collection[int]] | None = None
    ) -> "NDArray[np.float64]":
        """Return the scores of the only scorer, or the fused ones, of shape (queries, documents); -inf where a document
        is not found or left out."""
        import numpy as np

        matrices = [scorer.scores(queries, left_out).astype(np.float64) for scorer in self._scorers]
        for matrix in matrices:
            for row, gone in zip(matrix, left_out or (), strict=left_out is not None):
                row[list(gone)] = -np.inf
        if len(matrices) == 1:
            return matrices[0]
        return np.array([_fused(rows) for rows in zip(*matrices, strict=True)])

    def withheld(self, query: Query) -> set[int]:
        """Return the positions of the documents that must not be found: a solved question's twins, and itself."""
        with_id, about = self._with_id.get(query.id, set()), self._about(query.sentences)
        return with_id | about if query.solved else with_id & about

    def withheld_from(self, record: Record) -> set[int]:
        """Return the same, and where the record has an answer also the documents about that answer's sentence."""
        return self.withheld(replace(read_query(record), sentences=readings(record)))

    def record(self, hit: Hit) -> Record:
        """Return the solved question that was found."""
        record = self._documents[hit.position].record
        if record is None:
            raise ValueError(f"{hit.id} is a rule")
        return record

    def _about(self, sentences: Collection[str]) -> set[int]:
        return {position for sentence in sentences for position in self._with_sentence.get(sentence, ())}

    def _reranked(
        self,
        reranker: "PairScorer",
        queries: Sequence[Query],
        ranked: Sequence[Sequence[Hit]],
        twins: Sequence[Collection[int]],
    ) -> list[list[Hit]]:
        pairs = [
            (query, self._documents[hit.position].text)
            for query, hits in zip(queries, ranked, strict=True)
            for hit in hits[:RERANKED]
        ]
        scores = iter(reranker.scores(pairs) if pairs else ())
        ordered = []
        for hits, first in zip(ranked, twins, strict=True):
            scored = [Hit(hit.id, hit.position, float(next(scores))) for hit in hits[:RERANKED]]
            scored.sort(key=lambda hit: (hit.position not in first, -hit.score))
            ordered.append(scored + list(hits[RERANKED:]))
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
