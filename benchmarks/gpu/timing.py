"""Measure times and rates on the device: with CUDA events on a GPU, with the clock on a CPU."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any


def seconds_of_each(work: Callable[[], object], device: str, *, rounds: int) -> list[float]:
    """Seconds of `rounds` calls of `work` without a pause between them. Each is measured from the device's end of the
    previous call to its own, so that the host's time counts if the device waits for it."""
    marks = [_mark(device)]
    for _ in range(rounds):
        work()
        marks.append(_mark(device))
    return [_between(start, end) for start, end in itertools.pairwise(marks)]


def median_seconds(work: Callable[[], object], device: str, *, rounds: int, warm_up: int = 3) -> float:
    for _ in range(warm_up):
        work()
    return statistics.median(seconds_of_each(work, device, rounds=rounds))


def _mark(device: str) -> Any:
    if device != "cuda":
        return time.perf_counter()
    import torch

    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return float(end - start)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3  # milliseconds


def product_rate(device: str) -> float:
    """FLOP/s of a large square product of random numbers in bf16, the reference for MFU."""
    import torch

    size = 8192 if device == "cuda" else 256
    left, right = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * size**3 / median_seconds(lambda: torch.mm(left, right, out=out), device, rounds=20)


def memory_rate(device: str) -> float:
    """Bytes/s of the better of a copy, which reads and writes, and a sum, which reads; both are too large for any
    cache."""
    import torch

    source = torch.zeros(2**30 if device == "cuda" else 2**22, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device, rounds=10)
    return max(copied, source.nbytes / median_seconds(source.sum, device, rounds=10))
