"""How well rules and solved examples are found, beside what chance and an oracle would find.

Rules are judged by exact ids: one rule is right for a question, and a document counts only if its id is that rule's.
Examples are judged by what they are for: the ROUGE-1 of the nearest example's reason, copied as it stands.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from malpyeong.contest.answer import contest_split
from malpyeong.contest.records import Record
from malpyeong.contest.rulebook import Rule
from malpyeong.errors import InputError, printable
from malpyeong.retrieval.bm25 import BM25
from malpyeong.retrieval.search import Document, Retriever, Scorer, example_documents

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from malpyeong.retrieval.neural import Reranker

CUTS = (1, 5, 10, 30)
NDCG_CUT = 10
RESAMPLES = 2_000


@dataclass(frozen=True, slots=True)
class Measure:
    """A mean over questions with its 95 % bootstrap interval (percentiles; Efron & Tibshirani 1993)."""

    mean: float
    low: float
    high: float


def evaluate_rules(
    records: Sequence[Record], labels: Mapping[str, str], rules: Sequence[Rule], methods: Mapping[str, Retriever]
) -> dict[str, dict[str, Measure]]:
    """Return for each method Recall@1/5/10/30, MRR and nDCG@10 of the labelled rule.

    Args:
        records: the questions; their answers are not used.
        labels: record id → id of its rule.
        rules: what is searched.
        methods: name → retriever over the rules.

    Raises:
        KeyError: a record has no label.
    """
    import numpy as np

    size = len(rules)
    table = {"random": _expected_of_random(size, len(records))}
    for name, retriever in methods.items():
        ranks = []
        for record, hits in zip(records, retriever.search_all(records, size), strict=True):
            found = [rank for rank, hit in enumerate(hits, 1) if hit.id == labels[record.id]]
            ranks.append(found[0] if found else np.inf)
        table[name] = rank_measures(np.array(ranks, dtype=np.float64))
    return {**table, "oracle": rank_measures(np.ones(len(records)))}


def rank_measures(ranks: "NDArray[np.float64]") -> dict[str, Measure]:
    """Return the measures of the ranks (from 1; inf if not found) of the one right document of each question.

    With one right document Recall@k is the share of ranks up to k, and nDCG (Järvelin & Kekäläinen 2002) is
    1 / log2(1 + rank).
    """
    import numpy as np

    gains = np.where(ranks <= NDCG_CUT, 1 / np.log2(1 + ranks), 0)
    return {
        **{f"Recall@{cut}": measure((ranks <= cut).astype(np.float64)) for cut in CUTS},
        "MRR": measure(1 / ranks),
        f"nDCG@{NDCG_CUT}": measure(gains),
    }


def evaluate_examples(
    records: Sequence[Record],
    labels: Mapping[str, str],
    examples: Sequence[Record],
    methods: Mapping[str, Retriever],
) -> dict[str, dict[str, Measure]]:
    """Return for each method the ROUGE-1 of the nearest example's reason, and how often that example has the
    question's rule.

    The oracle takes the example whose reason is most like the gold one; a random choice is given by its expectation
    over all examples. Neither may take a solved question about the same sentence. A method that finds nothing scores 0.

    Args:
        records: questions with gold answers, which only the measure looks at.
        labels: record id → id of its rule; may lack examples, then the second measure is left out.
        examples: what is searched.
        methods: name → retriever over the examples.
    """
    import numpy as np

    reasons = [contest_split(record.answer or "")[1] for record in records]
    rouge = rouge_matrix(reasons, [contest_split(example.answer or "")[1] for example in examples])
    same = None
    if all(record.id in labels for record in (*records, *examples)):
        rules = np.array([labels[example.id] for example in examples])
        same = np.array([rules == labels[record.id] for record in records], dtype=np.float64)
    allowed = np.ones_like(rouge)
    twins = Retriever(example_documents(examples), ())
    for row, record in zip(allowed, records, strict=True):
        row[list(twins.twins(record))] = 0

    def of_choice(weights: "NDArray[np.float64]") -> dict[str, Measure]:
        """Weights of shape (questions, examples): the probability of taking each."""
        found = {"copied reason ROUGE-1": measure((weights * rouge).sum(1))}
        return found if same is None else {**found, "same rule": measure((weights * same).sum(1))}

    def one_each(places: Sequence[int | None]) -> "NDArray[np.float64]":
        weights = np.zeros_like(rouge)
        for row, place in zip(weights, places, strict=True):
            if place is not None:
                row[place] = 1
        return weights

    table = {"random": of_choice(allowed / np.maximum(1, allowed.sum(1, keepdims=True)))}
    for name, retriever in methods.items():
        nearest = [hits[0].position if hits else None for hits in retriever.search_all(records, 1)]
        table[name] = of_choice(one_each(nearest))
    best = np.where(allowed > 0, rouge, -1).argmax(1)
    return {**table, "oracle": of_choice(one_each([int(place) for place in best]))}


def methods(
    documents: Sequence[Document], dense: Scorer | None = None, reranker: "Reranker | None" = None
) -> dict[str, Retriever]:
    """Return the compared retrievers over ``documents``: BM25 step by step, and what the given models add."""
    weighted = BM25(documents)
    found = {
        "BM25, morphemes": Retriever(documents, [BM25(documents, bigrams=False, focus_weight=0)]),
        "BM25, + character pairs": Retriever(documents, [BM25(documents, focus_weight=0)]),
        "BM25, + weighted words": Retriever(documents, [weighted]),
    }
    scorers: list[Scorer] = [weighted]
    if dense is not None:
        scorers.append(dense)
        found["dense"] = Retriever(documents, [dense])
        found["BM25 and dense, fused"] = Retriever(documents, scorers)
    if reranker is not None:
        found["reranked"] = Retriever(documents, scorers, reranker)
    return found


def rouge_matrix(references: Sequence[str], candidates: Sequence[str]) -> "NDArray[np.float64]":
    """Return the ROUGE-1 F1 of every pair, of shape (references, candidates), as ``malpyeong.metrics.rouge`` does.

    Clipped counts become sets once a text's n-th use of a morpheme is told from its first, so that all overlaps are one
    matrix product.
    """
    import numpy as np

    from malpyeong.metrics.rouge import MorphemeTokenizer

    tokenizer = MorphemeTokenizer()
    places: dict[tuple[str, int], int] = {}

    def used(text: str) -> list[int]:
        seen: Counter[str] = Counter()
        found = []
        for morpheme in tokenizer.tokenize(text):
            seen[morpheme] += 1
            found.append(places.setdefault((morpheme, seen[morpheme]), len(places)))
        return found

    sides = [[used(text) for text in side] for side in (references, candidates)]
    matrices = []
    for side in sides:
        matrix = np.zeros((len(side), len(places)), dtype=np.float32)
        for row, positions in zip(matrix, side, strict=True):
            row[positions] = 1
        matrices.append(matrix)
    lengths = [np.array([len(positions) for positions in side], dtype=np.float64) for side in sides]
    both = lengths[0][:, None] + lengths[1][None, :]
    overlaps = (matrices[0] @ matrices[1].T).astype(np.float64)
    f1: NDArray[np.float64] = 2 * overlaps / np.maximum(1, both)
    return f1


def check_labels(path: Path, labels: Mapping[str, str], records: Sequence[Record], rules: Sequence[Rule]) -> None:
    """Make sure that every record has a label, and that it is the id of a rule.

    Raises:
        InputError: names the first record of which that is not so.
    """
    known = {rule.id for rule in rules}
    for record in records:
        if record.id not in labels:
            raise InputError(f'{path}: has no label for id "{printable(record.id, 40)}"; label every question')
        if labels[record.id] not in known:
            raise InputError(
                f'{path}: id "{printable(record.id, 40)}" is labelled "{printable(labels[record.id], 60)}", which the '
                "rule book does not have; ids must be the same to the letter"
            )


def measure(values: "NDArray[np.float64]") -> Measure:
    """Return the mean of a value for each question, and its interval."""
    import numpy as np

    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[drawn].mean(1), [2.5, 97.5])
    return Measure(float(values.mean()), float(low), float(high))


def _expected_of_random(size: int, questions: int) -> dict[str, Measure]:
    """Return what a random order of ``size`` documents, one of them right, gives on average."""
    import numpy as np

    ranks = np.arange(1, size + 1, dtype=np.float64)
    expected = {f"Recall@{cut}": min(1.0, cut / size) for cut in CUTS}
    expected["MRR"] = float((1 / ranks).mean())
    expected[f"nDCG@{NDCG_CUT}"] = float(np.where(ranks <= NDCG_CUT, 1 / np.log2(1 + ranks), 0).mean())
    return {name: Measure(value, value, value) for name, value in expected.items()}


def markdown(table: Mapping[str, Mapping[str, Measure]]) -> str:
    """Return a Markdown table of means with their intervals."""
    names = list(next(iter(table.values())))
    lines = [f"| | {' | '.join(names)} |", "|-" * (len(names) + 1) + "|"]
    for method, measures in table.items():
        cells = [
            f"{one.mean:.3f}" + (f" ({one.low:.3f}–{one.high:.3f})" if one.low != one.high else "")
            for one in measures.values()
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)
