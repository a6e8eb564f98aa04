"""Perplexity of answers, many answers to one prompt's beginning at a time.

``PPL(a | prompt) = exp(mean over the answer's tokens of -log p(token | prompt, answer so far))``. Prompt tokens do not
count. Where rules are compared the end-of-turn token is no part of the answer: whether a model stops says nothing about
what it was shown.

:func:`perplexity` is this definition in code. :func:`perplexities` gives the same numbers fast: the part that the
prompts share is computed once (:func:`shared_prefix`), answers are batched, and logits exist at answer positions only.
"""

import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy, linear
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from malpyeong.errors import InputError
from malpyeong.metrics.pairs import batches

# Logits held at once. On a CPU they stay in its caches, and their memory is used again and again: beyond 32 MiB the
# system takes it back each time, and zeroing its pages anew costs as much as computing what is written to them.
MAX_LOGITS = {"cpu": 2**20, "cuda": 2**25}
MAX_PADDED = 2**12  # tokens of a batch in answer_perplexities, without what its prompts share


class Row(NamedTuple):
    """What follows a shared prefix: the prompt's end (at least one token), and the answer that is scored."""

    prompt_end: list[int]
    answer: list[int]

    def __len__(self) -> int:  # the answer's last token is predicted, never read
        return len(self.prompt_end) + len(self.answer) - 1


class _SharedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of a prefix, of shape [1, heads, prefix, head_dim], that every row of any batch attends to.

    Nothing is added to it: a layer's keys and values of one batch live no longer than that layer's attention, and the
    prefix serves the next batch as it is.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: Any,  # noqa: ANN401 -- as in the base class
        **kwargs: Any,  # noqa: ANN401
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = key_states.shape[0]
        return (
            torch.cat([self.keys.expand(rows, -1, -1, -1), key_states], dim=-2),
            torch.cat([self.values.expand(rows, -1, -1, -1), value_states], dim=-2),
        )


@torch.inference_mode()
def perplexity(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> float:  # noqa: ANN401 -- a causal LM
    """Return PPL(answer | prompt) by one forward over the whole sequence: slow and plain."""
    ids = torch.tensor([[*prompt, *answer]], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return math.exp(float(cross_entropy(logits.float(), ids[0, len(prompt) :])))


@torch.inference_mode()
def shared_prefix(model: Any, prefix: Sequence[int]) -> Cache:  # noqa: ANN401 -- a causal LM, with LoRA or without
    """Return the keys and values of a prompt's beginning, to be given to :func:`perplexities` again and again."""
    # A cache made without the config keeps every position, also where a layer's attention window is shorter: the
    # model's mask hides what is out of reach.
    cache = DynamicCache()
    ids = torch.tensor([list(prefix)], device=model.device)
    causal_lm(model).get_decoder()(input_ids=ids, past_key_values=cache, use_cache=True)
    layers: Any = cache.layers
    return Cache(layers=[_SharedLayer(layer.keys, layer.values) for layer in layers])


@torch.inference_mode()
def perplexities(model: Any, prefix: Cache, rows: Sequence[Row], pad: int) -> list[float]:  # noqa: ANN401
    """Return the answer's perplexity in each row, all rows in one batch after the same prefix.

    Args:
        model: a causal LM in eval mode, with LoRA or without.
        prefix: from :func:`shared_prefix`; left as it is.
        rows: padded on the right to the longest; of similar length at best.
        pad: token id to pad with.

    Raises:
        ValueError: a row's answer or prompt end is empty.
        InputError: the model gives a perplexity that is not a number.
    """
    if not all(row.prompt_end and row.answer for row in rows):
        raise ValueError("a row needs at least one prompt token and one answer token after the prefix")
    seen, longest = prefix.get_seq_length(), max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)
    places: list[int] = []  # of the answers' predictors, in the flattened batch
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor([*row.prompt_end, *row.answer[:-1]])
        start = number * longest + len(row.prompt_end) - 1
        places += range(start, start + len(row.answer))
    lm = causal_lm(model)
    # Padding stands after a row's last token, where no token that counts looks: one causal mask serves all rows. It is
    # given ready made, because one of booleans is expanded and converted again in every layer.
    mask = torch.full((longest, seen + longest), -math.inf, dtype=lm.dtype, device=model.device).triu(seen + 1)
    hidden = lm.get_decoder()(
        input_ids=ids.to(model.device),
        attention_mask=mask[None, None],
        position_ids=torch.arange(seen, seen + longest, device=model.device)[None],
        past_key_values=prefix,
        use_cache=True,
    ).last_hidden_state
    hidden = hidden.reshape(-1, hidden.shape[-1])[torch.tensor(places, device=hidden.device)]
    targets = torch.tensor([token for row in rows for token in row.answer], device=hidden.device)
    losses = token_losses(lm.get_output_embeddings(), hidden, targets)
    means = [part.double().mean() for part in torch.split(losses.cpu(), [len(row.answer) for row in rows])]
    ppl = [math.exp(float(mean)) for mean in means]
    if not all(map(math.isfinite, ppl)):
        raise InputError("the model's perplexity is not a number; set model.dtype=bfloat16 or float32")
    return ppl


def token_losses(head: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:  # noqa: ANN401 -- a module
    """Return -log p of each target, of shape [positions], from hidden states of shape [positions, hidden].

    The vocabulary is gone through in pieces, with a running maximum and sum of exponentials (as in the online softmax
    of Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867), so that logits of the whole never exist. A head
    that is no plain linear layer takes pieces of the positions instead.
    """
    if type(head) is not torch.nn.Linear:  # LoRA or quantised: its weights are not simply there
        step = max(1, MAX_LOGITS["cuda"] // head(hidden[:1]).shape[-1])  # few pieces: each reads all its weights
        pieces = zip(torch.split(hidden, step), torch.split(targets, step), strict=True)
        return torch.cat([cross_entropy(head(some).float(), wanted, reduction="none") for some, wanted in pieces])
    step = max(1, MAX_LOGITS.get(hidden.device.type, MAX_LOGITS["cpu"]) // len(hidden))
    # The lowest number, not -inf: a piece may be masked as a whole, and the difference of two -inf is no number.
    highest = torch.full((len(hidden),), torch.finfo(torch.float32).min, device=hidden.device)
    total, target = torch.zeros_like(highest), torch.zeros_like(highest)
    for start in range(0, head.out_features, step):
        piece = slice(start, start + step)
        logits = linear(hidden, head.weight[piece], None if head.bias is None else head.bias[piece]).float()
        here = (targets >= start) & (targets < start + step)
        target[here] = logits[here, targets[here] - start]
        known, highest = highest, torch.maximum(highest, logits.amax(-1))
        total = total * (known - highest).exp() + logits.sub_(highest[:, None]).exp_().sum(-1)
    return highest + total.log() - target


def answer_perplexities(
    model: Any,  # noqa: ANN401 -- a causal LM
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
    pad: int,
) -> Iterator[tuple[int, float]]:
    """Yield (position, PPL(answer | its prompt)), longest first; what all prompts begin with is computed once.

    Raises:
        ValueError: an answer is empty.
        InputError: see :func:`perplexities` and :func:`check_parts`.
    """
    shared = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)
    rows = [Row(prompt[shared:], answer) for prompt, answer in zip(prompts, answers, strict=True)]
    head = prompts[0][:shared]
    check_parts(model, head, [rows[0], rows[-1]], pad)
    prefix = shared_prefix(model, head)
    for batch in batches([len(row) for row in rows], MAX_PADDED):
        yield from zip(batch, perplexities(model, prefix, [rows[place] for place in batch], pad), strict=True)


def check_parts(model: Any, head: Sequence[int], rows: Sequence[Row], pad: int) -> None:  # noqa: ANN401 -- a causal LM
    """Make sure that this architecture may be computed in parts: by a shared ``head``, and rows padded together.

    Raises:
        InputError: the perplexities are other ones than those of whole sequences.
    """
    parts = perplexities(model, shared_prefix(model, head), rows, pad)
    whole = [perplexity(model, [*head, *row.prompt_end], row.answer) for row in rows]
    tolerance = 1e-3 if str(model.dtype) == "torch.float32" else 5e-2
    if any(abs(a - b) > tolerance * b for a, b in zip(parts, whole, strict=True)):
        raise InputError(
            f"perplexities in parts {parts} differ from those of whole sequences {whole}: this model's architecture "
            "cannot be computed after a shared prefix; choose another model"
        )


def causal_lm(model: Any) -> Any:  # noqa: ANN401 -- transformers and PEFT models
    """Return the transformers model; LoRA layers sit inside it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
