"""Several datasets as one, each with its share of the sequences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import ConcatDataset

from atlas.data.sequences.conversations import ChatDataset
from atlas.data.sequences.dataset import SequenceDataset
from atlas.data.sequences.loader import SequenceOrder
from atlas.errors import DataError

BLOCK = 4096
"""Number of sequences per block. In each block the shares are exact."""


class MixtureDataset(ConcatDataset[tuple[Tensor, ...]]):
    """The windows of all parts, one part after the other, and the `weights` with which training samples the parts."""

    def __init__(self, parts: Sequence[SequenceDataset | ChatDataset], weights: Sequence[float]) -> None:
        super().__init__(parts)
        self.parts = list(parts)
        self.weights = list(weights)
        self.max_seq_len = parts[0].max_seq_len
        self.num_tokens = sum(part.num_tokens for part in parts)
        num_bytes = sum(part.bytes_per_token * part.num_targets for part in parts)
        self.bytes_per_token = num_bytes / sum(part.num_targets for part in parts)
        """Bytes per predicted token. Each part counts by its targets, not by its weight."""
        self.files = [file for part in self.parts for file in part.files]
        """The path and the sha256 of each file that the windows are read from."""


class MixtureOrder:
    """Maps sequence i of a run over several datasets to its window, like `SequenceOrder`.

    Each block of `BLOCK` sequences holds a fixed number of sequences of every part, and has its own order. The j-th
    sequence from a part is sequence j in the `SequenceOrder` of this part. So each window of a part occurs once per
    pass over the part, and the cost does not grow with i.

    Raises `DataError` for a weight that is too small for one sequence of a block.
    """

    def __init__(self, seed: int, num_windows: Sequence[int], weights: Sequence[float]) -> None:
        self.quotas = quotas(weights)
        self._ends = np.cumsum(self.quotas)
        self._offsets = np.concatenate([[0], np.cumsum(num_windows)[:-1]])
        self._slots = SequenceOrder(seed, BLOCK)
        self._orders = [SequenceOrder(seed + (part << 64), n) for part, n in enumerate(num_windows, 1)]

    def __call__(self, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the numbers of the windows of a run's `sequences`, in the same shape. The windows of all parts
        are numbered consecutively."""
        flat = np.asarray(sequences, dtype=np.int64).reshape(-1)
        windows = np.empty_like(flat)
        block, place = np.divmod(flat, BLOCK)
        for number in np.unique(block):
            part_of, rank_of = self._layout(int(number))
            here = np.flatnonzero(block == number)
            parts, ranks = part_of[place[here]], rank_of[place[here]]
            for part in np.unique(parts):
                mine = parts == part
                drawn = number * self.quotas[part] + ranks[mine]
                windows[here[mine]] = self._offsets[part] + self._orders[part](drawn)
        return windows.reshape(np.shape(sequences))

    def _layout(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return two arrays (BLOCK,) for the positions in a block: the part of each position, and the number of earlier
        positions in the block with the same part."""
        slots = self._slots(block * BLOCK + np.arange(BLOCK))
        part_of = np.searchsorted(self._ends, slots, side="right")
        rank_of = np.empty(BLOCK, np.int64)
        for part, quota in enumerate(self.quotas):
            rank_of[part_of == part] = np.arange(quota)
        return part_of, rank_of


def quotas(weights: Sequence[float]) -> list[int]:
    """Return the number of sequences of each part per block, rounded by largest remainder (Hamilton's method)."""
    exact = np.asarray(weights, dtype=np.float64) / max(weights)
    exact = exact / exact.sum() * BLOCK
    counts = np.floor(exact).astype(np.int64)
    largest_first = np.argsort(counts - exact, kind="stable")
    counts[largest_first[: BLOCK - int(counts.sum())]] += 1
    if counts.min() == 0:
        smallest = weights[counts.argmin()]
        raise DataError(
            f"data.mixture: weight {smallest:g} is less than one sequence in {BLOCK}: raise it, or leave the part out"
        )
    return [*map(int, counts)]


def order_of(
    dataset: SequenceDataset | ChatDataset | MixtureDataset, seed: int
) -> SequenceOrder | MixtureOrder:
    """Return the order of a dataset's windows in a run with this `seed`."""
    if isinstance(dataset, MixtureDataset):
        return MixtureOrder(seed, [len(part) for part in dataset.parts], dataset.weights)
    return SequenceOrder(seed, len(dataset))
