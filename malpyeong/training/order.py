"""The order in which SFT reads its records."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class LengthGroupedOrder(Sampler[int]):
    """Records of like length together (less padding), in an order that follows from the seed and the epoch alone.

    That of transformers follows from the global random state at the epoch's start, which a run that is resumed within
    a later epoch no longer has: it would read some records twice and others not at all.

    Args:
        lengths: tokens of each record.
        batch_size: records of a step.
        seed: of the run.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths, self._batch_size, self._seed, self._epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Take the epoch, counted from 0; the trainer calls this before each."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        """Yield each record's index once."""
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        indices: list[int] = get_length_grouped_indices(self._lengths, self._batch_size, generator=generator)  # type: ignore[no-untyped-call]
        return iter(indices)
