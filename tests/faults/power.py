"""A power cut at every operation of a command on the disk, and every legal state of the disk after it.

strace records the command once. A model of the disk (`crash/disk_model.py`) replays the calls and loses what was not
flushed. For each different state, a forked process starts the same command again. What was announced as saved must be
there, and the command must end as if nothing had happened.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.faults.crash.children import check_each, run_in
from tests.faults.crash.disk_model import Crash, Disk, Recording, crashes, replay, write
from tests.faults.crash.judge import Judge, announced, stage
from tests.faults.crash.scenes import SCENES, Scene
from tests.faults.crash.strace import Call, no_strace_because, record
from tests.faults.runs import Broken, command


@dataclass(frozen=True)
class Recorded:
    """A scene, its calls and their operations."""

    scene: Scene
    judge: Judge
    work: Path
    calls: Sequence[Call]
    disk: Recording

    def saved(self, crash: Crash) -> int:
        """The step of the last save that was announced before a crash."""
        over = crash.at == len(self.disk.operations)
        calls = self.calls if over else self.calls[: self.disk.origins[crash.at]]
        return max(self.judge.base_step, announced(calls))

    def describe(self, crash: Crash) -> str:
        """A crash in words."""
        place = "at the end"
        if crash.at < len(self.disk.operations):
            place = f"before {self.calls[self.disk.origins[crash.at]]}"
        names = [str(self.calls[self.disk.origins[number]]) for number in sorted(crash.lost)]
        lost = f"; lost: {', '.join(names[:3])}{' and more' if len(names) > 3 else ''}" if names else ""
        one = "" if crash.file is None else f", {crash.part} of {self._name(crash.file)}"
        return f"{place}{lost}; pending data: {crash.others}{one}"

    def _name(self, node: int) -> str:
        for operation, origin in zip(self.disk.operations, self.disk.origins, strict=True):
            if getattr(operation, "node", None) == node:
                return self.calls[origin].paths[0]
        return str(node)


def cut_the_power(
    folder: Path, *, scenes: Sequence[Scene] = SCENES, most: int | None = None, seed: int = 0
) -> list[str]:
    """Replay the states after a power cut of each command, or `most` random ones of each. Return the counts as
    lines."""
    if reason := no_strace_because():
        return [f"power: left out: {reason}"]
    lines, totals = [f"power: states of the disk after a power cut (--seed {seed})"], Counter[str]()
    for scene in scenes:
        recorded = record_scene(scene, folder / scene.name.replace(" ", "-"))
        legal = [*crashes(recorded.disk.operations)]
        states: dict[int, Crash] = {}
        for crash in legal:
            states.setdefault(hash(frozenset(replay(recorded.disk, crash).items())), crash)
        tried = [*states.values()]
        if most is not None and len(tried) > most:
            tried = random.Random(seed).sample(tried, most)
        faults = 0
        for crash, fault in check_each(tried, partial(go_on, recorded)):
            if fault:
                faults += 1
                print(f"  {scene.name}: {recorded.describe(crash)}: {fault}", file=sys.stderr, flush=True)
        lines.append(
            f"  {scene.name}: {len(recorded.disk.operations)} operations, {len(legal):,} crashes, "
            f"{len(states):,} different states, {len(tried):,} replayed, {faults} lost or wrong"
        )
        print(lines[-1], file=sys.stderr, flush=True)
        totals.update({"crashes": len(legal), "different states": len(states), "replayed": len(tried)})
        totals["lost or wrong"] += faults
        shutil.rmtree(recorded.work)
    lines.append("  " + ", ".join(f"{name}: {count:,}" for name, count in totals.items()))
    if totals["lost or wrong"]:
        raise Broken("\n".join(lines))
    return lines


def record_scene(scene: Scene, work: Path) -> Recorded:
    """Record a scene, and check that the model of the disk ends as the disk did."""
    judge = stage(scene, work)
    place = work / "recorded"
    shutil.copytree(work / "before", place)
    status, calls = record(lambda: scene.command()[0], place)
    if status != scene.ends_with:
        raise Broken(f"{scene.name}: exit code {status} under strace")
    disk, real = Recording(work / "before", calls), Disk.read(place).tree()
    if other := sorted(
        name for name in disk.end.keys() | real.keys() if disk.end.get(name) != real.get(name)
    ):
        raise Broken(f"{scene.name}: the recording lacks changes of {', '.join(other)}")
    shutil.rmtree(place)
    return Recorded(scene, judge, work, calls, disk)


def go_on(recorded: Recorded, crash: Crash) -> None:
    """Make the state after a crash, and check it, and how the command ends when it is started again."""
    place = Path(tempfile.mkdtemp(dir=recorded.work)).resolve()
    try:
        write(replay(recorded.disk, crash), place)
        with run_in(place):
            recorded.judge.check(recorded.saved(crash), is_over=crash.at == len(recorded.disk.operations))
    finally:
        shutil.rmtree(place)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.power")
    parser.add_argument(
        "--scene", default="", metavar="TEXT", help="only the commands whose name contains TEXT"
    )
    parser.add_argument(
        "--most", type=int, metavar="N", help="N random states of each command instead of all"
    )
    parser.add_argument(
        "--seed", type=int, default=random.randrange(1 << 32), help="left out, another each time"
    )
    asked = parser.parse_args()
    scenes = [scene for scene in SCENES if asked.scene in scene.name]
    return command("power", partial(cut_the_power, scenes=scenes, most=asked.most, seed=asked.seed))


if __name__ == "__main__":
    sys.exit(main())
