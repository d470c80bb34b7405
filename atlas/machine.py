"""Measure this machine's memory, its rate of matrix products, and its rate of memory copies.

No model can exceed these two rates. A training step takes at least the time of its FLOPs at the rate of matrix
products. Generating a token takes at least the time of reading all weights at the rate of copies.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")
_BF16_FLAGS = {"amx_bf16", "avx512_bf16"}
"""Linux's names of the instructions that multiply matrices of bf16."""
_ISA_LIMITS = "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"
"""The environment variables that forbid oneDNN, which computes PyTorch's matrix products, to use newer instructions.
oneDNN reads the second one, an older name, if the first one is not set."""
_WITHOUT_BF16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
"""Values of these variables with which oneDNN emulates matrix products in bf16."""
_SECONDS = 0.5
_SIZE = {"cpu": 1024, "cuda": 8192, "mps": 4096}
COPIED = {"cpu": 256_000_000, "cuda": 1_000_000_000, "mps": 256_000_000}
"""Size in bytes of the copied tensor, by type of device. The tensor is larger than any processor cache."""


def measure_memory(device: str) -> int:
    """Return the memory, in bytes, that is free for a run on `device` (`cpu`, `cuda` or `mps`)."""
    if device == "cuda":
        free, _total = torch.cuda.mem_get_info()
        return int(free)
    available = min(psutil.virtual_memory().available, _left_in_container(_CGROUP), left_of_data_limit())
    if device == "mps":  # the GPU shares this memory, but the driver limits each process
        return min(available, torch.mps.recommended_max_memory())
    return available


def left_of_data_limit() -> int:
    """Return the bytes that this process may still allocate under `ulimit -d`, or the machine's total memory if there
    is no limit. On Linux, the limit counts all private writable memory, including pages that were never touched."""
    total = psutil.virtual_memory().total
    if sys.platform == "win32":
        return total
    import resource

    limit, _hard = resource.getrlimit(resource.RLIMIT_DATA)
    return total if limit == resource.RLIM_INFINITY else max(0, limit - data_bytes())


def data_bytes() -> int:
    """Return how much of this process's memory `ulimit -d` counts, in bytes."""
    memory = psutil.Process().memory_info()
    return int(memory.data if psutil.LINUX else memory.rss)


def _left_in_container(cgroup: Path) -> int:
    """Return the bytes that this process may still use in its container, or the machine's total memory if there is no
    limit. `psutil` does not report a container's limit."""
    try:
        limit = int((cgroup / "memory.max").read_text(encoding="ascii"))
        return max(0, limit - int((cgroup / "memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError):  # no container, or a container without a limit ("max")
        return psutil.virtual_memory().total


def cpu_computes_in_bf16() -> bool:
    """Whether this CPU multiplies matrices in bf16 faster than in fp32: with AMX (Intel Xeon since Sapphire Rapids) or
    with AVX512-BF16 (AMD since Zen 4, some Intel Xeon), on Linux. Most other CPUs emulate bf16, and are up to hundreds
    of times slower in it than in fp32."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    limits = (os.environ[name] for name in _ISA_LIMITS if name in os.environ)
    if next(limits, "").upper() in _WITHOUT_BF16:
        return False
    flags = next((line for line in cpu_info().splitlines() if line.startswith("flags")), "")
    return not _BF16_FLAGS.isdisjoint(flags.split())


def cpu_info() -> str:
    """Return the text of Linux's `/proc/cpuinfo`, or an empty string on other systems."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def peak_resident() -> int:
    """Return the peak resident memory of this process in bytes, since the process started. On systems other than Linux
    and Windows, return the current resident memory instead."""
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
    """Multiply matrices of `size` × `size` numbers on `device` for about `seconds`. Return the FLOP/s of the fastest
    product, which counts as 2 · size³ operations. The function does not change the global random state, because a run
    may use that state."""
    size = size or _SIZE[device.type]
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * size**3 / best_time(lambda: torch.mm(left, right, out=out), device, seconds=seconds)


def measure_copy(device: torch.device, *, copied: int | None = None, seconds: float = _SECONDS) -> float:
    """Copy a tensor of `copied` bytes on `device` for about `seconds`. Return the bytes/s of the fastest copy. Both the
    bytes read and the bytes written count."""
    source = torch.zeros(copied or COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / best_time(lambda: target.copy_(source), device, seconds=seconds)


def best_time(work: Callable[[], object], device: torch.device, *, seconds: float) -> float:
    """Call `work` repeatedly for about `seconds`, and return the seconds of the fastest call. The first call does not
    count. The fastest call is the most accurate, because other programs can only make a call slower."""
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
