"""BLEURT-20 (Sellam et al. 2020, https://arxiv.org/abs/2004.04696; Pu et al. 2021) in PyTorch, without TensorFlow.

    python -m malpyeong.metrics.bleurt lucadiliello/BLEURT-20    (checks a downloaded model by two published scores)

BLEURT reads ``[CLS] reference [SEP] candidate [SEP]`` (token types 0 and 1) and regresses one number from the pooled
first token. BLEURT-20 is a RemBERT, so transformers' own model holds the converted checkpoint after its weights are
renamed. Two choices follow Google's code, which the contest runs:

- Truncation: while reference and candidate are longer than 512 tokens less three, the longer one loses its last
  token, the candidate if they are equally long.
- GELU: Google's ``gelu`` is the tanh approximation, transformers' ``gelu`` (which the converted checkpoint's own
  package uses) is the exact one. The default here is ``tanh``; the command above shows both.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import click

from malpyeong.errors import InputError
from malpyeong.metrics.pairs import Pair, PairScorer, batches, model_file, quiet_loading
from malpyeong.terminal import Command

if TYPE_CHECKING:
    import torch

BLEURT_MODEL = "lucadiliello/BLEURT-20"
MAX_TOKENS = 512
PUBLISHED_REFERENCES = ("a bird chirps by the window", "this is a random sentence")
PUBLISHED_CANDIDATES = ("a bird chirps by the window", "this looks like a random sentence")
PUBLISHED_SCORES = (0.99905, 0.79302)  # of BLEURT-20
TOLERANCE = 2e-3  # between the two GELUs; another model, text order or vocabulary is off by far more
_ACTIVATIONS = {"tanh": "gelu_pytorch_tanh", "erf": "gelu"}


class BLEURT(PairScorer):
    """BLEURT of (candidate, reference) pairs: about 0–1, but not bounded.

    Args:
        model: hub id or folder of a checkpoint in the converted layout (``bleurt.…`` keys) or transformers' own.
        device: ``cpu``, ``cuda`` or ``auto``; on a 16 GB card that also trains, the CPU keeps 2.3 GB off it.
        dtype: of weights and activations; float32 for a score that is reported.
        gelu: which GELU (see the module).

    Raises:
        MissingModelError: the model is not here and cannot be downloaded.
        InputError: weights are missing or left over (named), or there is no tokenizer.
    """

    def __init__(
        self,
        model: str = BLEURT_MODEL,
        device: str = "auto",
        dtype: str = "float32",
        gelu: Literal["tanh", "erf"] = "tanh",
    ) -> None:
        config_file = model_file(model, "config.json")
        weights_file = model_file(model, "model.safetensors", "pytorch_model.bin")
        super().__init__(device)
        import torch

        try:
            pieces, self._cls, self._sep = _load_pieces(model)
            settings = json.loads(config_file.read_text("utf-8"))
            if weights_file.suffix == ".safetensors":
                from safetensors.torch import load_file

                weights = load_file(weights_file)
            else:
                weights = torch.load(weights_file, map_location="cpu", weights_only=True, mmap=True)
        except InputError:
            raise
        except Exception as error:  # each reader has errors of its own for a damaged file
            raise InputError(f"{model}: is damaged ({str(error).strip()[:200]}); download it again") from None
        network = _build(model, settings, weights, getattr(torch, dtype), _ACTIVATIONS[gelu])
        if pieces.GetPieceSize() > network.config.vocab_size:
            raise InputError(
                f"{model}: its vocabulary has {pieces.GetPieceSize()} entries, its weights "
                f"{network.config.vocab_size}; they are of different checkpoints"
            )
        self._encode = lru_cache(maxsize=4_096)(pieces.EncodeAsIds)
        self._hold(network)
        self._limit = min(MAX_TOKENS, network.config.max_position_embeddings)

    def _score_new(self, pairs: Sequence[Pair]) -> list[float]:
        import torch

        rows = [self._ids(candidate, reference) for candidate, reference in pairs]
        scores = [0.0] * len(pairs)
        for batch in batches([len(ids) for ids, _ in rows], self._max_padded):
            longest = len(rows[batch[0]][0])
            ids, types, mask = (torch.zeros(len(batch), longest, dtype=torch.long) for _ in range(3))
            for place, index in enumerate(batch):
                row, reference_length = rows[index]
                ids[place, : len(row)] = torch.tensor(row)
                types[place, reference_length : len(row)] = 1
                mask[place, : len(row)] = 1
            with torch.inference_mode():
                logits = self._model(
                    input_ids=ids.to(self.device),
                    token_type_ids=types.to(self.device),
                    attention_mask=mask.to(self.device),
                ).logits
            for index, score in zip(batch, logits[:, 0].float().tolist(), strict=True):
                scores[index] = score
        return scores

    def _ids(self, candidate: str, reference: str) -> tuple[list[int], int]:
        """Return the token ids of a pair and how many of them belong to the reference (type 0)."""
        first, second = self._encode(reference), self._encode(candidate)
        keep = truncated(len(first), len(second), self._limit - 3)
        head = [self._cls, *first[: keep[0]], self._sep]
        return [*head, *second[: keep[1]], self._sep], len(head)


def truncated(reference: int, candidate: int, limit: int) -> tuple[int, int]:
    """Return how many tokens of each are kept: the longer one loses its last, the candidate on a tie."""
    while reference + candidate > limit:
        if reference > candidate:
            # down to the other's length at once, or as far as needed
            reference = max(candidate, limit - candidate)
        elif candidate > reference:
            candidate = max(reference, limit - reference)
        else:
            reference, candidate = limit - limit // 2, limit // 2
    return reference, candidate


def _build(
    name: str, settings: dict[str, Any], weights: dict[str, "torch.Tensor"], dtype: "torch.dtype", activation: str
) -> Any:  # noqa: ANN401 -- a transformers model
    """Put a checkpoint's weights into transformers' RemBERT."""
    from transformers import RemBertConfig, RemBertForSequenceClassification

    renamed = {
        key.replace("embedding_projection.", "embedding_hidden_mapping_in.").replace("bleurt.", "rembert."): value
        for key, value in weights.items()
        if not key.endswith("embeddings.position_ids")
    }
    shapes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    others = ("max_position_embeddings", "type_vocab_size", "layer_norm_eps")
    embedding = settings.get("input_embedding_size") or settings.get("embedding_size")
    missing = [key for key in shapes if key not in settings] + ([] if embedding else ["embedding_size"])
    if missing:
        raise InputError(f"{name}: its config.json has no {', '.join(missing)}; is it BLEURT-20? Download it again")
    known: dict[str, Any] = {key: settings[key] for key in (*shapes, *others) if key in settings}
    known |= {"input_embedding_size": embedding, "hidden_act": activation, "num_labels": 1}
    kind: Any = RemBertForSequenceClassification
    try:
        config = RemBertConfig(**known)
        with quiet_loading():
            model, report = kind.from_pretrained(
                None,
                config=config,
                state_dict=renamed,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they are named below
            )
    except Exception as error:  # a wrong type in the config is an error class of its own
        raise InputError(f"{name}: its weights do not fit its config.json ({str(error).strip()[:200]})") from None
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(key if isinstance(key, str) else key[0] for key in report[what])
        if keys:
            shown = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            raise InputError(f"{name}: is not a BLEURT checkpoint ({what.replace('_', ' ')}: {shown})")
    return model


def _load_pieces(model: str) -> tuple[Any, int, int]:
    """Return the SentencePiece model, which is called as Google's code calls it, and the ids of [CLS] and [SEP]."""
    from sentencepiece import SentencePieceProcessor

    vocabulary = model_file(model, "spm.model", "sent_piece.model", "sentencepiece.model")
    pieces = SentencePieceProcessor()
    pieces.Load(str(vocabulary))
    cls, sep = (pieces.PieceToId(mark) for mark in ("[CLS]", "[SEP]"))
    if pieces.unk_id() in (cls, sep):
        raise InputError(f"{vocabulary}: has no [CLS] or [SEP]; this is not BLEURT's vocabulary")
    return pieces, cls, sep


@click.command(cls=Command)
@click.argument("model", default=BLEURT_MODEL)
def main(model: str) -> None:
    """Score the two published pairs with MODEL, a hub id or folder; exit with 1 unless their scores come out.

    The score in use is the one with tanh; the other is shown to tell a wrong GELU from a wrong download.
    """
    differences = {}
    gelus: tuple[Literal["tanh", "erf"], ...] = ("tanh", "erf")
    for gelu in gelus:
        scores = BLEURT(model, gelu=gelu).score(PUBLISHED_CANDIDATES, PUBLISHED_REFERENCES)
        differences[gelu] = max(abs(score - other) for score, other in zip(scores, PUBLISHED_SCORES, strict=True))
        shown = ", ".join(f"{score:.5f}" for score in scores)
        published = ", ".join(map(str, PUBLISHED_SCORES))
        click.echo(f"gelu {gelu}: {shown}   (published: {published}; differs by {differences[gelu]:.5f})")
    if differences["tanh"] >= TOLERANCE:
        other = (
            "the exact GELU gives them: please report this" if differences["erf"] < TOLERANCE else "download it again"
        )
        click.echo(f"{model}: does not give the published scores; {other}", err=True)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
