"""BERTScore (Zhang et al. 2020, https://arxiv.org/abs/1904.09675) with the contest's settings.

``bert-base-multilingual-cased``, layer 9 (bert-score's choice for that model), no idf weights, no rescaling, F1. The
encoder's input and the matching are the bert-score package's own; what is ours is around them: batches of like
length, references embedded once in a run instead of once a pair, and two repairs for transformers 5 (an empty text
called a tokenizer method that is gone; a tokenizer without a length limit overflowed).
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cachetools import LRUCache

from malpyeong.errors import InputError
from malpyeong.metrics.pairs import Pair, PairScorer, batches, model_file, quiet_loading

if TYPE_CHECKING:
    import torch

BERTSCORE_MODEL = "bert-base-multilingual-cased"
LAYER = 9
MAX_TOKENS = 512
_REFERENCE_TOKENS = 100_000  # of 768 floats each: 300 MB; the contest's 622 references have about 60,000 tokens
_CHUNK = 1_024  # pairs whose references are held together


class BERTScore(PairScorer):
    """BERTScore F1 of (candidate, reference) pairs; 0.0 where either is empty.

    Args:
        model: hub id or folder of a BERT-like encoder with at least nine layers.
        device: ``cpu``, ``cuda``, or ``auto``: the GPU if there is one.
        dtype: of weights and embeddings; float32 for a score that is reported.

    Raises:
        MissingModelError: the model is not here and cannot be downloaded.
        InputError: it has too few layers, or its tokenizer knows no Korean.
    """

    def __init__(self, model: str = BERTSCORE_MODEL, device: str = "auto", dtype: str = "float32") -> None:
        model_file(model, "config.json")
        super().__init__(device)
        import torch
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        try:
            config: Any = AutoConfig.from_pretrained(model)
            if config.num_hidden_layers < LAYER:
                raise InputError(
                    f"{model}: has {config.num_hidden_layers} layers; the contest scores with layer {LAYER}"
                )
            config.num_hidden_layers = LAYER
            with quiet_loading():
                loaded: Any = AutoModel.from_pretrained(
                    model, config=config, dtype=getattr(torch, dtype), output_loading_info=True
                )
            self._tokenizer: Any = AutoTokenizer.from_pretrained(model)
        except InputError:
            raise
        except Exception as error:  # each reader has errors of its own for a damaged file
            raise InputError(f"{model}: cannot be loaded for BERTScore ({str(error).strip()[:200]})") from None
        network, report = loaded
        missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
        if missing:  # they would be drawn at random
            raise InputError(f"{model}: lacks weights ({', '.join(missing[:5])}); download it again")
        if getattr(self._tokenizer, "do_lower_case", False):
            raise InputError(f"{model}: its tokenizer lower-cases; is tokenizer_config.json missing?")
        known = self._tokenizer("옳은 문장", add_special_tokens=False)["input_ids"]
        if all(token == self._tokenizer.unk_token_id for token in known):
            raise InputError(
                f"{model}: its tokenizer reads Korean as unknown tokens; save the model with its tokenizer.json"
            )
        self._hold(network)
        self._references: LRUCache[str, tuple[torch.Tensor, torch.Tensor]] = LRUCache(
            _REFERENCE_TOKENS, getsizeof=lambda embedded: len(embedded[1])
        )
        self._idf: defaultdict[int, float] = defaultdict(lambda: 1.0)
        self._idf.update({self._tokenizer.cls_token_id: 0.0, self._tokenizer.sep_token_id: 0.0})

    def _score_new(self, pairs: Sequence[Pair]) -> list[float]:
        scores = [0.0] * len(pairs)
        filled = [index for index, pair in enumerate(pairs) if all(text.strip() for text in pair)]
        for start in range(0, len(filled), _CHUNK):
            chunk = filled[start : start + _CHUNK]
            references = self._embed_references({pairs[index][1] for index in chunk})
            lengths = [max(self._tokens(pairs[index][0]), len(references[pairs[index][1]][1])) for index in chunk]
            for batch in batches(lengths, self._max_padded):
                rows = [chunk[place] for place in batch]
                candidates = self._embed([pairs[row][0] for row in rows])
                for row, score in zip(
                    rows, self._match([references[pairs[row][1]] for row in rows], candidates), strict=True
                ):
                    scores[row] = score
        return scores

    def _embed_references(self, texts: set[str]) -> dict[str, tuple["torch.Tensor", "torch.Tensor"]]:
        embedded = {text: self._references[text] for text in sorted(texts) if text in self._references}
        new = sorted(texts - embedded.keys())
        for batch in batches([self._tokens(text) for text in new], self._max_padded):
            chosen = [new[index] for index in batch]
            embedded.update(zip(chosen, self._embed(chosen), strict=True))
        self._references.update(embedded)
        return embedded

    def _tokens(self, text: str) -> int:
        return len(_encode(self._tokenizer, text))

    def _embed(self, texts: Sequence[str]) -> list[tuple["torch.Tensor", "torch.Tensor"]]:
        """Return (embeddings, weights) of each text, of shapes (tokens, hidden) and (tokens,), without padding."""
        embeddings, mask, weights = _bert_score().get_bert_embedding(
            list(texts), self._model, self._tokenizer, self._idf, device=self.device
        )
        if not bool(embeddings.isfinite().all()):  # bert-score would turn them into scores of 0
            raise FloatingPointError(f"BERTScore's embeddings are not finite in {embeddings.dtype}; use float32")
        # In float32 from here: bfloat16 cosines would come in steps of 0.004.
        return [
            (embedding[:length].float().clone(), weight[:length])
            for embedding, weight, length in zip(embeddings, weights, mask.sum(dim=1).tolist(), strict=True)
        ]

    def _match(
        self,
        references: Sequence[tuple["torch.Tensor", "torch.Tensor"]],
        candidates: Sequence[tuple["torch.Tensor", "torch.Tensor"]],
    ) -> list[float]:
        import torch

        with torch.no_grad():
            _, _, f1 = _bert_score().greedy_cos_idf(*_pad(references), *_pad(candidates))
        return [float(score) for score in f1]


def _pad(
    embedded: Sequence[tuple["torch.Tensor", "torch.Tensor"]],
) -> tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]:
    """Return embeddings, mask and weights as bert-score's matching takes them; padding must not be a zero vector."""
    from torch.nn.utils.rnn import pad_sequence

    embeddings = pad_sequence([embedding for embedding, _ in embedded], batch_first=True, padding_value=2.0)
    weights = pad_sequence([weight for _, weight in embedded], batch_first=True)
    mask = pad_sequence([weight.new_ones(len(weight)) for _, weight in embedded], batch_first=True)
    return embeddings, mask.to(embeddings.device), weights


def _bert_score() -> Any:  # noqa: ANN401 -- a module without types
    from bert_score import utils

    utils.sent_encode = _encode
    return utils


def _encode(tokenizer: Any, text: str) -> list[int]:  # noqa: ANN401 -- a transformers tokenizer
    limit = min(tokenizer.model_max_length, MAX_TOKENS)
    ids: list[int] = tokenizer.encode(text.strip(), add_special_tokens=True, truncation=True, max_length=limit)
    return ids
