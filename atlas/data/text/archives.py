"""Checks of zip and tar archives before unpacking, since an archive may be untrusted.

Atlas never writes a member to disk. For a zip archive, Atlas checks only the directory, because `zipfile` returns at
most as many bytes of a member as the directory states. `--trust-archives` turns off the checks of sizes. All other
checks always apply.
"""

from __future__ import annotations

import functools
import re
import stat
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from atlas.data.text.formats import compression
from atlas.errors import DataError
from atlas.files import LimitedReads, check_regular, open_zip

MAX_RATIO = 200
"""The largest allowed ratio of unpacked to packed bytes. Prose has 3 to 5, a log 10 to 50, a bomb 1,000 or more."""
RATIO_FREE_BYTES = 100_000_000
"""An archive with at most `RATIO_FREE_BYTES` unpacked bytes may have any compression ratio."""
MAX_BYTES = 10**12
MAX_MEMBERS = 1_000_000

_DIRECTORY_LIMIT = 128 << 20
_TRUSTED_DIRECTORY_LIMIT = 4 << 30
_LONGEST_NAME = 1024
_LARGEST_HEADER = 16 << 20
_CHUNK = 1 << 20
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_IF_TRUSTED = "if you trust its origin, run atlas prepare with --trust-archives"

ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", *(f".tar{ending}" for ending in compression.ENDINGS))
"""Endings of the names of archives."""
DAMAGE = (*compression.ERRORS, zipfile.BadZipFile, tarfile.TarError, EOFError, UnicodeDecodeError)
"""Exceptions that the readers of archives and compressed files raise for damaged files."""


@dataclass(frozen=True)
class Member:
    """An archive member that is not a folder."""

    name: str
    size: int
    is_file: bool
    """False for a link, a device or a sparse file."""


class BombError(DataError):
    """A file that may unpack to much more than is safe. Unlike a damaged file, it is never left out."""


def refuse_bomb(name: str, packed: int, unpacked: int) -> None:
    """Raise `BombError` if a file of `packed` bytes, which unpacks to at least `unpacked` bytes, may be a bomb."""
    if unpacked > max(RATIO_FREE_BYTES, MAX_RATIO * packed):
        kind = "zip bomb" if name.lower().endswith(".zip") else "bomb"
        raise BombError(
            f"{name}: may be a {kind}: its {packed:,} bytes unpack to {unpacked:,} or more, more than {MAX_RATIO} "
            f"times as many; {_IF_TRUSTED}"
        )


def members_of(path: Path, *, trust: bool = False) -> list[Member]:
    """Check a zip or tar archive, and return its members in the order of the archive.

    Raises `DataError` for a file that is not a complete archive or is not safe to read. Unless `trust`, the function
    also raises `DataError` for an archive that is too large or may be a bomb.
    """
    members = _checked_zip(path, trust) if _is_zip(path) else _checked_tar(path, trust)
    # If several members have the same name, the last one counts.
    return list({member.name: member for member in members}.values())


def is_in_own_order(path: Path) -> bool:
    """Return whether an archive is a compressed tar. Atlas reads the members of such an archive in their stored order,
    because a backward seek would decompress the archive from its start."""
    with path.open("rb") as file:
        return compression.compression_of(file.read(compression.LONGEST_MARK)) is not None


def has_archive_name(path: str | Path) -> bool:
    """Return whether a name has the ending of an archive."""
    return str(path).lower().endswith(ARCHIVES)


def _is_zip(path: Path) -> bool:
    """Return whether a file is named like a zip archive, or begins as one."""
    check_regular(path)
    with path.open("rb") as file:
        return path.suffix.lower() == ".zip" or file.read(4) == b"PK\x03\x04"


def open_member(root: str, name: str) -> IO[bytes]:
    """Open a member of an archive that `members_of` has checked."""
    path = Path(root)
    status = path.stat()
    return cast(IO[bytes], _opener(path, (status.st_size, status.st_mtime_ns))(name))


@functools.lru_cache(maxsize=2)
def _opener(path: Path, _stamp: tuple[int, int]) -> Callable[[str], IO[bytes] | None]:
    """Return the function that opens a member by its name.

    The function is cached, since reading the directory of a large archive takes long. `_stamp` is the size and time of
    the archive, so that a changed archive is opened again.
    """
    if _is_zip(path):
        return open_zip(path, directory_limit=_TRUSTED_DIRECTORY_LIMIT).open
    tar = _open_tar(path)
    by_name = {member.name: member for member in tar}  # `tarfile` itself would search all members
    return lambda name: tar.extractfile(by_name[name])


def _open_tar(path: Path) -> tarfile.TarFile:
    stream = compression.decompressed(path.open("rb"), path.name)
    return tarfile.open(fileobj=LimitedReads(stream, _LARGEST_HEADER), mode="r:")


def _checked_zip(path: Path, trust: bool) -> list[Member]:
    try:
        limit = _TRUSTED_DIRECTORY_LIMIT if trust else _DIRECTORY_LIMIT
        with open_zip(path, directory_limit=limit) as archive:
            members = [member for member in archive.infolist() if not member.filename.endswith("/")]
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise DataError(f"{path}: is not a zip archive ({error!s:.200}); download or pack it again") from None
    for member in members:
        _refuse_unsafe(path, member)
    if not trust:
        _refuse_too_much(path, len(members), sum(member.file_size for member in members))
    return [Member(member.filename, member.file_size, _is_file(member)) for member in members]


def _checked_tar(path: Path, trust: bool) -> list[Member]:
    members: list[Member] = []
    try:
        check_regular(path)
        with _open_tar(path) as archive:
            for count, member in enumerate(archive, start=1):
                if not trust:  # check first, because the next step of the loop decompresses this member
                    _refuse_too_much(path, count, archive.offset)
                if member.isdir():
                    continue
                _refuse_unsafe_name(member.name, f"{path}: member {member.name!r:.200}")
                members.append(Member(member.name, member.size, member.isreg() and not member.issparse()))
            _check_end(archive, path, trust)
    except (OSError, ValueError, RecursionError, *DAMAGE) as error:
        # `tarfile` recurses along a chain of headers
        reason = "an endless chain of headers" if isinstance(error, RecursionError) else f"{error!s:.200}"
        raise DataError(
            f"{path}: is not a complete tar archive ({reason}); download or pack it again"
        ) from None
    return members


def _check_end(archive: tarfile.TarFile, path: Path, trust: bool) -> None:
    """Raise `ReadError` unless the archive ends with a block of zeros. `tarfile` itself accepts any invalid header as
    the end. Then read a compressed stream to its end, because the checksum is there."""
    stream: Any = archive.fileobj
    stream.seek(archive.offset)
    if stream.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"neither a member nor the end at byte {archive.offset:,}")
    while is_in_own_order(path) and stream.read(_CHUNK):
        if not trust:
            _refuse_too_much(path, 0, stream.tell())


def _is_file(member: zipfile.ZipInfo) -> bool:
    """Return whether a member of a zip archive is a regular file. An archive that was made on Unix can also contain
    links and devices. In an archive from another system, the type of each member is 0."""
    return stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG)


def _refuse_unsafe_name(name: str, shown: str) -> None:
    """Raise `DataError` for a name that points outside the archive, or that no file can have. Atlas refuses an archive
    with such a name, although Atlas never writes members to disk."""
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
            f"{shown} has a compression that Atlas does not read; unpack the archive, or pack it with deflate"
        )
    if member.compress_type == zipfile.ZIP_STORED and member.compress_size != member.file_size:
        raise DataError(f"{shown} gives two different sizes; download or pack it again")


def _refuse_too_much(archive: Path, count: int, size: int) -> None:
    if count > MAX_MEMBERS:
        raise DataError(f"{archive}: holds {count:,} files, more than {MAX_MEMBERS:,}; {_IF_TRUSTED}")
    if size > MAX_BYTES:
        held, most = size / 1e12, MAX_BYTES / 1e12
        raise DataError(f"{archive}: holds {held:,.1f} TB, more than {most:.0f}; {_IF_TRUSTED}")
    refuse_bomb(str(archive), archive.stat().st_size, size)
