"""One run at a time writes to an output folder. The lock dies with its process, however that ends."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from atlas.errors import AtlasError

# Record locks rather than flock: data-loading workers are forks, and would hold a flock after the run was
# killed. They work over NFS, too. On Windows the locked byte lies behind the text, which stays readable.
if sys.platform == "win32":
    import msvcrt

    def _lock(file: IO[str]) -> None:
        file.seek(1 << 20)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        file.seek(0)

else:
    import fcntl

    def _lock(file: IO[str]) -> None:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class FolderLock:
    """Held from construction until `release` or the end of the process. Raises `AtlasError` if it is taken."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "atlas.lock"
        self._file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115 (held, not read)
        try:
            _lock(self._file)
        except OSError:
            taken_by = self._owner()
            self._file.close()
            raise AtlasError(
                f"{folder}: another run is writing to it{taken_by}: wait for its end, or choose another --output-dir"
            ) from None
        owner = {"process": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with suppress(OSError):  # a full disk: the lock holds without its words
            self._file.truncate(0)
            self._file.write(json.dumps(owner))
            self._file.flush()

    def _owner(self) -> str:
        try:
            self._file.seek(0)
            owner = json.loads(self._file.read(1000))
            return f" (process {owner['process']} on {owner['host']}, since {owner['since']})"
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def release(self) -> None:
        self._file.close()
