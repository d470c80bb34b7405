"""Hashes of files. The hash of a file is cached until the file changes."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from pathlib import Path

from atlas.files import cache_folder, sha256_of

_SETTLED_SECONDS = 2.0
"""A hash is cached only if the file last changed more than this many seconds ago. A newer file could change again
without a new time stamp."""
_SAVE_SECONDS = 2.0
"""Seconds between two writes of new hashes to the cache. A kill loses at most the hashes since the last write."""
_TABLE = "CREATE TABLE IF NOT EXISTS hashes (path BLOB PRIMARY KEY, stamp TEXT, sha256 TEXT)"
_CACHE = "hashes.sqlite"
_LOOKUP = "SELECT sha256 FROM hashes WHERE path = ? AND stamp = ?"


def hashes_of(paths: Iterable[str | Path], advance: Callable[[int], None] = lambda done: None) -> list[str]:
    """Return the sha256 of each file. A file is read again if its size, times or inode changed, as in git's index. A
    copy may keep the modification time of the original, but not the change time (ctime). `advance` receives the number
    of bytes that were hashed or whose hash was in the cache."""
    hashes, new = [], list[tuple[bytes, str, str]]()
    with closing(_open_cache()) as cache:
        saved = time.monotonic()
        try:
            for path in paths:
                key, (stamp, changed), begun = os.fsencode(os.path.abspath(path)), stamp_of(path), time.time()
                if row := _look_up(cache, key, stamp):
                    hashes.append(row[0])
                    advance(os.path.getsize(path))
                    continue
                hashes.append(sha256_of(path, advance))
                if begun - changed > _SETTLED_SECONDS and stamp_of(path)[0] == stamp:
                    new.append((key, stamp, hashes[-1]))
                if time.monotonic() - saved >= _SAVE_SECONDS:
                    _save(cache, new)
                    saved = time.monotonic()
        finally:  # an interrupt loses no hash
            _save(cache, new)
    return hashes


def _look_up(cache: sqlite3.Connection, key: bytes, stamp: str) -> tuple[str] | None:
    """Return the cached hash, or None. A damaged cache is removed, so that the next command makes a new one."""
    try:
        row: tuple[str] | None = cache.execute(_LOOKUP, (key, stamp)).fetchone()
        return row
    except sqlite3.OperationalError:  # for example, another process holds the cache for long
        return None
    except sqlite3.DatabaseError:
        with suppress(OSError):
            (cache_folder() / _CACHE).unlink()
        return None


def _save(cache: sqlite3.Connection, new: list[tuple[bytes, str, str]]) -> None:
    with suppress(sqlite3.Error), cache:
        cache.executemany("INSERT OR REPLACE INTO hashes VALUES (?, ?, ?)", new)
    new.clear()


def _open_cache() -> sqlite3.Connection:
    """Open the table of cached hashes, or an empty table in memory if the cache folder cannot be used."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        cache = sqlite3.connect(folder / _CACHE, timeout=10)
        cache.execute(_TABLE)
    except (OSError, sqlite3.Error):
        cache = sqlite3.connect(":memory:")
        cache.execute(_TABLE)
    return cache


def written_at(path: str | Path) -> tuple[int, int] | None:
    """Return the size of a file and the time when it was last written, or None for a missing file. A new name, a link
    or other permissions do not change it, and it stays the same if a network file system is mounted again."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def stamp_of(path: str | Path) -> tuple[str, float]:
    """Return a string that changes whenever the file changes, and the time of the file's last change."""
    status = os.stat(path)
    stamp = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
    return stamp, max(status.st_mtime, status.st_ctime)
