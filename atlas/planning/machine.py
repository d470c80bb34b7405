"""What this machine has to give."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")


def measure_memory(device: str) -> int:
    """Bytes that a run on `device` (`cpu`, `cuda` or `mps`) can have now."""
    if device == "cuda":
        free, _total = torch.cuda.mem_get_info()
        return int(free)
    available = min(psutil.virtual_memory().available, _left_in_container(_CGROUP), left_of_data_limit())
    if device == "mps":  # the same memory, of which the driver lets a process have a part
        return min(available, torch.mps.recommended_max_memory())
    return available


def left_of_data_limit() -> int:
    """What `ulimit -d` leaves this process, as Linux counts: private memory that can be written to, touched or not.
    Without a limit, everything."""
    try:
        import resource

        limit, _hard = resource.getrlimit(resource.RLIMIT_DATA)
    except ImportError:  # Windows
        return psutil.virtual_memory().total
    if limit == resource.RLIM_INFINITY:
        return psutil.virtual_memory().total
    return max(0, limit - data_bytes())


def data_bytes() -> int:
    """The memory of this process that `ulimit -d` counts."""
    return (
        int(psutil.Process().memory_info().data) if psutil.LINUX else int(psutil.Process().memory_info().rss)
    )


def _left_in_container(cgroup: Path) -> int:
    """What a container's limit leaves, which the system's own figures do not show; without one, everything."""
    try:
        limit = int((cgroup / "memory.max").read_text(encoding="ascii"))
        return max(0, limit - int((cgroup / "memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError):  # no container, or "max": no limit
        return psutil.virtual_memory().total


def peak_resident() -> int:
    """The most bytes of memory that this process has held so far. Linux counts from the start of the program, Windows
    too; where the system does not say, what it holds now."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.split("VmHWM:", 1)[1].split(None, 1)[0]) * 1024
    except (OSError, IndexError, ValueError):
        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))
