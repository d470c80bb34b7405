"""Zip archives of text from anywhere: what is refused before anything in them is unpacked.

Nothing is ever written to disk, and `zipfile` gives no more bytes of a member than the archive's directory
says, so that the directory can be judged before any is read. What is judged by size only is a matter of
trust, which `--trust-archives` gives; the rest is refused in any case.
"""

from __future__ import annotations

import re
import stat
import zipfile
from pathlib import Path

from atlas.errors import AtlasError
from atlas.files import open_zip

MAX_RATIO = 200
"""Bytes of text per byte of archive: prose has 3 to 5, logs 10 to 50, a bomb 1,000 and more."""
RATIO_FREE_BYTES = 100_000_000
"""So much text an archive may hold at any ratio."""
MAX_BYTES = 10**12
MAX_MEMBERS = 1_000_000

_DIRECTORY_LIMIT = 128 << 20
_TRUSTED_DIRECTORY_LIMIT = 4 << 30
_LONGEST_NAME = 1024
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def open_archive(path: Path, *, trust: bool = False) -> zipfile.ZipFile:
    """The archive, its directory checked. Raises `AtlasError`; with `trust`, not for its size."""
    try:
        limit = _TRUSTED_DIRECTORY_LIMIT if trust else _DIRECTORY_LIMIT
        archive = open_zip(path, directory_limit=limit)
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise AtlasError(f"{path}: is not a zip archive ({error!s:.200}); download it again") from None
    members = files_in(archive)
    for member in members:
        _refuse_unsafe(path, member)
    if not trust:
        _refuse_bomb(path, members)
    return archive


def files_in(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    return [member for member in archive.infolist() if not member.filename.endswith("/")]


def is_file(member: zipfile.ZipInfo) -> bool:
    """Not a link or a device, which an archive made on Unix can hold. (Others leave the kind at 0.)"""
    return stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG)


def _refuse_unsafe(archive: Path, member: zipfile.ZipInfo) -> None:
    """Members are never written to disk; an archive that tries to leave its folder is refused all the same."""
    name = member.orig_filename
    shown = f"{archive}: member {name!r:.200}"
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
        raise AtlasError(f"{shown} points outside the archive; it is not safe to use")
    if not name or _CONTROL.search(name) or len(name) > _LONGEST_NAME:
        raise AtlasError(f"{shown} has a name that no file can have; it is not safe to use")
    if member.flag_bits & 1:
        raise AtlasError(f"{shown} is encrypted; unpack it first")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # bzip2 and LZMA unpack gigabytes at once, on the word of a few bytes.
        raise AtlasError(
            f"{shown} is compressed in a way Atlas does not read; unpack it, or pack with deflate"
        )
    if member.compress_type == zipfile.ZIP_STORED and member.compress_size != member.file_size:
        raise AtlasError(f"{shown} contradicts itself about its size; download it again")


def _refuse_bomb(archive: Path, members: list[zipfile.ZipInfo]) -> None:
    size, packed = sum(member.file_size for member in members), archive.stat().st_size
    remedy = "if you know where it comes from, give atlas prepare --trust-archives"
    if len(members) > MAX_MEMBERS:
        raise AtlasError(f"{archive}: holds {len(members):,} files, more than {MAX_MEMBERS:,}; {remedy}")
    if size > MAX_BYTES:
        raise AtlasError(
            f"{archive}: holds {size / 1e12:,.1f} TB, more than {MAX_BYTES / 1e12:.0f}; {remedy}"
        )
    if size > RATIO_FREE_BYTES and size > MAX_RATIO * packed:
        raise AtlasError(
            f"{archive}: {packed:,} bytes that unpack to {size:,}, more than {MAX_RATIO} times as many, may be "
            f"a zip bomb; {remedy}"
        )
