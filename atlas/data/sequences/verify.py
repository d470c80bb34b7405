"""Verify the bytes of a dataset while a run trains on it or an evaluation reads it."""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from atlas.data.shards import changed
from atlas.data.text.hashes import hashes_of, stamp_of
from atlas.errors import AtlasError, DataError
from atlas.files import cache_folder, sha256_of

_PATIENCE = 1.0  # seconds
_INTERVAL = 2.0  # seconds
_RARELY = 50
"""The thread rests this many times as long as a look at all files takes."""
_AT_ONCE = 16  # files per look into the cache of hashes


class DatasetVerifier:
    """Compares files with their sha256, in a thread that starts at once. `files` lists paths and hashes. A run calls
    `confirm` before it commits a checkpoint.

    A file whose size, times and inode have not changed since an earlier verification is not read again, see
    `hashes_of`. So only the first run on a dataset reads the complete dataset, beside its first updates. Later, the
    thread looks every `_INTERVAL` seconds whether a file was written, and verifies that file again. Without this, bytes
    that were changed and restored between two saves would stay unnoticed.
    """

    def __init__(self, files: Sequence[tuple[Path, str]]) -> None:
        cache_folder()  # raises an error for a mistake in ATLAS_CACHE_DIR before the run begins
        self._files = files
        self._verified: dict[Path, str] = {}
        self._error: AtlasError | None = None
        self._is_done_once = threading.Event()
        self._one_at_a_time = threading.Lock()
        self._is_unused = threading.Event()
        if files:
            weakref.finalize(self, self._is_unused.set)
            arguments = (weakref.ref(self), self._is_unused)
            threading.Thread(target=_watch, args=arguments, name="atlas-verify", daemon=True).start()
        else:
            self._is_done_once.set()

    def close(self) -> None:
        """End the thread. `confirm` still works."""
        self._is_unused.set()

    def check(self) -> None:
        """Raise `DataError` if a file is already known to have changed."""
        if self._error:
            raise self._error

    def confirm(self, say: Callable[[str], None], what: str = "checkpoint") -> None:
        """Wait until every file is verified. Raise `DataError` if a file has changed since it was prepared. A wait of
        more than a second is reported with `say`; `what` is that which waits.

        The bytes that the run has read up to now are then the bytes of the dataset, unless a file was changed and
        restored again within the few seconds between two looks of the thread.
        """
        if not self._is_done_once.wait(_PATIENCE):
            say(f"the {what} waits until the bytes of the dataset are verified")
            self._is_done_once.wait()
        self.check()
        self._verify()
        self.check()

    def _verify_quietly(self) -> None:
        if sys.platform == "linux":  # only Linux has a priority per thread
            # Training gets a free core first, but hashing always gets a part of a core.
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        try:
            self._verify()
        finally:
            self._is_done_once.set()

    def _look_again(self) -> float:
        """Verify what has changed, and return the seconds until the next look. If a file cannot be reached at the
        moment, the next look, or the save, tries again."""
        begun = time.monotonic()
        self._verify(ignore_unreachable=True)
        return max(_INTERVAL, _RARELY * (time.monotonic() - begun))

    def _verify(self, *, ignore_unreachable: bool = False) -> None:
        """Verify the files that have changed since they were last verified, or have not been verified yet."""
        with self._one_at_a_time:
            self._verify_changed(ignore_unreachable)

    def _verify_changed(self, ignore_unreachable: bool) -> None:
        try:
            stamps = [(path, sha256, stamp_of(path)[0]) for path, sha256 in self._files]
            unknown = [
                (path, sha256, stamp) for path, sha256, stamp in stamps if self._verified.get(path) != stamp
            ]
            for first in range(0, len(unknown), _AT_ONCE):
                some = unknown[first : first + _AT_ONCE]
                hashes = hashes_of(path for path, _, _ in some)
                for (path, sha256, stamp), found in zip(some, hashes, strict=True):
                    if found != sha256 and sha256_of(path) != sha256:  # the cache may be damaged, too
                        raise changed(path) if path.suffix == ".npy" else _changed_plan(path)
                    # If the file has changed since its stamp was taken, the next call reads the file again.
                    self._verified[path] = stamp
        except AtlasError as error:
            self._error = error
        except OSError as error:
            if ignore_unreachable:
                return
            self._error = DataError(
                f"{error.filename}: cannot be read ({error.strerror}): the run cannot verify its dataset; restore the "
                "file, then resume"
            )


def _watch(verifier: weakref.ref[DatasetVerifier], is_unused: threading.Event) -> None:
    """Verify the dataset as long as something uses the verifier, and no file has changed."""
    seconds = _INTERVAL
    if first := verifier():
        first._verify_quietly()
    del first
    while True:
        if is_unused.wait(seconds):
            return
        found = verifier()
        if found is None or found._error:
            return
        seconds = found._look_again()
        del found


def _changed_plan(path: Path) -> DataError:
    return DataError(
        f"{path}: this file of the plan for packing has changed: remove the folder {path.parent}; the next run makes "
        "the plan again"
    )
