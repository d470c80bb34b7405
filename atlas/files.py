"""Functions that read untrusted files, and that hash, replace, flush and lock files.

An untrusted file must be a regular file, since a read from a pipe or a device can block forever. Every read has a size
limit, since the sizes in a file header may be false.
"""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import os
import re
import shutil
import stat
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from unicodedata import category

import platformdirs

from atlas.errors import AtlasError

# Atlas uses POSIX record locks instead of flock. Child processes inherit a flock, and would hold the flock for seconds
# after their parent was killed. Record locks also work over NFS. On Windows, the locked byte is beyond the end of the
# text, so that other processes can read the text.
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
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode's categories of characters that control a terminal, end a line, or cannot be written."""
_NO_WAIT_NO_LINK = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)  # Windows has neither


def was_url(place: str | Path) -> bool:
    """Return whether a path is a URL. A URL that was converted to a `Path` has only one slash. A drive letter of
    Windows, as in `C:/data`, is no URL."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:[/\\]", str(place)) is not None


def local_path(option: str, place: str | Path) -> Path:
    """Return `place`, the value of `option`, as a path to write to. Raises `AtlasError` if `place` is a URL."""
    if was_url(place):
        raise AtlasError(
            f"{option} {place}: is a URL, and Atlas writes only to the file system: give a path, such as the path at "
            "which this storage is mounted"
        )
    return Path(place)


def check_regular(path: Path) -> int:
    """Return the size of the file at `path` in bytes. Links are followed. Raises `OSError` unless `path` is a regular
    file."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise _not_regular(path)
    return status.st_size


def open_regular(path: Path, mode: str, **options: Any) -> IO[Any]:
    """Open one of Atlas's own files as `open` does. Raises `OSError` for a link, a pipe, a socket or a device: `open`
    would wait until another process opens the other end of a pipe, and would follow a link to another folder."""

    def opener(name: str, flags: int) -> int:
        try:
            descriptor = os.open(name, flags | _NO_WAIT_NO_LINK, 0o666)
        except OSError as error:
            if error.errno in (errno.ENXIO, errno.ELOOP):  # a socket, a pipe that no process reads, or a link
                raise _not_regular(path) from None
            raise
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise _not_regular(path)
        return descriptor

    return open(path, mode, opener=opener, **options)


def without_wait(name: str, flags: int) -> int:
    """An opener for `open`. A pipe without a writer is then empty, and does not block."""
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0), 0o666)


def _not_regular(path: Path) -> OSError:
    return OSError(errno.EINVAL, "is not a regular file", str(path))


def lines_of(file: IO[bytes], *, longest: int = 16 << 20) -> Iterator[bytes]:
    """Yield the lines of a file with their ends. A line that is longer than `longest` bytes comes in pieces, so that
    the lines of a damaged file do not fill the memory."""
    return iter(lambda: file.readline(longest), b"")


@contextmanager
def explain_failed_write(
    place: object, remedy: str, *, kind: type[AtlasError] = AtlasError, problem: str = "cannot be written"
) -> Iterator[None]:
    """Convert an `OSError` that is raised inside this context to an error of class `kind`. The message of the new error
    gives the place, the problem, the system's reason and the remedy."""
    try:
        yield
    except OSError as error:
        raise kind(f"{place}: {problem} ({error.strerror or error}): {remedy}") from None


def read_limited(path: Path, *, limit: int) -> bytes:
    """Return the content of a regular file. Raises `OSError`, before reading, if the file has more than `limit`
    bytes."""
    check_regular(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size  # another process may have replaced the file by a longer one
        if size > limit:
            reason = f"is {size:,} bytes long, more than the {limit:,} that are allowed"
            raise OSError(errno.EFBIG, reason, str(path))
        return file.read(size)  # `file.read(limit)` would allocate `limit` bytes


def sha256_of(path: str | Path, advance: Callable[[int], None] = lambda done: None) -> str:
    """Return the SHA-256 of a file in hex. The function calls `advance` after each chunk, with the chunk's size in
    bytes."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb", opener=without_wait) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                advance(len(chunk))
    except OSError as error:
        error.filename = str(path)  # the error of a failed read does not name the file
        raise
    return digest.hexdigest()


def flush_to_disk(file: IO[Any]) -> None:
    """Flush a file to the disk, from Python's buffer and from the system's cache."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Flush a folder to the disk, so that a rename inside the folder survives a power cut. On Windows, do nothing:
    Windows cannot flush a folder, and a rename there needs no flush."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path, temporary: Path | None = None) -> Iterator[Path]:
    """Yield the path of a temporary file in the folder of `path`. When the context ends, flush the temporary file to
    the disk and rename it to `path`. After an error, remove the temporary file instead.

    The temporary file is `PATH.tmp` by default. It replaces an older file of this name."""
    temporary = temporary or path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)  # a link with that name would make Atlas write outside the folder
        yield temporary
        with open(temporary, "rb+") as file:
            flush_to_disk(file)
        os.replace(temporary, path)
        flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftover(path: Path) -> None:
    """Remove a file, a link or a folder that a killed process has left. What cannot be removed stays. For a pipe,
    `shutil.rmtree` would wait until another process opens its other end."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def try_to_lock(path: Path) -> IO[bytes] | None:
    """Open and lock a file, and return it. A missing file is created.

    The lock ends when the file is closed or the process ends. Returns None if another process holds the lock, or has
    just removed the file. Raises `OSError` for any other failure.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = open_regular(path, "ab")
    except PermissionError:
        if os.name == "nt" and path.exists():  # Windows raises this error while a file is being removed
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
    """Open a zip archive whose directory has at most `directory_limit` bytes and whose members do not overlap.

    Raises `zipfile.BadZipFile`, `ValueError` or `OSError` for any other file.
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
    """A seekable stream that raises `ValueError` if a single read requests more than `limit` bytes.

    `zipfile` reads the directory of an archive in one read, and `tarfile` reads a header in one read. In both cases,
    the size of the read comes from the untrusted file. `size` is the length of the stream in bytes. Only `zipfile`
    needs `size`, because it reads up to the end of the stream to find the directory.
    """

    def __init__(self, stream: Any, limit: int, size: int = 0) -> None:
        super().__init__(stream)
        self._limit, self._size = limit, size

    def read(self, size: int | None = -1, /) -> bytes:
        """Read up to `size` bytes. Raises `ValueError` if `size` exceeds the limit."""
        if size is None or size < 0:
            size = max(0, self._size - self.tell())
        if size > self._limit:
            raise ValueError(f"its directory, or a header in it, has more than {self._limit:,} bytes")
        return super().read(size)

    def __del__(self) -> None:
        self.close()


def encodable(text: str) -> str:
    """Return `text` with escapes in place of lone surrogates, which UTF-8 cannot hold. In Python, a path that is not
    UTF-8 has a lone surrogate for each such byte. JSON may have lone surrogates, too."""
    return text.encode("utf-8", "backslashreplace").decode()


def on_one_line(text: str) -> str:
    """Return `text` with escapes in place of line ends, other control characters and lone surrogates."""
    return "".join(ascii(char)[1:-1] if category(char) in _UNSEEN else char for char in text)


def cache_folder() -> Path:
    """Return the folder that `ATLAS_CACHE_DIR` names, or else Atlas's folder in the user's cache folder.

    A user without a home folder, as with `docker run --user`, gets a folder in the system's temporary folder. Raises
    `AtlasError` if that folder is another user's, whose files are not to be trusted.
    """
    if asked := os.environ.get("ATLAS_CACHE_DIR"):
        return local_path("ATLAS_CACHE_DIR", asked)
    with suppress(RuntimeError, OSError):  # RuntimeError: no HOME, and the system does not know the user
        folder = Path(platformdirs.user_cache_dir("atlas", appauthor=False))
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    if sys.platform == "win32":
        raise AtlasError(
            "the user's cache folder cannot be made: set ATLAS_CACHE_DIR to a folder of your own"
        )
    folder = Path(tempfile.gettempdir(), f"atlas-{os.getuid()}")
    with explain_failed_write(folder, "set ATLAS_CACHE_DIR to a folder of your own"):
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            raise OSError(errno.EPERM, "it belongs to another user")
    return folder
