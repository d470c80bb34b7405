"""The order of a run's sequences, and the batches read in that order.

The i-th sequence of a run is a pure function of (seed, number of windows, i). Therefore one integer is enough to resume
a run at any batch size: the number of sequences that the run has consumed.
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

Numbers = NDArray[np.int64]
Batch = tuple[Tensor, ...]
Order = Callable[[Numbers], Numbers]
"""A function that maps the numbers of a run's sequences to the numbers of windows."""

_AHEAD = 2
"""Batches per thread: one batch is being read, and one batch waits."""

_ROUNDS = 8
_NUM_KEYS = np.uint64(_ROUNDS + 1)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class SequenceOrder:
    """Maps sequence i of a run to its window: a new permutation of all windows in each epoch.

    A Feistel network (Luby and Rackoff 1988) computes the permutation, so nothing is stored. The network permutes the
    numbers below 2^b, where b is the smallest even number with 2^b ≥ `num_windows`. The network is applied again until
    the result is less than `num_windows` (Black and Rogaway 2002). So every i costs the same time and memory, even with
    10¹⁰ windows.
    """

    def __init__(self, seed: int, num_windows: int) -> None:
        if num_windows < 1:
            raise ValueError(f"num_windows {num_windows} must be at least 1")
        self.num_windows = num_windows
        self._half_bits = max(1, -(-(num_windows - 1).bit_length() // 2))
        digest = hashlib.blake2b(str(seed).encode(), digest_size=8, person=b"atlas-order").digest()
        self._seed_key = np.uint64(int.from_bytes(digest, "little"))

    def __call__(self, sequences: Numbers) -> Numbers:
        """Return the numbers of the windows of a run's `sequences`, in the same shape."""
        flat = np.asarray(sequences, dtype=np.uint64).reshape(-1)
        epoch, window = np.divmod(flat, np.uint64(self.num_windows))
        keys = [_mix(self._seed_key + _mix(epoch * _NUM_KEYS + np.uint64(k))) for k in range(_ROUNDS + 1)]
        window = self._permute(window, keys)
        while len(outside := np.flatnonzero(window >= self.num_windows)):
            window[outside] = self._permute(window[outside], [key[outside] for key in keys])
        return window.astype(np.int64).reshape(np.shape(sequences))

    def _permute(self, x: NDArray[np.uint64], keys: list[NDArray[np.uint64]]) -> NDArray[np.uint64]:
        half, mask = np.uint64(self._half_bits), np.uint64((1 << self._half_bits) - 1)
        # A Feistel network makes only even permutations, and with few windows this bias is noticeable. The addition of
        # a key rotates the numbers, so that odd permutations are possible, too.
        x = x + keys[-1]
        left, right = (x >> half) & mask, x & mask
        for key in keys[:-1]:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        joined: NDArray[np.uint64] = (left << half) | right
        return joined


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return splitmix64 of `x` (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed


def share_of_update(sequences_per_update: int, world_size: int) -> int:
    """Return the number of sequences per process in an update. Raises `DataError` if the sequences cannot be divided
    evenly."""
    if sequences_per_update % world_size:
        raise DataError(
            f"an update of {sequences_per_update} sequences cannot be split evenly over {world_size} processes; "
            "choose training.batch_size × training.gradient_accumulation_steps as a multiple of the number of processes"
        )
    return sequences_per_update // world_size


def batches(
    dataset: Dataset[Batch],
    order: Order,
    *,
    start: int,
    sequences_per_update: int,
    num_updates: int | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Yield a batch for each update: the next `sequences_per_update` sequences of the run, from sequence `start` on.

    Each batch holds the dataset's columns, stacked: (inputs, targets) or (inputs, targets, documents), each (N, T)
    int64. The iterator ends after `num_updates` updates, or never if `num_updates` is None. Each of `world_size`
    processes gets an equal share of every update: rank 0 gets the first N sequences, rank 1 the next N. Together
    the shares are the same sequences, in the same order, as the update of a single process.

    `num_workers` threads read ahead. Each thread needs memory for 2 batches, with 16 bytes per token (24 with
    `documents`). The batches are the same as without threads, bit for bit. An exception in a thread is raised here.
    Closing the iterator stops the threads.

    Raises `DataError` if an update cannot be divided evenly.
    """
    share = share_of_update(sequences_per_update, world_size)
    firsts = itertools.count(start + rank * share, sequences_per_update)
    updates = (np.arange(first, first + share) for first in itertools.islice(firsts, num_updates))

    def read(sequences: Numbers) -> Batch:
        # `np.stack`, since `torch.stack` would start a pool of OpenMP threads for every thread that reads.
        rows = zip(*(dataset[window] for window in order(sequences).tolist()), strict=True)
        columns = tuple(torch.from_numpy(np.stack(column)) for column in rows)
        return tuple(column.pin_memory() for column in columns) if pin_memory else columns

    return _read_ahead(read, updates, num_workers)


def _read_ahead(
    read: Callable[[Numbers], Batch], updates: Iterator[Numbers], num_threads: int
) -> Iterator[Batch]:
    """Yield the batches of `updates` in order. Threads are enough to read the batches, because reading a file
    releases Python's global interpreter lock."""
    if num_threads == 0:
        yield from map(read, updates)
        return
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="atlas-read-ahead")
    ahead: collections.deque[Future[Batch]] = collections.deque()
    try:
        while True:
            for sequences in itertools.islice(updates, _AHEAD * num_threads - len(ahead)):
                ahead.append(pool.submit(read, sequences))
            if not ahead:
                return
            yield ahead.popleft().result()
    finally:  # also when the iterator is deleted: each thread ends after its current batch, and nobody waits
        # `cancel_futures` would fail when the interpreter deletes the iterator while it shuts down.
        for batch in ahead:
            batch.cancel()
        pool.shutdown(wait=False)
