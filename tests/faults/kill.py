"""SIGKILL at random moments and inside saves; the same command is started again each time.

The result must be that of a run that was never killed, bit for bit. At no moment may there be a checkpoint with a
fitting sidecar that cannot be read. Real processes are started and killed. The disk is slowed between one fsync and the
next (`ATLAS_TEST_SLOW_DISK`, in `tests/toy.py`), so that a kill can be aimed between the two.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from atlas.training.checkpoint.manager import CheckpointManager
from tests.faults.runs import (
    PATIENCE_S,
    Broken,
    Run,
    command,
    hard_run,
    options,
    resumed_step,
    shown,
    sound_checkpoints,
    wait_for_progress,
)
from tests.runs import assert_same_run

SAVE_INTERVAL = 3
BYTES, STAGED, BETWEEN, SIDECAR = (
    "in its bytes",
    "before its rename",
    "between file and sidecar",
    "in its sidecar",
)
PLACES = (BYTES, STAGED, BETWEEN, SIDECAR)
"""Where a save can be struck, in the order in which it passes."""

Entries = set[tuple[str, int]]
"""The names in a folder, each with its inode."""


@dataclass
class Tally:
    """Counts of the kills and their results."""

    kills: int = 0
    inside: Counter[str] = field(default_factory=Counter)
    half_written: int = 0
    newest: int = 0
    seen_best: bool = False
    seconds_per_step: float = 0.05


@dataclass(frozen=True)
class Aim:
    """When to kill: `delay` seconds after the first line of progress, and then, with `place`, inside a save."""

    delay: float
    place: str | None
    size: int
    """How many bytes the half-written file should have by then."""
    last_step: int
    """A checkpoint of this step ends the waiting, so that the run is not over before its last kill."""


def kill_and_resume(folder: Path, *, rounds: int, steps: int, seed: int, fsync_s: float = 0.01) -> list[str]:
    """Kill a run `rounds` times, let it finish and compare it with one that was never killed. Return the counts as
    lines."""
    chance = random.Random(seed)
    settings = {
        "model__hidden_size": 96,
        "training__max_steps": steps,
        "training__learning_rate": 1e-3,
        "checkpoint__save_interval": SAVE_INTERVAL,
    }
    whole, killed = (hard_run(folder / name, **settings) for name in ("whole", "killed"))
    reference = whole.start()  # meanwhile
    tally = Tally()
    for number in shown(rounds, "kill"):
        aim = _aim(chance, tally, number=number, rounds=rounds, steps=steps)
        _one_round(killed, tally, aim, number, fsync_s=fsync_s)
    said = killed.finish()
    whole.wait(reference)
    if tally.newest < steps and resumed_step(said) != tally.newest:  # else there was nothing left to do
        raise Broken(f"the last start went on from step {resumed_step(said)}, not {tally.newest}")
    assert_same_run(whole.output, killed.output, steps=steps)
    if sum(tally.inside.values()) < max(1, rounds // 4):
        raise Broken(
            f"only {sum(tally.inside.values())} of {rounds} kills were inside a save: {dict(tally.inside)}"
        )
    return _summary(tally, killed.output, steps=steps, seed=seed)


def _aim(chance: random.Random, tally: Tally, *, number: int, rounds: int, steps: int) -> Aim:
    """At random, with the next save in reach on average: what remains of the run is shared among the kills."""
    share = (steps - tally.newest) / (rounds - number + 1)
    place = PLACES[number // 2 % len(PLACES)] if number % 2 else None
    delay = chance.uniform(0, 2 * share) * tally.seconds_per_step
    last_step = min(steps - 1, tally.newest + math.ceil(3 * share) + SAVE_INTERVAL)
    return Aim(delay, place, int(chance.random() * 1e6), last_step)


def _one_round(run: Run, tally: Tally, aim: Aim, number: int, *, fsync_s: float) -> None:
    """Start, kill and look; saves in the background and in the loop, with and without a worker, take turns."""
    asked = f"data.num_workers={int(number % 3 == 1)}", f"checkpoint.background={number // 8 % 2 == 0}"
    process = run.start(
        *(word for setting in asked for word in ("--set", setting)), ATLAS_TEST_SLOW_DISK=str(fsync_s)
    )
    wait_for_progress(process, run)
    begun = time.perf_counter()
    before = _entries(run.output)
    first = _last_logged(run)
    _kill_at(process, run, aim, before)
    if process.returncode == 0:
        raise Broken(f"the run was over after {tally.kills} kills: more --steps are needed")
    if process.returncode != -9 and os.name != "nt":
        raise Broken(f"exit code {process.returncode} before the kill: {run.last_words()}")
    said = run.said.read_text(encoding="utf-8", errors="replace")
    if "Traceback" in said and re.search(
        r'File ".*atlas[/\\]', said
    ):  # an orphaned worker may show one of torch's
        raise Broken(f"a traceback of Atlas's before the kill: {run.last_words()}")
    if resumed_step(said) != tally.newest:
        raise Broken(
            f"went on from step {resumed_step(said)}, the newest checkpoint was of step {tally.newest}"
        )
    tally.kills += 1
    if (advanced := _last_logged(run) - first) > 0:
        tally.seconds_per_step += 0.3 * ((time.perf_counter() - begun) / advanced - tally.seconds_per_step)
    _examine(run.output, tally, before)


def _kill_at(process: subprocess.Popen[str], run: Run, aim: Aim, before: Entries) -> None:
    begun = time.perf_counter()
    while process.poll() is None:
        waited = time.perf_counter() - begun
        now = _entries(run.output)
        in_place = aim.place is None or (
            aim.place in _places(now, before)
            and (aim.place != BYTES or _size(run.output / "atlas_writing.tmp") > aim.size)
        )
        if (waited > aim.delay and in_place) or _newest_named(now) >= aim.last_step or waited > PATIENCE_S:
            process.kill()
            break
        time.sleep(0.0002)
    process.wait()


def _examine(folder: Path, tally: Tally, before: Entries) -> None:
    """Check what the kill left: where it hit, and that every checkpoint with a sidecar is there and can be read."""
    if places := _places(_entries(folder), before):
        tally.inside[places[0]] += 1
        if places[0] == BYTES and _size(folder / "atlas_writing.tmp") < max(
            map(_size, folder.glob("*.pt")), default=0
        ):
            tally.half_written += 1
    sound = sound_checkpoints(folder)
    complaints: list[str] = []
    latest = CheckpointManager(folder, say=complaints.append).load_latest()
    if complaints:
        raise Broken(f"after kill {tally.kills}: {complaints[0]}")
    found = latest[1]["step"] if latest else 0
    newest = max(sound.values(), default=0)
    if found != newest:
        raise Broken(
            f"after kill {tally.kills}: discovery takes step {found}, the newest whole one is {newest}"
        )
    if newest < tally.newest:
        raise Broken(f"after kill {tally.kills}: the checkpoint of step {tally.newest} is gone")
    if tally.seen_best and "atlas_best.pt" not in sound:
        raise Broken(f"after kill {tally.kills}: atlas_best.pt is gone")
    tally.newest, tally.seen_best = newest, "atlas_best.pt" in sound


def _entries(folder: Path) -> Entries:
    with os.scandir(folder) as entries:
        return {(entry.name, entry.inode()) for entry in entries}


def _places(now: Entries, before: Entries) -> list[str]:
    """The places of a save that the names in the folder tell of, the last one that a save passes first.

    A file without its sidecar, or the reverse, that was there before is an earlier kill's.
    """
    names = {name for name, _ in now}
    stems = [{name.rpartition(".")[0] for name in names if name.endswith(end)} for end in (".pt", ".json")]
    alone = stems[0] ^ stems[1]
    told = {
        SIDECAR: any(name.endswith(".json.tmp") for name in names),
        BETWEEN: any(name.rpartition(".")[0] in alone for name, _ in now - before),
        STAGED: any(name.endswith(".pt.tmp") for name in names),
        BYTES: "atlas_writing.tmp" in names,
    }
    return [place for place, seen in told.items() if seen]


def _newest_named(entries: Entries) -> int:
    steps = (re.fullmatch(r"atlas_step_(\d+)\.json", name) for name, _ in entries)
    return max((int(match[1]) for match in steps if match), default=0)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # renamed meanwhile
        return 0


def _last_logged(run: Run) -> int:
    """The last step with a complete line; a kill may have cut the next one."""
    lines = (run.output / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return int(json.loads(lines[-1])["step"]) if lines else 0


def _summary(tally: Tally, output: Path, *, steps: int, seed: int) -> list[str]:
    lost = (output / "metrics.lost.jsonl").read_text(encoding="utf-8").splitlines()
    repeated = sum('"kind": "train"' in line for line in lost)
    orphans = sum(not path.with_suffix(".json").exists() for path in output.glob("atlas_*.pt"))
    inside = ", ".join(f"{count} {place}" for place, count in tally.inside.most_common())
    return [
        f"kill: {tally.kills} kills over {steps} steps (--seed {seed})",
        f"  inside a save: {sum(tally.inside.values())} ({inside}; {tally.half_written} with the bytes half written)",
        f"  steps trained twice: {repeated}; steps of which the log has none or two: 0",
        f"  checkpoints vouched for and unreadable: 0; files that nobody vouches for, left behind: {orphans}",
        "  weights, optimizer state, losses: bit for bit those of the run that was never killed",
    ]


def main() -> int:
    parser = options("kill", rounds=60)
    parser.add_argument("--steps", type=int, default=300, metavar="N")
    asked = parser.parse_args()
    return command(
        "kill",
        lambda folder: kill_and_resume(folder, rounds=asked.rounds, steps=asked.steps, seed=asked.seed),
    )


if __name__ == "__main__":
    sys.exit(main())
