"""The order of a run's sequences, and the batches read in that order.

The i-th sequence of a run is a pure function of (seed, number of windows, i). A run is therefore resumed,
at any batch size, by one integer: how many sequences it has consumed.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from atlas.errors import DataError

Order = Callable[[NDArray[np.int64]], NDArray[np.int64]]
"""Numbers of a run's sequences → their windows."""

_AHEAD = 2
"""Batches per thread that are read or waiting to be used: one in work, one done."""

_ROUNDS = 8
_NUM_KEYS = np.uint64(_ROUNDS + 1)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class SequenceOrder:
    """Which window is the i-th sequence of a run: a new permutation of all windows in each epoch.

    A keyed bijection, not a stored permutation: a Feistel network (Luby and Rackoff 1988) over the
    smallest even number of bits that holds `num_windows`, walked along its cycle until it lands inside
    (Black and Rogaway 2002). So any i costs the same, in time and in memory, for 10¹⁰ windows too.
    """

    def __init__(self, seed: int, num_windows: int) -> None:
        if num_windows < 1:
            raise ValueError(f"num_windows {num_windows} must be at least 1")
        self.num_windows = num_windows
        self._half_bits = max(1, -(-(num_windows - 1).bit_length() // 2))
        digest = hashlib.blake2b(str(seed).encode(), digest_size=8, person=b"atlas-order").digest()
        self._seed_key = np.uint64(int.from_bytes(digest, "little"))

    def __call__(self, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
        """The windows of these sequences of the run, any shape."""
        flat = np.asarray(sequences, dtype=np.uint64).reshape(-1)
        epoch, window = np.divmod(flat, np.uint64(self.num_windows))
        keys = [_mix(self._seed_key + _mix(epoch * _NUM_KEYS + np.uint64(k))) for k in range(_ROUNDS + 1)]
        window = self._permute(window, keys)
        while len(outside := np.flatnonzero(window >= self.num_windows)):
            window[outside] = self._permute(window[outside], [key[outside] for key in keys])
        return window.astype(np.int64).reshape(np.shape(sequences))

    def _permute(self, x: NDArray[np.uint64], keys: list[NDArray[np.uint64]]) -> NDArray[np.uint64]:
        half, mask = np.uint64(self._half_bits), np.uint64((1 << self._half_bits) - 1)
        # A Feistel network makes even permutations only, which shows at a handful of windows; the rotation
        # makes odd ones too.
        x = x + keys[-1]
        left, right = (x >> half) & mask, x & mask
        for key in keys[:-1]:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        joined: NDArray[np.uint64] = (left << half) | right
        return joined


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64 (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed


def share_of_update(sequences_per_update: int, world_size: int) -> int:
    """How many sequences of an update each process takes. Raises `DataError` if it cannot be shared out evenly."""
    if sequences_per_update % world_size:
        raise DataError(
            f"an update of {sequences_per_update} sequences cannot be split evenly over {world_size} processes; "
            "choose training.batch_size × training.gradient_accumulation_steps as a multiple of their number"
        )
    return sequences_per_update // world_size


def batches(
    dataset: Dataset[tuple[Tensor, ...]],
    order: Order,
    *,
    start: int,
    sequences_per_update: int,
    num_updates: int | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[Tensor, ...]]:
    """Per update the next `sequences_per_update` sequences of the run, from sequence `start` on.

    Yields the dataset's columns stacked, (inputs, targets) or (inputs, targets, documents), each (N, T) int64,
    for `num_updates` updates or without end. Of `world_size` processes each gets an equal share of every update:
    `rank` 0 the first N sequences, rank 1 the next; together the update of one process, in its order.

    With `num_workers` threads read ahead, in memory for 2 batches each (16 bytes per token); the batches are
    the same, bit for bit. What a thread raises is raised here, and closing the iterator stops the threads.

    Raises `DataError` if an update cannot be shared out evenly.
    """
    share_of_update(sequences_per_update, world_size)
    updates = _sequences_of_updates(start, sequences_per_update, num_updates, rank, world_size)

    def read(sequences: NDArray[np.int64]) -> tuple[Tensor, ...]:
        return _read(dataset, order(sequences).tolist(), pin_memory=pin_memory)

    return _read_ahead(read, updates, num_threads=num_workers)


def _sequences_of_updates(
    start: int, sequences_per_update: int, num_updates: int | None, rank: int, world_size: int
) -> Iterator[NDArray[np.int64]]:
    share = share_of_update(sequences_per_update, world_size)
    for update in itertools.count() if num_updates is None else range(num_updates):
        first = start + update * sequences_per_update + rank * share
        yield np.arange(first, first + share)


def _read_ahead(
    read: Callable[[NDArray[np.int64]], tuple[Tensor, ...]],
    updates: Iterator[NDArray[np.int64]],
    *,
    num_threads: int,
) -> Iterator[tuple[Tensor, ...]]:
    """The batches of `updates`, in order, read by threads: page faults and copies do not hold Python's lock."""
    if num_threads == 0:
        yield from map(read, updates)
        return
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="atlas-read-ahead")
    ahead: collections.deque[Future[tuple[Tensor, ...]]] = collections.deque()
    try:
        while True:
            for sequences in itertools.islice(updates, _AHEAD * num_threads - len(ahead)):
                ahead.append(pool.submit(read, sequences))
            if not ahead:
                return
            yield ahead.popleft().result()
    finally:  # also when the iterator is dropped: a thread ends with the batch it is at, and nobody waits for it
        for batch in (
            ahead
        ):  # not by `cancel_futures`, which fails where the interpreter drops the iterator as it ends
            batch.cancel()
        pool.shutdown(wait=False)


def _read(
    dataset: Dataset[tuple[Tensor, ...]], windows: list[int], *, pin_memory: bool
) -> tuple[Tensor, ...]:
    """The sequences of these windows, stacked column by column."""
    # NumPy, since torch.stack would start a pool of OpenMP threads of its own for every thread that reads.
    rows = zip(*(dataset[window] for window in windows), strict=True)
    columns = tuple(torch.from_numpy(np.stack(column)) for column in rows)
    return tuple(column.pin_memory() for column in columns) if pin_memory else columns
