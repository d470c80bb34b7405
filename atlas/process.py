"""What a process asks of the system's C libraries and of PyTorch before it computes. On Linux; elsewhere nothing.

The numbers that are computed stay the same to the bit. What it gives on a CPU is in benchmarks/RESULTS.md.
"""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""glibc's `malloc.h`."""
KEPT_BELOW = 32 << 20
"""Bytes of blocks that malloc keeps when they are freed."""
_NVIDIA_DRIVER = "/dev/nvidiactl"
"""There with Linux's own driver. Under WSL 2 and with ROCm expandable segments may fail at the first allocation
(pytorch/pytorch#192330, #192259)."""
_ALLOCATOR, _OLD_ALLOCATOR = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
_BUSY_CORES, _LOOK = 0.5, 0.1
"""Another program computes where this many cores have worked for so many seconds while this one waited, and not only
then: on average of the last minute as well."""


def set_up_process() -> None:
    """Called before PyTorch is imported: its threads read their setting once."""
    if sys.platform == "linux":
        keep_memory()
        # PyTorch then aligns tensors of 2 MB and more to the system's large pages, and asks for them: a page fault for
        # 512 pages.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        if os.path.exists(_NVIDIA_DRIVER) and not {_ALLOCATOR, _OLD_ALLOCATOR} & os.environ.keys():
            # Segments of GPU memory that grow leave no gaps between them, which nothing else would fit into.
            os.environ[_ALLOCATOR] = "expandable_segments:True"
        if "torch" not in sys.modules and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
            _share_the_cores()


def keep_memory() -> None:
    """Let malloc keep what is freed, for the next update, which wants the same again.

    Left to itself it gives blocks of some megabytes back to the system, and each comes again page by page, zeroed:
    hundreds of thousands of page faults in an update.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    # Both or neither: with only one of them set, malloc stops adjusting the other to what it sees.
    # Larger blocks are given back: among smaller ones they leave holes that nothing fills.
    if mallopt and mallopt(_M_MMAP_THRESHOLD, KEPT_BELOW):
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def _share_the_cores() -> None:
    """Where another program computes, let PyTorch's waiting threads go to sleep soon.

    They wait for each other hundreds of times in an update. Left to themselves they spin meanwhile, which is fastest on
    a machine of one's own; where the one waited for has lost its core to another program, it takes until the
    scheduler's next turn (benchmarks/busy_machine.py).
    """
    import psutil

    if os.getloadavg()[0] < _BUSY_CORES:
        return
    if psutil.cpu_percent(_LOOK) / 100 * (psutil.cpu_count() or 1) >= _BUSY_CORES:
        os.environ["GOMP_SPINCOUNT"] = "1000"
