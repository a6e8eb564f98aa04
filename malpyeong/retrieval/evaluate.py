"""How well rules and solved examples are found, beside what chance and an oracle would find.

Rules are judged by exact ids: one rule is right for a question, and a document counts only if its id is that rule's.
Examples are judged by what they are for: the ROUGE-1 of the nearest example's reason, copied as it stands. With a
sentence that the question itself offers, that reason makes the floor: what an answer without any model scores.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from malpyeong.contest.answer import contest_split, format_problem, parse_answer
from malpyeong.contest.particles import subject_particle
from malpyeong.contest.question import read_record
from malpyeong.contest.records import Record
from malpyeong.contest.rulebook import Rule
from malpyeong.errors import InputError, printable
from malpyeong.metrics.bootstrap import interval, resampled_means
from malpyeong.metrics.exact_match import exact_match
from malpyeong.prompts.rule_choice import Labels
from malpyeong.retrieval.bm25 import BM25, EditBM25
from malpyeong.retrieval.neighbours import Neighbours
from malpyeong.retrieval.search import Document, Hit, Retriever, Scorer, example_documents, rule_documents

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from malpyeong.retrieval.neural import Reranker

CUTS = (1, 3, 5, 10, 30)
NDCG_CUT = 10


@dataclass(frozen=True, slots=True)
class Measure:
    """A mean over questions with its 95 % interval (see :mod:`malpyeong.metrics.bootstrap`)."""

    mean: float
    low: float
    high: float


class Finder(Protocol):
    """Finds documents for questions: a :class:`Retriever`, or :class:`Neighbours`."""

    def search_all(self, records: Sequence[Record], k: int) -> list[list[Hit]]:
        """Return the best ``k`` documents for each record, best first."""
        ...


def evaluate_rules(
    records: Sequence[Record], labels: Mapping[str, str], rules: Sequence[Rule], methods: Mapping[str, Finder]
) -> dict[str, dict[str, Measure]]:
    """Return for each method Recall at :data:`CUTS`, MRR and nDCG@10 of the labelled rule.

    Args:
        records: the questions; their answers are not used.
        labels: record id → id of its rule.
        rules: what is searched.
        methods: name → what finds the rules.

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
    """Return for each method the ROUGE-1 of the nearest example's reason, how much that is above the first method's
    (a paired difference), and how often that example has the question's rule.

    The oracle takes the example whose reason is most like the gold one; a random choice is given by its expectation
    over all examples. Neither may take a solved question about the same sentence. A method that finds nothing scores 0.

    Args:
        records: questions with gold answers, which only the measure looks at.
        labels: record id → id of its rule; may lack examples, then the last measure is left out.
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
        row[list(twins.withheld_from(record))] = 0

    def nearest_of(retriever: Retriever) -> "NDArray[np.float64]":
        return one_each([hits[0].position if hits else None for hits in retriever.search_all(records, 1)])

    def one_each(places: Sequence[int | None]) -> "NDArray[np.float64]":
        weights = np.zeros_like(rouge)
        for row, place in zip(weights, places, strict=True):
            if place is not None:
                row[place] = 1
        return weights

    best = np.where(allowed > 0, rouge, -1).argmax(1)
    chosen = {  # probabilities of taking each example, of shape (questions, examples)
        "random": allowed / np.maximum(1, allowed.sum(1, keepdims=True)),
        **{name: nearest_of(retriever) for name, retriever in methods.items()},
        "oracle": one_each([int(place) for place in best]),
    }
    scores = {name: (weights * rouge).sum(1) for name, weights in chosen.items()}
    first = next(iter(methods), "random")
    table = {}
    for name, weights in chosen.items():
        table[name] = {"copied reason ROUGE-1": measure(scores[name])}
        table[name][f"above {first}"] = measure(scores[name] - scores[first])
        if same is not None:
            table[name]["same rule"] = measure((weights * same).sum(1))
    return table


def evaluate_floor(records: Sequence[Record], retriever: Retriever) -> dict[str, dict[str, Measure]]:
    """Return what answers without a model score: the first option, or the sentence as it is, and the nearest reason.

    Args:
        records: questions with gold answers.
        retriever: over solved questions.
    """
    import numpy as np

    from malpyeong.metrics.rouge import rouge_1

    matches, overlaps, formats = [], [], []
    for record, hits in zip(records, retriever.search_all(records, 1), strict=True):
        question = read_record(record)
        sentence = next(iter((*question.options, *question.sentences)), record.question.strip())
        reason = contest_split(retriever.record(hits[0]).answer or "")[1] if hits else ""
        answer, gold = f'"{sentence}"{subject_particle(sentence)} 옳다. {reason}', record.answer or ""
        matches.append(exact_match(answer, gold))
        formats.append(float(format_problem(answer) is None))
        reasons = contest_split(answer)[1], contest_split(gold)[1]
        if all(reasons):
            overlaps.append(rouge_1(*reasons))
    columns = {"EM": matches, "ROUGE-1": overlaps or [0.0], "format": formats}
    return {"no model": {name: measure(np.array(values)) for name, values in columns.items()}}


def rule_methods(
    rules: Sequence[Rule],
    dense: Scorer | None = None,
    reranker: "Reranker | None" = None,
    examples: Sequence[Record] = (),
    labels: Sequence[Labels | None] = (),
) -> dict[str, Finder]:
    """Return what is compared in finding rules: BM25 step by step, what the given models add, and, where ``labels`` of
    ``examples`` are given, the votes of neighbours, alone and with BM25 (and the dense model)."""
    documents = rule_documents(rules)
    weighted = BM25(documents)
    found: dict[str, Finder] = {
        "BM25, morphemes": Retriever(documents, [BM25(documents, bigrams=False, focus_weight=0)]),
        "BM25, + character pairs": Retriever(documents, [BM25(documents, focus_weight=0)]),
        "BM25, + weighted words": Retriever(documents, [weighted]),
    }
    texts = _with_models(found, documents, weighted, dense, reranker)
    if any(labels):
        found["neighbours' labels"] = Neighbours(examples, labels, rules, None)
        found["neighbours' labels and texts"] = Neighbours(examples, labels, rules, texts)
    return found


def example_methods(
    documents: Sequence[Document], dense: Scorer | None = None, reranker: "Reranker | None" = None
) -> dict[str, Retriever]:
    """Return what is compared in finding examples: BM25 of questions and reasons, of questions, with the edit, and what
    the given models add."""
    with_reasons = [
        replace(document, text=f"{document.text}\n{parse_answer(document.record.answer or '').reason}")
        for document in documents
        if document.record is not None
    ]
    edits = EditBM25(documents)
    found = {
        "questions and reasons": Retriever(documents, [BM25(with_reasons)]),
        "questions": Retriever(documents, [BM25(documents)]),
        "questions and edits": Retriever(documents, [edits]),
    }
    _with_models(found, documents, edits, dense, reranker)
    return found


def _with_models(
    found: "dict[str, Finder] | dict[str, Retriever]",
    documents: Sequence[Document],
    scorer: Scorer,
    dense: Scorer | None,
    reranker: "Reranker | None",
) -> Retriever:
    """Add the rows of the given models to ``found``; return the retriever without the reranker."""
    scorers = [scorer]
    if dense is not None:
        scorers.append(dense)
        found["dense"] = Retriever(documents, [dense])
        found["BM25 and dense, fused"] = Retriever(documents, scorers)
    if reranker is not None:
        found["reranked"] = Retriever(documents, scorers, reranker)
    return Retriever(documents, scorers)


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
    return Measure(float(values.mean()), *interval(resampled_means(values[:, None])))


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
            f"{one.mean:.3f}" + (f" ({one.low:.3f} to {one.high:.3f})" if one.low != one.high else "")
            for one in measures.values()
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)
