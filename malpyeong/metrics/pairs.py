"""What BERTScore and BLEURT share: their model's files, batches of like length, and no pair scored twice."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cachetools import LRUCache

from malpyeong.errors import InputError

if TYPE_CHECKING:
    import torch

Pair = tuple[str, str]

_KNOWN_PAIRS = 65_536


class MissingModelError(InputError):
    """A scorer's model is neither on this machine nor can it be downloaded."""


class PairScorer(ABC):
    """A metric of (candidate, reference) pairs that is computed by a neural network.

    A GRPO run meets the same pair many times (the answers of a group are often alike, and prompts come back), so
    every distinct pair is scored once and remembered.

    Attributes:
        device: where the network runs.
        weight_bytes: memory that its weights take.
    """

    device: str
    weight_bytes: int

    def __init__(self, device: str) -> None:
        self.device = pick_device(device)
        # Beyond this many tokens a batch gains nothing: a small card's memory suffers, or a CPU's time, because tensors
        # of over 32 MB are given back to the system after every layer, and their pages zeroed anew in the next.
        self._max_padded = 1_024 if self.device == "cpu" else 16_384
        self._known: LRUCache[Pair, float] = LRUCache(_KNOWN_PAIRS)

    def score(self, candidates: Sequence[str], references: Sequence[str]) -> list[float]:
        """Return the score of each candidate against the reference in the same place.

        Raises:
            ValueError: the lengths differ.
            FloatingPointError: a score is not a number (an overflow in half precision).
        """
        pairs = list(zip(candidates, references, strict=True))
        scored = {pair: self._known[pair] for pair in dict.fromkeys(pairs) if pair in self._known}
        new = [pair for pair in dict.fromkeys(pairs) if pair not in scored]
        if new:
            scores = self._score_new(new)
            if not all(map(math.isfinite, scores)):
                raise FloatingPointError(f"{type(self).__name__} gives scores that are not finite; use float32")
            scored.update(zip(new, scores, strict=True))
        self._known.update(scored)
        return [scored[pair] for pair in pairs]

    def _hold(self, model: "torch.nn.Module") -> None:
        """Put the network where it runs."""
        self._model: Any = model.to(self.device).eval()
        self.weight_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())

    @abstractmethod
    def _score_new(self, pairs: Sequence[Pair]) -> list[float]:
        """Score distinct pairs that are not remembered."""


def batches(lengths: Sequence[int], max_padded: int) -> Iterator[list[int]]:
    """Yield the indices of ``lengths`` in batches of like length, longest first.

    A batch padded to its longest member has at most ``max_padded`` places (a single longer one is a batch of its
    own). Longest first: if memory does not suffice, the first batch says so.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > max_padded:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def pick_device(name: str) -> str:
    """Turn ``auto`` into ``cuda`` where there is a GPU, else ``cpu``.

    Raises:
        InputError: ``cuda`` is asked for and there is none.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("the scorers' device is cuda, and there is no GPU here; choose cpu or auto")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def model_file(name: str, *filenames: str) -> Path:
    """Return the first of some files that a model has.

    Args:
        name: a folder, or a hub id whose file is then downloaded (or found in the hub's cache).
        filenames: names to look for, the best first.

    Raises:
        MissingModelError: there is none of them; says how to download the model.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    folder = Path(name)
    if folder.is_dir():
        for filename in filenames:
            if (folder / filename).is_file():
                return folder / filename
        raise MissingModelError(f"{name}: has no {' or '.join(filenames)}; download the model again")
    reason = ""
    for filename in filenames:
        try:
            return Path(hf_hub_download(name, filename))
        except (OSError, HfHubHTTPError, HFValidationError) as error:
            reason = str(error).strip().partition("\n")[0][:150]
    raise MissingModelError(
        f"{name}: is neither a folder nor in the hub's cache, and cannot be downloaded from here; run "
        f'"hf download {name}" where there is internet, or give the folder that it is in ({reason})'
    )


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep transformers from reporting the weights that a scorer leaves out on purpose."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
