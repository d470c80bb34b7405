"""What this machine does in a second, measured in a moment: matrix products and copies, the two floors of any model.

A training step cannot be faster than its floating-point operations at the first rate, nor writing a token faster than
its weights at the second.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_SECONDS = 0.5
_SIZE = {"cpu": 1024, "cuda": 8192, "mps": 4096}
COPIED = {"cpu": 256_000_000, "cuda": 1_000_000_000, "mps": 256_000_000}
"""Bytes, too many for any cache."""


def measure_matrix_products(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    size: int | None = None,
    seconds: float = _SECONDS,
) -> float:
    """FLOP/s of products of `size` × `size` matrices of `dtype` on `device`: 2 N³ for each, the best of many. Of the
    global random numbers, which may be a run's, it takes none."""
    size = size or _SIZE[device.type]
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * size**3 / best_time(lambda: torch.mm(left, right, out=out), device, seconds=seconds)


def measure_copy(device: torch.device, *, copied: int | None = None, seconds: float = _SECONDS) -> float:
    """Bytes/s that are read and written together while a tensor of `copied` bytes is copied on `device`, the best of
    many."""
    source = torch.zeros(copied or COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / best_time(lambda: target.copy_(source), device, seconds=seconds)


def best_time(work: Callable[[], object], device: torch.device, *, seconds: float) -> float:
    """Seconds of the fastest call in about `seconds`, after a first that does not count; others share the machine, and
    they only ever make it slower."""
    work()
    _wait_for(device)
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        _wait_for(device)
        best = min(best, time.perf_counter() - start)
    return best


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
