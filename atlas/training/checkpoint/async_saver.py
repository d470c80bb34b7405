"""Save checkpoints in the background: the training thread copies the state, and another thread writes the copy.

The copy is in main memory, which is pinned if the state is on a GPU. Atlas allocates this memory once, and each save
reuses it. If the run rolls back, it loads the copy.
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

from atlas.model import is_lora
from atlas.process import lasting_blocks_apart
from atlas.training.checkpoint.atomic_write import Abandoned, named_tensors, tensor_bytes
from atlas.training.checkpoint.manager import CheckpointManager
from atlas.training.devices.parallel import map_tensors
from atlas.training.devices.pinned import pinned_like
from atlas.training.logs.run_log import RunLog

_SLOW_DISK = 100e6  # bytes per second
_LONG_INTERVAL = 20.0  # seconds between saves
_LONGEST_PAUSE, _SHORTEST_PAUSE = 8.0, 0.005  # seconds per second of work; seconds per pause


class Snapshot:
    """A copy of nested dicts, lists and tensors in main memory. Each new copy overwrites the previous copy."""

    def __init__(self, say: Callable[[str], None] = lambda line: None) -> None:
        self._say = say
        self._buffers: dict[tuple[str, torch.Size, torch.dtype], Tensor] = {}
        self.contents: dict[str, Any] | None = None

    def take(self, contents: Mapping[str, Any], *, keeps_frozen: bool = False) -> dict[str, Any]:
        """Copy `contents` over the previous copy. Wait until every byte is in main memory, and return the new copy.

        With `keeps_frozen`, the frozen weights of a LoRA run that are in main memory are not copied, since they never
        change.
        """
        tensors = {
            (name, tensor.shape, tensor.dtype): tensor
            for name, tensor in named_tensors(contents)
            if not (keeps_frozen and _is_kept_frozen(name, tensor))
        }
        missing = {key: tensor for key, tensor in tensors.items() if key not in self._buffers}
        on_gpu = {key: tensor for key, tensor in missing.items() if tensor.is_cuda}
        with lasting_blocks_apart():
            self._buffers |= {key: torch.empty(key[1], dtype=key[2]) for key in missing.keys() - on_gpu}
        if on_gpu:
            # The tensors that have no buffer yet share one new pinned block. At the start of a run, these are the
            # weights; at the first save, they are the optimizer's state.
            self._buffers |= zip(on_gpu, pinned_like([*on_gpu.values()], say=self._say), strict=True)

        def copy(name: str, tensor: Tensor) -> Tensor:
            if (name, tensor.shape, tensor.dtype) not in tensors:
                return tensor
            return self._buffers[name, tensor.shape, tensor.dtype].copy_(tensor.detach(), non_blocking=True)

        copied: dict[str, Any] = map_tensors(contents, copy)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()  # the copies are asynchronous
        self.contents = copied
        return copied


def _is_kept_frozen(name: str, tensor: Tensor) -> bool:
    """Return whether a tensor in the contents of a LoRA run's checkpoint is a frozen weight in main memory."""
    return name.startswith("model_state_dict/") and not is_lora(name) and not tensor.is_cuda


class Pacer:
    """Pauses a save after every few megabytes, so that training on a CPU can use the cores.

    The pauses last at most eight seconds per second of work. They stretch a save to at most about half of the time
    between two saves.
    """

    def __init__(self) -> None:
        self.hurry = threading.Event()
        """An event that is set when training waits for the save. From then on, the save does not pause."""
        self.is_abandoned = False
        self._work = self._pause = self._debt = 0.0

    def begin(self, interval: float, *, num_bytes: int) -> None:
        """Prepare the pauses of a save of `num_bytes` that begins `interval` seconds after the previous save. If
        `interval` is 0, the save never pauses."""
        work = self._work or num_bytes / _SLOW_DISK  # seconds, as in the last save
        self._pause = min(_LONGEST_PAUSE, max(0.0, interval / 2 / work - 1))
        self._work = self._debt = 0.0
        self.hurry.clear()

    def __call__(self, seconds: float) -> None:
        """Count `seconds` of work, and pause if a pause is due. Raises `Abandoned` if `is_abandoned` is set."""
        if self.is_abandoned:
            raise Abandoned
        self._work += seconds
        self._debt += seconds * self._pause
        if self._debt > _SHORTEST_PAUSE:
            self.hurry.wait(self._debt)
            self._debt = 0.0


class BackgroundSaver:
    """Saves checkpoints, one at a time. Each checkpoint is one file.

    With `in_background`, `save` copies the state, and a thread writes the copy while training continues. Otherwise
    `save` writes the state directly, and returns when the checkpoint is on the disk. Each save first flushes `log` to
    the disk, and logs an event afterwards. A subclass that writes another format overrides `_prepare`.
    """

    is_sharded = False
    """Whether each rank writes its own shards. Otherwise the first rank writes everything. With shards, a process can
    exit during a save, since the save may be waiting for a rank that has exited."""

    def __init__(
        self, checkpoints: CheckpointManager, *, in_background: bool, log: RunLog | None = None
    ) -> None:
        self.checkpoints = checkpoints
        self.in_background = in_background
        self.written: list[Path] = []
        """The paths that the last finished save wrote."""
        self.seconds = self.stall = 0.0
        """The seconds that the last save took, and the seconds that training waited for that save."""
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
        """Wait for the save in progress. After a `KeyboardInterrupt` (a second Ctrl-C), abandon that save instead; the
        save then removes its incomplete file."""
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
        """Copy the state if saves are in the background. The run can roll back to the copy until the next save replaces
        it."""
        if self.in_background:
            self._snapshot.take(contents, keeps_frozen=self.checkpoints.base is not None)

    def last_good(self) -> dict[str, Any] | None:
        """The state to roll back to: the last copy of the state, otherwise the latest intact checkpoint, otherwise
        None."""
        self.join()
        if self._snapshot.contents is not None:
            return self._snapshot.contents
        latest = self.checkpoints.load_latest()
        return latest and latest[1]

    def expected_seconds(self, num_bytes: int) -> float:
        """The estimated duration of a save in seconds: the duration of the last save. Before the first save, it is the
        time in which a slow disk writes `num_bytes`."""
        return self.seconds or num_bytes / _SLOW_DISK

    def save(self, contents: Mapping[str, Any], kinds: list[str], *, wait: bool) -> None:
        """Save `contents` as a checkpoint of each kind in `kinds`. With `wait`, return when the checkpoints are
        written.

        If the previous save is still in progress, this method first waits for that save to end. But if `wait` is false
        and `kinds` is only `step`, the new save is skipped instead, and only the first skip is reported. A new best or
        the end of an epoch is never skipped, since the run does not reach the same state again.
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
        """Return a function that writes the checkpoint and returns its paths. Return None if nothing can be saved.

        If the save is in the background, copy `contents` first.
        """
        if not self.in_background:
            return lambda: self.checkpoints.save(contents, kinds)
        copied = self._snapshot.take(contents, keeps_frozen=self.checkpoints.base is not None)
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
        except BaseException as error:  # a bug in Atlas; `join` raises the error in the training thread
            self._error = error

    def join(self) -> None:
        """Wait for the save in progress, which no longer pauses. If that save raised an error, raise the error."""
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
            f"step {step}: no checkpoint saved: the previous checkpoint is still being written: its "
            f"{size / 1e9:.3f} GB have taken more than {seconds:.1f} s (less than {size / 1e6 / seconds:,.0f} MB/s). "
            "If this happens often, raise checkpoint.save_interval or set checkpoint.background=false. "
            "This is reported once"
        )


def _yield_the_cores() -> None:
    """Lower this thread's priority, so that training gets a free core first. Only on Linux does Python set the priority
    of a single thread.

    With the lower priority, even a small save takes seconds. Therefore, a save keeps its priority if the next save is
    due soon.
    """
    if sys.platform == "linux":
        with suppress(OSError):  # a container may forbid this call; the save still pauses
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
