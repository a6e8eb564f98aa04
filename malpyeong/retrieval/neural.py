"""Dense retrieval and reranking with local sentence-transformers models."""

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, TypeVar

from malpyeong.errors import InputError, needs

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from sentence_transformers import SentenceTransformer

    from malpyeong.retrieval.search import Document, Query

Model = TypeVar("Model")

_LONG = 500  # texts from which on a progress bar is worth its line
# Padding moves a score by about 1e-7; rounding keeps the order of ties from depending on what is encoded together.
_DECIMALS = 5


class Dense:
    """Cosine similarity of embeddings.

    Args:
        documents: what is searched.
        model: folder or hub id of a sentence-transformers model; its prompts for queries and documents are used.

    Raises:
        InputError: there is no such model here and it cannot be downloaded.
    """

    def __init__(self, documents: Sequence["Document"], model: str) -> None:
        needs("sentence_transformers", "retrieval")
        from sentence_transformers import SentenceTransformer

        self._model = _load(model, lambda: SentenceTransformer(model))
        self._documents = self._model.encode_document(
            [
                "\n".join((*document.focus, document.text)) if document.focus else document.text
                for document in documents
            ],
            normalize_embeddings=True,
            show_progress_bar=len(documents) > _LONG,
        )

    def scores(
        self, queries: Sequence["Query"], left_out: Sequence[Collection[int]] | None = None
    ) -> "NDArray[np.float32]":
        """Return scores of shape (queries, documents); no document has an influence on another's."""
        import numpy as np

        encoded = self._model.encode_query(
            [query_text(query) for query in queries],
            normalize_embeddings=True,
            show_progress_bar=len(queries) > _LONG,
        )
        scores: NDArray[np.float32] = np.round(encoded @ self._documents.T, _DECIMALS).astype(np.float32)
        return scores


class Reranker:
    """A cross-encoder, which reads question and document together.

    Args:
        model: folder or hub id of a sentence-transformers cross-encoder with one output.

    Raises:
        InputError: there is no such model here and it cannot be downloaded.
    """

    def __init__(self, model: str) -> None:
        needs("sentence_transformers", "retrieval")
        from sentence_transformers import CrossEncoder

        self._model = _load(model, lambda: CrossEncoder(model))
        if self._model.num_labels != 1:
            raise InputError(f"{model}: gives {self._model.num_labels} scores a pair; a reranker gives one")

    def scores(self, pairs: Sequence[tuple["Query", str]]) -> "NDArray[np.float32]":
        """Return the score of each (query, text of a document)."""
        import numpy as np

        predicted = self._model.predict(
            [(query_text(query), text) for query, text in pairs], show_progress_bar=len(pairs) > _LONG
        )
        scores: NDArray[np.float32] = np.round(predicted, _DECIMALS).astype(np.float32)
        return scores


def query_text(query: "Query") -> str:
    """Return a question as an encoder reads it: the words it is about first, where they are known."""
    return "\n".join((*query.focus, query.text))


def load_encoder(name: str, dtype: str, max_length: int) -> "SentenceTransformer":
    """Load a model to be trained as an encoder: a sentence-transformers model as it is, any other with mean pooling.

    Args:
        name: folder or hub id.
        dtype: of the weights; see :func:`malpyeong.models.load.pick_dtype`.
        max_length: tokens from which on a text would be cut.

    Raises:
        InputError: there is no such model here and it cannot be downloaded.
    """
    needs("sentence_transformers", "retrieval")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from sentence_transformers.util import is_sentence_transformer_model

    from malpyeong.models.load import pick_dtype

    options = {"dtype": pick_dtype(dtype)}

    def load() -> SentenceTransformer:
        if is_sentence_transformer_model(name):
            model = SentenceTransformer(name, model_kwargs=options)
            model.max_seq_length = max_length
            return model
        transformer = Transformer(name, max_seq_length=max_length, model_kwargs=options)
        return SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension(), "mean")])

    return _load(name, load)


def _load(name: str, load: Callable[[], Model]) -> Model:
    try:
        return load()
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0][:150]
        raise InputError(
            f"{name}: no sentence-transformers model can be loaded from here; give its folder, or run "
            f'"hf download {name}" where there is internet ({reason})'
        ) from None
