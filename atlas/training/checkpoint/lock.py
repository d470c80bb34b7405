"""A lock on an output folder, so that only one run writes to the folder. If a process is killed, the system releases
the lock."""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO
from weakref import WeakValueDictionary

from atlas.errors import CheckpointError
from atlas.files import read_limited, try_to_lock

_LONGEST_NOTE = 1000  # bytes


_locked_files: WeakValueDictionary[tuple[int, int], IO[bytes]] = WeakValueDictionary()
"""Device and inode → the open lock file. The system would release the lock if this process opened the file a second
time and closed it. So two locks of one process on one folder share the open file."""


class FolderLock:
    """A lock on a folder. This process holds the lock from construction until `release` or until the process ends. The
    folder is created if it does not exist. Several threads may use a lock.

    Raises `CheckpointError` if another process holds the lock, and `OSError` if the lock file cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "atlas.lock"
        places = [self._path, folder, *folder.parents]
        self._created = [place for place in places if not os.path.lexists(place)]
        self._since = time.strftime("%Y-%m-%d %H:%M:%S")
        self._note = self._times = None
        self._mutex = threading.Lock()
        self._file: IO[bytes] | None = self._shared()
        if self._file is None:
            with suppress(OSError):
                self._note = read_limited(self._path, limit=_LONGEST_NOTE)
                self._times = self._path.stat()
            self._file = self._lock()

    def _shared(self) -> IO[bytes] | None:
        """Return the lock file of this folder that this process has already locked, or None."""
        try:
            status = self._path.stat()
        except OSError:
            return None
        return _locked_files.get((status.st_dev, status.st_ino))

    def _lock(self) -> IO[bytes]:
        file = try_to_lock(self._path)
        if file is None:
            raise CheckpointError(
                f"{self._folder}: another run is writing to this folder{_owner(self._path)}: wait until that "
                "run ends, or choose another --output-dir"
            )
        owner = {"process": os.getpid(), "host": platform.node(), "since": self._since}
        with suppress(OSError):  # on a full disk, the lock works without this note
            file.truncate(0)
            file.write(json.dumps(owner).encode("utf-8"))
            file.flush()
        status = os.fstat(file.fileno())
        _locked_files[status.st_dev, status.st_ino] = file
        return file

    @property
    def is_released(self) -> bool:
        """Whether `release` or `undo` was called."""
        return self._file is None

    @property
    def is_held(self) -> bool:
        """Whether the lock file in the folder is still the file that this process has locked. If the folder cannot be
        reached at the moment, the answer is yes: a save then fails with its own error."""
        if self._file is None:
            return False
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        except FileNotFoundError:
            return False
        except OSError:
            return True

    def check(self, is_untouched: Callable[[], bool] = lambda: True) -> bool:
        """Raise `CheckpointError` if another run has taken the folder.

        This can happen only after the lock file was removed. If the file was removed and no other run has made a new
        one, lock a new file, and return True. `is_untouched` returns whether the folder shows no trace of another run,
        whose lock file may have been removed too.
        """
        with self._mutex:
            if self.is_held:
                return False
            if not os.path.lexists(self._path):
                try:
                    self._file = self._lock()
                except OSError:
                    return False  # a save fails with the same error, and the next check locks again
                except CheckpointError:
                    pass
                else:
                    if is_untouched():
                        return True
                    self.release()
            raise CheckpointError(
                f"{self._folder}: another run has taken this folder, because atlas.lock was removed: this run ends "
                "without another save. Use one --output-dir per run, and do not remove atlas.lock while a run is active"
            )

    def release(self) -> None:
        """Release the lock, so that another run can use the folder."""
        self._file = None  # the file is closed when no other lock shares it

    def undo(self) -> None:
        """Release the lock. Remove the lock file and the empty folders that the constructor created, or give the lock
        file its earlier content and times back."""
        with suppress(OSError):
            if self._file and self._note is not None and self._times is not None:
                self._file.truncate(0)
                self._file.write(self._note)
                self._file.flush()
                os.utime(self._path, ns=(self._times.st_atime_ns, self._times.st_mtime_ns))
        if os.name == "nt":  # Windows cannot remove an open file
            self.release()
        for place in self._created:
            with suppress(OSError):
                place.unlink() if place == self._path else place.rmdir()
        self.release()


@contextmanager
def undone_after_error(lock: FolderLock | None) -> Iterator[None]:
    """A context for the checks before a run begins. After an error, undo the lock, so that a mistake changes no
    file."""
    try:
        yield
    except BaseException:
        if lock:
            lock.undo()
        raise


def _owner(path: Path) -> str:
    try:
        owner = json.loads(read_limited(path, limit=_LONGEST_NOTE))
        return f" (process {owner['process']} on {owner['host']}, since {owner['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
