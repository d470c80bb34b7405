"""Move the files of an earlier run to a folder `previous-N`, all or none of them.

A journal lists the files before the first of them moves. If a kill interrupts the move, the next run in the output
folder completes it. Otherwise a checkpoint could be separated from its sidecar, and a new run could overwrite it.
"""

from __future__ import annotations

import errno
import filecmp
import itertools
import os
import shutil
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from atlas.errors import CheckpointError, first_line
from atlas.files import (
    explain_failed_write,
    flush_folder,
    flush_to_disk,
    read_limited,
    remove_leftover,
    replacing,
)
from atlas.training.checkpoint.manifest import BASE_FILE, FileName
from atlas.training.checkpoint.retention import files_of
from atlas.training.checkpoint.validate import is_base

JOURNAL = "moving.json"
_LARGEST_JOURNAL = 16 << 20  # bytes


class _Journal(BaseModel):
    model_config = ConfigDict(extra="forbid")
    to: str = Field(pattern=r"^previous-[0-9]{1,9}$")
    files: list[FileName]


def move_aside(folder: Path, files: Collection[Path]) -> Path:
    """Move `files` to a new folder `previous-N` in `folder`. The sidecars of checkpoints move too. Return the path of
    the new folder. Raises `CheckpointError` if the disk is full; then nothing has moved."""
    numbered = (folder / f"previous-{number}" for number in itertools.count(1))
    target = next(path for path in numbered if not os.path.lexists(path))
    moved = dict.fromkeys(
        file.name for path in files for file in files_of(path, among=files) if file.exists()
    )
    with explain_failed_write(
        target, "free some space", problem="no file was moved there", kind=CheckpointError
    ):
        with replacing(folder / JOURNAL) as temporary:
            temporary.write_text(
                _Journal(to=target.name, files=list(moved)).model_dump_json(), encoding="utf-8"
            )
    complete_move(folder, may_move=lambda name: True)
    return target


def complete_move(folder: Path, *, may_move: Callable[[str], bool]) -> Path | None:
    """Complete the move in the journal of `folder`, if there is one. Return the folder to which the files have moved.
    Only the run that holds the folder's lock may call this function. Raises `CheckpointError`, also if a name in the
    journal is not one that `may_move`: the folder may be a stranger's, and the file the user's own."""
    path = folder / JOURNAL
    with suppress(OSError):
        path.with_name(f"{JOURNAL}.tmp").unlink()  # a killed move left it; no file has moved yet
    if not os.path.lexists(path):
        return None
    try:
        journal = _Journal.model_validate_json(read_limited(path, limit=_LARGEST_JOURNAL))
        if foreign := [name for name in journal.files if not may_move(name)]:
            raise OSError(f"no run writes {foreign[0]}")
    except (OSError, ValidationError) as error:
        raise CheckpointError(
            f"{path}: is not the list of files that a move has left ({first_line(error)}): remove this file, or choose "
            "another --output-dir"
        ) from None
    target = folder / journal.to
    remedy = f"free some space, or move these files yourself: {', '.join(journal.files):.200}"
    with explain_failed_write(target, remedy, problem="files cannot be moved there", kind=CheckpointError):
        target.mkdir(exist_ok=True)
        if target.is_symlink():
            raise OSError("is a link")
        _bring_base(folder, target, journal.files)
        for name in journal.files:
            if os.path.lexists(folder / name):
                if os.path.lexists(target / name) and not _is_copy(target / name, folder / name):
                    raise FileExistsError(f"{name} is already there")
                _move(folder / name, target / name)
        flush_folder(target)
        flush_folder(folder)
        path.unlink()
        flush_folder(folder)
    return target


def _bring_base(folder: Path, target: Path, names: Collection[str]) -> None:
    """Give checkpoints of a LoRA run their base, which stays in `folder` for the run's other checkpoints. No program
    changes this file in place, so a hard link is enough."""
    base, copy = folder / BASE_FILE, target / BASE_FILE
    if BASE_FILE in names or os.path.lexists(copy) or not any(name.endswith(".pt") for name in names):
        return
    if not is_base(base):
        return
    try:
        os.link(base, copy)
    except OSError:  # the file system has no hard links
        with replacing(copy) as temporary:
            shutil.copyfile(base, temporary)


def _is_copy(copy: Path, source: Path) -> bool:
    """Return whether `copy` is a folder that has all files of the folder `source`, with the same bytes."""
    files = [path for path in source.rglob("*") if path.is_symlink() or not path.is_dir()]
    copies = [copy / path.relative_to(source) for path in files]
    return (
        all(path.is_dir() and not path.is_symlink() for path in (copy, source))
        and all(path.is_file() and not path.is_symlink() for path in (*files, *copies))
        and all(map(partial(filecmp.cmp, shallow=False), files, copies))
    )


def _move(source: Path, target: Path) -> None:
    """Rename a file or a folder. A folder from a lower layer of an overlay file system, as in a container, cannot be
    renamed, so copy it, then remove it. If a kill interrupts the removal, the next call completes it."""
    try:
        if not target.exists():
            os.rename(source, target)
            return
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        copy = target.with_name(f"{target.name}.tmp")
        remove_leftover(copy)
        shutil.copytree(source, copy)
        for path in copy.rglob("*"):
            if path.is_file():
                with open(path, "rb+") as file:
                    flush_to_disk(file)
        os.rename(copy, target)
        flush_folder(target.parent)
    shutil.rmtree(source)
