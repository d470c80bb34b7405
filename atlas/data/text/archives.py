"""Zip and tar archives from anywhere: what is refused before anything in them is unpacked.

Nothing is ever written to disk, and `zipfile` returns no more bytes of a member than the archive's directory says, so
the directory is enough to check. Checks of sizes are a matter of trust, which `--trust-archives` gives. Everything
else is refused in any case.
"""

from __future__ import annotations

import functools
import gzip
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
from atlas.files import LimitedReads, check_regular, open_zip

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MAX_RATIO = 200
"""Bytes of text per byte of archive: prose has 3 to 5, logs 10 to 50, a bomb 1,000 and more."""
RATIO_FREE_BYTES = 100_000_000
"""An archive with less text than this may have any compression ratio."""
MAX_BYTES = 10**12
MAX_MEMBERS = 1_000_000

_DIRECTORY_LIMIT = 128 << 20
_TRUSTED_DIRECTORY_LIMIT = 4 << 30
_LONGEST_NAME = 1024
_LARGEST_HEADER = 16 << 20
_CHUNK = 1 << 20
_MOST_WINDOW_BITS = 27
"""A Zstandard stream may make its reader remember up to 128 MiB."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class Member:
    """A member of an archive that is no folder."""

    name: str
    size: int
    is_file: bool
    """Not a link or a device."""


def unpack_limit(packed: int, *, trusted: bool) -> int:
    """How many bytes a file of `packed` bytes may unpack to."""
    return sys.maxsize if trusted else max(RATIO_FREE_BYTES, MAX_RATIO * packed)


def bomb(name: str, packed: int) -> DataError:
    """The error for a file of `packed` bytes that unpacks to more than its limit."""
    return DataError(
        f"{name}: {packed:,} bytes that unpack to more than {MAX_RATIO} times as many may be a bomb; if you know "
        "where it comes from, give atlas prepare --trust-archives"
    )


def members_of(path: Path, *, trust: bool = False) -> list[Member]:
    """Check a zip or tar, and return its members in its own order.

    Raises `DataError` for what is no archive, is not safe to read, or, unless `trust`, may be a bomb.
    """
    if path.suffix.lower() == ".zip":
        zipped = _checked_zip(path, trust)
        members = [Member(member.filename, member.file_size, _is_file(member)) for member in zipped]
    else:
        members = _checked_tar(path, trust)
    return list({member.name: member for member in members}.values())  # the last one of a name counts


def is_in_own_order(path: Path) -> bool:
    """Whether members are read in their own order: a compressed tar cannot seek back without starting again."""
    return path.suffix.lower() not in (".zip", ".tar")


def open_member(root: str, name: str) -> IO[bytes]:
    """Open a member of an archive that `members_of` has checked."""
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
    """Cached, since the directory of a large archive takes long to read. `_stamp` changes with the file."""
    if path.suffix.lower() == ".zip":
        return open_zip(path, directory_limit=_TRUSTED_DIRECTORY_LIMIT)
    return _open_tar(path)


@functools.lru_cache(maxsize=2)
def _by_name(archive: tarfile.TarFile) -> dict[str, tarfile.TarInfo]:
    """An index, since `tarfile` itself searches through every member."""
    return {member.name: member for member in archive.getmembers()}


def open_zstd(stream: IO[bytes]) -> IO[bytes]:
    """Decompress a Zstandard stream, in limited memory."""
    options = {int(zstd.DecompressionParameter.window_log_max): _MOST_WINDOW_BITS}
    return cast(IO[bytes], zstd.ZstdFile(stream, options=options))


def _open_tar(path: Path) -> tarfile.TarFile:
    name = path.name.lower()
    raw: Any = path.open("rb")
    if name.endswith((".gz", ".tgz")):
        raw = gzip.GzipFile(fileobj=raw)
    elif name.endswith(".zst"):
        raw = open_zstd(raw)
    return tarfile.open(fileobj=LimitedReads(raw, _LARGEST_HEADER), mode="r:")


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
                if not trust:  # before the member is skipped, which unpacks it
                    _refuse_bomb(path, count, archive.offset)
                if member.isdir():
                    continue
                _refuse_unsafe_name(member.name, f"{path}: member {member.name!r:.200}")
                is_file = member.isreg() and not member.issparse()
                members.append(Member(member.name, member.size, is_file))
            _require_end_of_tar(archive)
            if is_in_own_order(path):
                _read_to_end(archive, path, trust)
    except (
        tarfile.TarError,
        OSError,
        EOFError,
        ValueError,
        zlib.error,
        zstd.ZstdError,
        RecursionError,
    ) as error:
        # tarfile recurses along a chain of headers
        reason = "headers without end" if isinstance(error, RecursionError) else f"{error!s:.200}"
        raise DataError(
            f"{path}: is not a complete tar archive ({reason}); download or pack it again"
        ) from None
    return members


def _require_end_of_tar(archive: tarfile.TarFile) -> None:
    """Require a block of zeros: `tarfile` takes anything that is no header for the end."""
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"neither a member nor the end at byte {archive.offset:,}")


def _read_to_end(archive: tarfile.TarFile, path: Path, trust: bool) -> None:
    """Read to the end of the compressed stream, where its checksum is."""
    assert archive.fileobj is not None
    while archive.fileobj.read(_CHUNK):
        if not trust:
            _refuse_bomb(path, 0, archive.fileobj.tell())


def _is_file(member: zipfile.ZipInfo) -> bool:
    """Whether it is no link or device, which an archive made on Unix can hold. (Others leave the kind at 0.)"""
    return stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG)


def _refuse_unsafe_name(name: str, shown: str) -> None:
    """Members are never written to disk, but an archive that tries to leave its folder is refused."""
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
        # A few bytes make bzip2 and LZMA allocate gigabytes.
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
