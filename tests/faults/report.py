"""Every kind of fault, for some minutes each, and all counts in one table.

python -m tests.faults.report            many minutes
python -m tests.faults.report --quick    some minutes
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults import (
    actors,
    console,
    corrupt,
    dataset,
    disk,
    file_types,
    fuzz,
    kill,
    numbers,
    power,
    refusal,
    syscalls,
)
from tests.faults.crash.scenes import PREPARATIONS, SCENES
from tests.faults.runs import Broken, own_folder

Counts = list[str]


def kinds(*, quick: bool, seed: int) -> dict[str, Callable[[Path], Counts]]:
    """The kinds of faults by name. Each takes an empty folder, returns its counts, and raises if a promise is
    broken."""
    few = 10 if quick else 40
    forking = {  # first, since PyTorch with a GPU refuses gradients in children of a process that has computed some
        "two actors": lambda folder: actors.two_actors(
            folder, histories=few * few // 4, real=few // 8, seed=seed
        ),
        "changed data": lambda folder: dataset.change_and_resume(folder, rounds=2 * few, seed=seed),
    }
    return (forking if hasattr(os, "fork") else {}) | {
        "kills": lambda folder: kill.kill_and_resume(folder, rounds=few, steps=6 * few, seed=seed),
        "rotten files": lambda folder: corrupt.corrupt_and_resume(folder, rounds=5 * few, seed=seed),
        "full disks": lambda folder: disk.fill_at_each_point(folder, variants=1 if quick else 4),
        "a true full disk": _true_full_disk,
        "kills at each system call": lambda folder: syscalls.kill_at_each_call(
            folder, scenes=PREPARATIONS if quick else SCENES, once_each=quick
        ),
        "power cuts": lambda folder: power.cut_the_power(
            folder, scenes=PREPARATIONS if quick else SCENES, most=20 if quick else None, seed=seed
        ),
        "wrong numbers": lambda folder: numbers.wrong_numbers(folder, rounds=2 * few, seed=seed),
        "short memory": lambda folder: numbers.short_memory(folder, rounds=few, seed=seed),
        "consoles": lambda folder: [
            *console.streams(
                folder, ("info", "version") if quick else ("train", "generate", "info", "prepare-stdin")
            ),
            *console.hangups(folder),
        ],
        "heat": lambda folder: heat(),
        "strange files": lambda folder: file_types.strange_files(
            folder, rounds=6 * few if quick else None, seed=seed
        ),
        "hostile files": lambda folder: hostile_files(seconds=2 if quick else 20, seed=seed),
        "costly requests": lambda folder: refusal.refuse(fields=refusal.TEXTS if quick else "", seed=seed),
        "minutes of abuse": lambda folder: refusal.abuse(folder, minutes=0.1 if quick else 3, seed=seed),
    }


def _true_full_disk(folder: Path) -> Counts:
    reason = disk.no_tmpfs_because()
    return [f"left out: {reason}"] if reason else disk.fill_a_tmpfs(folder)


def heat() -> Counts:
    """The tests of `guard.max_gpu_temp` with a fake NVML, counted by pytest."""
    tests = Path(__file__).parents[1] / "training/devices/test_gpu_temperature.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise Broken(done.stdout[-500:])
    return [f"heat: a false NVML, {done.stdout.strip().splitlines()[-1]}"]


def hostile_files(*, seconds: float, seed: int) -> Counts:
    """The attacks made by hand, and sound files with random changes, for some time per reader."""
    by_hand = fuzz.bad_inputs()
    changed = {reader: fuzz.fuzz(reader, seconds, seed) for reader in by_hand}
    refused = sum(count["refused"] for count in changed.values())
    tried = sum(count.total() for count in changed.values())
    return [
        f"bad inputs made by hand: {sum(by_hand.values())} of {len(by_hand)} kinds, all refused in one line: "
        + ", ".join(f"{count} {reader}" for reader, count in by_hand.items()),
        f"  sound files with random changes: {tried}; refused in one line: {refused}; the rest read; tracebacks: 0",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.report")
    parser.add_argument("--quick", action="store_true", help="some minutes")
    parser.add_argument(
        "--seed", type=int, default=random.randrange(1 << 32), help="left out, another each time"
    )
    asked = parser.parse_args()
    broken = []
    cache = os.environ.get("ATLAS_CACHE_DIR")
    for name, run in kinds(quick=asked.quick, seed=asked.seed).items():
        begun = time.perf_counter()
        try:
            with own_folder(name.replace(" ", "-")) as folder:
                lines = run(folder)
        except (Broken, AssertionError) as error:
            broken.append(name)
            lines = [f"BROKEN: {error}"]
        finally:
            if cache is None:
                os.environ.pop("ATLAS_CACHE_DIR", None)
            else:
                os.environ["ATLAS_CACHE_DIR"] = cache
        print(f"\n{name} ({time.perf_counter() - begun:.0f} s)", *lines, sep="\n", flush=True)
    print(f"\nbroken: {', '.join(broken)}" if broken else "\nnothing was lost")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
