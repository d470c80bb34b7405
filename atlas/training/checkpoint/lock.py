"""A lock on an output folder, so that only one run writes to the folder. If a process is killed, the system releases
the lock."""

from __future__ import annotations

import json
import os
import platform
import time
from contextlib import suppress
from pathlib import Path

from atlas.errors import CheckpointError
from atlas.files import read_limited, try_to_lock


class FolderLock:
    """A lock on a folder. This process holds the lock from construction until `release` or until the process ends.

    Raises `CheckpointError` if another process holds the lock.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "atlas.lock"
        file = try_to_lock(path)
        if file is None:
            raise CheckpointError(
                f"{folder}: another run is writing to this folder{_owner(path)}: wait until that "
                "run ends, or choose another --output-dir"
            )
        self._file = file
        owner = {"process": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with suppress(OSError):  # on a full disk, the lock works without this note
            file.truncate(0)
            file.write(json.dumps(owner).encode("utf-8"))
            file.flush()

    def release(self) -> None:
        """Release the lock, so that another run can use the folder."""
        self._file.close()


def _owner(path: Path) -> str:
    try:
        owner = json.loads(read_limited(path, limit=1000))
        return f" (process {owner['process']} on {owner['host']}, since {owner['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
