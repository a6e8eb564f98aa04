"""Engines: what turns prompts into answers. transformers anywhere, vLLM on a GPU; both behind one :class:`Engine`.

Constrained answers are well formed by construction. Where a question offers options, the verdict is the likeliest of
those that it can have (:func:`malpyeong.contest.question.verdicts`), and only the reason is generated; elsewhere the
whole answer is generated under the grammar of :func:`malpyeong.contest.grammar.answer_grammar`. This is for prediction
alone: in RL rollouts it would hide from the rewards what the model does by itself.

What an answer is made of is the same for every engine (:meth:`BatchEngine.answers`). An engine itself scores
candidates and generates tokens, nothing else.
"""

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from malpyeong.contest.question import pick_verdict, verdicts
from malpyeong.contest.repair import finish
from malpyeong.decoding.constrain import MIN_CONSTRAINED_TOKENS, AnswerFormat, GrammarMask, token_ids
from malpyeong.errors import InputError
from malpyeong.prompts.context import Context
from malpyeong.prompts.messages import Prompt
from malpyeong.prompts.rule_choice import NONE, tag

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

VLLM_SHARE = 0.85  # of the card's memory; logits of whole prompts, for log-likelihoods, come on top of it
VLLM_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what max_lora_rank may be


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

    def answers(self, prompts: Sequence[Prompt]) -> list[list[str]]:
        """Return ``decoding.samples`` answers to each prompt of a batch."""


Watch = Callable[[list[int]], bool]


@dataclass(frozen=True, slots=True)
class Request:
    """One answer to generate.

    Attributes:
        prompt: token ids of everything before it, what was chosen of it by likelihood included.
        max_tokens: how many tokens may be generated.
        grammar: that they keep to (see :class:`malpyeong.decoding.constrain.AnswerFormat`); None: whatever comes.
        seed: None for a greedy answer.
        temperature: of a drawn one.
        top_p: of a drawn one: the likeliest tokens that have this probability together.
        watch: called with the tokens so far after each of them; True ends the answer there. vLLM does not call it.
        stop: texts that vLLM ends the answer behind.
    """

    prompt: list[int]
    max_tokens: int
    grammar: str | None = None
    seed: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    watch: Watch | None = None
    stop: tuple[str, ...] = ()


Pick = Callable[[Sequence[str], Sequence[float]], str]


def _highest(candidates: Sequence[str], scores: Sequence[float]) -> str:
    return candidates[max(range(len(candidates)), key=scores.__getitem__)]


class BatchEngine(ABC):
    """An engine that answers in batches, with whatever scores and generates.

    Args:
        tokenizer: as the model was trained with.
        ends: tokens that end an answer, the tokenizer's eos token and those that the model's files name.
        vocabulary: width of the model's logits; 0 for the tokenizer's size.
        decoding: how answers are decoded.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        ends: Sequence[int],
        vocabulary: int = 0,
        decoding: Decoding | None = None,
    ) -> None:
        self.tokenizer, self.decoding = tokenizer, decoding or Decoding()
        self._ends = {tokenizer.eos_token_id, *ends}
        self._format = AnswerFormat(tokenizer, ends, vocabulary) if self.decoding.constrained else None

    @property
    def max_length(self) -> int:
        """How many tokens the model takes, prompt and answer together."""
        return self.tokenizer.model_max_length

    def json_grammar(self, schema: dict[str, Any]) -> str:
        """Return the grammar of a :class:`Request` whose answer keeps to a JSON schema (constrained decoding only).

        Raises:
            ValueError: it is not a schema, or one that cannot be kept to; says why.
        """
        assert self._format, "an engine that does not constrain answers has no grammars"
        return self._format.json_grammar(schema)

    @abstractmethod
    def score(self, prompts: Sequence[list[int]], candidates: Sequence[Sequence[list[int]]]) -> list[list[float]]:
        """Return log p(candidate | its prompt), summed over its tokens, for the candidates of each prompt."""

    @abstractmethod
    def generate(self, requests: Sequence[Request]) -> list[list[int]]:
        """Return the tokens of each request's answer, up to and without the first end token."""

    def answers(self, prompts: Sequence[Prompt], watches: Sequence[Watch | None] = ()) -> list[list[str]]:
        """Return ``decoding.samples`` answers to each prompt of a batch, the greedy one first.

        Args:
            prompts: of the questions.
            watches: one for each prompt (see :class:`Request`), or none at all; an answer that one of them ends is of
                no use.
        """
        decoding, records, starts = self.decoding, [prompt.record for prompt in prompts], [one.ids for one in prompts]
        tags, chosen = [""] * len(records), [""] * len(records)
        if self._format:
            tags = self.likeliest(starts, [_tags(prompt.context) for prompt in prompts])
            starts = [start + token_ids(self.tokenizer, name) for start, name in zip(starts, tags, strict=True)]
            chosen = self.likeliest(starts, [verdicts(record) for record in records], pick_verdict)
        begun = [token_ids(self.tokenizer, verdict) for verdict in chosen]
        requests = []
        watches = watches or [None] * len(records)
        for record, start, named, verdict, ids, watch in zip(
            records, starts, tags, chosen, begun, watches, strict=True
        ):
            limit, grammar = decoding.max_new_tokens, None
            if self._format:
                limit -= len(token_ids(self.tokenizer, named)) + len(ids)
                limit, grammar = max(limit, MIN_CONSTRAINED_TOKENS // 2), self._format.grammar(verdict)
            seeds = [None, *(_seed(decoding.seed, record.id, sample) for sample in range(1, decoding.samples))]
            requests += [
                Request(start + ids, limit, grammar, seed, decoding.temperature, watch=watch) for seed in seeds
            ]
        completions = self.generate(requests)
        rows = [row for row in range(len(records)) for _ in range(decoding.samples)]
        if self._format:
            completions = self._closed(self._format, requests, completions, [chosen[row] for row in rows])
        texts = self.tokenizer.batch_decode(
            [begun[row] + ids for row, ids in zip(rows, completions, strict=True)], skip_special_tokens=True
        )
        if self._format:
            texts = [tags[row] + finish(text, records[row].question) for row, text in zip(rows, texts, strict=True)]
        return [texts[start : start + decoding.samples] for start in range(0, len(texts), decoding.samples)]

    def likeliest(
        self, prompts: Sequence[list[int]], candidates: Sequence[Sequence[str]], pick: Pick = _highest
    ) -> list[str]:
        """Return the likeliest candidate after each prompt, as ``pick`` says, "" where there is none."""
        if not any(candidates):
            return [""] * len(prompts)
        scores = self.score(prompts, [[token_ids(self.tokenizer, text) for text in some] for some in candidates])
        return [pick(some, logs) if logs else "" for some, logs in zip(candidates, scores, strict=True)]

    def _closed(
        self,
        answer_format: AnswerFormat,
        requests: Sequence[Request],
        completions: Sequence[list[int]],
        chosen: Sequence[str],
    ) -> list[list[int]]:
        """Return constrained completions that end within their budget; reasons of forced verdicts are generated."""
        forced: list[list[int]] = [
            (not verdict and answer_format.close_sentence(ids, request.max_tokens)) or []
            for request, ids, verdict in zip(requests, completions, chosen, strict=True)
        ]
        rests, generated = list(requests), list(completions)
        again = [row for row, ids in enumerate(forced) if ids]
        for row in again:
            request, ids = requests[row], forced[row]
            grammar = answer_format.grammar(str(self.tokenizer.decode(ids)))
            prompt, limit = request.prompt + ids, request.max_tokens - len(ids)
            rests[row] = replace(request, prompt=prompt, max_tokens=limit, grammar=grammar)
        if again:
            for row, ids in zip(again, self.generate([rests[row] for row in again]), strict=True):
                generated[row] = ids
        return [
            ids + answer_format.close_reason(rest.grammar or "", reason, rest.max_tokens)
            for ids, rest, reason in zip(forced, rests, generated, strict=True)
        ]


class TransformersEngine(BatchEngine):
    """Batches of left-padded prompts through ``generate``, with the KV cache."""

    def __init__(
        self,
        model: Any,  # noqa: ANN401 -- a transformers or PEFT model
        tokenizer: "PreTrainedTokenizerBase",
        decoding: Decoding | None = None,
    ) -> None:
        from malpyeong.decoding.likelihood import TreeScorer, can_score_trees

        named = model.generation_config.eos_token_id
        ends = named if isinstance(named, list) else [] if named is None else [named]
        super().__init__(tokenizer, ends, model.config.get_text_config().vocab_size, decoding)
        self.model, self._trees = model, None
        if self.decoding.constrained and can_score_trees(model, token_ids(tokenizer, '"나무가 크다."가 옳다.')):
            self._trees = TreeScorer(model, tokenizer.pad_token_id)

    @property
    def max_length(self) -> int:
        """How many tokens the model takes: what it was trained with, or has positions for."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return min(self.tokenizer.model_max_length, positions or self.tokenizer.model_max_length)

    def score(self, prompts: Sequence[list[int]], candidates: Sequence[Sequence[list[int]]]) -> list[list[float]]:
        """Return log p(candidate | its prompt): a whole batch at once where the architecture allows it."""
        from malpyeong.decoding.likelihood import log_likelihoods

        if self._trees:
            return self._trees.score(prompts, candidates)
        return [
            log_likelihoods(self.model, prompt, some) if some else []
            for prompt, some in zip(prompts, candidates, strict=True)
        ]

    def generate(self, requests: Sequence[Request]) -> list[list[int]]:
        """Return the tokens of each request's answer, all in one batch; what :meth:`score` has computed is used."""
        import torch

        prompts = [request.prompt for request in requests]
        batch: dict[str, Any] = {}
        if self._trees:
            ids, mask, cache = self._trees.begin(prompts)
            batch = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}
        else:
            batch = dict(self.tokenizer.pad({"input_ids": prompts}, return_tensors="pt", padding_side="left"))
            batch = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
        width = batch["input_ids"].shape[1]
        processors: list[Any] = []
        if self._format:
            processors.append(GrammarMask(self._format, [request.grammar for request in requests], width))
        if any(request.seed is not None for request in requests):
            processors.append(SeededSampling(requests, self.model.device))
        watching = Watching(requests, self._ends, width)
        with torch.inference_mode():
            output = self.model.generate(
                **batch,
                do_sample=False,
                max_new_tokens=max(request.max_tokens for request in requests),
                pad_token_id=self.tokenizer.pad_token_id,
                logits_processor=processors,
                stopping_criteria=[watching] if watching.live else [],
            )
        rows = [ids[: watching.stopped.get(row)] for row, ids in enumerate(output[:, width:].tolist())]
        return [_until(ids[: one.max_tokens], self._ends) for ids, one in zip(rows, requests, strict=True)]


class VLLMEngine(BatchEngine):
    """The same prompts, grammars and choices through vLLM. Not run by this project's tests: it needs a GPU.

    Greedy decoding only. ``--batch-size`` questions are in flight at once.

    Raises:
        InputError: vLLM is not installed, or several samples are asked for.
    """

    def __init__(self, model: str, adapter: str | None, dtype: str, decoding: Decoding) -> None:
        from malpyeong.models.adapter import adapter_folder, check_adapter
        from malpyeong.models.load import stop_tokens, tokenizer_for_prediction

        if decoding.samples > 1:
            raise InputError("samples are drawn with the transformers engine; leave --engine out")
        try:
            from vllm import LLM
            from vllm.lora.request import LoRARequest
        except ImportError:
            raise InputError(
                "vLLM is not installed; run make setup-vllm on a GPU machine, or leave --engine out"
            ) from None
        tokenizer = tokenizer_for_prediction(model, adapter)
        super().__init__(tokenizer, stop_tokens(model, tokenizer), decoding=decoding)
        rank = check_adapter(adapter).get("r", 1)
        self._adapter = LoRARequest("adapter", 1, str(adapter_folder(adapter))) if adapter else None
        self._llm = LLM(
            model=model,
            tokenizer=str(tokenizer.name_or_path),
            dtype=dtype,
            generation_config="vllm",  # nothing of the base's own
            max_model_len=-1,  # as much of the model's length as the card holds
            gpu_memory_utilization=VLLM_SHARE,
            enable_lora=adapter is not None,
            max_lora_rank=next(limit for limit in VLLM_LORA_RANKS if rank <= limit),
            structured_outputs_config={"backend": "guidance"},
        )

    @property
    def max_length(self) -> int:
        """How many tokens the model takes, and the card holds."""
        length = int(self._llm.llm_engine.model_config.max_model_len)
        return min(self.tokenizer.model_max_length, length)

    def score(self, prompts: Sequence[list[int]], candidates: Sequence[Sequence[list[int]]]) -> list[list[float]]:
        """Return log p(candidate | its prompt), from the log-probabilities that vLLM gives of a prompt's tokens."""
        from vllm import SamplingParams

        texts = [prompt + ids for prompt, some in zip(prompts, candidates, strict=True) for ids in some]
        parameters = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        outputs = iter(self._run(texts, [parameters] * len(texts)))
        return [
            [log_likelihood_of_end(next(outputs).prompt_logprobs, prompt + ids, len(ids)) for ids in some]
            for prompt, some in zip(prompts, candidates, strict=True)
        ]

    def generate(self, requests: Sequence[Request]) -> list[list[int]]:
        """Return the tokens of each request's answer."""
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        outputs = self._run(
            [request.prompt for request in requests],
            [
                SamplingParams(
                    temperature=0.0 if request.seed is None else request.temperature,
                    top_p=request.top_p,
                    seed=request.seed,
                    max_tokens=request.max_tokens,
                    stop=list(request.stop),
                    stop_token_ids=sorted(self._ends),
                    detokenize=bool(request.stop),
                    structured_outputs=StructuredOutputsParams(grammar=request.grammar) if request.grammar else None,
                )
                for request in requests
            ],
        )
        return [_until(list(output.outputs[0].token_ids), self._ends) for output in outputs]

    def _run(self, prompts: Sequence[list[int]], parameters: Sequence[Any]) -> list[Any]:
        return list(
            self._llm.generate(
                [{"prompt_token_ids": ids} for ids in prompts],
                list(parameters),
                lora_request=self._adapter,
                use_tqdm=False,
            )
        )


def load_engine(
    name: str, model: str, adapter: str | None, dtype: str, load_in_4bit: bool, decoding: Decoding
) -> BatchEngine:
    """Load a model into the engine called ``transformers`` or ``vllm``; ``auto``: vLLM where it is there and can run.

    Raises:
        InputError: what is asked for does not go together, or is not here.
    """
    import torch

    if name == "auto":
        modern = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
        name = "vllm" if modern and not load_in_4bit and find_spec("vllm") else "transformers"
    if name == "vllm":
        if load_in_4bit:
            raise InputError("--load-in-4bit goes with the transformers engine; leave one of the two out")
        return VLLMEngine(model, adapter, dtype, decoding)
    from malpyeong.models.load import load_for_prediction

    return TransformersEngine(*load_for_prediction(model, adapter, dtype, load_in_4bit), decoding)


def log_likelihood_of_end(logprobs: Sequence[Mapping[int, Any] | None], ids: Sequence[int], count: int) -> float:
    """Return the sum over the last ``count`` tokens of what vLLM reports of a prompt's tokens."""
    pairs = list(zip(logprobs, ids, strict=True))[-count:]
    return sum(float(reported[token].logprob) for reported, token in pairs if reported)


class SeededSampling:
    """A logits processor after which the highest score is a draw at a temperature (the Gumbel-max trick).

    Every row draws from its own generator, so that what it draws does not depend on the other rows.

    Args:
        requests: one for each row; one without a seed is answered greedily.
        device: where the scores are.
    """

    def __init__(self, requests: Sequence[Request], device: "torch.device") -> None:
        import torch

        self._draws = [
            (row, torch.Generator(device=device).manual_seed(request.seed), request.temperature, request.top_p)
            for row, request in enumerate(requests)
            if request.seed is not None
        ]

    def __call__(self, input_ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        """Return the scores (rows, vocabulary) with noise on them."""
        import torch

        scores = scores.float()
        noise = torch.zeros_like(scores)
        for row, generator, temperature, top_p in self._draws:
            noise[row] = -torch.empty_like(scores[row]).exponential_(generator=generator).log()
            scores[row] = scores[row] / temperature
            if top_p < 1:
                likeliest, order = scores[row].softmax(0).sort(descending=True)
                scores[row, order[likeliest.cumsum(0) - likeliest >= top_p]] = -torch.inf
        return scores + noise


class Watching:
    """A stopping criterion that shows its tokens to each request's ``watch``, and ends the rows that it says.

    Args:
        requests: one for each row.
        ends: tokens at which a row ends by itself.
        start: tokens of the padded prompts, after which the answers begin.

    Attributes:
        live: the rows that are watched and have not ended.
        stopped: how many tokens the rows have that were ended.
    """

    def __init__(self, requests: Sequence[Request], ends: Collection[int | None], start: int) -> None:
        self.live = {row: request.watch for row, request in enumerate(requests) if request.watch}
        self.stopped: dict[int, int] = {}
        self._ends, self._start = ends, start

    def __call__(self, input_ids: "torch.Tensor", scores: object, **_: object) -> "torch.Tensor":
        """Return which rows are ended, of shape (rows,)."""
        import torch

        rows = input_ids[:, self._start :].tolist()
        for row, watch in list(self.live.items()):
            if rows[row][-1] in self._ends:
                del self.live[row]
            elif watch(rows[row]):
                del self.live[row]
                self.stopped[row] = len(rows[row])
        return torch.tensor([row in self.stopped for row in range(len(rows))], device=input_ids.device)


def _tags(context: Context) -> list[str]:
    """Return the tags (see ``malpyeong.prompts.rule_choice``) among which a rule is named; [] where none is."""
    return [tag(name) for name in (*(rule.id for rule in context.rules), NONE)] if context.choose else []


def _until(ids: Sequence[int], ends: Collection[int]) -> list[int]:
    """Return the tokens before the first end token."""
    return list(itertools.takewhile(lambda token: token not in ends, ids))


def _seed(seed: int, record_id: str, sample: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{record_id}/{sample}".encode()).digest()[:7], "big")
