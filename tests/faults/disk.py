"""A full disk at every point of a save: training continues or ends with one line, and nothing that was saved is lost.

There are two ways. Injected: `open`, `write`, `os.fsync` and `os.replace` are watched, and the selected call raises
`ENOSPC`; in most variants every later write until the next save does, too. Real (`--tmpfs`): a small tmpfs in its own
mount namespace is filled in the middle of a save until N bytes are left. It reports its free space correctly, so that
Atlas does not begin the saves after it; or it claims to have space, as a disk with a quota does, so that every save
fails at its end. When there is space again, the same command must finish the run with the same bits as a run that never
met a full disk, and no partial file may be left.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import errno
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from atlas.cli import main as atlas
from tests.faults.runs import Broken, Run, command, hard_run, shown, sound_checkpoints
from tests.runs import REPOSITORY, assert_same_run, config_flags

STEPS, SAVE_INTERVAL = 8, 2
TMPFS_BYTES = 48 << 20
_BEGIN = "open atlas_writing.tmp"
"""What a save does first."""

Point = tuple[str, int]
"""An operation, such as `write atlas_writing.tmp`, and which one of its kind in a save."""


# Watching what takes space


class _WatchedFile:
    """A file that calls a function before each write."""

    def __init__(self, file: Any, name: str, before: Callable[[str], None]) -> None:
        self._file, self._name, self._before = file, name, before

    def write(self, data: Any) -> int:
        self._before(f"write {self._name}")
        return int(self._file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _WatchedFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


@contextlib.contextmanager
def watched(folder: Path, before: Callable[[str], None]) -> Iterator[None]:
    """Call `before` ahead of every opening for writing, write, flush and rename in `folder`; what it raises is
    what the operation answers."""
    true_open, true_fsync, true_replace = builtins.open, os.fsync, os.replace
    names: dict[int, str] = {}

    def label(path: Any) -> str | None:
        if not isinstance(path, (str, os.PathLike)) or Path(path).parent != folder:
            return None
        return re.sub(r"\d+", "N", Path(path).name)

    def watched_open(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        name = label(path)
        if name is None or not set(mode) & set("wax+") or name == "atlas.lock":
            return true_open(path, mode, *args, **kwargs)
        before(f"open {name}")
        file = true_open(path, mode, *args, **kwargs)
        names[file.fileno()] = name
        return _WatchedFile(file, name, before)

    def watched_fsync(descriptor: int) -> None:
        before(f"flush {names.pop(descriptor, 'the folder')}")
        true_fsync(descriptor)

    def watched_replace(source: Any, target: Any) -> None:
        if name := label(target):
            before(f"rename to {name}")
        true_replace(source, target)

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (builtins, "open", watched_open),
            (io, "open", watched_open),
            (os, "fsync", watched_fsync),
            (os, "replace", watched_replace),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


@dataclass
class Strike:
    """The disk is full at `point` of the `save`-th save; if it `lasts`, until the next one begins."""

    point: Point | None
    save: int = 2
    lasts: bool = False
    seen: Counter[str] = field(default_factory=Counter)
    struck: bool = False
    _saves: int = 0

    def __call__(self, operation: str) -> None:
        self._saves += operation == _BEGIN
        if self._saves != self.save:
            return
        self.seen[operation] += 1
        now = (operation, self.seen[operation]) == self.point
        self.struck = self.struck or now
        if now or (self.struck and self.lasts and operation.startswith(("write", "open"))):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# A full disk


@dataclass
class Tally:
    """Counts of the full disks and their results."""

    points: Counter[str] = field(default_factory=Counter)
    went_on: int = 0
    ended_with_a_line: int = 0


def make_run(folder: Path, *, output: Path | None = None, **changed: object) -> Run:
    settings = {
        "training__max_steps": STEPS,
        "training__eval_interval": SAVE_INTERVAL,
        "checkpoint__save_interval": SAVE_INTERVAL,
        "checkpoint__background": False,
        "checkpoint__output_dir": str(output or folder / "run"),
        "data__num_workers": 0,
    }
    return hard_run(folder, words=150, **settings | changed)


def train(run: Run, *, in_background: bool = False) -> tuple[int, str]:
    """Exit code of the command line, called in this process, and what it said. An exception from it is a bug."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        setting = f"checkpoint.background={in_background}"
        code = atlas(["train", *config_flags(run.folder / "run.yaml"), "--set", setting])
    return code, said.getvalue()


def fill_at_each_point(folder: Path, *, variants: int = 4, once_each: bool = False) -> list[str]:
    """Answer ENOSPC at each point of a save in turn; what was counted. `variants` of the four ways are tried,
    and with `once_each` one operation of each kind instead of its first, middle and last."""
    os.environ["ATLAS_CACHE_DIR"] = str(folder / "cache")
    run = make_run(folder)
    strike = Strike(None)
    with watched(run.output, strike):
        _expect_an_end(*train(run), codes=(0,))
    whole = folder / "whole"
    run.output.rename(whole)
    ways = [
        {"lasts": True},
        {"lasts": True, "in_background": True},
        {"lasts": True, "save": STEPS // SAVE_INTERVAL},
        {"lasts": False},
    ]
    cases = [(point, way) for way in ways[:variants] for point in points_of(strike.seen, once_each=once_each)]
    tally = Tally()
    for number in shown(len(cases), "disk"):
        point, way = cases[number]
        try:
            _strike_once(run, whole, point, tally, **way)
        except Exception as error:
            raise Broken(
                f"full at {point[0]} ({point[1]}), {way}: {type(error).__name__}: {error}"
            ) from error
    return [
        f"disk: full at {len(tally.points)} operations of a save, {sum(tally.points.values())} times (injected): "
        + ", ".join(tally.points),
        *_verdict(tally),
    ]


def points_of(seen: Counter[str], *, once_each: bool) -> list[Point]:
    """The first, middle and last of the operations of each kind, or only the middle one."""
    middle = {name: (count + 1) // 2 for name, count in seen.items()}
    at = {name: {middle[name]} if once_each else {1, middle[name], count} for name, count in seen.items()}
    return [(name, number) for name in seen for number in sorted(at[name])]


def _strike_once(
    run: Run,
    whole: Path,
    point: Point,
    tally: Tally,
    *,
    in_background: bool = False,
    **way: Any,
) -> None:
    shutil.rmtree(run.output, ignore_errors=True)
    strike = Strike(point, **way)
    with watched(run.output, strike):
        _count(tally, _expect_an_end(*train(run, in_background=in_background), codes=(0, 2)))
    if strike.struck:
        tally.points[point[0]] += 1
    elif (
        strike.save == 2 and not in_background
    ):  # the last save is another one, and what is dropped has no points
        raise Broken("the operation never came")
    _finish_and_compare(run, whole)


def _expect_an_end(code: int, said: str, *, codes: tuple[int, ...]) -> int:
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    if code not in codes or len(errors) != (code == 2) or "Traceback" in said:
        raise Broken(f"exit code {code}: {' / '.join(said.splitlines()[-2:])}")
    return code


def _count(tally: Tally, code: int) -> None:
    tally.went_on += code == 0
    tally.ended_with_a_line += code == 2


def _finish_and_compare(run: Run, whole: Path) -> None:
    """With space again: checkpoints with a sidecar are there, the same command finishes, and no partial file is
    left."""
    sound_checkpoints(run.output)
    _expect_an_end(*train(run), codes=(0,))
    if left := sorted(path.name for path in run.output.glob("*.tmp")):
        raise Broken(f"half files are left: {', '.join(left)}")
    assert_same_run(whole, run.output, steps=STEPS)


def _verdict(tally: Tally) -> list[str]:
    return [
        f"  trained to the end: {tally.went_on}; ended with one line: {tally.ended_with_a_line}; tracebacks: 0",
        "  with room again: finished bit for bit as the run that never met a full disk; half files left: 0",
    ]


# A real one


def no_tmpfs_because() -> str | None:
    """Why this machine does not allow a private tmpfs; None if it does."""
    if shutil.which("unshare") is None:
        return "no unshare on this system"
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", folder],
            capture_output=True,
            text=True,
            check=False,
        )
    return None if done.returncode == 0 else f"no tmpfs in a namespace of one's own: {done.stderr.strip()}"


def fill_a_tmpfs(folder: Path) -> list[str]:
    """Do `fill_inside` in a mount namespace with a small tmpfs. Return the counts as lines."""
    mount = folder / "small"
    mount.mkdir()
    script = (
        f'mount -t tmpfs -o size={TMPFS_BYTES} tmpfs "$0" && exec "$1" -m tests.faults.disk --inside "$0"'
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, str(mount), sys.executable],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise Broken(done.stdout.strip() or f"exit code {done.returncode}")
    return done.stdout.splitlines()


def fill_inside(folder: Path, disk: Path) -> list[str]:
    """Fill the file system at `disk` in the middle of a save, until a few bytes are left."""
    os.environ["ATLAS_CACHE_DIR"] = str(folder / "cache")
    run = make_run(folder, output=disk / "run")
    _expect_an_end(*train(run), codes=(0,))
    whole = folder / "whole"
    shutil.move(disk / "run", whole)
    size = (whole / "atlas_best.pt").stat().st_size
    page = os.sysconf("SC_PAGE_SIZE")
    shares = [
        0,
        size // 4,
        size // 2,
        size - page,
        size,
        size + page,
        3 * size // 2,
        2 * size - page,
        2 * size,
    ]
    leave = [*shares, *(2 * size + count * page for count in (1, 2, 3, 4, 6))]
    cases = [(left, claims) for claims in (False, True) for left in leave]
    tally = Tally()
    for number in shown(len(cases), "tmpfs"):
        left, claims_room = cases[number]
        try:
            _fill_once(run, whole, disk, left=left, claims_room=claims_room, tally=tally)
        except Exception as error:
            raise Broken(
                f"{left} bytes left, claims room: {claims_room}: {type(error).__name__}: {error}"
            ) from error
    return [
        f"disk: {len(cases)} times a tmpfs full in the middle of a save, 0 to {leave[-1]:,} bytes short of it "
        f"(a save of two names takes {2 * size:,})",
        *_verdict(tally),
    ]


def _fill_once(run: Run, whole: Path, disk: Path, *, left: int, claims_room: bool, tally: Tally) -> None:
    output, ballast = run.output, disk / "ballast"
    shutil.rmtree(output, ignore_errors=True)
    begun = 0

    def fill(operation: str) -> None:
        nonlocal begun
        begun += operation == _BEGIN
        if operation == _BEGIN and begun == 3 and claims_room:
            ballast.unlink()  # and training continues
        if operation == _BEGIN and begun == 2:
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            with open(ballast, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, free - left))

    roomy = shutil.disk_usage(disk)._replace(free=1 << 40)
    with contextlib.ExitStack() as stack:
        if claims_room:
            stack.enter_context(mock.patch.object(shutil, "disk_usage", return_value=roomy))
        stack.enter_context(watched(output, fill))
        _count(tally, _expect_an_end(*train(run), codes=(0, 2)))
    before = sound_checkpoints(output)
    if max(before.values(), default=0) < SAVE_INTERVAL:
        raise Broken("the checkpoint from before the disk was full is gone")
    ballast.unlink(missing_ok=True)
    _finish_and_compare(run, whole)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.disk")
    parser.add_argument("--tmpfs", action="store_true", help="also fill a true, small file system")
    parser.add_argument("--inside", type=Path, help="fill the file system at this folder, and nothing else")
    asked = parser.parse_args()
    if asked.inside:
        return command("disk", lambda folder: fill_inside(folder, asked.inside))
    code = command("disk", fill_at_each_point)
    if asked.tmpfs and (reason := no_tmpfs_because()):
        print(f"disk: tmpfs left out: {reason}")
    elif asked.tmpfs:
        code = max(code, command("disk", fill_a_tmpfs))
    return code


if __name__ == "__main__":
    sys.exit(main())
