"""Work with files: open and read files that may be untrusted; hash, flush and lock files.

Only regular files are opened, since a pipe or a device would block forever. Files are read up to a limit, since the
sizes in a header may be false.
"""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import os
import shutil
import stat
import sys
import zipfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import platformdirs

from atlas.errors import AtlasError

# Atlas uses record locks instead of flock. Forked processes that read data ahead would hold a flock for seconds after
# their parent was killed. Record locks work over NFS, too. On Windows the locked byte is behind the end of the text, so
# other processes can read the text.
if sys.platform == "win32":
    import msvcrt

    def _lock(file: IO[bytes]) -> None:
        file.seek(1 << 20)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(file: IO[bytes]) -> None:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


_CHUNK = 1 << 20
_HELD = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
"""Error codes for a lock that another process holds."""
_LOCAL_HEADER_BYTES = 30


def check_regular(path: Path) -> int:
    """Return the size of a file in bytes; links are followed. Raises `OSError` unless it is a regular file."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return status.st_size


@contextmanager
def explain_failed_write(
    place: object, remedy: str, *, kind: type[AtlasError] = AtlasError, problem: str = "cannot be written"
) -> Iterator[None]:
    """Turn an `OSError` raised within this context into an error of class `kind`. The message of that error gives the
    place, the problem with the system's reason, and the remedy."""
    try:
        yield
    except OSError as error:
        raise kind(f"{place}: {problem} ({error.strerror or error}): {remedy}") from None


def read_limited(path: Path, *, limit: int) -> bytes:
    """Return the content of a regular file. Raises `OSError`, before reading, if the file has more than `limit`
    bytes."""
    size = check_regular(path)
    if size > limit:
        reason = f"is {size:,} bytes long, more than the {limit:,} that are allowed"
        raise OSError(errno.EFBIG, reason, str(path))
    with path.open("rb") as file:
        return file.read(size)  # not `limit`: Python allocates the full requested size


def sha256_of(path: Path, advance: Callable[[int], None] = lambda done: None) -> str:
    """Return the SHA-256 of a file in hex. `advance` receives the number of bytes read, piece by piece."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                advance(len(chunk))
    except OSError as error:
        error.filename = str(path)  # the error of a failed read does not name the file
        raise
    return digest.hexdigest()


def flush_to_disk(file: IO[Any]) -> None:
    """Flush a file from Python's buffer and the system's to the disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Flush a folder to the disk, which makes a rename in it durable. Windows has no call to flush a folder, and needs
    none."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file beside `path`. At the end the temporary file, complete and flushed to the
    disk, replaces `path`. After an error the temporary file is removed."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)  # a link with that name would make Atlas write outside the folder
        yield temporary
        with open(temporary, "rb+") as file:
            flush_to_disk(file)
        os.replace(temporary, path)
        flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_folder(folder: Path, names: Collection[str], write: Callable[[Path], None]) -> Path:
    """Create `folder` with the files `names`, complete or not at all. `write` makes the files in a temporary folder.

    An existing folder that holds only files with these names is replaced. Raises `AtlasError` if the folder holds other
    files or cannot be written.
    """
    if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= set(names)):
        raise AtlasError(f"{folder}: exists and is not an exported model; choose another --output")
    temporary = folder.with_name(folder.name + ".tmp")
    try:
        with explain_failed_write(folder, "choose another place"):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            write(temporary)
            for name in names:
                with open(temporary / name, "rb+") as written:
                    flush_to_disk(written)
            if folder.exists():
                shutil.rmtree(folder)
            temporary.rename(folder)
            flush_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def try_to_lock(path: Path) -> IO[bytes] | None:
    """Open and lock a file, which is created if needed. The lock ends when the file is closed or the process ends.

    Returns None while another process holds the lock, or if that process has removed the file meanwhile. Raises
    `OSError` for any other failure.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = path.open("ab")
    except PermissionError:
        if os.name == "nt" and path.exists():  # Windows raises this for a file that is just being removed
            return None
        raise
    try:
        _lock(file)
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    except OSError as error:
        if error.errno not in (*_HELD, errno.ENOENT):
            file.close()
            raise
    file.close()
    return None


def open_zip(path: Path, *, directory_limit: int) -> zipfile.ZipFile:
    """Open a zip archive. The archive's directory must have at most `directory_limit` bytes, and its members must not
    overlap.

    Raises `zipfile.BadZipFile`, `ValueError` or `OSError`.
    """
    size = check_regular(path)
    try:
        archive = zipfile.ZipFile(LimitedReads(io.FileIO(path), directory_limit, size))
    except (NotImplementedError, EOFError, UnicodeError) as error:
        raise zipfile.BadZipFile(str(error)) from None
    members = sorted(archive.infolist(), key=lambda member: member.header_offset)
    starts = [member.header_offset for member in members]
    for member, (start, following) in zip(members, itertools.pairwise([*starts, size]), strict=True):
        if start < 0 or start + _LOCAL_HEADER_BYTES + member.compress_size > following:
            raise zipfile.BadZipFile(f"member {member.orig_filename!r:.80} overlaps the data after it")
    return archive


class LimitedReads(io.BufferedReader):
    """A seekable stream that refuses any single read of more than `limit` bytes.

    `zipfile` reads a directory in one read, and `tarfile` reads a header in one read. In both cases the file itself
    gives the size of the read. `zipfile` needs `size`, the length of the stream, because it searches the rest of the
    stream for the directory.
    """

    def __init__(self, stream: Any, limit: int, size: int = 0) -> None:
        super().__init__(stream)
        self._limit, self._size = limit, size

    def read(self, size: int | None = -1, /) -> bytes:
        """Read up to `size` bytes. Raises `ValueError` for a read that is too large."""
        if size is None or size < 0:
            size = max(0, self._size - self.tell())
        if size > self._limit:
            raise ValueError(f"its directory, or a header in it, has more than {self._limit:,} bytes")
        return super().read(size)

    def __del__(self) -> None:
        self.close()


def cache_folder() -> Path:
    """The user's cache folder of Atlas, or the folder that `ATLAS_CACHE_DIR` names."""
    return Path(os.environ.get("ATLAS_CACHE_DIR") or platformdirs.user_cache_dir("atlas", appauthor=False))
