"""Each rank writes its own part of a sharded checkpoint while training continues."""

from __future__ import annotations

import json
import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from atlas.files import flush_folder, sha256_of
from atlas.training.checkpoint.atomic_write import tensor_bytes
from atlas.training.checkpoint.manager import CheckpointManager
from atlas.training.checkpoint.manifest import STATE_FILE, FileEntry
from atlas.training.checkpoint.shard_format import split
from atlas.training.devices.world import World, has_joined

# One process may save and read shards, too, and PyTorch need not say each time that there are no others.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


_SLOW_DISK = 100e6  # bytes a second


class ShardSaver:
    """Saves sharded checkpoints, one at a time; every rank must call each method. As `BackgroundSaver` otherwise.

    With `in_background` the ranks copy their shards to main memory and write them while training continues.
    """

    def __init__(
        self,
        checkpoints: CheckpointManager,
        world: World,
        *,
        in_background: bool,
        before: Callable[[], None],
        after: Callable[[list[Path], int, float], None],
    ) -> None:
        self.checkpoints = checkpoints
        self.world = world
        self.in_background = in_background
        self.before = before
        self.after = after
        self.written: list[Path] = []
        self.seconds = self.stall = 0.0
        # What the saving threads tell one another must not come between what the training threads do.
        patience = timedelta(seconds=world.timeout)
        self._group = dist.new_group(backend="gloo", timeout=patience) if has_joined() else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> ShardSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.join()

    def hold(self, contents: Mapping[str, Any]) -> None:
        """Nothing: a state that is in shards is gone back to on the disk."""

    def last_good(self) -> dict[str, Any] | None:
        self.join()
        latest = self.checkpoints.load_latest()
        return latest and latest[1]

    def expected_seconds(self, num_bytes: int) -> float:
        """How long a save takes: as long as the last one, or for `num_bytes` at the rate of a slow disk."""
        return self.seconds or num_bytes / _SLOW_DISK

    def save(
        self, contents: Mapping[str, Any], kinds: list[str], manifest: dict[str, Any], *, wait: bool
    ) -> None:
        """Save `contents`, its tensors in shards, under the names of `kinds`. A regular step save is skipped if the
        previous save is still being written, unless `wait` is set; every other kind waits for it."""
        begin = time.perf_counter()
        is_writing = self._thread is not None and self._thread.is_alive()
        if self.world.any(is_writing) and kinds == ["step"] and not wait:
            self.checkpoints.say(
                f"step {manifest['step']}: no checkpoint saved: the one before is still being written"
            )
            return
        self.join()
        plain, tensors = split(contents)
        staged = self.checkpoints.folder / f"atlas_step_{manifest['step']}.tmp"
        room = self.world.broadcast(
            self.checkpoints.begin_shards(staged, tensor_bytes(tensors), manifest["step"])
            if self.world.is_first
            else None
        )
        if not room:
            return
        writer = HuggingFaceStorageWriter(str(staged), save_distributed=True)
        alone = self._group is None

        def finish(wait_for: Callable[[], Any]) -> None:
            try:
                wait_for()
                if self.world.is_first:
                    self.before()
                    (staged / STATE_FILE).write_text(json.dumps(plain), encoding="utf-8")
                    files = tuple(_entry(path) for path in sorted(staged.iterdir()))
                    flush_folder(staged)
                    self.written = self.checkpoints.commit_shards(staged, kinds, manifest, files)
                self.seconds = time.perf_counter() - begin
                if self.world.is_first:
                    self.after(self.written, manifest["step"], self.seconds)
            except (OSError, CheckpointException) as error:
                reason = str(error).strip().splitlines()[-1]
                self.checkpoints.say(f"no checkpoint saved: {reason:.200}; the ones that are there stay")
                self.written = []
            except BaseException as error:  # a bug; it belongs to the training thread, which raises it
                self._error = error

        if self.in_background:
            future: Any = async_save(tensors, storage_writer=writer, process_group=self._group, no_dist=alone)
            self._thread = threading.Thread(
                target=finish, args=(future.result,), name="atlas-save", daemon=True
            )
            self._thread.start()
        else:
            finish(lambda: save(tensors, storage_writer=writer, process_group=self._group, no_dist=alone))
        if wait or not self.in_background:
            self.join()
        self.stall = time.perf_counter() - begin

    def join(self) -> None:
        """Wait for the save in flight."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def _entry(path: Path) -> FileEntry:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return FileEntry(name=path.name, size=path.stat().st_size, sha256=sha256_of(path))
