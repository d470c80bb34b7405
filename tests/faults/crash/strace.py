"""Forked processes under strace: their changes to the disk are recorded, or one of them is answered with SIGKILL.

The parent has imported everything, so that a process starts in 20 ms. It stops before its first call, until strace is
attached.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

Action = Callable[[], int]
"""What a process does. The result is its exit code."""

CHANGES = (
    "openat,creat,write,pwrite64,writev,pwritev,ftruncate,truncate,fallocate,rename,renameat,renameat2,unlink,unlinkat,"
    "rmdir,mkdir,mkdirat,link,linkat,symlink,symlinkat,fsync,fdatasync,sendfile,copy_file_range"
)
"""The calls that change what is on a disk."""
_POSITIONS = ("lseek", "read")
_LINE = re.compile(r"(\d+) +(\w+)\((.*)\) += (\?|-?\w+)")
_UNFINISHED = re.compile(r"(\d+) +(\w+)\((.*?),? *<unfinished \.\.\.>$")
_RESUMED = re.compile(r"(\d+) +<\.\.\. (\w+) resumed>(.*)")
_ARGUMENT = re.compile(r'"((?:\\x\w\w)*)"|(AT_FDCWD|\d+)<((?:\\x\w\w)*)>|([^,\s"][^,]*)')


@dataclass(frozen=True)
class Call:
    """A system call: its name, the which-th of its name in its thread, its paths, its other arguments. Paths in the
    folder of the process are relative."""

    name: str
    number: int
    paths: tuple[str, ...]
    words: tuple[str, ...]
    data: bytes
    result: int | None
    """None for the call at which the process was killed."""
    in_main_thread: bool = True

    def __str__(self) -> str:
        return f"{self.name} {' → '.join(self.paths)}"

    @property
    def descriptor(self) -> int:
        return int(self.words[0], 0)

    @property
    def has_path(self) -> bool:
        """Whether strace finds this call by its path, not relative to an open folder and without chance in it."""
        at_folder = self.words[:1] != ("AT_FDCWD",) and self.name.endswith("at")
        return not at_folder and "replaced-" not in self.paths[0]

    def changes_the_disk(self) -> bool:
        """Whether this call changed something in the folder of the process, or flushed it."""
        if self.name not in CHANGES.split(",") or self.result == -1 or not self.paths:
            return False
        if self.name == "openat" and "O_CREAT" not in self.words[1] and "O_TRUNC" not in self.words[1]:
            return False
        return not any(os.path.isabs(path) for path in self.paths)


@functools.cache
def no_strace_because() -> str | None:
    """Why processes cannot be traced here; None if they can."""
    if shutil.which("strace") is None:
        return "no strace on this system"
    try:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place, "empty")
            folder.mkdir()
            status, _ = trace(lambda: 0, folder, [])
    except RuntimeError as error:
        return str(error)
    return None if status == 0 else f"strace does not work here (status {status})"


def record(action: Action, folder: Path) -> tuple[int, list[Call]]:
    """Let a process do `action` in `folder`. Return its status and its calls of CHANGES, lseek and read, in order."""
    names = ",".join("?" + name for name in (*CHANGES.split(","), *_POSITIONS))
    status, lines = trace(action, folder, ["-s", str(1 << 26), "-e", f"trace={names}", "-e", "raw=read"])
    return status, parse(lines, str(folder.resolve()))


def kill_at(action: Action, folder: Path, name: str, number: int, path: str = "") -> tuple[int, Call | None]:
    """Let a process do `action` in `folder`, and kill it as it enters the `number`-th call of this name, which does
    not happen. With `path`, only calls with this path count. Return the status and this call."""
    inject = f"inject={name}:signal=SIGKILL:when={number}"
    filters = ["-P", path, "-P", str(folder / path)] if path else []
    status, lines = trace(action, folder, ["-s", "0", "-e", f"trace={name}", "-e", inject, *filters])
    calls = parse(lines, str(folder.resolve()))
    return status, calls[-1] if calls else None


def trace(action: Action, folder: Path, options: Sequence[str]) -> tuple[int, list[str]]:
    """Let a process do `action` in `folder` under strace. Return its status and the lines of strace."""
    log = folder.with_name(folder.name + ".strace")
    pid = stopped(action, folder)
    command = ["strace", "-f", "-qq", "-y", "-xx", "-o", str(log), *options, "-p", str(pid)]
    tracer = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while not log.exists() or log.stat().st_size == 0:  # strace notes the stop as soon as it is attached
            if tracer.poll() is not None:
                os.kill(pid, signal.SIGKILL)
                raise RuntimeError(f"strace ended with exit code {tracer.returncode}")
            time.sleep(0.0005)
        os.kill(pid, signal.SIGCONT)
    finally:
        status = os.waitpid(pid, 0)[1]
        tracer.wait()
    lines = log.read_text(encoding="ascii").splitlines()
    log.unlink()
    return os.waitstatus_to_exitcode(status), lines


def stopped(action: Action, folder: Path) -> int:
    """Fork a process that will do `action` in `folder` as soon as it gets SIGCONT. Return its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.chdir(folder)
            os.kill(os.getpid(), signal.SIGSTOP)
            code = action()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.waitpid(pid, os.WUNTRACED)
    return pid


def parse(lines: Sequence[str], folder: str) -> list[Call]:
    """The calls in the lines of strace, in the order in which they ended."""
    begun: dict[str, str] = {}
    counts: Counter[tuple[str, str]] = Counter()
    numbers: dict[str, int] = {}
    calls = []
    main = lines[0].split()[0] + " " if lines else ""
    for line in lines:
        if unfinished := _UNFINISHED.match(line):
            thread, name, arguments = unfinished.groups()
            counts[thread, name] += 1
            begun[thread], numbers[thread] = f"{name}({arguments}", counts[thread, name]
            continue
        if resumed := _RESUMED.match(line):
            thread, name, rest = resumed.groups()
            line, number = f"{thread} {begun.pop(thread)}{rest}", numbers[thread]
            if not (match := _LINE.match(line)):
                continue
        elif match := _LINE.match(line):
            counts[match[1], match[2]] += 1
            number = counts[match[1], match[2]]
        else:
            continue
        call = _call(match[2], number, match[3], match[4], folder)
        calls.append(replace(call, in_main_thread=line.startswith(main)))
    for thread, text in begun.items():  # the process ended in these calls
        name, _, arguments = text.partition("(")
        calls.append(_call(name, numbers[thread], arguments, "?", folder))
    return calls


def _call(name: str, number: int, arguments: str, result: str, folder: str) -> Call:
    base, paths, words, data = folder, [], [], b""
    for text, descriptor, place, word in _ARGUMENT.findall(arguments):
        if word:
            words.append(word.strip())
        elif place or descriptor:
            words.append(descriptor)
            at = os.fsdecode(_bytes(place))
            if "at" in name[-3:] and not name.startswith("f"):  # the folder of the next path
                base = at
            else:
                paths.append(at)
        elif name.startswith(("write", "pwrite")):
            data = _bytes(text)
        else:
            paths.append(os.path.join(base, os.fsdecode(_bytes(text))))
    value = None if result == "?" else int(result, 0)
    places = map(os.path.normpath, paths)
    inside = ["." if place == folder else place.removeprefix(folder + "/") for place in places]
    return Call(name, number, tuple(inside), tuple(words), data, value)


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))
