"""Histories of real processes, which start, stop and die at random times."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults.folder_model import Actor, Saved
from tests.faults.history import ACTIONS, VICTIMS, WAYS, History, Scene
from tests.faults.runs import PATIENCE_S, PROGRESS, Broken, shown
from tests.faults.trajectory import STEPS
from tests.runs import REPOSITORY


@dataclass
class Started:
    """`atlas train` in a process of its own."""

    popen: subprocess.Popen[bytes]
    said_path: Path

    @property
    def code(self) -> int | None:
        return self.popen.poll()

    @property
    def said(self) -> str:
        return self.said_path.read_text(encoding="utf-8", errors="replace")

    @property
    def updates(self) -> int:
        return len(PROGRESS.findall(self.said))


def real_histories(scene: Scene, *, histories: int, seed: int) -> None:
    """Try this many histories of real processes, which act at random times."""
    chance = random.Random(seed)
    startup_s = _seconds_to_the_first_update(scene)
    for number in shown(histories, "actors"):
        history = History(scene)
        history.model.takes_turns = False
        try:
            _one_history(history, chance, startup_s)
        except Broken as error:
            raise Broken(f"history {number} (--seed {seed}): {', '.join(history.done)}: {error}") from error
        finally:
            for actor in history.alive:
                _popen(actor).kill()


def _seconds_to_the_first_update(scene: Scene) -> float:
    history, begun = History(scene), time.monotonic()
    actor = _start(history, "plain", 0, update_s=0)
    while not actor.trains and actor.lives:
        time.sleep(0.01)
    seconds = time.monotonic() - begun
    _popen(actor).wait()
    return seconds


def _one_history(history: History, chance: random.Random, startup_s: float) -> None:
    """Some actions, each followed by a random wait, and then the last start."""
    before = history.model.saved()
    for _ in range(ACTIONS // 2):
        _act(history, chance, update_s=startup_s / STEPS)
        time.sleep(chance.uniform(0, startup_s) if chance.random() < 0.8 else 0)
        before = _check_frozen(history, before)
    for actor in history.alive:
        actor.killed = True
        _popen(actor).kill()
        _popen(actor).wait()
    _check_frozen(history, before)

    def start_to_the_end() -> Actor:
        last = _start(history, "plain", 0, update_s=0)
        _popen(last).wait(PATIENCE_S)
        return last

    history.close(start_to_the_end)


def _act(history: History, chance: random.Random, *, update_s: float) -> None:
    """Do something at random."""
    alive, kinds = history.alive, ["start"] * 3
    if alive:
        kinds = ["terminate", "terminate", "kill", "meddle"] + (["start"] * 4 if len(alive) < 2 else [])
    kind = chance.choice(kinds)
    if kind == "start":
        how = chance.choice(WAYS)
        history.done.append(f"start ({how})")
        _start(history, how, chance.randrange(6), update_s=update_s)
        return
    actor = chance.choice(alive)
    if kind == "meddle":
        if all(actor.trains for actor in alive):  # a start may be moving files
            history.meddle(chance.choice(VICTIMS))
        return
    actor.killed = kind == "kill"
    name = "SIGKILL" if actor.killed else "SIGTERM"
    history.scene.counts[name] += 1
    history.done.append(f"{name} to start number {history.actors.index(actor) + 1}")
    _popen(actor).send_signal(signal.SIGKILL if actor.killed else signal.SIGTERM)


def _start(history: History, how: str, which: int, *, update_s: float) -> Actor:
    words, step = history.how_to_start(how, which)
    said = history.folder / f"said-{len(history.actors)}.txt"
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
        "ATLAS_TEST_UPDATE_SECONDS": str(update_s),
    }
    with open(said, "wb") as output:
        popen = subprocess.Popen(
            [sys.executable, "-m", "atlas", *history.arguments, *words],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    return history.add(Started(popen, said), how if words else "plain", step)


def _popen(actor: Actor) -> subprocess.Popen[bytes]:
    assert isinstance(actor.process, Started)
    return actor.process.popen


def _check_frozen(history: History, before: Sequence[Saved]) -> Sequence[Saved]:
    """Stop all processes for a moment, and check everything. Return what is saved."""
    frozen = history.alive
    for actor in frozen:
        _popen(actor).send_signal(signal.SIGSTOP)
    for actor in frozen:
        os.waitid(os.P_PID, _popen(actor).pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    for actor in history.actors:
        history.check(actor, before)
    before = history.model.saved()
    for actor in frozen:
        _popen(actor).send_signal(signal.SIGCONT)
    return before
