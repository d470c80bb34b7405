"""SIGKILL at every system call that changes the disk, one after the other, for every command that renames or removes.

A process that has imported everything forks one child per call. strace answers the call with SIGKILL, so that it does
not happen. Without strace, an audit hook of Python kills the child, which leaves out writes and flushes. After each
kill, what was there before must still be there. The same command, started again, must end as if nothing had happened.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.faults.crash import audit, strace
from tests.faults.crash.children import check_each, run_in
from tests.faults.crash.judge import Judge, stage
from tests.faults.crash.scenes import SCENES, Scene
from tests.faults.crash.strace import Call
from tests.faults.runs import Broken, command

_SHIFTS = (0, 0, 1, -1, 2, -2, 3, -3)
"""The number of a call varies a little, since a process may open more or fewer files before. These are tried."""


@dataclass(frozen=True)
class Point:
    """A call at which the process is killed, and the which-th it is of its name and path."""

    call: Call
    of_its_path: int


def kill_at_each_call(
    folder: Path, *, scenes: Sequence[Scene] = SCENES, once_each: bool = False, without_strace: bool = False
) -> list[str]:
    """Kill each command at each of its calls, or, with `once_each`, at one of each kind. Return the counts as lines."""
    reason = "left out" if without_strace else strace.no_strace_because()
    by = f"an audit hook (strace: {reason})" if reason else "strace"
    lines, total, broken = [f"syscalls: killed by {by} at each call that changes the disk"], 0, 0
    for scene in scenes:
        work = folder / scene.name.replace(" ", "-")
        killed = Killed(scene, stage(scene, work), work, by_hook=reason is not None)
        points = killed.points()
        if once_each:
            points = [*{kind_of(point.call): point for point in points}.values()]
        faults = 0
        for point, fault in check_each(points, killed.check):
            if fault:
                faults += 1
                print(f"  {scene.name}: killed at {point.call}: {fault}", file=sys.stderr, flush=True)
        lines.append(f"  {scene.name}: {len(points)} points, {faults} lost or wrong")
        print(lines[-1], file=sys.stderr, flush=True)
        total, broken = total + len(points), broken + faults
    if broken:
        raise Broken("\n".join([*lines, f"  {broken} of {total} points lost or wrong"]))
    return [*lines, f"  {total} points, lost: 0, wrong: 0"]


@dataclass(frozen=True)
class Killed:
    """A scene whose command is killed, and its folder."""

    scene: Scene
    judge: Judge
    work: Path
    by_hook: bool

    def points(self) -> list[Point]:
        """The calls of the command that change the disk. In another thread, where the order changes, no call can be
        aimed at; there, a run only hashes its data."""
        place = self.work / "recorded"
        shutil.copytree(self.work / "before", place)
        status, calls = (audit if self.by_hook else strace).record(self._act, place)
        if status != self.scene.ends_with:
            raise Broken(f"{self.scene.name}: exit code {status} while it is recorded")
        shutil.rmtree(place)
        points, seen = [], Counter[tuple[str, str]]()
        for call in calls:
            seen.update((call.name, path) for path in {*call.paths})
            if call.changes_the_disk() and call.in_main_thread:
                points.append(Point(call, seen[call.name, call.paths[0]]))
        return points

    def check(self, point: Point) -> None:
        """Kill the command at this point, and check what it left, and how it ends when it is started again."""
        place = Path(tempfile.mkdtemp(dir=self.work)).resolve()
        try:
            if not any(self._kill(place, point, shift) for shift in _SHIFTS):
                raise Broken("no kill hit this call")
            with run_in(place):
                self.judge.check(max(self.judge.base_step, self.judge.announced_here()))
        finally:
            shutil.rmtree(place)

    def _kill(self, place: Path, point: Point, shift: int) -> bool:
        """Run and kill the command in a copy of the folder. Return whether the kill hit the call that was meant."""
        call = point.call
        shutil.rmtree(place)
        shutil.copytree(self.work / "before", place)
        if self.by_hook:
            _, hit = audit.kill_at(self._act, place, call.number)
        elif call.has_path and not shift and _without_chance(call) == str(call):
            _, hit = strace.kill_at(self._act, place, call.name, point.of_its_path, call.paths[0])
        else:
            _, hit = strace.kill_at(self._act, place, call.name, max(1, call.number + shift))
        return hit is not None and _without_chance(hit) == _without_chance(call)

    def _act(self) -> int:
        return self.scene.command()[0]


def kind_of(call: Call) -> str:
    """The call without the numbers in its paths, such as steps."""
    return re.sub(r"\d+", "N", _without_chance(call))


def _without_chance(call: Call) -> str:
    """The call without the parts of temporary names that differ in each process."""
    return re.sub(r"\.new-[0-9a-f-]+|-[0-9a-f]{8}\b", "", str(call))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.syscalls")
    parser.add_argument(
        "--scene", default="", metavar="TEXT", help="only the commands whose name contains TEXT"
    )
    parser.add_argument("--once-each", action="store_true", help="one call of each kind instead of all")
    asked = parser.parse_args()
    scenes = [scene for scene in SCENES if asked.scene in scene.name]
    return command("syscalls", partial(kill_at_each_call, scenes=scenes, once_each=asked.once_each))


if __name__ == "__main__":
    sys.exit(main())
