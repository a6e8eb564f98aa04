"""Log-likelihoods of what may follow each prompt of a batch, in two passes over the model.

The prompts go through the model together, padded on the left. What may follow a prompt is a tree, since candidates begin
alike. All trees go through the model in a second pass, in which a token sees its prompt and its own branch (tree
attention, as in SpecInfer, Miao et al. 2023, https://arxiv.org/abs/2305.09781): no prompt is read or held twice. The
keys and values of every candidate are then there, and :meth:`TreeScorer.begin` lets generation go on from them.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from malpyeong.training.perplexity import causal_lm, token_losses

if TYPE_CHECKING:
    import numpy as np


class Batch(NamedTuple):
    """Sequences padded on the left, and the keys and values of all their tokens but the last.

    Attributes:
        ids: of shape [rows, length].
        mask: of shape [rows, length]; 0 where there is padding.
        cache: length - 1 tokens of every row.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    cache: Cache


class _Tree:
    """Candidates as a tree that shares what they begin with; its root is the prompt's last token."""

    def __init__(self, root: int, candidates: Sequence[Sequence[int]]) -> None:
        self.tokens, self.parents, self.depths = [root], [0], [0]
        self.paths = []  # each candidate's nodes
        children: dict[tuple[int, int], int] = {}
        for candidate in candidates:
            node, path = 0, []
            for token in candidate:
                child = children.setdefault((node, token), len(self.tokens))
                if child == len(self.tokens):
                    self.tokens.append(token)
                    self.parents.append(node)
                    self.depths.append(self.depths[node] + 1)
                node = child
                path.append(node)
            self.paths.append(path)

    def see(self, seen: "np.ndarray[Any, Any]") -> None:
        """Mark what each node sees, of shape [nodes, nodes]: itself and its branch up to the root."""
        import numpy as np

        for path in ([], *self.paths):
            branch = [0, *path]
            seen[np.ix_(branch, branch)] |= np.tri(len(branch), dtype=bool)


class TreeScorer:
    """Scores the candidates of a batch of prompts, and hands on what it has computed for them.

    Args:
        model: a causal LM in eval mode, with LoRA or without; see :func:`can_score_trees`.
        pad: token id to pad with.
    """

    def __init__(self, model: Any, pad: int) -> None:  # noqa: ANN401 -- a transformers or PEFT model
        self._model, self._pad = causal_lm(model), pad
        self._cache: Cache | None = None
        self._known: dict[tuple[int, ...], tuple[int, list[int]]] = {}  # sequence → its row and places in the cache

    @torch.inference_mode()
    def score(self, prompts: Sequence[list[int]], candidates: Sequence[Sequence[list[int]]]) -> list[list[float]]:
        """Return log p(candidate | its prompt), summed over its tokens, for the candidates of each prompt."""
        import numpy as np

        batch = self.begin(prompts)
        trees = [_Tree(prompt[-1], some) for prompt, some in zip(prompts, candidates, strict=True)]
        rows, before, nodes = len(trees), batch.ids.shape[1] - 1, max(len(tree.tokens) for tree in trees)
        ids = np.full((rows, nodes), self._pad)
        positions = np.zeros((rows, nodes), dtype=np.int64)
        seen = np.zeros((rows, nodes, nodes), dtype=bool)
        seen[:, range(nodes), range(nodes)] = True  # padding too: of nothing at all there is no softmax
        for row, tree in enumerate(trees):
            ids[row, : len(tree.tokens)] = tree.tokens
            positions[row, : len(tree.tokens)] = np.add(tree.depths, len(prompts[row]) - 1)
            tree.see(seen[row])
        device, dtype = batch.ids.device, self._model.dtype
        allowed = torch.cat(
            [batch.mask[:, None, :before].bool().expand(-1, nodes, -1), torch.from_numpy(seen).to(device)], dim=2
        )
        # In the model's dtype, because a mask of booleans is converted again in every layer.
        mask = torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill_(~allowed, torch.finfo(dtype).min)
        hidden = self._model.get_decoder()(
            input_ids=torch.from_numpy(ids).to(device),
            attention_mask=mask[:, None],
            position_ids=torch.from_numpy(positions).to(device),
            past_key_values=batch.cache,
            use_cache=True,
        ).last_hidden_state
        logs = self._log_probabilities(hidden, trees)
        self._cache, self._known = batch.cache, {}
        for row, (prompt, tree) in enumerate(zip(prompts, trees, strict=True)):
            own = [*range(before + 1 - len(prompt), before + 1)]
            for ids_, path in zip(([], *candidates[row]), ([], *tree.paths), strict=True):
                self._known[*prompt, *ids_] = row, [*own, *(before + node for node in path)]
        return [[sum(logs[row][node] for node in path) for path in tree.paths] for row, tree in enumerate(trees)]

    def _log_probabilities(self, hidden: torch.Tensor, trees: Sequence[_Tree]) -> list[list[float]]:
        """Return log p of each node after its branch (0 for roots), from hidden states [rows, nodes, hidden]."""
        parents = [(row, parent) for row, tree in enumerate(trees) for parent in tree.parents[1:]]
        targets = [token for tree in trees for token in tree.tokens[1:]]
        if not targets:
            return [[0.0] for _ in trees]
        places = torch.tensor(parents, device=hidden.device)
        losses = token_losses(
            self._model.get_output_embeddings(),
            hidden[places[:, 0], places[:, 1]],
            torch.tensor(targets, device=hidden.device),
        )
        parts = torch.split(-losses.double(), [len(tree.tokens) - 1 for tree in trees])
        return [[0.0, *part.tolist()] for part in parts]

    @torch.inference_mode()
    def begin(self, sequences: Sequence[list[int]]) -> Batch:
        """Return ``sequences`` as a batch whose last tokens come next.

        Where the last :meth:`score` has computed all of them (its prompts, with a candidate or without), its keys and
        values are used; they are given away by that.
        """
        longest = max(map(len, sequences))
        device = self._model.device
        ids = torch.tensor([[self._pad] * (longest - len(row)) + row for row in sequences], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in sequences], device=device)
        found = [self._known.get(tuple(row)) for row in sequences]
        known = [place for place in found if place]
        cache, self._cache, self._known = self._cache, None, {}
        if cache and len(known) == len(found):
            rows = torch.tensor([row for row, _ in known], device=device)[:, None]
            places = torch.tensor([[0] * (longest - len(own)) + own[:-1] for _, own in known], device=device)
            layers: Any = cache.layers
            for layer in layers:
                layer.keys = layer.keys.transpose(1, 2)[rows, places].transpose(1, 2)
                layer.values = layer.values.transpose(1, 2)[rows, places].transpose(1, 2)
            return Batch(ids, mask, cache)
        cache = DynamicCache()
        self._model.get_decoder()(
            input_ids=ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=(mask[:, :-1].cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        )
        return Batch(ids, mask, cache)


@torch.inference_mode()
def log_likelihoods(model: Any, prompt: Sequence[int], candidates: Sequence[Sequence[int]]) -> list[float]:  # noqa: ANN401
    """Return log p(candidate | prompt), summed over its tokens: plain, for one prompt and any architecture.

    The prompt goes through the model once; its cache is repeated for the candidates, in one batch padded on the right.
    """
    device, longest = model.device, max(map(len, candidates))
    start = model(input_ids=torch.tensor([list(prompt)], device=device), use_cache=True, logits_to_keep=1)
    cache = start.past_key_values
    cache.batch_repeat_interleave(len(candidates))
    padded = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in candidates], device=device)
    real = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in candidates], device=device)
    mask = torch.cat([real.new_ones(len(candidates), len(prompt)), real], dim=1)
    # Every candidate's first token is predicted by the prompt, its others by the tokens before them.
    rest = model(input_ids=padded, attention_mask=mask, past_key_values=cache, use_cache=True).logits
    logits = torch.cat([start.logits.expand(len(candidates), -1, -1), rest[:, :-1]], dim=1).float()
    each = logits.gather(2, padded[..., None])[..., 0] - logits.logsumexp(2)
    totals: list[float] = (each * real).sum(1).tolist()
    return totals


def can_score_trees(model: Any, sample: Sequence[int]) -> bool:  # noqa: ANN401 -- a causal LM
    """Tell whether a :class:`TreeScorer` gives what the model itself gives, by trying it.

    Every layer has to attend to all tokens, at positions that are stated, and the logits have to be what the output
    layer gives.

    Args:
        model: a causal LM.
        sample: at least five tokens of a text.
    """
    lm = causal_lm(model)
    plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=lm.config).layers)
    if not plain or lm.config._attn_implementation not in ("sdpa", "eager"):
        return False
    prompts = [list(sample[:3]), list(sample[:2])]
    candidates = [[list(sample[3:]), list(sample[4:])], [list(sample[2:])]]
    trees = TreeScorer(model, 0).score(prompts, candidates)
    one_by_one = [log_likelihoods(lm, prompt, some) for prompt, some in zip(prompts, candidates, strict=True)]
    tolerance = 1e-4 if str(lm.dtype) == "torch.float32" else 2e-2
    return all(
        abs(a - b) <= tolerance * abs(b)
        for tree, plain in zip(trees, one_by_one, strict=True)
        for a, b in zip(tree, plain, strict=True)
    )
