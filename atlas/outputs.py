"""Outputs among the user's own files: replace a file or a folder in one step, and nothing beside it."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from atlas.errors import AtlasError
from atlas.files import explain_failed_write, flush_folder, flush_to_disk, remove_leftover, replacing
from atlas.process import is_running

_HERE, _RENAME_EXCHANGE = -100, 2
"""AT_FDCWD and RENAME_EXCHANGE of Linux's renameat2, see `man 2 rename`."""


@contextmanager
def replacing_output(path: Path) -> Iterator[Path]:
    """Yield a path for a new file. When the context ends, the new file takes the place of `path`, or of the file that
    the link `path` leads to. Raises `AtlasError` if something else than a file is there."""
    place = place_of_file(path)
    with replacing(place, unused_name(place)) as temporary:
        yield temporary


def unused_name(path: Path) -> Path:
    """Return a hidden name beside `path`, for a file or folder that will replace `path`. The name contains the host and
    the number of this process. What killed processes of this host have left under such names is removed."""
    own_name = re.compile(rf"\.{re.escape(path.name)}\.new-{_host()}-([0-9]+)-[0-9a-f]{{8}}")
    for entry in path.parent.iterdir() if path.parent.is_dir() else ():
        match = own_name.fullmatch(entry.name)
        # In a container, each process of Atlas can have the same number as a killed one.
        if match and (
            entry.name not in _made if int(match[1]) == os.getpid() else not is_running(int(match[1]))
        ):
            remove_leftover(entry)
    name = f".{path.name}.new-{_host()}-{os.getpid()}-{secrets.token_hex(4)}"
    _made.add(name)
    return path.with_name(name)


_made: set[str] = set()
"""The names that `unused_name` has returned in this process."""


def _host() -> str:
    """Return eight digits for the name of this host, or of this container, whose processes have numbers of their
    own."""
    return hashlib.sha256(os.fsencode(platform.node())).hexdigest()[:8]


def place_of_file(path: Path) -> Path:
    """Return the file to replace if a new file shall take the place of `path`: `path` itself or, for a link, the file
    that it leads to. Raises `AtlasError` if something else than a file is there."""
    real = Path(os.path.realpath(path)) if path.is_symlink() else path
    if os.path.lexists(real) and not real.is_file():
        what = "a folder" if real.is_dir() else "a pipe, a socket, a device or a link to itself"
        raise AtlasError(f"{path}: is {what}, which Atlas does not replace: choose another name")
    return real


def place_of(folder: Path) -> Path:
    """Return the folder to replace if a new folder shall take the place of `folder`: `folder` itself or, for a link,
    the folder that it leads to. Raises `AtlasError` if that folder cannot be replaced."""
    real = os.path.realpath(folder)
    if os.path.islink(real):
        raise AtlasError(f"{folder}: is a link that leads to itself: remove it, or choose another folder")
    if os.path.ismount(real):
        raise AtlasError(
            f"{folder}: is the root of a disk or volume, which Atlas cannot replace: choose a folder in it"
        )
    if Path.cwd().is_relative_to(real):
        raise AtlasError(
            f"{folder}: is the folder in which this command runs, or contains it, and Atlas would replace it: choose "
            "a folder in it, or run the command in another folder"
        )
    return Path(real) if folder.is_symlink() else folder


def write_folder(folder: Path, names: Sequence[str], write: Callable[[Path], None]) -> Path:
    """Create `folder` with the files `names`, and return `folder`. After an error, `folder` has none of the new files.

    `write` makes the files in a temporary folder. An existing folder that is empty, or holds only files with these
    names, among them the first one, is replaced, see `replace_folder`. Raises `AtlasError` if the folder holds other
    files or cannot be written.
    """
    folder = place_of(folder)

    def refuse_foreign(place: Path) -> None:
        found = {path.name: path.is_file() for path in place.iterdir()} if place.is_dir() else {}
        is_own = not found or (found.keys() <= set(names) and names[0] in found and all(found.values()))
        if os.path.lexists(place) and not (place.is_dir() and is_own):
            kept = (
                "" if place == folder else f"; another program wrote to it, and its files are kept in {place}"
            )
            raise AtlasError(f"{folder}: exists and is not an exported model{kept}; choose another --output")

    refuse_foreign(folder)
    temporary = unused_name(folder)
    try:
        with explain_failed_write(folder, "choose another place"):
            temporary.mkdir(parents=True)
            write(temporary)
            for name in names:
                with open(temporary / name, "rb+") as written:
                    flush_to_disk(written)
            flush_folder(temporary)
            refuse_foreign(folder)
    except BaseException:
        remove_leftover(temporary)
        raise
    with explain_failed_write(folder, "choose another place"):
        replace_folder(temporary, folder, check_old=refuse_foreign)
    return folder


def replace_folder(new: Path, folder: Path, *, check_old: Callable[[Path], None] = lambda old: None) -> None:
    """Rename the folder `new` to `folder`, and flush the rename to the disk. An existing `folder` is removed, unless
    `check_old`, which is called with the folder under its other name, raises an error.

    On Linux, the two folders are exchanged in one step, so that a kill leaves either the old `folder` or the new one.
    Elsewhere, a kill can leave both under other names, `new` and `.NAME.replaced-X`. Raises `OSError`.
    """
    if not folder.exists():
        new.rename(folder)
    elif not _exchange(new, folder):
        aside = folder.with_name(f".{folder.name}.replaced-{secrets.token_hex(4)}")
        try:
            folder.rename(aside)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            shutil.rmtree(folder)  # a folder in a lower layer of an overlay file system cannot be renamed
        try:
            new.rename(folder)
        except OSError:
            aside.rename(folder)
            raise
        if aside.exists():
            aside.rename(new)
    flush_folder(folder.parent)
    if new.exists():
        check_old(new)
        remove_leftover(new)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step. If the system or the file system cannot do this, change nothing
    and return False."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is None:
        return False
    done: int = renameat2(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _RENAME_EXCHANGE)
    return done == 0
