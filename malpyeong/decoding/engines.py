"""Engines: what turns prompts into answers. transformers anywhere, vLLM on a GPU; both behind one :class:`Engine`.

Constrained answers are well formed by construction. Where a question offers options, the verdict is the likeliest of
those that it can have (:func:`malpyeong.contest.question.verdicts`), and only the reason is generated; elsewhere the
whole answer is generated under the grammar of :func:`malpyeong.contest.answer.answer_grammar`. This is for prediction
alone: in RL rollouts it would hide from the rewards what the model does by itself.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from malpyeong.contest.answer import answer_grammar, reason_grammar
from malpyeong.contest.question import pick_verdict, verdicts
from malpyeong.contest.records import Record
from malpyeong.contest.repair import finish
from malpyeong.errors import InputError
from malpyeong.prompts.context import Context
from malpyeong.prompts.messages import context_messages, prompt_ids
from malpyeong.prompts.rule_choice import NONE, tag

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

MIN_CONSTRAINED_TOKENS = 64  # a shorter answer cannot always be closed in time


@dataclass(frozen=True, slots=True)
class Decoding:
    """How answers are decoded.

    Attributes:
        constrained: well formed by construction, and a literal option where options are offered.
        samples: answers per record; the first is greedy, the others are drawn.
        temperature: of the drawn ones.
        seed: of the drawn ones; with the record's id it decides them, whatever else is in the batch.
        max_new_tokens: length limit of an answer, in tokens.
    """

    constrained: bool = False
    samples: int = 1
    temperature: float = 0.8
    seed: int = 0
    max_new_tokens: int = 320

    def __post_init__(self) -> None:
        if self.constrained and self.max_new_tokens < MIN_CONSTRAINED_TOKENS:
            raise InputError(
                f"constrained answers need room to be closed: at least {MIN_CONSTRAINED_TOKENS} new tokens, "
                f"not {self.max_new_tokens}"
            )


class Engine(Protocol):
    """What :func:`malpyeong.predict.predict` needs of an engine."""

    decoding: Decoding

    def prompts(self, records: Sequence[Record]) -> list[list[int]]:
        """Return each record's prompt as token ids."""

    def answers(self, records: Sequence[Record]) -> list[list[str]]:
        """Return ``decoding.samples`` answers for each record of a batch."""


def _prompts(
    tokenizer: "PreTrainedTokenizerBase", records: Sequence[Record], contexts: Mapping[str, Context]
) -> list[list[int]]:
    """Return each record's prompt, with the rules and examples that ``contexts`` has for its id."""
    return [prompt_ids(tokenizer, context_messages(record, contexts.get(record.id, Context()))) for record in records]


class TransformersEngine:
    """Batches of left-padded prompts through ``generate``, with the KV cache."""

    def __init__(
        self,
        model: Any,  # noqa: ANN401 -- a transformers or PEFT model
        tokenizer: "PreTrainedTokenizerBase",
        decoding: Decoding | None = None,
        contexts: Mapping[str, Context] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.decoding = model, tokenizer, decoding or Decoding()
        self._contexts = contexts or {}
        self._format = _Format(model, tokenizer) if self.decoding.constrained else None

    def prompts(self, records: Sequence[Record]) -> list[list[int]]:
        """Return each record's prompt as token ids."""
        return _prompts(self.tokenizer, records, self._contexts)

    def answers(self, records: Sequence[Record]) -> list[list[str]]:
        """Return ``decoding.samples`` answers for each record of a batch, the greedy one first."""
        import torch

        decoding, tokenizer = self.decoding, self.tokenizer
        prompts = self.prompts(records)
        tags, chosen = [""] * len(records), [""] * len(records)
        tag_ids: list[list[int]] = [[]] * len(records)
        if self._format:
            tags = [self._named_rule(record, prompt) for record, prompt in zip(records, prompts, strict=True)]
            tag_ids = [_ids(tokenizer, name) for name in tags]
            prompts = [prompt + ids for prompt, ids in zip(prompts, tag_ids, strict=True)]
            offered = [verdicts(record) for record in records]
            chosen = [
                pick_verdict(candidates, self.log_likelihoods(prompt, candidates)) if candidates else ""
                for prompt, candidates in zip(prompts, offered, strict=True)
            ]
        begun = [_ids(tokenizer, verdict) for verdict in chosen]
        rows = [place for place in range(len(records)) for _ in range(decoding.samples)]
        batch = tokenizer.pad(
            {"input_ids": [prompts[place] + begun[place] for place in rows]}, return_tensors="pt", padding_side="left"
        ).to(self.model.device)
        width = batch["input_ids"].shape[1]
        processors: list[Any] = []
        if self._format:
            limits = [decoding.max_new_tokens - len(tag_ids[place]) - len(begun[place]) for place in rows]
            states = [self._format.row(chosen[place], limit) for place, limit in zip(rows, limits, strict=True)]
            processors.append(FormatGuard(states, width))
        if decoding.samples > 1:
            seeds = [
                None if row % decoding.samples == 0 else _seed(decoding.seed, records[place].id, row % decoding.samples)
                for row, place in enumerate(rows)
            ]
            processors.append(SeededSampling(seeds, decoding.temperature, self.model.device))
        with torch.inference_mode():
            output = self.model.generate(
                **batch,
                do_sample=False,
                max_new_tokens=decoding.max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                logits_processor=processors,
            )
        completions = [begun[place] + ids for place, ids in zip(rows, output[:, width:].tolist(), strict=True)]
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        if self._format:
            texts = [
                tags[place] + finish(text, records[place].question) for place, text in zip(rows, texts, strict=True)
            ]
        return [texts[start : start + decoding.samples] for start in range(0, len(texts), decoding.samples)]

    def _named_rule(self, record: Record, prompt: list[int]) -> str:
        """Return the likeliest tag of a rule, or "" where the model is not asked for one."""
        context = self._contexts.get(record.id)
        if context is None or not context.choose:
            return ""
        return self.likeliest(prompt, [tag(name) for name in (*(rule.id for rule in context.rules), NONE)])

    def likeliest(self, prompt: list[int], candidates: Sequence[str]) -> str:
        """Return the candidate with the highest log-likelihood after ``prompt``."""
        scores = self.log_likelihoods(prompt, candidates)
        return candidates[max(range(len(candidates)), key=scores.__getitem__)]

    def log_likelihoods(self, prompt: list[int], candidates: Sequence[str]) -> list[float]:
        """Return log p(candidate | prompt), summed over its tokens, for each candidate.

        The prompt goes through the model once; all candidates share its KV cache in one padded batch.
        """
        import torch

        tokens = [_ids(self.tokenizer, candidate) for candidate in candidates]
        device = self.model.device
        with torch.inference_mode():
            start = self.model(input_ids=torch.tensor([prompt], device=device), use_cache=True, logits_to_keep=1)
            cache = start.past_key_values
            cache.batch_repeat_interleave(len(tokens))
            longest = max(map(len, tokens))
            padded = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in tokens], device=device)
            real = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in tokens], device=device)
            mask = torch.cat([real.new_ones(len(tokens), len(prompt)), real], dim=1)
            # Every candidate's first token is predicted by the prompt, its others by the tokens before them.
            rest = self.model(input_ids=padded, attention_mask=mask, past_key_values=cache, use_cache=True).logits
            logits = torch.cat([start.logits.expand(len(tokens), -1, -1), rest[:, :-1]], dim=1).float()
            each = logits.gather(2, padded[..., None])[..., 0] - logits.logsumexp(2)
            totals: list[float] = (each * real).sum(1).tolist()
            return totals


class VLLMEngine:
    """The same prompts through vLLM. Not run by this project's tests: it needs a GPU.

    Greedy decoding only; options are alternatives of the grammar there, decided token by token.

    Raises:
        InputError: vLLM is not installed, or several samples are asked for.
    """

    def __init__(
        self,
        model: str,
        adapter: str | None,
        dtype: str,
        decoding: Decoding,
        contexts: Mapping[str, Context] | None = None,
    ) -> None:
        from malpyeong.models.load import adapter_folder, check_adapter, tokenizer_for_prediction

        if decoding.samples > 1:
            raise InputError("samples are drawn with the transformers engine; leave --engine out")
        if decoding.constrained and any(context.choose for context in (contexts or {}).values()):
            raise InputError("rules are chosen with the transformers engine, or with --decoding free")
        try:
            from vllm import LLM
            from vllm.lora.request import LoRARequest
        except ImportError:
            raise InputError(
                'vLLM is not installed; run pip install "malpyeong[vllm]" on a GPU machine, or leave --engine out'
            ) from None
        self.decoding, self._contexts = decoding, contexts or {}
        self.tokenizer = tokenizer_for_prediction(model, adapter)
        rank = check_adapter(adapter).get("r", 16)
        self._adapter = LoRARequest("adapter", 1, str(adapter_folder(adapter))) if adapter else None
        self._llm = LLM(
            model=model,
            dtype=dtype,
            enable_lora=adapter is not None,
            max_lora_rank=rank,
            structured_outputs_config={"backend": "guidance"},
        )

    def prompts(self, records: Sequence[Record]) -> list[list[int]]:
        """Return each record's prompt as token ids."""
        return _prompts(self.tokenizer, records, self._contexts)

    def answers(self, records: Sequence[Record]) -> list[list[str]]:
        """Return one answer for each record of a batch."""
        from vllm import SamplingParams

        outputs = self._llm.generate(
            [{"prompt_token_ids": ids} for ids in self.prompts(records)],
            [
                SamplingParams(
                    temperature=0.0,
                    max_tokens=self.decoding.max_new_tokens,
                    structured_outputs=structured_outputs(record) if self.decoding.constrained else None,
                )
                for record in records
            ],
            lora_request=self._adapter,
            use_tqdm=False,
        )
        texts = [output.outputs[0].text for output in outputs]
        if self.decoding.constrained:
            texts = [finish(text, record.question) for text, record in zip(texts, records, strict=True)]
        return [[text] for text in texts]


def structured_outputs(record: Record) -> Any:  # noqa: ANN401 -- vllm.sampling_params.StructuredOutputsParams
    """Return vLLM's parameters that hold an answer of ``record`` to the format and to its options. Not run here."""
    from vllm.sampling_params import StructuredOutputsParams

    return StructuredOutputsParams(grammar=answer_grammar(verdicts(record)))


class _Format:
    """The grammar compiled for one tokenizer, and the tokens that close an answer."""

    def __init__(self, model: Any, tokenizer: Any) -> None:  # noqa: ANN401 -- see the engine
        import llguidance.hf

        ends = model.generation_config.eos_token_id
        self.end: int = tokenizer.eos_token_id
        self.ends = {self.end, *(ends if isinstance(ends, list) else [ends])} - {None}
        self.tokenizer = tokenizer
        vocabulary = model.config.get_text_config().vocab_size
        self._tokens = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=sorted(self.ends))
        self._compiled: dict[str, Any] = {}
        self.closings = [_ids(tokenizer, f'"{particle} 옳다.') for particle in ("가", "이")]
        self.endings = [_ids(tokenizer, ending) for ending in (".", "다.")]  # the second where there is no syllable yet

    def row(self, verdict: str, limit: int) -> "_Row":
        """Return the state of an answer that goes on from ``verdict``, or that is new if it is ""."""
        from llguidance import LLMatcher, LLParserLimits

        grammar = reason_grammar(verdict) if verdict else answer_grammar()
        if grammar not in self._compiled:
            # Ten times the default, which suffices as far as is known: a slow step is better than none.
            limits = LLParserLimits(step_lexer_fuel=2_000_000)
            self._compiled[grammar] = LLMatcher(self._tokens, grammar, limits=limits)
        return _Row(self, self._compiled[grammar].deep_copy(), max(limit, MIN_CONSTRAINED_TOKENS // 2), not verdict)


@dataclass(slots=True)
class _Row:
    """One answer on its way: where the grammar is, and when it has to come to an end."""

    format: _Format
    matcher: Any
    limit: int
    in_sentence: bool
    ids: list[int] = field(default_factory=list)
    ended: bool = False
    forced: list[int] = field(default_factory=list)

    def take(self, token: int) -> None:
        """Go on by one token."""
        if self.ended:
            return
        if token in self.format.ends:
            self.ended = True
            return
        if not self.matcher.consume_token(token):
            raise RuntimeError(f"constrained decoding took a token against the grammar: {self.matcher.get_error()}")
        self.ids.append(token)
        if self.in_sentence:
            self.in_sentence = _HAS_VERDICT.search(self._text()) is None

    def must(self) -> list[int]:
        """Return the tokens that have to come next for the answer to end in time; [] where the model is free."""
        if self.forced:
            return self.forced
        left = self.limit - len(self.ids)
        if self.in_sentence:
            if left <= max(self.limit // 4, MIN_CONSTRAINED_TOKENS // 3):
                self.forced = self._closing()
        elif self.matcher.is_accepting():
            if left <= self.limit // 8:
                return [self.format.end]
        elif left <= 8:
            self.forced = next((list(ending) for ending in self.format.endings if self._ends_with(ending)), [])
        return self.forced

    def _ends_with(self, ending: list[int]) -> bool:
        """Tell whether the reason is whole after these tokens."""
        after = self.matcher.deep_copy()
        return bool(after.try_consume_tokens(ending) == len(ending) and after.is_accepting())

    def _closing(self) -> list[int]:
        """Return the tokens that close the sentence, [] if it cannot end here (behind a space, within a character)."""
        for closing in self.format.closings:
            text = str(self.format.tokenizer.decode([*self.ids, *closing]))
            if _CLOSED_VERDICT.search(text) and self.matcher.validate_tokens(closing) == len(closing):
                return list(closing)
        return []

    def _text(self) -> str:
        return str(self.format.tokenizer.decode(self.ids))


_HAS_VERDICT = re.compile(r'.\S"[가이] 옳다\.')  # behind a sentence: the opening quote closes nothing
_CLOSED_VERDICT = re.compile(rf"{_HAS_VERDICT.pattern}\Z")


class FormatGuard:
    """A logits processor that lets through what every row's grammar allows, and ends rows in time.

    Args:
        rows: the state of each row of the batch.
        prompt_length: tokens of the padded prompts, after which the answers begin.
    """

    def __init__(self, rows: Sequence[_Row], prompt_length: int) -> None:
        from llguidance import LLExecutor

        self._rows, self._start, self._executor = rows, prompt_length, LLExecutor()

    def __call__(self, input_ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        """Return ``scores`` (rows, vocabulary) with -inf where a token is not allowed."""
        import numpy as np
        import torch
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par

        if input_ids.shape[1] > self._start:
            for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
                row.take(token)
        forced = [[] if row.ended else row.must() for row in self._rows]
        masks = allocate_token_bitmask(len(self._rows), scores.shape[1])
        free = [(row.matcher, place) for place, row in enumerate(self._rows) if not row.ended and not forced[place]]
        if free:
            fill_next_token_bitmask_par(self._executor, free, masks)
        allowed = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")[:, : scores.shape[1]].astype(bool)
        for place, tokens in enumerate(forced):
            if tokens:
                allowed[place] = False
                allowed[place, tokens.pop(0)] = True
        return scores.masked_fill(~torch.from_numpy(allowed).to(scores.device), -torch.inf)


class SeededSampling:
    """A logits processor after which the highest score is a draw at a temperature (the Gumbel-max trick).

    Every row draws from its own generator, so that what it draws does not depend on the other rows.

    Args:
        seeds: one for each row; None keeps a row greedy.
        temperature: divides the logits.
        device: where the scores are.
    """

    def __init__(self, seeds: Sequence[int | None], temperature: float, device: "torch.device") -> None:
        import torch

        self._temperature = temperature
        self._draws = [None if seed is None else torch.Generator(device=device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        """Return the scores (rows, vocabulary) with noise on them."""
        import torch

        scores = scores.float()
        noise = torch.zeros_like(scores)
        for row, generator in enumerate(self._draws):
            if generator is not None:
                noise[row] = -torch.empty_like(scores[row]).exponential_(generator=generator).log()
                scores[row] = scores[row] / self._temperature
        return scores + noise


def _ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _seed(seed: int, record_id: str, sample: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{record_id}/{sample}".encode()).digest()[:7], "big")
