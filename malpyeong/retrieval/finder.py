"""What ``search`` and the server find for a question: rules and solved examples, as the files that are given allow."""

from collections.abc import Callable, Sequence

from malpyeong.contest.records import Record
from malpyeong.contest.rulebook import Rule
from malpyeong.prompts.rule_choice import Labels
from malpyeong.retrieval.bm25 import BM25, EditBM25
from malpyeong.retrieval.neighbours import Neighbours
from malpyeong.retrieval.search import Document, PairScorer, Retriever, Scorer, example_documents, rule_documents


class Finder:
    """Finds rules and solved examples for questions.

    Args:
        rules: the rule book, or none.
        examples: solved questions, or none.
        labels: rules of the examples, to find rules by what similar examples needed; none: by their texts alone.
        rules_k: rules a question.
        examples_k: examples a question.
        dense: makes a scorer of documents that is fused with BM25, or None.
        reranker: orders the best anew.
    """

    def __init__(
        self,
        rules: Sequence[Rule],
        examples: Sequence[Record],
        labels: Sequence[Labels | None] = (),
        rules_k: int = 3,
        examples_k: int = 3,
        dense: Callable[[list[Document]], Scorer | None] = lambda documents: None,
        reranker: PairScorer | None = None,
    ) -> None:
        self._rules, self._examples, self._rules_k, self._examples_k = rules, examples, rules_k, examples_k
        self._of_rules: Retriever | Neighbours | None = None
        self._of_examples: Retriever | None = None
        if rules:
            documents = rule_documents(rules)
            texts = _retriever(documents, BM25(documents), dense(documents), None if labels else reranker)
            self._of_rules = Neighbours(examples, labels, rules, texts) if labels else texts
        if examples:
            documents = example_documents(examples)
            self._of_examples = _retriever(documents, EditBM25(documents), dense(documents), reranker)

    def rules(self, records: Sequence[Record]) -> list[list[tuple[float, Rule]]]:
        """Return the (score, rule) pairs of each record, best first."""
        hits = self._of_rules.search_all(records, self._rules_k) if self._of_rules else [[] for _ in records]
        return [[(hit.score, self._rules[hit.position]) for hit in row] for row in hits]

    def examples(self, records: Sequence[Record]) -> list[list[tuple[float, Record]]]:
        """Return the (score, solved question) pairs of each record, best first."""
        hits = self._of_examples.search_all(records, self._examples_k) if self._of_examples else [[] for _ in records]
        return [[(hit.score, self._examples[hit.position]) for hit in row] for row in hits]


def _retriever(
    documents: list[Document], scorer: Scorer, dense: Scorer | None, reranker: PairScorer | None
) -> Retriever:
    return Retriever(documents, [scorer] if dense is None else [scorer, dense], reranker)
