"""Rules to choose among, from what similar solved questions needed.

The labels of the most similar solved questions vote: each gives its rules their gains, as shares of the best one's,
times its similarity. The votes and BM25 over the rules' texts are brought to mean 0 and standard deviation 1 over the
rules, and added.

Nothing of a question's own answer or label reaches its candidates: what is asked is a
:class:`~malpyeong.retrieval.search.Query`, which holds no answer, and where the question is one of the solved ones, it
and its twins neither vote nor are in the index that the others are searched in.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from malpyeong.contest.records import Record
from malpyeong.contest.rulebook import Rule
from malpyeong.errors import InputError, printable
from malpyeong.prompts.rule_choice import Labels
from malpyeong.retrieval.bm25 import EditBM25
from malpyeong.retrieval.search import Hit, Query, Retriever, example_documents, read_query

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Chosen on the sample data (docs/retrieval.md).
VOTERS = 100
POWER = 2  # of the similarity, as a share of the most similar one's


class Neighbours:
    """Finds rules for questions.

    Args:
        examples: solved questions.
        labels: which rules help with each of them, None where that is not known.
        rules: the rule book.
        texts: searches the rules' texts; None to go by the votes alone.

    Raises:
        InputError: a label's rule is not in the rule book, or no example has a label.
    """

    def __init__(
        self,
        examples: Sequence[Record],
        labels: Sequence[Labels | None],
        rules: Sequence[Rule],
        texts: Retriever | None,
    ) -> None:
        import numpy as np

        self._rules, self._texts = rules, texts
        documents = example_documents(examples)
        self._examples = Retriever(documents, [EditBM25(documents)])
        self._gains = np.zeros((len(examples), len(rules)))
        columns = {rule.id: column for column, rule in enumerate(rules)}
        for row, record, label in zip(self._gains, examples, labels, strict=True):
            for id_, share in label.shares.items() if label else ():
                if id_ not in columns:
                    raise InputError(
                        f'id "{printable(record.id, 40)}" is labelled "{printable(id_, 60)}", which the rule book does '
                        "not have; ids must be the same to the letter"
                    )
                row[columns[id_]] = share
        if not self._gains.any():
            raise InputError("no solved question has a label: nothing to vote with; see docs/mining.md")

    def search_all(self, records: Sequence[Record], k: int) -> list[list[Hit]]:
        """Return the best ``k`` rules for each record, best first."""
        import numpy as np

        queries = [read_query(record) for record in records]
        scores = _standardised(self.votes(queries))
        if self._texts is not None:
            scores += _standardised(np.nan_to_num(self._texts.scores(queries), neginf=0))
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return [
            [Hit(self._rules[column].id, int(column), round(float(row[column]), 6)) for column in columns]
            for row, columns in zip(scores, best, strict=True)
        ]

    def votes(self, queries: Sequence[Query]) -> "NDArray[np.float64]":
        """Return the votes for each rule, of shape (queries, rules)."""
        import numpy as np

        similarities = self._examples.scores(queries, [self._examples.withheld(query) for query in queries])
        votes = np.zeros((len(queries), len(self._rules)))
        for row, scores in zip(votes, similarities, strict=True):
            nearest = np.argsort(-scores, kind="stable")[:VOTERS]
            nearest = nearest[np.isfinite(scores[nearest])]
            if len(nearest):
                row[:] = (scores[nearest] / scores[nearest[0]]) ** POWER @ self._gains[nearest]
        return votes


def _standardised(scores: "NDArray[np.float64]") -> "NDArray[np.float64]":
    """Return each row with mean 0 and standard deviation 1; all 0 where it has none."""
    import numpy as np

    centred = scores - scores.mean(1, keepdims=True)
    deviations = centred.std(1, keepdims=True)
    standardised: NDArray[np.float64] = np.divide(centred, deviations, out=np.zeros_like(centred), where=deviations > 0)
    return standardised
