"""Which rule makes the gold answer likelier: PPL mining of context labels.

For a question q with gold answer a and each rule c of the rule book::

    delta = PPL(a|q) - PPL(a|c,q)        improvement_ratio = delta / PPL(a|q)

and the rules with the largest delta label the question. This needs the gold answer: it labels training data and has no
place at test time. ``PPL`` of a choice question's options needs none: each option's verdict is scored without a rule.

Prompt order. The rule stands before the question, as in the prompts of training, so that all questions share a rule's
beginning, which is computed once; a pair costs the tokens of its question and answer alone. With the question first,
the shared part would be the shorter one. docs/mining.md says what the order does to the ranking.

Resuming. The batches follow from the inputs and from the results before them. Each one's results are one line of a part
file, so a killed run goes on with the batch that it was at and ends in the same result.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from malpyeong.contest.particles import subject_particle
from malpyeong.contest.question import options
from malpyeong.contest.records import Record
from malpyeong.contest.rulebook import Rule
from malpyeong.errors import InputError
from malpyeong.files import PartFile
from malpyeong.prompts.messages import build_messages, completion_ids, prompt_ids
from malpyeong.training.perplexity import Row, check_parts, perplexities, shared_prefix

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

NO_RULE = 0  # position of "no rule" among a plan's contexts


class Batch(NamedTuple):
    """Rows (positions in :attr:`Plan.rows`) that are computed together after one context."""

    context: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What may be computed, in tokens.

    Attributes:
        heads: the shared beginning of the prompt for each context: no rule, then every rule.
        rows: the question's end of the prompt with its gold answer, one for each record, in their order; then the same
            with each option's verdict for an answer.
        options: for each record the (sentence, position in ``rows``) of its options.
        batch_tokens: limit of a batch: rows times (context + longest row).
    """

    heads: list[list[int]]
    rows: list[Row]
    options: list[list[tuple[str, int]]]
    batch_tokens: int

    def batches(self, pairs: Iterable[tuple[int, int]]) -> list[Batch]:
        """Return (context, row) pairs in batches: contexts in order, long rows first."""
        batches = []
        for context, members in groupby(sorted(pairs, key=self._order), key=itemgetter(0)):
            rows = [row for _, row in members]
            while rows:
                size = max(1, self.batch_tokens // (len(self.heads[context]) + len(self.rows[rows[0]])))
                batches.append(Batch(context, tuple(rows[:size])))
                del rows[:size]
        return batches

    def alone(self) -> list[tuple[int, int]]:
        """Return the pairs of every row and no rule."""
        return [(NO_RULE, row) for row in range(len(self.rows))]

    def all_pairs(self) -> list[tuple[int, int]]:
        """Return the pairs of every row and no rule, and of every record and rule."""
        records = range(len(self.options))
        return [*self.alone(), *((context, row) for context in range(1, len(self.heads)) for row in records)]

    def cost(self, batch: Batch) -> int:
        """Return the tokens of a batch after its context."""
        return sum(len(self.rows[row]) for row in batch.rows)

    def tokens(self, pairs: Collection[tuple[int, int]]) -> int:
        """Return how many tokens the model reads for the pairs of one pass."""
        heads = sum(len(self.heads[context]) for context in {context for context, _ in pairs})
        return heads + sum(len(self.rows[row]) for _, row in pairs)

    def naive_tokens(self, pairs: Collection[tuple[int, int]]) -> int:
        """Return how many tokens it would read with a whole forward for every perplexity."""
        return sum(len(self.heads[context]) + len(self.rows[row]) for context, row in pairs)

    def digest(self) -> str:
        """Return a digest of all tokens and of the batch size: of data, rules, tokenizer and template."""
        return hashlib.sha256(json.dumps([self.heads, self.rows, self.batch_tokens]).encode()).hexdigest()

    def _order(self, pair: tuple[int, int]) -> tuple[int, int, int]:
        context, row = pair
        return context, -len(self.rows[row]), row


def make_plan(
    tokenizer: "PreTrainedTokenizerBase",
    records: Sequence[Record],
    rules: Sequence[Rule],
    max_length: int,
    batch_tokens: int,
) -> Plan:
    """Tokenize every prompt and answer.

    Args:
        tokenizer: with a chat template.
        records: questions with gold answers.
        rules: every rule that may be a candidate.
        max_length: limit of prompt and answer together, in tokens.
        batch_tokens: see :class:`Plan`.

    Raises:
        InputError: a question, rule and answer together have more than ``max_length`` tokens, or the chat template does
            not put the rule before the question.
    """
    contexts = [None, *rules]

    def prompt(context: Rule | None, record: Record) -> list[int]:
        return prompt_ids(tokenizer, build_messages(record, rules=[context] if context else ()))

    # A prompt is one of `heads` and one of `ends`. Only the prompts of the first record and of the first rule are
    # rendered whole; where the tokenizer merged over the seam, the two would not meet.
    prompts = [prompt(contexts[-1], record) for record in records]
    shared = len(os.path.commonprefix(prompts)) if len(prompts) > 1 else len(prompts[0]) - 1
    shared = min(shared, min(map(len, prompts)) - 1)
    ends = [ids[shared:] for ids in prompts]
    heads = []
    for context in contexts:
        ids = prompt(context, records[0])
        if ids[-len(ends[0]) :] != ends[0]:
            raise InputError(
                "the chat template or tokenizer of the model does not keep the rule apart "
                "from the question after it; choose another model"
            )
        heads.append(ids[: -len(ends[0])])

    rows = [Row(end, _answer(tokenizer, record.answer or "")) for end, record in zip(ends, records, strict=True)]
    named: list[list[tuple[str, int]]] = []
    for end, record in zip(ends, records, strict=True):
        named.append([])
        for sentence in options(record):
            named[-1].append((sentence, len(rows)))
            rows.append(Row(end, _answer(tokenizer, f'"{sentence}"{subject_particle(sentence)} 옳다.')))

    longest = max(range(len(heads)), key=lambda context: len(heads[context]))
    needed = len(heads[longest]) + max(map(len, rows))
    if needed > max_length:
        where = f'rule "{rules[longest - 1].id}"' if longest else "no rule"
        raise InputError(
            f"a question with {where} and its answer have {needed} tokens, over model.max_length={max_length}; raise "
            f"it to {needed} or shorten the rule"
        )
    return Plan(heads, rows, named, batch_tokens)


def mine(
    model: Any,  # noqa: ANN401 -- a causal LM
    plan: Plan,
    batches: Sequence[Batch],
    pad: int,
    part: PartFile,
) -> Iterator[list[float]]:
    """Yield the perplexities of each batch: those that an earlier start has left in ``part``, then the others, which
    are added to it.

    Raises:
        InputError: what is left there is not of these batches; the model gives a perplexity that is not a number, or
            another one for a whole sequence than for one in parts.
    """
    pieces = part.pieces[: len(batches)]
    del part.pieces[: len(batches)]
    for batch, piece in zip(batches, pieces, strict=False):
        try:
            values = [float(value) for value in piece["ppl"]]
            if (piece["rule"], piece["rows"], len(values)) != (batch.context, list(batch.rows), len(batch.rows)):
                raise part.damaged()
        except (KeyError, TypeError, ValueError):
            raise part.damaged() from None
        yield values
    rest = batches[len(pieces) :]
    if rest:
        longest = max(rest, key=lambda batch: len(plan.heads[batch.context]))
        check_parts(model, plan.heads[longest.context], [plan.rows[longest.rows[0]], plan.rows[longest.rows[-1]]], pad)
    for context, members in groupby(rest, key=lambda batch: batch.context):
        prefix = shared_prefix(model, plan.heads[context])
        for batch in members:
            values = perplexities(model, prefix, [plan.rows[row] for row in batch.rows], pad)
            part.add({"rule": batch.context, "rows": batch.rows, "ppl": values})
            yield values


def pairs_of(chosen: "NDArray[np.bool_]") -> list[tuple[int, int]]:
    """Return the (context, row) pairs of what is chosen, of shape (questions, rules)."""
    return [(rule + 1, row) for row, rule in zip(*(axis.tolist() for axis in chosen.nonzero()), strict=True)]


def improvement_ratios(ppl: Mapping[tuple[int, int], float], questions: int, rules: int) -> "NDArray[np.float64]":
    """Return the improvement ratios of shape (questions, rules), NaN where a pair was not computed."""
    import numpy as np

    ratios = np.full((questions, rules), np.nan)
    for (context, row), value in ppl.items():
        if context != NO_RULE:
            ratios[row, context - 1] = (ppl[NO_RULE, row] - value) / ppl[NO_RULE, row]
    return ratios


def ranked(
    plan: Plan, records: Sequence[Record], rules: Sequence[Rule], ppl: Mapping[tuple[int, int], float], top_k: int
) -> list[dict[str, Any]]:
    """Return one JSON object for each record: its perplexity, the ``top_k`` rules by delta, and its options.

    Rules of equal delta stand in the order of the rule book.

    Args:
        plan: of the work.
        records: its questions.
        rules: its rules.
        ppl: the perplexity of each (context, row).
        top_k: how many rules a record is given.
    """
    results = []
    for row, record in enumerate(records):
        alone = ppl[NO_RULE, row]
        tried = [(rule.id, ppl[context, row]) for context, rule in enumerate(rules, 1) if (context, row) in ppl]
        tried.sort(key=lambda pair: pair[1])
        results.append(
            {
                "id": record.id,
                "question": record.question,
                "ppl_question": _short(alone),
                "candidates": [
                    {
                        "rule": id_,
                        "ppl": _short(value),
                        "delta": _short(alone - value),
                        "improvement_ratio": _short((alone - value) / alone),
                    }
                    for id_, value in tried[:top_k]
                ],
                "options": [
                    {"sentence": sentence, "ppl": _short(ppl[NO_RULE, verdict])}
                    for sentence, verdict in plan.options[row]
                ],
            }
        )
    return results


def weights_digest(model: Any) -> str:  # noqa: ANN401 -- a transformers or PEFT model
    """Return a digest of the weights in use, the adapter's among them, as they are held (4-bit or not)."""
    import torch

    sha256 = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        sha256.update(name.encode())
        sha256.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return sha256.hexdigest()


def _answer(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    return completion_ids(tokenizer, text)[:-1]  # without the end of the turn


def _short(value: float) -> float:
    """Return a value with the six digits that float32 carries."""
    return float(f"{value:.6g}")
