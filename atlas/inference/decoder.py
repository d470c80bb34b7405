"""Compute the logits of each row's next token in one forward pass. On a GPU, the pass runs as a CUDA graph.

The pass consists of hundreds of small kernels. The CPU needs more time to launch these kernels than the GPU needs to
run them. A CUDA graph (https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs/) launches all kernels in one
call. Each graph is for a fixed number of rows and a fixed number of cache slots that attention reads. When the
sequences outgrow this number of slots, the number doubles.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from atlas.model import AtlasLM, KVCache, long_tensor
from atlas.model.kv_cache import CacheWindow

_FEWEST_SLOTS = 256
_WARM_UPS = 2
"""The number of forward passes before a capture. In these passes, libraries allocate their workspaces."""
_CAPTURE_LOCK = threading.Lock()
"""A lock for captures. A process can capture only one graph at a time, and a server may have several models."""


class Decoder:
    """A model and the KV cache of the sequences that it generates."""

    def __init__(self, model: AtlasLM, cache: KVCache) -> None:
        self.model = model
        self.cache = cache
        self._uses_graphs = cache.keys.is_cuda
        self._graphs: dict[tuple[int, int], Callable[[Tensor], Tensor]] = {}
        self._pool: Any = None
        """The memory pool that all graphs share, since only one graph runs at a time."""

    def next_logits(self, newest: Sequence[int]) -> Tensor:
        """Return (B, V): the logits of each row's next token. `newest` has the newest token id of each row. The model
        adds the keys and values of these tokens to the cache. The result is valid until the next call."""
        tokens = long_tensor(newest, self.cache.keys.device)[:, None]
        step = self._captured_step(tokens) if self._uses_graphs else None
        if step is None:
            return self.model(tokens, self.cache)[:, -1]  # type: ignore[no-any-return]
        logits = step(tokens)
        self.cache.advance(1)
        return logits

    def _captured_step(self, tokens: Tensor) -> Callable[[Tensor], Tensor] | None:
        """Return a function that runs the graph for the rows of `tokens` and their lengths in the cache. Return None if
        PyTorch cannot capture a graph."""
        slots = _FEWEST_SLOTS
        while slots <= self.cache.longest:
            slots *= 2
        key = len(tokens), min(slots, self.cache.max_len)
        if key not in self._graphs:
            newest, window = tokens.clone(), CacheWindow(self.cache, key[1])

            def step() -> Tensor:
                return self.model(newest, window)[:, -1]  # type: ignore[no-any-return]

            try:
                run = self._capture(step)
            except RuntimeError as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                warnings.warn(
                    f"cannot capture CUDA graphs, so generation is slower: {reason:.200}", stacklevel=2
                )
                self._uses_graphs = False
                return None

            def replay(tokens: Tensor) -> Tensor:
                newest.copy_(tokens)
                window.lengths.copy_(self.cache.lengths)
                return run()

            self._graphs[key] = replay
        return self._graphs[key]

    def _capture(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Capture `step` as a graph. Return a function that runs the graph and returns the same tensor each time."""
        device = self.cache.keys.device
        with _CAPTURE_LOCK, torch.cuda.device(device):
            before, side = torch.cuda.current_stream(), _side_stream(device)
            side.wait_stream(before)
            graph = torch.cuda.CUDAGraph()
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            try:
                with torch.cuda.stream(side):
                    for _ in range(_WARM_UPS):
                        step()
                before.wait_stream(side)
                # Other threads of a server may use the device during the capture.
                with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
                    logits = step()
            except RuntimeError:
                torch.cuda.set_stream(before)  # PyTorch does not restore the stream after a failed capture
                raise

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream for all captures on a device. Several streams would waste memory, because cuBLAS keeps a workspace for
    each stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
