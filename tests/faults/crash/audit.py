"""What `strace.py` does, without strace: an audit hook of Python notes the changes of names, and kills before one.

The hook sees each opening for writing, rename, removal, new folder and truncation by Python, but no write and no flush.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.faults.crash.strace import Action, Call, stopped

_NAMES = {
    "open": "openat",
    "os.rename": "rename",
    "os.remove": "unlink",
    "os.mkdir": "mkdir",
    "os.rmdir": "rmdir",
    "os.truncate": "truncate",
    "os.link": "link",
    "os.symlink": "symlink",
}
"""Event of the hook → a system call that does the same."""


def record(action: Action, folder: Path) -> tuple[int, list[Call]]:
    """Let a process do `action` in `folder`. Return its status and its changes, numbered from 1."""
    return _run(action, folder, killed_at=None)


def kill_at(action: Action, folder: Path, number: int) -> tuple[int, Call | None]:
    """Let a process do `action` in `folder`, and kill it before its change of this number. Return its status and this
    change."""
    status, calls = _run(action, folder, killed_at=number)
    return status, calls[-1] if calls else None


def _run(action: Action, folder: Path, *, killed_at: int | None) -> tuple[int, list[Call]]:
    log = folder.with_name(folder.name + ".audit")
    log.touch()

    def hooked() -> int:
        notes = os.open(log, os.O_WRONLY | os.O_APPEND)
        left = killed_at or 0

        def hook(event: str, arguments: Sequence[object]) -> None:
            nonlocal left
            if (paths := _changed(event, arguments, folder)) is None:
                return
            os.write(notes, "\t".join([_NAMES[event], *paths]).encode() + b"\n")
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        return action()

    pid = stopped(hooked, folder)
    os.kill(pid, signal.SIGCONT)
    status = os.waitpid(pid, 0)[1]
    lines = log.read_text(encoding="utf-8").splitlines()
    log.unlink()
    calls = []
    for number, line in enumerate(lines, 1):
        name, *paths = line.split("\t")
        calls.append(Call(name, number, tuple(paths), ("", "O_CREAT"), b"", 0))
    return os.waitstatus_to_exitcode(status), calls


def _changed(event: str, arguments: Sequence[object], folder: Path) -> list[str] | None:
    """The paths that an event changes, relative to `folder`; None if the event changes nothing there."""
    if event not in _NAMES:
        return None
    count = 2 if event in ("os.rename", "os.link", "os.symlink") else 1
    if not all(isinstance(path, (str, bytes, os.PathLike)) for path in arguments[:count]):
        return None
    if event == "open" and not int(arguments[2]) & (os.O_CREAT | os.O_TRUNC):  # type: ignore[call-overload]
        return None
    paths = [os.path.relpath(os.fsdecode(path), folder) for path in arguments[:count]]  # type: ignore[arg-type]
    return None if any(path.startswith("..") for path in paths) else paths
