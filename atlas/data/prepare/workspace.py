"""Make a dataset folder that appears complete or not at all, and that never replaces other files."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from atlas.data.shards import MANIFEST, is_prepared
from atlas.errors import DataError
from atlas.files import (
    explain_failed_write,
    flush_folder,
    flush_to_disk,
    read_limited,
    remove_leftover,
    replacing,
    try_to_lock,
)
from atlas.outputs import replace_folder
from atlas.process import is_running
from atlas.progress import notify

State = dict[str, Any]


class WorkerKilled(DataError):
    """A process that tokenizes was killed. The work so far is intact."""


_LARGEST_JOURNAL = 64 << 20  # bytes; enough for a hundred thousand shards
LEFT_OUT = "left_out.txt"
"""The file in a dataset's folder that names the rows and files which could not be read."""
_OWN_FILES = re.compile(r"dataset\.json|left_out\.txt|tokenizer\.json|(train|val)-\d{5,}(\.docs)?\.npy")


def refuse_foreign(output: Path) -> None:
    """Raise `DataError` unless `output` does not exist, is empty, or holds only an older dataset."""
    names = sorted(os.listdir(output)) if output.is_dir() else []
    foreign = [name for name in names if not _OWN_FILES.fullmatch(name)]
    if foreign:
        raise DataError(f"{output}: holds other files ({foreign[0]}); choose another folder with --output")
    if names and MANIFEST not in names:
        raise DataError(
            f"{output}: is not empty, and is not a prepared dataset; choose another folder with --output"
        )
    for place in (output, *output.parents):
        if place.exists() and not place.is_dir():
            raise DataError(f"{place}: is a file; choose a folder with --output")


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Wait until no other process prepares `output`. Within this context other processes wait.

    If this process is killed, the lock ends, too. At the end of this context, the lock file is removed. Folders that
    this context made above `output` are also removed, if they are empty.
    """
    output = output.absolute()
    made = [folder for folder in output.parents if not folder.exists()]
    path = output.with_name(f".{output.name}.lock")
    lock = None
    try:
        with explain_failed_write(
            output.parent,
            "choose an --output in a folder that you may write to",
            problem="the dataset cannot be made in this folder",
            kind=DataError,
        ):
            lock = try_to_lock(path)
        if lock is None:
            notify(f"{output}: another process prepares this dataset; waiting until that process is done")
        while lock is None:
            time.sleep(0.1)
            lock = try_to_lock(path)
        yield
    finally:
        with suppress(OSError):
            if lock and os.name == "nt":  # Windows cannot remove an open file
                lock.close()
            if lock:
                path.unlink()
                lock.close()
            for folder in made:
                folder.rmdir()


class Workspace:
    """The folder in which a dataset is made, beside the dataset's final place. If a process is killed, the next process
    takes the folder over.

    `dataset` will be moved to the final place. `journal.json` holds the key of the settings and states of the work.
    """

    def __init__(
        self, folder: Path, key: str, is_usable: Callable[[State], bool] = lambda state: True
    ) -> None:
        """Resume from the last committed state that `is_usable`. Without such a state, the folder is emptied."""
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise DataError(f"{folder}: is not a folder that atlas prepare has made; remove it")
        self.folder, self.dataset = folder, folder / "dataset"
        self.key, self.journal = key, folder / "journal.json"
        states: list[State] = []
        with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
            content = json.loads(read_limited(self.journal, limit=_LARGEST_JOURNAL))
            if content["key"] == key and self.dataset.is_dir():
                states = content["states"]
        committed = len(states)
        while states and not is_usable(states[-1]):
            states.pop()
        self.states = states
        """The states that were committed last, oldest first; empty if there is nothing to resume."""
        if 0 < len(states) < committed:
            self.commit(*states)  # before the work after these states is overwritten
        if not states:
            self.journal.unlink(missing_ok=True)  # first, so that no journal describes files that are gone
            shutil.rmtree(folder, ignore_errors=True)
            self.dataset.mkdir(parents=True)

    @property
    def state(self) -> State:
        """The state from which this process resumes, or an empty one."""
        return self.states[-1] if self.states else {}

    def commit(self, *states: State) -> None:
        """Save the states, oldest first, from one of which the next process can resume. All data that they describe
        must be on the disk."""
        with replacing(self.journal) as new:
            new.write_text(json.dumps({"key": self.key, "states": states}), encoding="utf-8", newline="\n")
        self.states = [*states]


@contextmanager
def building(
    output: Path, work: Path, key: str, is_usable: Callable[[State], bool] = lambda state: True
) -> Iterator[Workspace]:
    """Yield a workspace whose dataset replaces `output` at the end. The caller must have `locked` the `work`, beside
    which the workspace lies.

    After a kill, an interrupt or an error, the committed work stays for the next call with the same `key`. That call
    resumes from the last state that `is_usable`.
    """
    shown, output = output, output.absolute()
    clean_up(output)
    workspace = Workspace(work.absolute().with_name(f".{work.name}.preparing"), key, is_usable)
    replaced = output.with_name(f".{output.name}.replaced-{secrets.token_hex(4)}")
    keep = False
    try:
        yield workspace
        for file in workspace.dataset.iterdir():  # so the dataset is complete even after a power cut
            with file.open("rb+") as opened:
                flush_to_disk(opened)
        flush_folder(workspace.dataset)
        refuse_foreign(output)
        workspace.dataset.rename(replaced)  # so that the journal never describes the old dataset
        replace_folder(replaced, output)
    except BaseException:
        keep = workspace.journal.exists() and workspace.dataset.exists()  # an interrupt may come in a commit
        if keep:
            tokens = workspace.state.get("tokens")
            size = f" ({tokens:,} tokens)" if tokens else ""
            notify(f"{shown}: the work so far{size} is kept; the same command resumes it")
        raise
    finally:
        if not keep:
            shutil.rmtree(workspace.folder, ignore_errors=True)


def remove_leftovers(output: Path, work: Path) -> None:
    """Remove what a preparation left if it was killed after the dataset was complete in `output`. Unfinished work
    stays, and so does everything while another process prepares the dataset."""
    output, work = output.absolute(), work.absolute()
    workspace, lock = (work.with_name(f".{work.name}.{kind}") for kind in ("preparing", "lock"))
    beginnings = (f".{output.name}.replaced-", f".{output.name}.stdin-")
    has_leftovers = any(path.name.startswith(beginnings) for path in output.parent.iterdir())
    if not (has_leftovers or lock.exists() or workspace.exists()):
        return
    with suppress(OSError):
        if file := try_to_lock(lock):
            clean_up(output)
            if not (workspace / "dataset").exists():
                remove_leftover(workspace)
            if os.name == "nt":  # Windows cannot remove an open file
                file.close()
            lock.unlink()
            file.close()


def clean_up(output: Path) -> None:
    """Remove the files that a killed process left, except the workspace. If the process was killed between two renames
    of a complete dataset, rename this dataset to `output`."""
    own_name = re.compile(rf"\.{re.escape(output.name)}\.(?:(preparing|replaced)-[0-9a-f]+|(stdin)-([0-9]+))")
    for folder in output.parent.iterdir():
        match = own_name.fullmatch(folder.name)
        if match and match[1] == "replaced" and is_prepared(folder) and not output.exists():
            folder.rename(output)
        elif match and not (match[2] and is_running(int(match[3]))):
            remove_leftover(folder)
