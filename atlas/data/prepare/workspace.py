"""A dataset folder that appears whole or not at all, and never in place of something else; the cache folder."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from atlas.data.shards import MANIFEST, is_prepared
from atlas.errors import DataError
from atlas.files import flush_folder, flush_to_disk, try_to_lock
from atlas.progress import say


class WorkerKilled(DataError):
    """A process that tokenizes was killed: the work so far is sound."""


_OWN_FILES = re.compile(r"dataset\.json|tokenizer\.json|(train|val)-\d{5,}(\.docs)?\.npy")


def refuse_foreign(output: Path) -> None:
    """Raises `DataError` unless `output` is free, empty, or an older dataset and nothing besides."""
    names = sorted(os.listdir(output)) if output.is_dir() else []
    foreign = [name for name in names if not _OWN_FILES.fullmatch(name)]
    if foreign:
        raise DataError(f"{output}: holds other files ({foreign[0]}); choose another folder with --output")
    if names and MANIFEST not in names:
        raise DataError(
            f"{output}: is not empty and no prepared dataset; choose another folder with --output"
        )
    for place in (output, *output.parents):
        if place.exists() and not place.is_dir():
            raise DataError(f"{place}: is a file; choose a folder with --output")


@contextmanager
def alone(output: Path) -> Iterator[None]:
    """Waits until no other process prepares `output`, and keeps others waiting until it is left.

    The lock dies with its process. Its file is removed, and so are the folders above `output` that were
    made for it, unless `output` is there in the end.
    """
    output = output.absolute()
    made = [folder for folder in output.parents if not folder.exists()]
    path = output.with_name(f".{output.name}.lock")
    lock, said = None, False
    try:
        while (lock := try_to_lock(path)) is None:
            if not said:
                say(f"{output}: another process prepares it; waiting for that to end")
                said = True
            time.sleep(0.1)
        yield
    finally:
        with suppress(OSError):
            if lock and os.name == "nt":  # where an open file cannot be removed
                lock.close()
            if lock:
                path.unlink()
                lock.close()
            for folder in made:
                folder.rmdir()


class Workspace:
    """Where a dataset is made: a folder beside its place, which a killed process leaves to the next one.

    `dataset` is what will take the place; `journal.json` says how far it is, and for which key.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.dataset = folder, folder / "dataset"
        self.key, self._journal = key, folder / "journal.json"
        self.state: dict[str, Any] | None = None
        """What `commit` was given last, by whichever process; None when there is nothing to go on with."""
        with suppress(OSError, ValueError):
            content = json.loads(self._journal.read_text(encoding="utf-8"))
            if content["key"] == key and self.dataset.is_dir():
                self.state = content["state"]
        if self.state is None:
            shutil.rmtree(folder, ignore_errors=True)
            self.dataset.mkdir(parents=True)

    @property
    def can_go_on(self) -> bool:
        """By what is on the disk: an interrupt may come in the middle of a commit."""
        return self._journal.exists()

    def commit(self, state: dict[str, Any]) -> None:
        """From here on the next process goes on. All that `state` tells of must be on the disk."""
        new = self._journal.with_suffix(".new")
        with new.open("w", encoding="utf-8", newline="\n") as file:
            json.dump({"key": self.key, "state": state}, file)
            flush_to_disk(file)
        os.replace(new, self._journal)
        flush_folder(self.folder)
        self.state = state


@contextmanager
def building(output: Path, key: str) -> Iterator[Workspace]:
    """A workspace whose dataset takes the place of `output` at the end.

    What is committed stays for the next call with the same `key` if this one is killed or interrupted, or runs
    out of disk or memory; any other failure leaves nothing. Only who is `alone` with `output` may call this.
    """
    output = output.absolute()
    clean_up(output)
    workspace = Workspace(output.with_name(f".{output.name}.preparing"), key)
    replaced = output.with_name(f".{output.name}.replaced-{secrets.token_hex(4)}")
    keep = False
    try:
        yield workspace
        _flush(workspace.dataset)
        refuse_foreign(output)
        if output.exists():
            output.rename(replaced)
        workspace.dataset.rename(output)
    except (KeyboardInterrupt, OSError, WorkerKilled):
        keep = workspace.can_go_on
        if keep:
            say(f"{output}: what is done so far is kept; the same command goes on with it")
        raise
    finally:
        if replaced.exists() and not output.exists():
            replaced.rename(output)
        if not keep:
            shutil.rmtree(workspace.folder, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def clean_up(output: Path) -> None:
    """Remove what a killed process left, except a workspace; put back what it had only just moved out of the way."""
    own_name = re.compile(rf"\.{re.escape(output.name)}\.(?:(preparing|replaced)-[0-9a-f]+|(stdin)-([0-9]+))")
    for folder in output.parent.iterdir():
        match = own_name.fullmatch(folder.name)
        if match and match[1] == "replaced" and is_prepared(folder) and not output.exists():
            folder.rename(output)
        elif match and match[2] == "stdin":
            if not psutil.pid_exists(int(match[3])):
                folder.unlink()
        elif match:
            shutil.rmtree(folder, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Bring every file to the disk, so that the folder's new name means all of it after a power cut too."""
    for path in folder.iterdir():
        with path.open("rb+") as file:
            flush_to_disk(file)
    flush_folder(folder)
