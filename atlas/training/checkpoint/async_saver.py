"""Save checkpoints in the background: the training thread copies its state, another thread writes the copy.

The copy is in main memory (pinned if the state is on a GPU). Each save reuses the same memory, which is allocated once.
A run that rolls back loads this copy.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atlas.training.checkpoint.atomic_write import Abandoned, named_tensors, tensor_bytes
from atlas.training.checkpoint.manager import CheckpointManager
from atlas.training.devices.parallel import map_tensors
from atlas.training.devices.pinned import pinned_like
from atlas.training.logs.run_log import RunLog

_SLOW_DISK = 100e6  # bytes per second
_LONG_INTERVAL = 20.0  # seconds between saves
_LONGEST_PAUSE, _SHORTEST_PAUSE = 8.0, 0.005  # longest: seconds per second of work; shortest: seconds


class Snapshot:
    """A copy, on the CPU, of nested dicts, lists and tensors. Every new copy reuses the same memory."""

    def __init__(self, say: Callable[[str], None] = lambda line: None) -> None:
        self._say = say
        self._buffers: dict[tuple[str, torch.Size, torch.dtype], Tensor] = {}
        self.contents: dict[str, Any] | None = None

    def take(self, contents: Mapping[str, Any]) -> dict[str, Any]:
        """Overwrite the last copy with `contents`. Return the new copy when every byte is in main memory."""
        tensors = {(name, tensor.shape, tensor.dtype): tensor for name, tensor in named_tensors(contents)}
        missing = {key: tensor for key, tensor in tensors.items() if key not in self._buffers}
        on_gpu = {key: tensor for key, tensor in missing.items() if tensor.is_cuda}
        self._buffers |= {key: torch.empty(key[1], dtype=key[2]) for key in missing.keys() - on_gpu}
        if on_gpu:
            # One pinned block for the weights at the start of a run; another for the optimizer's state at the first
            # save.
            self._buffers |= zip(on_gpu, pinned_like([*on_gpu.values()], say=self._say), strict=True)

        def copy(name: str, tensor: Tensor) -> Tensor:
            return self._buffers[name, tensor.shape, tensor.dtype].copy_(tensor.detach(), non_blocking=True)

        copied: dict[str, Any] = map_tensors(contents, copy)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()  # the copies are asynchronous
        self.contents = copied
        return copied


class Pacer:
    """Pauses a save between its pieces, so that training on a CPU keeps the cores.

    The pauses last up to eight seconds per second of work. They never stretch a save beyond half of the time until the
    next save is due.
    """

    def __init__(self) -> None:
        self.hurry = threading.Event()
        """Set when training waits for the save. The save then no longer pauses."""
        self.is_abandoned = False
        self._work = self._pause = self._debt = 0.0

    def begin(self, interval: float, *, num_bytes: int) -> None:
        """Begin a save of `num_bytes`, `interval` seconds after the previous one. With an interval of 0 the save never
        pauses."""
        work = self._work or num_bytes / _SLOW_DISK  # assume the work of the last save
        self._pause = min(_LONGEST_PAUSE, max(0.0, interval / 2 / work - 1))
        self._work = self._debt = 0.0
        self.hurry.clear()

    def __call__(self, seconds: float) -> None:
        """Count another `seconds` of work and pause if a pause is due. Raises `Abandoned` if the save is abandoned."""
        if self.is_abandoned:
            raise Abandoned
        self._work += seconds
        self._debt += seconds * self._pause
        if self._debt > _SHORTEST_PAUSE:
            self.hurry.wait(self._debt)
            self._debt = 0.0


class BackgroundSaver:
    """Saves checkpoints one at a time. Each is one file, written from a snapshot.

    With `in_background` false, `save` writes the state directly and returns when it is on the disk. `log` is flushed to
    the disk before each save and gets an event after it. A subclass that writes another format overrides `_prepare`.
    """

    is_sharded = False
    """Whether each rank writes its own shards. Otherwise the first rank writes everything. With shards, a process that
    exits does not wait for its save, since the other ranks may have exited."""

    def __init__(
        self, checkpoints: CheckpointManager, *, in_background: bool, log: RunLog | None = None
    ) -> None:
        self.checkpoints = checkpoints
        self.in_background = in_background
        self.written: list[Path] = []
        """The paths that the last finished save wrote."""
        self.seconds = self.stall = 0.0
        """The seconds that the last save took, and the seconds that training waited for it."""
        self._log = log
        self._snapshot = Snapshot(checkpoints.say)
        self._pacer = Pacer()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._due_at = self._began = time.perf_counter()
        self._reported_skip = False

    def __enter__(self) -> BackgroundSaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Wait for the save in progress. After a second Ctrl-C, abandon the save; its incomplete file is removed."""
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            self.join()
        elif self._thread is not None:
            self._pacer.is_abandoned = True
            self._pacer.hurry.set()
            self._thread.join()

    @property
    def is_writing(self) -> bool:
        """Whether a save is in progress."""
        return self._thread is not None and self._thread.is_alive()

    def keep_snapshot(self, contents: Mapping[str, Any]) -> None:
        """Keep a copy of the state at the start of a run. Before its first save, the run can roll back to this copy."""
        if self.in_background:
            self._snapshot.take(contents)

    def last_good(self) -> dict[str, Any] | None:
        """The state to roll back to: that of the last save, or else of the latest intact checkpoint, or None."""
        self.join()
        if self._snapshot.contents is not None:
            return self._snapshot.contents
        latest = self.checkpoints.load_latest()
        return latest and latest[1]

    def expected_seconds(self, num_bytes: int) -> float:
        """The estimated seconds of a save: those of the last save, or else `num_bytes` at the rate of a slow disk."""
        return self.seconds or num_bytes / _SLOW_DISK

    def save(self, contents: Mapping[str, Any], kinds: list[str], *, wait: bool) -> None:
        """Save `contents` under the names of `kinds`.

        If the previous save is still being written, this save waits for it. A regular step save is skipped in that
        case, and only the first skip is reported. A save of a new best or of the end of an epoch is never skipped,
        since the same state does not come again.
        """
        if self._is_busy() and kinds == ["step"] and not wait:
            self._report_skip(contents)
            return
        begin = time.perf_counter()
        interval, self._due_at = begin - self._due_at, begin
        self.join()
        write = self._prepare(contents, kinds, interval)
        if write is None:
            return
        self._began = time.perf_counter()
        work = partial(self._write, write, contents["step"])
        if self.in_background:
            self._thread = threading.Thread(target=work, name="atlas-save", daemon=self.is_sharded)
            self._thread.start()
        else:
            work()
        if wait or not self.in_background:
            self.join()
        self.stall = time.perf_counter() - begin

    def _is_busy(self) -> bool:
        return self.is_writing

    def _prepare(
        self, contents: Mapping[str, Any], kinds: list[str], interval: float
    ) -> Callable[[], list[Path]] | None:
        """Return a function that writes the checkpoint and returns its paths, or None if nothing can be saved.

        For a save in the background, `contents` are copied first.
        """
        if not self.in_background:
            return lambda: self.checkpoints.save(contents, kinds)
        copied = self._snapshot.take(contents)
        if any(weight.is_cuda for weight in contents["model_state_dict"].values()):
            interval = 0.0  # training on a GPU does not need the cores
        self._pacer.begin(interval, num_bytes=tensor_bytes(contents))

        def write() -> list[Path]:
            if interval >= _LONG_INTERVAL:
                _yield_the_cores()
            return self.checkpoints.save(copied, kinds, pace=self._pacer)

        return write

    def _write(self, write: Callable[[], list[Path]], step: int) -> None:
        try:
            if self._log:
                self._log.flush_to_disk()
            self.written = write()
            self.seconds = time.perf_counter() - self._began
            if self._log and self.written:
                names = [path.name for path in self.written]
                self._log.event("save", step, names=names, save_seconds=self.seconds)
        except BaseException as error:  # a bug: `join` raises it in the training thread
            self._error = error

    def join(self) -> None:
        """Wait for the save in progress. From this call on, the save no longer pauses."""
        self._pacer.hurry.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _report_skip(self, contents: Mapping[str, Any]) -> None:
        if self._reported_skip:
            return
        self._reported_skip = True
        step, size = contents["step"], tensor_bytes(contents)
        seconds = time.perf_counter() - self._began
        self.checkpoints.say(
            f"step {step}: no checkpoint saved: the previous one is still being written: {size / 1e9:.3f} GB have "
            f"taken more than {seconds:.1f} s (less than {size / 1e6 / seconds:,.0f} MB/s). If that happens often, "
            "raise checkpoint.save_interval or set checkpoint.background=false. This is reported once"
        )


def _yield_the_cores() -> None:
    """Lower this thread's priority, so that training gets a free core first. Only Linux has a priority per thread.

    Even a small save then takes seconds, which matters only if the next save is due soon.
    """
    if sys.platform == "linux":
        with suppress(OSError):  # a container may forbid it; the save still pauses
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
