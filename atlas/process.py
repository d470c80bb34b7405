"""Settings of the system's C libraries and of PyTorch that make Atlas faster on Linux.

The settings do not change any computed number. benchmarks/RESULTS.md shows how much faster Atlas is on a CPU.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of `mallopt`, from glibc's `malloc.h`."""
KEPT_BELOW = 32 << 20
"""Malloc keeps freed blocks of fewer bytes than this number, instead of returning them to the system."""
_LASTING_FROM = 128 << 10
"""In `lasting_blocks_apart`, malloc takes blocks of this number of bytes and more from the system. This is malloc's
threshold at the start of a process."""
_NVIDIA_DRIVER = "/dev/nvidiactl"
"""A file that exists only with NVIDIA's native driver for Linux. Under WSL 2 and with ROCm, this file is missing, and
expandable segments may fail at the first allocation (pytorch/pytorch#192330, #192259)."""
_ALLOCATOR, _OLD_ALLOCATOR = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
_BUSY_CORES, _LOOK = 0.5, 0.1
"""Atlas assumes that another program is computing if at least `_BUSY_CORES` cores are busy: while this process waits
for `_LOOK` seconds, and also on average over the last minute."""


def set_up_process() -> None:
    """Apply all settings. Call this function before PyTorch is imported, since PyTorch's threads read their setting
    only once."""
    if sys.platform == "linux":
        keep_memory()
        # With `THP_MEM_ALLOC_ENABLE`, PyTorch requests transparent huge pages for tensors of 2 MB and more. A huge page
        # causes one page fault instead of 512.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        if os.path.exists(_NVIDIA_DRIVER) and not {_ALLOCATOR, _OLD_ALLOCATOR} & os.environ.keys():
            # If memory segments can grow, the GPU's memory is less fragmented.
            os.environ[_ALLOCATOR] = "expandable_segments:True"
        if "torch" not in sys.modules and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
            _share_the_cores()


def abandon(thread: Thread, exit_code: int) -> None:
    """Register an exit handler, which ends the process with `exit_code` if the daemon `thread` is still alive.

    Without this handler, compiled code in the thread may request the GIL after the interpreter has ended. CPython
    before 3.14 then unwinds the thread's stack, and Rust or C++ code on this stack aborts the process
    (python/cpython#87135).
    """

    def leave() -> None:
        if thread.is_alive():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(exit_code)

    atexit.register(leave)


def is_running(process: int) -> bool:
    """Return whether a process with this number exists and has not ended."""
    import psutil

    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def stop_signals() -> list[signal.Signals]:
    """Return the signals that ask a process to end: SIGINT, SIGTERM, SIGHUP and, on Windows, SIGBREAK. SIGHUP is left
    out if the process ignores it, as under `nohup`."""
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
    numbers = [signal.Signals[name] for name in names if hasattr(signal, name)]
    return [n for n in numbers if n.name != "SIGHUP" or signal.getsignal(n) != signal.SIG_IGN]


def keep_memory() -> None:
    """Let malloc keep freed blocks, because the next update allocates blocks of the same sizes.

    By default, malloc returns blocks of several megabytes to the system. The next update then gets zeroed pages from
    the system, with hundreds of thousands of page faults.
    """
    # Set both thresholds or neither: if one threshold is set, malloc no longer adapts the other threshold. Blocks of
    # `KEPT_BELOW` bytes and more go back to the system. If malloc kept these blocks, they would leave unused gaps
    # between smaller blocks.
    if _set_malloc(_M_MMAP_THRESHOLD, KEPT_BELOW):
        _set_malloc(_M_TRIM_THRESHOLD, (1 << 31) - 1)


@contextmanager
def lasting_blocks_apart() -> Iterator[None]:
    """A context in which malloc takes each block of 128 KB and more directly from the system. After the context,
    `keep_memory` is in effect.

    Among the activations, a block that lasts would separate freed memory for the rest of the run, so that larger blocks
    no longer fit. The first micro-batch of a process allocates such blocks: oneDNN generates the code of each matrix
    product and keeps it, in blocks of 258 KB. Because of page faults, a micro-batch in this context takes longer.
    """
    _set_malloc(_M_MMAP_THRESHOLD, _LASTING_FROM)
    try:
        yield
    finally:
        keep_memory()


def _set_malloc(parameter: int, value: int) -> bool:
    """Set a parameter of glibc's malloc. Return False if there is none: musl, for example, has no `mallopt`."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return bool(mallopt and mallopt(parameter, value))


def _share_the_cores() -> None:
    """If another program is computing, let PyTorch's waiting threads sleep after a short spin.

    PyTorch's threads wait for each other hundreds of times per update. By default, a waiting thread spins, because
    spinning is fastest on an idle machine. But if another program has taken the core of the awaited thread, the waiting
    threads spin until the scheduler runs the awaited thread again (benchmarks/busy_machine.py).
    """
    import psutil

    if os.getloadavg()[0] < _BUSY_CORES:
        return
    if psutil.cpu_percent(_LOOK) / 100 * (psutil.cpu_count() or 1) >= _BUSY_CORES:
        os.environ["GOMP_SPINCOUNT"] = "1000"
