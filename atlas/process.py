"""Settings of the system's C libraries and of PyTorch that make a process compute faster on Linux.

The computed numbers stay the same to the bit. The gain on a CPU is in benchmarks/RESULTS.md.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
from threading import Thread

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of `mallopt`, from glibc's `malloc.h`."""
KEPT_BELOW = 32 << 20
"""Malloc keeps freed blocks of fewer bytes than `KEPT_BELOW`."""
_NVIDIA_DRIVER = "/dev/nvidiactl"
"""A file that exists with NVIDIA's native driver for Linux. Under WSL 2 and with ROCm, expandable segments may fail at
the first allocation (pytorch/pytorch#192330, #192259)."""
_ALLOCATOR, _OLD_ALLOCATOR = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
_BUSY_CORES, _LOOK = 0.5, 0.1
"""Another program counts as computing if `_BUSY_CORES` cores were busy while this process waited `_LOOK` seconds, and
also on average over the last minute."""


def set_up_process() -> None:
    """Apply all settings. Call this function before PyTorch is imported, since PyTorch's threads read their setting
    once."""
    if sys.platform == "linux":
        keep_memory()
        # With `THP_MEM_ALLOC_ENABLE` PyTorch aligns tensors of 2 MB and more to the system's large pages, and requests
        # such pages. A large page causes one page fault instead of 512.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        if os.path.exists(_NVIDIA_DRIVER) and not {_ALLOCATOR, _OLD_ALLOCATOR} & os.environ.keys():
            # Segments of GPU memory that can grow leave no gaps that are too small for anything else.
            os.environ[_ALLOCATOR] = "expandable_segments:True"
        if "torch" not in sys.modules and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
            _share_the_cores()


def abandon(thread: Thread, exit_code: int) -> None:
    """Let the process end with `exit_code` if the daemon `thread` is still inside compiled code by then.

    When such a thread asks for the interpreter's lock after the interpreter has ended, CPython before 3.14 unwinds the
    thread's stack, on which Rust and C++ abort the process (python/cpython#87135).
    """

    def leave() -> None:
        if thread.is_alive():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(exit_code)

    atexit.register(leave)


def keep_memory() -> None:
    """Let malloc keep freed blocks for the next update, which needs the same sizes.

    By default malloc returns blocks of some megabytes to the system and gets them back page by page, zeroed. The result
    is hundreds of thousands of page faults per update.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    # Set both thresholds or neither: if only one is set, malloc no longer adapts the other. Larger blocks go back to
    # the system: among smaller blocks they would leave holes that nothing fills.
    if mallopt and mallopt(_M_MMAP_THRESHOLD, KEPT_BELOW):
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def _share_the_cores() -> None:
    """If another program is computing, let PyTorch's waiting threads sleep soon.

    PyTorch's threads wait for each other hundreds of times per update. By default a waiting thread spins, which is
    fastest on an idle machine. If the awaited thread has lost its core to another program, the spinning lasts until the
    scheduler runs that thread again (benchmarks/busy_machine.py).
    """
    import psutil

    if os.getloadavg()[0] < _BUSY_CORES:
        return
    if psutil.cpu_percent(_LOOK) / 100 * (psutil.cpu_count() or 1) >= _BUSY_CORES:
        os.environ["GOMP_SPINCOUNT"] = "1000"
