"""Saving without waiting: the training thread copies its state, another thread writes the copy.

The copy lives in main memory (pinned, where the state is on a GPU) and is used again for the next save, so
that it costs its size once. It is also what a run rolls back to.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from atlas.training.checkpoint.atomic_write import Abandoned, named_tensors, tensor_bytes
from atlas.training.checkpoint.manager import CheckpointManager
from atlas.training.devices.pinned import pinned_like

if TYPE_CHECKING:
    pass

_SLOW_DISK = 100e6  # bytes a second
_MUCH_TIME = 20.0  # seconds between saves
_LONGEST_REST, _SHORTEST_REST = 8.0, 0.005  # seconds to a second of work; seconds


class Snapshot:
    """A copy of nested dicts, lists and tensors on the CPU, its memory kept for the next one."""

    def __init__(self, say: Callable[[str], None] = lambda line: None) -> None:
        self._say = say
        self._buffers: dict[str, Tensor] = {}
        self._from_gpu = False
        self.contents: dict[str, Any] | None = None

    def take(self, contents: Mapping[str, Any]) -> dict[str, Any]:
        """Copy `contents` over the last copy. Returns when every byte is here."""
        self._allocate_pinned(contents)
        copied = self._copy("", dict(contents))
        if self._from_gpu:
            torch.cuda.synchronize()  # these copies run on their own
        self.contents = copied
        return copied  # type: ignore[no-any-return]

    def _allocate_pinned(self, contents: Mapping[str, Any]) -> None:
        """One block for all tensors on a GPU that have no memory here yet: the weights at the start of a run, the
        optimizer's state at its first save."""
        tensors = {key: tensor for key, tensor in named_tensors(contents) if tensor.is_cuda}
        missing = {key: tensor for key, tensor in tensors.items() if not self._has_buffer(key, tensor)}
        if missing:
            self._from_gpu = True
            self._buffers |= zip(missing, pinned_like([*missing.values()], say=self._say), strict=True)

    def _has_buffer(self, key: str, value: Tensor) -> bool:
        buffer = self._buffers.get(key)
        return buffer is not None and buffer.shape == value.shape and buffer.dtype == value.dtype

    def _copy(self, key: str, value: Any) -> Any:
        """`key` as `named_tensors` has it."""
        if isinstance(value, Tensor):
            if not self._has_buffer(key, value):
                self._buffers[key] = torch.empty(value.shape, dtype=value.dtype)
            return self._buffers[key].copy_(value.detach(), non_blocking=True)
        if isinstance(value, Mapping):
            return {name: self._copy(f"{key}.{name}".lstrip("."), entry) for name, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._copy(f"{key}.{place}", entry) for place, entry in enumerate(value))
        return value


class Pacer:
    """Lets a save rest between pieces, so that training on a CPU keeps its cores: up to eight seconds for one of
    work, as far as the save still takes less than half of the time until the next one is due."""

    def __init__(self) -> None:
        self.hurry = threading.Event()
        """Set when the save is waited for: it rests no more."""
        self.is_abandoned = False
        self.has_time = False
        self._work = self._rest = self._debt = 0.0

    def begin(self, interval: float, *, num_bytes: int) -> None:
        """A save of `num_bytes` begins, `interval` seconds after the one before; 0 to write at once."""
        work = self._work or num_bytes / _SLOW_DISK  # as long as the last one worked
        self._rest = min(_LONGEST_REST, max(0.0, interval / 2 / work - 1))
        self._work = self._debt = 0.0
        self.has_time = interval >= _MUCH_TIME
        self.hurry.clear()

    def __call__(self, seconds: float) -> None:
        """After `seconds` of work: rest, if it is time. Raises `Abandoned` if that was asked for."""
        if self.is_abandoned:
            raise Abandoned
        self._work += seconds
        self._debt += seconds * self._rest
        if self._debt > _SHORTEST_REST:
            self.hurry.wait(self._debt)
            self._debt = 0.0


class BackgroundSaver:
    """Saves checkpoints from a snapshot, one at a time.

    With `in_background` false every save is written before `save` returns, straight from the state. `before` is
    called before each is written, `after` when it is, with the paths, the step and the seconds that it took.
    """

    def __init__(
        self,
        checkpoints: CheckpointManager,
        *,
        in_background: bool,
        before: Callable[[], None] = lambda: None,
        after: Callable[[list[Path], int, float], None] = lambda written, step, seconds: None,
    ) -> None:
        self.checkpoints = checkpoints
        self.before = before
        self.after = after
        self.in_background = in_background
        self.snapshot = Snapshot(checkpoints.say)
        self.written: list[Path] = []
        """What the last save that has ended wrote."""
        self.seconds = 0.0
        """How long the last save took to reach the disk, and for how much of it training stood still:"""
        self.stall = 0.0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._pacer = Pacer()
        self._due_at = time.perf_counter()
        self._began = 0.0
        self._said_dropped = False

    def __enter__(self) -> BackgroundSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the save in flight; a second Ctrl-C does not."""
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._abandon()
        else:
            self.join()

    @property
    def is_writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def hold(self, contents: Mapping[str, Any]) -> None:
        """Keep the state that a run begins with, so that there is one to go back to before the first save."""
        if self.in_background:
            self.snapshot.take(contents)

    def last_good(self) -> dict[str, Any] | None:
        """What the run can go back to: the state of the last save, else the latest checkpoint that is whole."""
        self.join()
        if self.snapshot.contents is not None:
            return self.snapshot.contents
        latest = self.checkpoints.load_latest()
        return latest and latest[1]

    def save(
        self, contents: Mapping[str, Any], kinds: list[str], manifest: dict[str, Any], *, wait: bool
    ) -> None:
        """Save `contents` under the names of `kinds`.

        If the previous save is still being written, this one waits for it, unless it is only a regular step save:
        that one is skipped, and a note says so once. A new best or the end of an epoch would not come again.
        """
        if self.is_writing and kinds == ["step"] and not wait:
            self._say_dropped(contents, manifest["step"])
            return
        begin = time.perf_counter()
        interval, self._due_at = begin - self._due_at, begin
        self.join()
        if self.in_background:
            copied = self.snapshot.take(contents)
            needs_cores = not any(weight.is_cuda for weight in contents["model_state_dict"].values())
            self._pacer.begin(interval if needs_cores else 0.0, num_bytes=tensor_bytes(contents))
            self._thread = threading.Thread(
                target=self._write, args=(copied, kinds, manifest), name="atlas-save"
            )
            self._began = time.perf_counter()
            self._thread.start()
            if wait:
                self.join()
        else:
            self._began = begin
            self.before()
            self.written = self.checkpoints.save(contents, kinds, manifest)
            self.seconds = time.perf_counter() - begin
            self.after(self.written, manifest["step"], self.seconds)
        self.stall = time.perf_counter() - begin

    def _write(self, contents: dict[str, Any], kinds: list[str], manifest: dict[str, Any]) -> None:
        try:
            if self._pacer.has_time:
                _yield_the_cores()
            self.before()
            self.written = self.checkpoints.save(contents, kinds, manifest, pace=self._pacer)
            self.seconds = time.perf_counter() - self._began
            self.after(self.written, manifest["step"], self.seconds)
        except BaseException as error:  # a bug; it belongs to the training thread, which raises it
            self._error = error

    def expected_seconds(self, num_bytes: int) -> float:
        """How long a save takes: as long as the last one, or for `num_bytes` at the rate of a slow disk."""
        return self.seconds or num_bytes / _SLOW_DISK

    def join(self) -> None:
        """Wait for the save in flight, which makes haste from here on."""
        self._pacer.hurry.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _abandon(self) -> None:
        """End the save in flight without finishing it: what it has written so far is removed."""
        self._pacer.is_abandoned = True
        self._pacer.hurry.set()
        if self._thread is not None:
            self._thread.join()

    def _say_dropped(self, contents: Mapping[str, Any], step: int) -> None:
        if self._said_dropped:
            return
        self._said_dropped = True
        size, seconds = tensor_bytes(contents), time.perf_counter() - self._began
        self.checkpoints.say(
            f"step {step}: no checkpoint saved: the one before is still being written: {size / 1e9:.3f} GB in more "
            f"than {seconds:.1f} s (less than {size / 1e6 / seconds:,.0f} MB/s), "
            f"and this one falls due after {seconds:.1f} s. If that is usual, raise checkpoint.save_interval or set "
            "checkpoint.background=false. Said once"
        )


def _yield_the_cores() -> None:
    """Let training go first where both want a core. A small save then takes seconds, however fast the disk is, which
    matters only where the next one is near. Linux alone sets the priority of one thread."""
    if sys.platform == "linux":
        with suppress(OSError):  # a container may forbid it; then the save only rests
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
