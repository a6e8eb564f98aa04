"""Log-likelihoods of what may follow each prompt of a batch, without reading or holding a prompt twice.

The prompts go through the model together, padded on the left. What may follow a prompt is a tree, since candidates
begin alike. All trees go through the model in one more pass, in which a token sees its prompt and its own branch (tree
attention, as in SpecInfer, Miao et al. 2023, https://arxiv.org/abs/2305.09781). The keys and values of the candidates
are then there, and :meth:`TreeScorer.begin` lets generation go on from them.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from malpyeong.training.perplexity import causal_lm, token_losses


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
    """Candidates as a tree that shares what they begin with; its root is the prompt's last token.

    Attributes:
        tokens, parents, depths: of each node. A candidate's last token is no node: nothing is read after it here.
        places: where each node's keys and values are in the cache.
        logs: (node, token) → log p(token | the branch up to the node).
    """

    def __init__(self, root: int, candidates: Sequence[Sequence[int]]) -> None:
        self._candidates = candidates
        self.tokens, self.parents, self.depths = [root], [0], [0]
        self.places: list[int] = []
        self.logs: dict[tuple[int, int], float] = {}
        self._children: dict[tuple[int, int], int] = {}

    def grow(self, wanted: Sequence[int]) -> None:
        """Make nodes for the candidates at these positions."""
        for position in wanted:
            node = 0
            for token in self._candidates[position][:-1]:
                child = self._children.setdefault((node, token), len(self.tokens))
                if child == len(self.tokens):
                    self.tokens.append(token)
                    self.parents.append(node)
                    self.depths.append(self.depths[node] + 1)
                node = child

    def edges(self, position: int) -> Iterator[tuple[int, int]]:
        """Yield a candidate's tokens, each with the node before it, as far as there are nodes."""
        node: int | None = 0
        for token in self._candidates[position]:
            if node is None:
                return
            yield node, token
            node = self._children.get((node, token))

    def edges_after(self, start: int) -> set[tuple[int, int]]:
        """Return the tokens of all candidates behind the nodes from ``start`` on, each with its node."""
        every = (edge for position in range(len(self._candidates)) for edge in self.edges(position))
        return {edge for edge in every if edge[0] >= start}

    def branch(self, node: int) -> list[int]:
        """Return the nodes from the root to ``node``."""
        return [*self.branch(self.parents[node]), node] if node else [0]

    def scores(self) -> list[float]:
        """Return each candidate's log-likelihood; of one that has not all of its nodes, a bound that is not below."""
        return [sum(self.logs[edge] for edge in self.edges(position)) for position in range(len(self._candidates))]

    def unfinished(self) -> list[int]:
        """Return the positions of candidates without all of their nodes that may yet be the likeliest.

        First all that are not much longer than the shortest; the others only where what they begin with is as likely
        as the best of those is as a whole.
        """
        lengths = list(map(len, self._candidates))
        if not self.logs:
            return [position for position, length in enumerate(lengths) if 2 * length <= 3 * min(lengths)]
        scores = self.scores()
        whole = [sum(1 for _ in self.edges(position)) == length for position, length in enumerate(lengths)]
        best = max(score for score, finished in zip(scores, whole, strict=True) if finished)
        return [position for position, score in enumerate(scores) if score >= best and not whole[position]]


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
        """Return log p(candidate | its prompt), summed over its tokens, for the candidates of each prompt.

        A candidate that cannot be the likeliest of its prompt may have a bound instead: above its log-likelihood, and
        below the highest.
        """
        asked = [row for row, some in enumerate(candidates) if some]
        batch = self.begin([prompts[row] for row in asked])
        trees = [_Tree(prompts[row][-1], candidates[row]) for row in asked]
        starts = [0] * len(trees)
        while any(wanted := [tree.unfinished() for tree in trees]):
            for tree, some in zip(trees, wanted, strict=True):
                tree.grow(some)
            self._read(batch, trees, starts)
            starts = [len(tree.tokens) for tree in trees]
        self._cache, self._known = batch.cache, {}
        scores: list[list[float]] = [[] for _ in prompts]
        for number, (row, tree) in enumerate(zip(asked, trees, strict=True)):
            prompt, scores[row] = prompts[row], tree.scores()
            own = [*range(batch.ids.shape[1] - len(prompt), batch.ids.shape[1] - 1)]
            self._known[tuple(prompt)] = number, own
            for position, ids in enumerate(candidates[row]):
                nodes = [node for node, _ in tree.edges(position)]
                if len(nodes) == len(ids):
                    self._known[*prompt, *ids] = number, [*own, *(tree.places[node] for node in nodes)]
        return scores

    def _read(self, batch: Batch, trees: Sequence[_Tree], starts: Sequence[int]) -> None:
        """Read the nodes from ``starts`` on into the batch's cache, and note what the model says of the next tokens."""
        rows, before = len(trees), batch.ids.shape[1] - 1
        done = batch.cache.get_seq_length() - before  # of trees, padding included
        nodes = max(len(tree.tokens) - start for tree, start in zip(trees, starts, strict=True))
        lengths = batch.mask.sum(1).tolist()
        ids = np.full((rows, nodes), self._pad)
        positions = np.zeros((rows, nodes), dtype=np.int64)
        seen = np.zeros((rows, nodes, done + nodes), dtype=bool)
        seen[:, range(nodes), range(done, done + nodes)] = True  # padding too: of nothing at all there is no softmax
        edges: list[tuple[int, int, int]] = []  # (row, node, token)
        for row, (tree, start) in enumerate(zip(trees, starts, strict=True)):
            new = range(start, len(tree.tokens))
            tree.places += [before + done + node - start for node in new]
            ids[row, : len(new)] = tree.tokens[start:]
            positions[row, : len(new)] = np.add(tree.depths[start:], lengths[row] - 1)
            for node in new:
                seen[row, node - start, [tree.places[one] - before for one in tree.branch(node)]] = True
            edges += ((row, *edge) for edge in tree.edges_after(start))
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
        at = torch.tensor([(row, node - starts[row]) for row, node, _ in edges], device=device)
        targets = torch.tensor([token for *_, token in edges], device=device)
        losses = token_losses(self._model.get_output_embeddings(), hidden[at[:, 0], at[:, 1]], targets)
        for (row, *edge), loss in zip(edges, losses.tolist(), strict=True):
            trees[row].logs[edge[0], edge[1]] = -loss

    @torch.inference_mode()
    def begin(self, sequences: Sequence[list[int]]) -> Batch:
        """Return ``sequences`` as a batch whose last tokens come next.

        Of what the last :meth:`score` has read (prompts, with a candidate or without) the keys and values are used;
        they are given away by that.
        """
        longest, device = max(map(len, sequences)), self._model.device
        ids = torch.tensor([[self._pad] * (longest - len(row)) + row for row in sequences], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in sequences], device=device)
        known = {row: self._known[key] for row, ids_ in enumerate(sequences) if (key := tuple(ids_)) in self._known}
        fresh = [row for row in range(len(sequences)) if row not in known]
        old, self._cache, self._known = self._cache, None, {}
        caches: list[Any] = []
        if old and known:
            rows = torch.tensor([row for row, _ in known.values()], device=device)[:, None]
            own = [[0] * (longest - 1 - len(places)) + places for _, places in known.values()]
            places = torch.tensor(own, device=device)
            caches.append(old)
            for layer in caches[0].layers:
                layer.keys = layer.keys.transpose(1, 2)[rows, places].transpose(1, 2)
                layer.values = layer.values.transpose(1, 2)[rows, places].transpose(1, 2)
        if fresh:
            width = max(len(sequences[row]) for row in fresh)
            caches.append(self._prefill(ids[fresh, -width:-1], mask[fresh, -width:-1]))
            for layer in caches[-1].layers:
                layer.keys = pad(layer.keys, (0, 0, longest - width, 0))
                layer.values = pad(layer.values, (0, 0, longest - width, 0))
        if len(caches) == 2:
            order = torch.tensor([*known, *fresh], device=device).argsort()
            for layer, other in zip(caches[0].layers, caches[1].layers, strict=True):
                layer.keys = torch.cat([layer.keys, other.keys])[order]
                layer.values = torch.cat([layer.values, other.values])[order]
        return Batch(ids, mask, caches[0])

    def _prefill(self, ids: torch.Tensor, mask: torch.Tensor) -> Cache:
        cache = DynamicCache()
        self._model.get_decoder()(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        )
        return cache


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
    candidates = [[list(sample[3:]), [*sample[3:-1], sample[0]]], [list(sample[2:])]]
    trees = TreeScorer(model, 0).score(prompts, candidates)
    one_by_one = [log_likelihoods(lm, prompt, some) for prompt, some in zip(prompts, candidates, strict=True)]
    tolerance = 1e-4 if str(lm.dtype) == "torch.float32" else 2e-2
    return all(
        abs(a - b) <= tolerance * abs(b)
        for tree, plain in zip(trees, one_by_one, strict=True)
        for a, b in zip(tree, plain, strict=True)
    )
