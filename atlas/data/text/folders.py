"""The files below a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from atlas.files import encodable

_LOGS_OF_A_RUN = {"metrics.jsonl", "training.log"}
_OF_A_RUN = re.compile(
    r"metrics(\.lost)?\.jsonl|training(\.rank-\d+)?\.log|config\.yaml|atlas\.lock|atlas_.*\.(pt|json)|previous-\d+|moving\.json"
)


def is_of_a_run(path: str) -> bool:
    """Return whether a file is one that a run wrote to its output folder."""
    folder = os.path.dirname(path)
    return _OF_A_RUN.fullmatch(os.path.basename(path)) is not None and all(
        os.path.exists(os.path.join(folder, log)) for log in _LOGS_OF_A_RUN
    )


def files_below(
    folder: str, unreadable: list[str], own: list[str], prefix: str = ""
) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield the files in a folder and its subfolders, each with its name relative to the folder. Hidden files and
    folders are left out, and links to folders are not followed. A subfolder that cannot be read is added to
    `unreadable`, and the output folder of a run to `own`. If `folder` itself is the output folder of a run, the run's
    files are left out. Calls to `pathlib` would take most of the time."""
    try:
        scan = os.scandir(folder)
    except PermissionError:
        if not prefix:
            raise
        unreadable.append(encodable(folder))
        return
    with scan as found:
        entries = [*found]
        is_of_a_run = {entry.name for entry in entries} >= _LOGS_OF_A_RUN
        if is_of_a_run:
            own.append(encodable(folder))
        if is_of_a_run and prefix:
            return
        for entry in entries:
            if entry.name.startswith(".") or (is_of_a_run and _OF_A_RUN.fullmatch(entry.name)):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from files_below(entry.path, unreadable, own, f"{prefix}{entry.name}/")
            # `is_file` raises an error for a link to itself, and `isfile` returns False.
            elif os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file():
                yield prefix + entry.name, entry
