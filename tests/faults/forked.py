"""Atlas in children that are forked from a process which has imported everything, and that stop at a chosen moment.

A child counts the operations on its files and its updates, and stops itself (SIGSTOP) before the operation that its
parent has chosen. While a child is stopped, the parent may act, and the files on the disk are those that a kill at
this moment would leave. Only one child computes at a time, so that a history can be repeated. POSIX only.

The parent must not compute gradients, since PyTorch refuses to compute gradients in children of such a process.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # with the next two, so that no child has to import them

import atlas.cli.train
import atlas.inference.text  # noqa: F401
from atlas.cli import main as atlas_main
from atlas.training.loss import compute_lm_loss
from tests.faults.runs import PATIENCE_S, Broken

LOSS = "tests.faults.forked:loss"
"""The setting `training.loss` that makes updates count."""
NEVER = 1 << 40
"""A number of operations or updates that no child reaches."""
_OPERATIONS = {
    "open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate",
    "fcntl.lockf", "fcntl.flock",
}  # fmt: skip
"""The audit events of Python that count as operations on a file."""


class _Shared(ctypes.Structure):
    """What parent and child both see: how many operations and updates the child may still do, and what it has done."""

    _fields_ = (
        ("operations_left", ctypes.c_int64),
        ("updates_left", ctypes.c_int64),
        ("operations", ctypes.c_int64),
        ("updates", ctypes.c_int64),
        ("is_in_update", ctypes.c_int64),
    )


_mine: _Shared | None = None
"""In a child, its own counters."""


class Forked:
    """`atlas ARGUMENTS` in a child. The child stops before its first operation on a file in `watched`."""

    def __init__(self, arguments: Sequence[str], said: Path, watched: Path) -> None:
        self._shared = _Shared.from_buffer(mmap.mmap(-1, ctypes.sizeof(_Shared)))
        self._shared.operations_left, self._shared.updates_left = 1, NEVER
        self.said_path = said
        self.code: int | None = None
        """The exit code, or the negative number of the signal that ended the child. None while the child exists."""
        self.pid = os.fork()
        if self.pid == 0:
            _be_the_child(self._shared, arguments, said, watched)
        self._wait()

    @property
    def said(self) -> str:
        return self.said_path.read_text(encoding="utf-8", errors="replace")

    @property
    def operations(self) -> int:
        """How many operations on files in `watched` the child has done or is about to do."""
        return int(self._shared.operations)

    @property
    def updates(self) -> int:
        """How many updates the child has begun."""
        return int(self._shared.updates)

    @property
    def is_in_update(self) -> bool:
        """Whether the child stopped in an update, and neither in its start nor in a save."""
        return self.code is None and bool(self._shared.is_in_update)

    def proceed(self, *, operations: int = NEVER, updates: int = NEVER) -> None:
        """Let the child run until it has done this many more operations or updates, or until it ends."""
        self._shared.operations_left, self._shared.updates_left = operations, updates
        self._shared.is_in_update = 0
        os.kill(self.pid, signal.SIGCONT)
        self._wait()

    def send(self, number: int) -> None:
        """Send a signal. Except for SIGKILL, the child receives the signal when it runs again."""
        os.kill(self.pid, number)
        if number == signal.SIGKILL:
            self._wait()

    def _wait(self) -> None:
        """Wait until the child stops or ends."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            pid, status = os.waitpid(self.pid, os.WUNTRACED | os.WNOHANG)
            if pid and os.WIFSTOPPED(status):
                return
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                return
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                self.code = -signal.SIGKILL
                raise Broken(f"neither stopped nor ended within {PATIENCE_S:.0f} s: {self.said[-300:]}")
            time.sleep(0.0005)


def _be_the_child(shared: _Shared, arguments: Sequence[str], said: Path, watched: Path) -> None:
    """Run `atlas` and end the process. An exception becomes a traceback in `said` and exit code 1, as in a process of
    its own."""
    global _mine
    code = 1
    try:
        _mine = shared
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, "utf-8", closefd=False) for number in (1, 2))
        torch.set_num_threads(1)
        os.fsync = lambda descriptor: None  # a kill loses nothing that a power cut would lose
        prefix = str(watched)

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            if event in _OPERATIONS and (event.startswith("fcntl") or str(arguments[0]).startswith(prefix)):
                _count_operation(shared)

        sys.addaudithook(count)
        code = atlas_main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _count_operation(shared: _Shared) -> None:
    shared.operations += 1
    shared.operations_left -= 1
    if shared.operations_left == 0:
        os.kill(os.getpid(), signal.SIGSTOP)


def loss(logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The default loss. In a forked child, it counts the update, and stops the child if its parent wants this. In
    another process, ATLAS_TEST_UPDATE_SECONDS makes each update last longer."""
    if "ATLAS_TEST_UPDATE_SECONDS" in os.environ and torch.is_grad_enabled():
        time.sleep(float(os.environ["ATLAS_TEST_UPDATE_SECONDS"]))
    if _mine is not None and torch.is_grad_enabled():
        _mine.updates += 1
        _mine.updates_left -= 1
        if _mine.updates_left == 0:
            _mine.is_in_update = 1
            os.kill(os.getpid(), signal.SIGSTOP)
    return compute_lm_loss(logits, targets, mask)
