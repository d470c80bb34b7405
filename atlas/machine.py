"""Measure this machine's memory and two rates that no model can exceed: those of matrix products and of copies.

A training step takes at least as long as its floating-point operations at the rate of matrix products. Generating a
token takes at least as long as reading the weights at the rate of copies.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")
_SECONDS = 0.5
_SIZE = {"cpu": 1024, "cuda": 8192, "mps": 4096}
COPIED = {"cpu": 256_000_000, "cuda": 1_000_000_000, "mps": 256_000_000}
"""Bytes of the tensor that is copied, by device: too many for any cache."""


def measure_memory(device: str) -> int:
    """Return the bytes that are free for a run on `device` (`cpu`, `cuda` or `mps`)."""
    if device == "cuda":
        free, _total = torch.cuda.mem_get_info()
        return int(free)
    available = min(psutil.virtual_memory().available, _left_in_container(_CGROUP), left_of_data_limit())
    if device == "mps":  # the GPU shares the main memory, and the driver allows a process only a part of it
        return min(available, torch.mps.recommended_max_memory())
    return available


def left_of_data_limit() -> int:
    """Return the bytes that `ulimit -d` leaves this process, or all memory if there is no limit. Linux counts private
    writable memory, touched or not."""
    total = psutil.virtual_memory().total
    if sys.platform == "win32":
        return total
    import resource

    limit, _hard = resource.getrlimit(resource.RLIMIT_DATA)
    return total if limit == resource.RLIM_INFINITY else max(0, limit - data_bytes())


def data_bytes() -> int:
    """Return the bytes of this process that `ulimit -d` counts."""
    memory = psutil.Process().memory_info()
    return int(memory.data if psutil.LINUX else memory.rss)


def _left_in_container(cgroup: Path) -> int:
    """Return the bytes that a container's limit leaves, or all memory. The system's figures do not show a container's
    limit."""
    try:
        limit = int((cgroup / "memory.max").read_text(encoding="ascii"))
        return max(0, limit - int((cgroup / "memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError):  # no container, or "max": no limit
        return psutil.virtual_memory().total


def peak_resident() -> int:
    """Return the peak resident bytes of this process. On Linux and Windows the peak is since the start of the program.
    On other systems the function returns the bytes that are resident now."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.split("VmHWM:", 1)[1].split(None, 1)[0]) * 1024
    except (OSError, IndexError, ValueError):
        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))


def measure_matrix_products(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    size: int | None = None,
    seconds: float = _SECONDS,
) -> float:
    """Return the FLOP/s of the fastest of many products of `size` × `size` matrices of `dtype` on `device`. A product
    counts as 2 N³ operations. The global random state, which a run may use, does not change."""
    size = size or _SIZE[device.type]
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * size**3 / best_time(lambda: torch.mm(left, right, out=out), device, seconds=seconds)


def measure_copy(device: torch.device, *, copied: int | None = None, seconds: float = _SECONDS) -> float:
    """Return the bytes/s of the fastest of many copies of a tensor of `copied` bytes on `device`. The bytes read and
    the bytes written both count."""
    source = torch.zeros(copied or COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / best_time(lambda: target.copy_(source), device, seconds=seconds)


def best_time(work: Callable[[], object], device: torch.device, *, seconds: float) -> float:
    """Call `work` for about `seconds`, and return the time of the fastest call in seconds. The first call does not
    count. The fastest call is the one to report because other programs can only make a call slower."""
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
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
