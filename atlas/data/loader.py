"""The order of a run's sequences, and the batches read in that order.

The i-th sequence of a run is a pure function of (seed, number of windows, i). A run is therefore resumed,
at any batch size, by one integer: how many sequences it has consumed.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import itertools
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from atlas.data.dataset import SequenceDataset

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


def batches(
    dataset: SequenceDataset,
    order: SequenceOrder,
    *,
    start: int,
    sequences_per_update: int,
    num_updates: int | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Per update the next `sequences_per_update` sequences of the run, from sequence `start` on.

    Yields (inputs, targets), each (N, T) int64, for `num_updates` updates or without end. With
    `num_workers` other processes read ahead; the batches are the same, bit for bit, and torch's global
    random state is left alone.
    """
    updates = _windows_of_updates(order, start, sequences_per_update, num_updates)
    if num_workers == 0:
        for windows in updates:
            rows = [dataset[window] for window in windows]
            inputs, targets = (torch.stack(column) for column in zip(*rows, strict=True))
            yield (inputs.pin_memory(), targets.pin_memory()) if pin_memory else (inputs, targets)
        return
    with _workers_may_go() as may_go:
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=updates,
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=functools.partial(_leave_signals_to_parent, may_go),
            generator=torch.Generator(),
        )
        with _signals_held_back():
            iterator = iter(loader)
        for inputs, targets in iterator:
            yield inputs, targets


def _windows_of_updates(
    order: SequenceOrder, start: int, sequences_per_update: int, num_updates: int | None
) -> Iterator[list[int]]:
    for update in itertools.count() if num_updates is None else range(num_updates):
        first = start + update * sequences_per_update
        yield order(np.arange(first, first + sequences_per_update)).tolist()


@contextmanager
def _workers_may_go() -> Iterator[Any]:
    """A byte that workers see too, 1 from the moment when they may end: the loop is left, or the process.

    Torch and `multiprocessing` end workers that linger by SIGTERM, and at exit wait until it is obeyed.
    """
    may_go = multiprocessing.RawValue("b", 0)
    let_go = functools.partial(setattr, may_go, "value", 1)
    atexit.register(let_go)
    try:
        yield may_go
    finally:
        let_go()
        atexit.unregister(let_go)


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Processes started meanwhile are born deaf to both signals; the parent hears them when they are started."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_parent(may_go: Any, _worker: int) -> None:
    """Ctrl-C reaches every process of a terminal, and SIGTERM every process that a batch system or a
    container ends, but the parent decides when to stop, and wants its batches until then. SIGTERM is obeyed
    once they `may_go`. (Windows has no mask to inherit; there this is the whole protection.)"""

    def go_if_allowed(number: int, frame: FrameType | None) -> None:
        if may_go.value:
            os._exit(0)  # as torch's own handler does: any other end is reported as a failure

    for name in ("SIGINT", "SIGBREAK"):
        if number := getattr(signal, name, None):
            signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, go_if_allowed)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
