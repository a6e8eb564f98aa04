"""Which rule makes the gold answer likelier: PPL mining of context labels.

For a question q with gold answer a and each rule c of the rule book::

    delta = PPL(a|q) - PPL(a|c,q)        improvement_ratio = delta / PPL(a|q)

and the rules with the largest delta label the question. This needs the gold answer: it labels training data and has no
place at test time. ``PPL`` of a choice question's options needs none: each option's verdict is scored without a rule.

Prompt order. The rule stands before the question, as in the prompts of training, so that all questions share a rule's
beginning, which is computed once; a pair costs the tokens of its question and answer alone. With the question first,
the shared part would be the shorter one. docs/mining.md says what the order does to the ranking.

Resuming. The batches follow from the inputs alone. Each one's results are one line of a part file, so a killed run goes
on with the batch that it was at and ends in the same result.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from malpyeong.contest.particles import subject_particle
from malpyeong.contest.question import options
from malpyeong.contest.records import Record
from malpyeong.contest.rulebook import Rule
from malpyeong.errors import InputError, printable
from malpyeong.files import PartFile
from malpyeong.prompts.context import load_contexts
from malpyeong.prompts.messages import build_messages, completion_ids, prompt_ids
from malpyeong.training.perplexity import Row, check_parts, perplexities, shared_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_RULE = 0  # position of "no rule" among a plan's contexts


class Batch(NamedTuple):
    """Rows (positions in :attr:`Plan.rows`) that are computed together after one context."""

    context: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Everything that is computed, in tokens and in order.

    Attributes:
        heads: the shared beginning of the prompt for each context: no rule, then every rule.
        rows: the question's end of the prompt with its gold answer, one for each record, in their order; then the same
            with each option's verdict for an answer.
        options: for each record the (sentence, position in ``rows``) of its options.
        batches: contexts in order, long rows first.
    """

    heads: list[list[int]]
    rows: list[Row]
    options: list[list[tuple[str, int]]]
    batches: list[Batch]

    @property
    def pairs(self) -> int:
        """How many perplexities are computed."""
        return sum(len(batch.rows) for batch in self.batches)

    @property
    def tokens(self) -> int:
        """How many tokens the model reads."""
        contexts = {batch.context for batch in self.batches}
        return sum(len(self.heads[context]) for context in contexts) + sum(map(self.cost, self.batches))

    @property
    def naive_tokens(self) -> int:
        """How many tokens it would read with a whole forward for every perplexity."""
        return sum(len(batch.rows) * len(self.heads[batch.context]) + self.cost(batch) for batch in self.batches)

    def cost(self, batch: Batch) -> int:
        """Return the tokens of a batch after its context."""
        return sum(len(self.rows[row]) for row in batch.rows)

    def digest(self) -> str:
        """Return a digest of all tokens and their order: of data, rules, tokenizer, template and batch size."""
        return hashlib.sha256(json.dumps([self.heads, self.rows, self.batches]).encode()).hexdigest()


def make_plan(
    tokenizer: "PreTrainedTokenizerBase",
    records: Sequence[Record],
    rules: Sequence[Rule],
    candidates: Mapping[str, Sequence[str]] | None,
    max_length: int,
    batch_tokens: int,
) -> Plan:
    """Lay out the whole work.

    Args:
        tokenizer: with a chat template.
        records: questions with gold answers.
        rules: every rule that may be a candidate.
        candidates: for each record's id the rules to try, or None to try every rule.
        max_length: limit of prompt and answer together, in tokens.
        batch_tokens: limit of a batch: rows times (context + longest row).

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

    batches = []
    for number, context in enumerate(contexts):
        members = list(range(len(rows) if context is None else len(records)))
        if context is not None and candidates is not None:
            members = [row for row in members if context.id in candidates[records[row].id]]
        members.sort(key=lambda row: (-len(rows[row]), row))
        if members and len(heads[number]) + len(rows[members[0]]) > max_length:
            longest = len(heads[number]) + len(rows[members[0]])
            where = f'rule "{context.id}"' if context else "no rule"
            raise InputError(
                f"a question with {where} and its answer have {longest} tokens, over model.max_length={max_length}; "
                f"raise it (to {max(map(len, heads)) + max(map(len, rows))} for everything) or shorten the rule"
            )
        while members:
            size = max(1, batch_tokens // (len(heads[number]) + len(rows[members[0]])))
            batches.append(Batch(number, tuple(members[:size])))
            del members[:size]
    return Plan(heads, rows, named, batches)


def mine(model: Any, plan: Plan, pad: int, done: int = 0) -> Iterator[list[float]]:  # noqa: ANN401 -- a causal LM
    """Yield the perplexities of each batch of the plan, from the batch ``done`` on.

    Raises:
        InputError: the model gives a perplexity that is not a number, or another one for a whole sequence than for one
            in parts.
    """
    rest = plan.batches[done:]
    if rest:
        longest = max(rest, key=lambda batch: len(plan.heads[batch.context]))
        check_parts(model, plan.heads[longest.context], [plan.rows[longest.rows[0]], plan.rows[longest.rows[-1]]], pad)
    for context, batches in groupby(rest, key=lambda batch: batch.context):
        prefix = shared_prefix(model, plan.heads[context])
        for batch in batches:
            yield perplexities(model, prefix, [plan.rows[row] for row in batch.rows], pad)


def ranked(
    plan: Plan, records: Sequence[Record], rules: Sequence[Rule], found: Sequence[Sequence[float]], top_k: int
) -> list[dict[str, Any]]:
    """Return one JSON object for each record: its perplexity, the ``top_k`` rules by delta, and its options.

    Rules of equal delta stand in the order of the rule book.
    """
    ppl: dict[tuple[int, int], float] = {}
    for batch, values in zip(plan.batches, found, strict=True):
        ppl.update({(batch.context, row): value for row, value in zip(batch.rows, values, strict=True)})
    results = []
    for row, record in enumerate(records):
        alone = ppl[NO_RULE, row]
        tried = [(rule.id, ppl[number, row]) for number, rule in enumerate(rules, 1) if (number, row) in ppl]
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
                    {"sentence": sentence, "ppl": _short(ppl[NO_RULE, place])} for sentence, place in plan.options[row]
                ],
            }
        )
    return results


def computed(part: PartFile, plan: Plan) -> list[list[float]]:
    """Return the perplexities of the batches that an earlier start has left in ``part``.

    Raises:
        InputError: they are not those of the plan's first batches.
    """
    try:
        numbers, found = [piece["batch"] for piece in part.pieces], [list(piece["ppl"]) for piece in part.pieces]
    except (KeyError, TypeError):
        raise part.damaged() from None
    sizes = [len(batch.rows) for batch in plan.batches[: len(found)]]
    if numbers != list(range(len(found))) or list(map(len, found)) != sizes:
        raise part.damaged()
    return found


def weights_digest(model: Any) -> str:  # noqa: ANN401 -- a transformers or PEFT model
    """Return a digest of the weights in use, the adapter's among them, as they are held (4-bit or not)."""
    import torch

    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode())
        found.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return found.hexdigest()


def load_candidates(path: Path, records: Sequence[Record], rules: Sequence[Rule]) -> dict[str, list[str]]:
    """Read which rules to try for each record, from a context file (``malpyeong.retrieval search``).

    Raises:
        InputError: the file is defective, a record has no line, or a rule is not the rule book's.
    """
    known = {rule.id: rule for rule in rules}
    candidates = {}
    for record, context in zip(records, load_contexts(path, records), strict=True):
        for rule in context.rules:
            if known.get(rule.id) != rule:
                raise InputError(
                    f'{path}: id "{printable(record.id, 40)}": its rule "{printable(rule.id, 40)}" is not in the rule '
                    "book as it stands there; make the file again with the same rule book"
                )
        candidates[record.id] = [rule.id for rule in context.rules]
    return candidates


def _answer(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    return completion_ids(tokenizer, text)[:-1]  # without the end of the turn


def _short(value: float) -> float:
    """Return a value with the six digits that float32 carries."""
    return float(f"{value:.6g}")
