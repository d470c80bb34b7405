"""The files below a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from atlas.files import encodable

_LOGS_OF_A_RUN = {"metrics.jsonl", "training.log"}
_OF_A_RUN = re.compile(
    r"metrics(\.lost)?\.jsonl|training(\.rank-\d+)?\.log|config\.yaml|atlas\.lock|atlas_.*\.(pt|json)|previous-\d+|moving\.json"
)
_OF_A_DATASET = {"dataset.json", "train-00000.npy"}


@dataclass
class Skipped:
    """What Atlas passes over in a folder, by name."""

    unreadable: list[str] = field(default_factory=list)
    """Subfolders that cannot be read, such as the `lost+found` of a disk."""
    own: list[str] = field(default_factory=list)
    """Output folders of runs, and datasets. Atlas does not read its own logs as text."""
    links: list[str] = field(default_factory=list)
    """Links to folders, and links that point outside the folder. Atlas does not follow such links, because the folder
    may be untrusted and the files outside may be private."""


def is_hidden(name: str) -> bool:
    """Return whether a name is that of a hidden file or folder, or of a folder that programs fill unasked."""
    return name.startswith(".") or name in ("__pycache__", "__MACOSX")


def is_of_a_run(path: str) -> bool:
    """Return whether a file is one that a run wrote to its output folder."""
    folder = os.path.dirname(path)
    return _OF_A_RUN.fullmatch(os.path.basename(path)) is not None and all(
        os.path.exists(os.path.join(folder, log)) for log in _LOGS_OF_A_RUN
    )


def files_below(folder: str, skipped: Skipped, prefix: str = "") -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield the files in a folder and its subfolders, each with its name relative to the folder. Hidden files and
    folders are left out; what else is passed over is added to `skipped`. If `folder` itself is the output folder of a
    run, the run's files are left out. Calls to `pathlib` would take most of the time."""
    try:
        scan = os.scandir(folder)
    except PermissionError:
        if not prefix:
            raise
        skipped.unreadable.append(encodable(folder))
        return
    with scan as found:
        entries = [*found]
        names = {entry.name for entry in entries}
        is_of_a_run = names >= _LOGS_OF_A_RUN
        if is_of_a_run or (prefix and names >= _OF_A_DATASET):
            skipped.own.append(encodable(folder))
            if prefix:
                return
        for entry in entries:
            if is_hidden(entry.name) or (is_of_a_run and _OF_A_RUN.fullmatch(entry.name)):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from files_below(entry.path, skipped, f"{prefix}{entry.name}/")
            elif entry.is_symlink():
                if os.path.isdir(entry.path):
                    skipped.links.append(encodable(entry.path))
                elif os.path.isfile(entry.path):  # False for a link to itself
                    yield prefix + entry.name, entry
            elif entry.is_file():
                yield prefix + entry.name, entry
