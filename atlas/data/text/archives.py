"""Archives of text from anywhere, zip and tar: what is refused before anything in them is unpacked.

Nothing is ever written to disk, and `zipfile` gives no more bytes of a member than the archive's directory
says, so that the directory can be judged before any is read. What is judged by size only is a matter of
trust, which `--trust-archives` gives; the rest is refused in any case.
"""

from __future__ import annotations

import functools
import gzip
import io
import re
import stat
import sys
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from atlas.errors import DataError
from atlas.files import check_regular, open_zip

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MAX_RATIO = 200
"""Bytes of text per byte of archive: prose has 3 to 5, logs 10 to 50, a bomb 1,000 and more."""
RATIO_FREE_BYTES = 100_000_000
"""So much text an archive may hold at any ratio."""
MAX_BYTES = 10**12
MAX_MEMBERS = 1_000_000

_DIRECTORY_LIMIT = 128 << 20
_TRUSTED_DIRECTORY_LIMIT = 4 << 30
_LONGEST_NAME = 1024
_LARGEST_READ = 16 << 20
_READ_ON_BYTES = 1 << 20
_MOST_WINDOW_BITS = 27
"""Of a Zstandard stream: what it may have a reader remember, 128 MiB."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class Member:
    """What an archive holds, but for folders."""

    name: str
    size: int
    is_file: bool
    """Not a link or a device."""


def members_of(path: Path, *, trust: bool = False) -> list[Member]:
    """The members of a zip or tar, in its own order; the archive is checked first.

    Raises `DataError` for what is no archive, is not safe to read, or, unless `trust`, may be a bomb.
    """
    if path.suffix.lower() == ".zip":
        zipped = _checked_zip(path, trust)
        members = [Member(member.filename, member.file_size, _is_file(member)) for member in zipped]
    else:
        members = _checked_tar(path, trust)
    return list({member.name: member for member in members}.values())  # the last of a name is the valid one


def is_in_own_order(path: Path) -> bool:
    """Whether members are read as they come: a compressed tar goes back only by beginning again."""
    return path.suffix.lower() not in (".zip", ".tar")


def open_member(root: str, name: str) -> IO[bytes]:
    """A member of an archive that `members_of` has checked."""
    path = Path(root)
    status = path.stat()
    archive = _open_archive(path, (status.st_size, status.st_mtime_ns))
    if isinstance(archive, zipfile.ZipFile):
        return archive.open(name)
    content = archive.extractfile(_by_name(archive)[name])
    assert content is not None
    return content


@functools.lru_cache(maxsize=2)
def _open_archive(path: Path, _stamp: tuple[int, int]) -> zipfile.ZipFile | tarfile.TarFile:
    """Kept open: the directory of a large archive takes long to read. `_stamp` tells another file by that name."""
    if path.suffix.lower() == ".zip":
        return open_zip(path, directory_limit=_TRUSTED_DIRECTORY_LIMIT)
    return _open_tar(path)


@functools.lru_cache(maxsize=2)
def _by_name(archive: tarfile.TarFile) -> dict[str, tarfile.TarInfo]:
    """`tarfile` itself looks at every member to find one."""
    return {member.name: member for member in archive.getmembers()}


def open_zstd(stream: IO[bytes]) -> IO[bytes]:
    options = {int(zstd.DecompressionParameter.window_log_max): _MOST_WINDOW_BITS}
    return cast(IO[bytes], zstd.ZstdFile(stream, options=options))


def _open_tar(path: Path) -> tarfile.TarFile:
    name = path.name.lower()
    raw: Any = path.open("rb")
    if name.endswith((".gz", ".tgz")):
        raw = gzip.GzipFile(fileobj=raw)
    elif name.endswith(".zst"):
        raw = open_zstd(raw)
    return tarfile.open(fileobj=cast(IO[bytes], _SmallReads(raw)), mode="r:")


class _SmallReads(io.RawIOBase):
    """A stream of which nobody reads more than some megabytes at once, as `tarfile` does with a header."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _LARGEST_READ:
            raise tarfile.ReadError(f"a header of {size} bytes")
        content: bytes = self._stream.read(size)
        return content

    def seek(self, offset: int, whence: int = 0, /) -> int:
        place: int = self._stream.seek(offset, whence)
        return place

    def tell(self) -> int:
        place: int = self._stream.tell()
        return place

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._stream.close()
        super().close()


def _checked_zip(path: Path, trust: bool) -> list[zipfile.ZipInfo]:
    try:
        limit = _TRUSTED_DIRECTORY_LIMIT if trust else _DIRECTORY_LIMIT
        with open_zip(path, directory_limit=limit) as archive:
            members = [member for member in archive.infolist() if not member.filename.endswith("/")]
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise DataError(f"{path}: is not a zip archive ({error!s:.200}); download or pack it again") from None
    for member in members:
        _refuse_unsafe(path, member)
    if not trust:
        _refuse_bomb(path, len(members), sum(member.file_size for member in members))
    return members


def _checked_tar(path: Path, trust: bool) -> list[Member]:
    members: list[Member] = []
    try:
        check_regular(path)
        with _open_tar(path) as archive:
            for count, member in enumerate(archive, start=1):
                if not trust:  # before the member is passed over, by unpacking it
                    _refuse_bomb(path, count, archive.offset)
                if member.isdir():
                    continue
                _refuse_unsafe_name(member.name, f"{path}: member {member.name!r:.200}")
                is_file = member.isreg() and not member.issparse()
                members.append(Member(member.name, member.size, is_file))
            _require_end_of_tar(archive)
            if is_in_own_order(path):
                _read_on(archive, path, trust)
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, zstd.ZstdError) as error:
        raise DataError(
            f"{path}: is not a whole tar archive ({error!s:.200}); download or pack it again"
        ) from None
    except RecursionError:  # tarfile's, in a chain of thousands of headers
        raise DataError(f"{path}: is not a whole tar archive (headers without end)") from None
    return members


def _require_end_of_tar(archive: tarfile.TarFile) -> None:
    """`tarfile` takes whatever is no header for the end; the end is a block of zeros."""
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"neither a member nor the end at byte {archive.offset:,}")


def _read_on(archive: tarfile.TarFile, path: Path, trust: bool) -> None:
    """To the end of the compressed stream, where its checksum stands."""
    assert archive.fileobj is not None
    while archive.fileobj.read(_READ_ON_BYTES):
        if not trust:
            _refuse_bomb(path, 0, archive.fileobj.tell())


def _is_file(member: zipfile.ZipInfo) -> bool:
    """Not a link or a device, which an archive made on Unix can hold. (Others leave the kind at 0.)"""
    return stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG)


def _refuse_unsafe_name(name: str, shown: str) -> None:
    """Members are never written to disk; an archive that tries to leave its folder is refused all the same."""
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
        raise DataError(f"{shown} points outside the archive; it is not safe to use")
    if not name or _CONTROL.search(name) or len(name) > _LONGEST_NAME:
        raise DataError(f"{shown} has a name that no file can have; it is not safe to use")


def _refuse_unsafe(archive: Path, member: zipfile.ZipInfo) -> None:
    shown = f"{archive}: member {member.orig_filename!r:.200}"
    _refuse_unsafe_name(member.orig_filename, shown)
    if member.flag_bits & 1:
        raise DataError(f"{shown} is encrypted; unpack it first")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # bzip2 and LZMA unpack gigabytes at once, on the word of a few bytes.
        raise DataError(
            f"{shown} is compressed in a way Atlas does not read; unpack it, or pack with deflate"
        )
    if member.compress_type == zipfile.ZIP_STORED and member.compress_size != member.file_size:
        raise DataError(f"{shown} contradicts itself about its size; download or pack it again")


def _refuse_bomb(archive: Path, count: int, size: int) -> None:
    packed = archive.stat().st_size
    remedy = "if you know where it comes from, give atlas prepare --trust-archives"
    if count > MAX_MEMBERS:
        raise DataError(f"{archive}: holds {count:,} files, more than {MAX_MEMBERS:,}; {remedy}")
    if size > MAX_BYTES:
        raise DataError(f"{archive}: holds {size / 1e12:,.1f} TB, more than {MAX_BYTES / 1e12:.0f}; {remedy}")
    if size > RATIO_FREE_BYTES and size > MAX_RATIO * packed:
        raise DataError(
            f"{archive}: {packed:,} bytes that unpack to {size:,}, more than {MAX_RATIO} times as many, may be "
            f"a {'zip ' if archive.suffix.lower() == '.zip' else ''}bomb; {remedy}"
        )
