"""Save sharded checkpoints, to which each rank writes its own shards."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from atlas.files import flush_folder, sha256_of
from atlas.training.checkpoint.async_saver import BackgroundSaver
from atlas.training.checkpoint.atomic_write import tensor_bytes
from atlas.training.checkpoint.manager import CheckpointManager
from atlas.training.checkpoint.manifest import STATE_FILE, FileEntry
from atlas.training.checkpoint.shard_format import split
from atlas.training.devices.world import World, has_joined
from atlas.training.logs.run_log import RunLog


class ShardSaver(BackgroundSaver):
    """Saves sharded checkpoints, one at a time. Every rank must call `save`.

    With `in_background`, each rank copies its shards to main memory, and writes the copies while training continues.
    """

    is_sharded = True

    def __init__(
        self, checkpoints: CheckpointManager, world: World, *, in_background: bool, log: RunLog
    ) -> None:
        super().__init__(checkpoints, in_background=in_background, log=log)
        self._world = world
        # In a separate process group, messages of the saving threads do not mix with messages of the training threads.
        timeout = timedelta(seconds=world.timeout)
        self._group = dist.new_group(backend="gloo", timeout=timeout) if has_joined() else None

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Wait for the save in progress. After an error, do not wait: another rank may have exited, and the save would
        then never end."""
        if kind is None:
            self.join()

    def _is_busy(self) -> bool:
        return self._world.any(self.is_writing)

    def _prepare(
        self, contents: Mapping[str, Any], kinds: list[str], interval: float
    ) -> Callable[[], list[Path]] | None:
        plain, tensors = split(contents)
        is_first, step = self._world.is_first, contents["step"]
        staged = self.checkpoints.folder / f"atlas_step_{step}.tmp"
        has_space = is_first and self.checkpoints.begin_shards(staged, tensor_bytes(tensors), step)
        if not self._world.broadcast(has_space):
            return None
        arguments: dict[str, Any] = {
            "storage_writer": HuggingFaceStorageWriter(str(staged), save_distributed=True),
            "process_group": self._group,
            "no_dist": self._group is None,
        }
        if self.in_background:
            write_shards = async_save(tensors, **arguments).result  # type: ignore[union-attr]
        else:
            write_shards = partial(save, tensors, **arguments)

        def write() -> list[Path]:
            try:
                write_shards()
                if not is_first:
                    return []
                (staged / STATE_FILE).write_text(json.dumps(plain), encoding="utf-8")
                files = tuple(_entry(path) for path in sorted(staged.iterdir()))
                flush_folder(staged)
                return self.checkpoints.commit_shards(staged, kinds, contents, files)
            except (OSError, CheckpointException) as error:
                reason = str(error).strip().splitlines()[-1]
                self.checkpoints.say(f"no checkpoint saved: {reason:.200}; the existing checkpoints stay")
                return []

        return write


def _entry(path: Path) -> FileEntry:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return FileEntry(name=path.name, size=path.stat().st_size, sha256=sha256_of(path))
