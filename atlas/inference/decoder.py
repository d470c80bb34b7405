"""One token more of each text: a pass through the model, on a GPU as a CUDA graph.

Such a pass is some hundred small kernels, and to launch them takes the host longer than the GPU takes to run them. A
graph (https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs/) launches them all in one call. It holds for one
number of rows and for the slots of the cache that attention reads, which are doubled as the texts grow.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atlas.model import AtlasLM, KVCache, long_tensor
from atlas.model.kv_cache import CacheWindow

_FEWEST_SLOTS = 256
_WARM_UPS = 2
"""Passes before a recording, in which libraries make what they keep."""
_RECORDING = threading.Lock()
"""PyTorch records one graph at a time in a process; a server may have several models."""


@dataclass(frozen=True)
class _Recorded:
    """A pass and the memory that it reads its input from."""

    newest: Tensor
    window: CacheWindow
    run: Callable[[], Tensor]


class Decoder:
    """A model and the cache of the texts that it writes."""

    def __init__(self, model: AtlasLM, cache: KVCache) -> None:
        self.model = model
        self.cache = cache
        self._records = cache.keys.is_cuda
        self._recorded: dict[tuple[int, int], _Recorded] = {}
        self._pool: Any = None
        """The memory that all graphs share, since one runs at a time."""

    def next_logits(self, newest: Sequence[int]) -> Tensor:
        """(B, V) after the newest token of each row, which enters the cache. They are there until the next call."""
        tokens = long_tensor(newest, self.cache.keys.device)[:, None]
        recorded = self._record(tokens) if self._records else None
        if recorded is None:
            return self.model(tokens, self.cache)[:, -1]  # type: ignore[no-any-return]
        recorded.newest.copy_(tokens)
        recorded.window.lengths.copy_(self.cache.lengths)
        logits = recorded.run()
        self.cache.advance(1)
        return logits

    def _record(self, tokens: Tensor) -> _Recorded | None:
        """The graph of a pass of so many rows, as long as they are; None where it cannot be had."""
        slots = _FEWEST_SLOTS
        while slots <= self.cache.longest:
            slots *= 2
        key = len(tokens), min(slots, self.cache.max_len)
        if key not in self._recorded:
            newest, window = tokens.clone(), CacheWindow(self.cache, key[1])

            def one_pass() -> Tensor:
                return self.model(newest, window)[:, -1]  # type: ignore[no-any-return]

            try:
                run = self._graph(one_pass)
            except RuntimeError as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                warnings.warn(f"no CUDA graphs, texts are written more slowly: {reason:.200}", stacklevel=2)
                self._records = False
                return None
            self._recorded[key] = _Recorded(newest, window, run)
        return self._recorded[key]

    def _graph(self, one_pass: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """`one_pass` as a graph, which gives the same tensor each time."""
        device = self.cache.keys.device
        with _RECORDING, torch.cuda.device(device):
            before, side = torch.cuda.current_stream(), _side_stream(device)
            side.wait_stream(before)
            graph = torch.cuda.CUDAGraph()
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            try:
                with torch.cuda.stream(side):
                    for _ in range(_WARM_UPS):
                        one_pass()
                before.wait_stream(side)
                # Other threads of a server may use the device meanwhile.
                with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
                    logits = one_pass()
            except RuntimeError:
                torch.cuda.set_stream(before)  # which a recording that failed does not
                raise

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: for each stream cuBLAS keeps memory of its own."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
