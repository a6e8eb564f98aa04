"""Well-formed answers as token ids: the grammar compiled for one tokenizer, and how an answer ends within its budget.

No engine is known here. An engine generates under a grammar up to a number of tokens; what has not ended by then is cut
back to where it can be closed: a sentence that takes up three quarters of the budget gets its verdict, after which the
reason is generated; a reason ends at its last whole sentence, or with a period.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from cachetools import LRUCache

from malpyeong.contest.grammar import answer_grammar, reason_grammar

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

MIN_CONSTRAINED_TOKENS = 64  # a shorter answer cannot always be closed in time

_HAS_VERDICT = re.compile(r'.\S"[가이] 옳다\.')  # behind a sentence: the opening quote closes nothing
_CLOSED_VERDICT = re.compile(rf"{_HAS_VERDICT.pattern}\Z")


def token_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Return the token ids of a part of an answer."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


class AnswerFormat:
    """The answer's grammar for one tokenizer, and the tokens that close an answer.

    Args:
        tokenizer: its eos token ends an answer.
        ends: further special tokens that may end it; its eos token may be among them.
        vocabulary: width of the model's logits; the tokenizer's size if that is larger.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", ends: Sequence[int], vocabulary: int = 0) -> None:
        import llguidance.hf

        self._tokenizer, self.pad = tokenizer, tokenizer.pad_token_id  # which follows a row that was stopped
        self.ends = {tokenizer.eos_token_id, *ends}
        self.vocabulary = max(vocabulary, len(tokenizer))
        kind: Any = tokenizer
        self._tokens = llguidance.hf.from_tokenizer(kind, n_vocab=self.vocabulary)
        self._compiled: LRUCache[str, Any] = LRUCache(256)
        self._closings = [token_ids(tokenizer, f'"{particle} 옳다.') for particle in ("가", "이")]
        # The second where there is no syllable yet, the third where there is nothing.
        self._endings = [token_ids(tokenizer, ending) for ending in (".", "다.", " 다.")]

    def grammar(self, verdict: str = "") -> str:
        """Return the grammar of what follows ``verdict``, of a whole answer if it is ""; the end tokens are in it.

        A grammar's own end is the tokenizer's eos token alone: in vLLM there is no other way to allow further ones.
        """
        return self._with_ends(reason_grammar(verdict) if verdict else answer_grammar())

    def json_grammar(self, schema: dict[str, Any]) -> str:
        """Return the grammar of JSON without needless white space that keeps to a JSON schema.

        Raises:
            ValueError: it is not a schema, or one that cannot be kept to; says why.
        """
        from llguidance import LLMatcher

        grammar = f"start: %json {json.dumps({**schema, 'x-guidance': {'whitespace_flexible': False}})}\n"
        if problem := LLMatcher.validate_grammar(grammar, self._tokens):
            raise ValueError(problem)
        return self._with_ends(grammar)

    def _with_ends(self, grammar: str) -> str:
        others = " | ".join(f"<[{token}]>" for token in sorted(self.ends - {self._tokenizer.eos_token_id}))
        return f"{grammar.replace('start:', 'answer:', 1)}start: answer ({others})?\n" if others else grammar

    def matcher(self, grammar: str) -> Any:  # noqa: ANN401 -- llguidance.LLMatcher
        """Return the state before the first token of a grammar."""
        from llguidance import LLMatcher, LLParserLimits

        if grammar not in self._compiled:
            # Ten times the default, which suffices as far as is known: a slow step is better than none.
            limits = LLParserLimits(step_lexer_fuel=2_000_000)
            self._compiled[grammar] = LLMatcher(self._tokens, grammar, limits=limits)
        return self._compiled[grammar].deep_copy()

    def close_sentence(self, ids: Sequence[int], limit: int) -> list[int] | None:
        """Return the beginning of a whole answer up to a verdict that was forced, or None where none has to be.

        Args:
            ids: the answer, of at most ``limit`` tokens, without an end token.
            limit: the answer's budget. A quarter of it, and at least a third of the smallest budget, is the reason's.
        """
        room = limit - max(limit // 4, MIN_CONSTRAINED_TOKENS // 3)
        if _HAS_VERDICT.search(self._text(ids[:room])):
            return None
        for begun in _cut_back(ids[:room], self._closings):
            if _CLOSED_VERDICT.search(self._text(begun)) and self._consumed(self.grammar(), begun):
                return begun
        return None

    def close_reason(self, grammar: str, ids: Sequence[int], limit: int) -> list[int]:
        """Return the answer's tokens up to the end of its last whole sentence within ``limit`` tokens.

        Where there is none, an ending is put behind as many tokens as leave room for it.

        Args:
            grammar: that ``ids`` were generated under, from its beginning.
            ids: what was generated, without an end token.
            limit: how many tokens there may be.
        """
        ids, whole, matcher = list(ids[:limit]), 0, self.matcher(grammar)
        for count, token in enumerate(ids, 1):
            if not matcher.consume_token(token):
                raise RuntimeError(f"constrained decoding took a token against the grammar: {matcher.get_error()}")
            if matcher.is_accepting():
                whole = count
        if whole:
            return ids[:whole]
        for ending in self._endings:
            for closed in _cut_back(ids[: max(0, limit - len(ending))], [ending]):
                matcher = self._consumed(grammar, closed)
                if matcher and matcher.is_accepting():
                    return closed
        return ids

    def _consumed(self, grammar: str, ids: list[int]) -> Any:  # noqa: ANN401 -- llguidance.LLMatcher | None
        matcher = self.matcher(grammar)
        return matcher if matcher.try_consume_tokens(ids) == len(ids) else None

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids)))


def _cut_back(ids: Sequence[int], closings: Sequence[list[int]]) -> Iterator[list[int]]:
    """Yield the beginnings of ``ids``, longest first, each with every closing."""
    for count in range(len(ids), -1, -1):
        for closing in closings:
            yield [*ids[:count], *closing]


class GrammarMask:
    """A logits processor that lets through what every row's grammar allows; rows that have ended cost nothing.

    Args:
        answer_format: whose end tokens end a row.
        grammars: of each row of the batch; None lets everything through.
        prompt_length: tokens of the padded prompts, after which the answers begin.
    """

    def __init__(self, answer_format: AnswerFormat, grammars: Sequence[str | None], prompt_length: int) -> None:
        from llguidance import LLExecutor
        from llguidance.numpy import allocate_token_bitmask

        self._ends, self._start, self._executor = answer_format.ends | {answer_format.pad}, prompt_length, LLExecutor()
        self._live = [(answer_format.matcher(grammar), row) for row, grammar in enumerate(grammars) if grammar]
        self._shifts: torch.Tensor | None = None
        self._masks = allocate_token_bitmask(len(grammars), answer_format.vocabulary)  # (rows, 32 tokens each)

    def __call__(self, input_ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        """Return ``scores`` (rows, vocabulary) with -inf where a token is not allowed."""
        import torch
        from llguidance.numpy import fill_next_token_bitmask_par

        if input_ids.shape[1] > self._start:
            self._take(input_ids[:, -1].tolist())
        if not self._live:
            return scores
        fill_next_token_bitmask_par(self._executor, self._live, self._masks)
        masks = torch.from_numpy(self._masks).to(scores.device)
        if self._shifts is None:
            self._shifts = torch.arange(32, dtype=torch.int32, device=scores.device)
        refused = (masks[:, :, None] >> self._shifts & 1 == 0).flatten(1)[:, : scores.shape[1]]
        return scores.masked_fill(refused, -torch.inf)

    def _take(self, tokens: Sequence[int]) -> None:
        live = []
        for matcher, row in self._live:
            if tokens[row] in self._ends:
                self._masks[row] = -1  # whatever: an ended row is padded
            elif matcher.consume_token(tokens[row]):
                live.append((matcher, row))
            else:
                raise RuntimeError(f"constrained decoding took a token against the grammar: {matcher.get_error()}")
        self._live = live
