"""The files below a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator

from atlas.files import encodable

_LOGS_OF_A_RUN = {"metrics.jsonl", "training.log"}


def files_below(
    folder: str, unreadable: list[str], own: list[str], prefix: str = ""
) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield the files in a folder and its subfolders, each with its name relative to the folder. Hidden files and
    folders are left out, and links to folders are not followed. A subfolder that cannot be read is added to
    `unreadable`, and the output folder of a run to `own`. Calls to `pathlib` would take most of the time."""
    try:
        scan = os.scandir(folder)
    except PermissionError:
        if not prefix:
            raise
        unreadable.append(encodable(folder))
        return
    with scan as found:
        entries = [*found]
        if prefix and {entry.name for entry in entries} >= _LOGS_OF_A_RUN:
            own.append(encodable(folder))
            return
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from files_below(entry.path, unreadable, own, f"{prefix}{entry.name}/")
            # `is_file` raises an error for a link to itself, and `isfile` returns False.
            elif os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file():
                yield prefix + entry.name, entry
