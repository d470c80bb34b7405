"""A history of actors on one output folder: what they share, and what can be done to them and to the folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.folder_model import Actor, FolderModel, Process, Saved
from tests.faults.runs import Broken
from tests.faults.trajectory import DEFAULT_SEED, STEPS, Trajectory, make_config, make_dataset, true_course

WAYS = ("plain", "auto", "older", "no-resume")
"""The ways to start: without an option, `--resume auto`, `--resume CHECKPOINT`, `--no-resume`."""
VICTIMS = ("lock", "folder", "folder and its lock")
"""What somebody may take away while actors train: the last is moved, the others are removed."""
ACTIONS = 10


@dataclass
class Scene:
    """What all histories share: the prepared data, the true course, and the counts."""

    folder: Path
    data: Path
    seeds: range
    """The seeds of the runs in one history: the first is the default, the others are those of `--no-resume`."""
    truth: Trajectory
    counts: Counter[str] = field(default_factory=Counter)
    first_broken: str = ""
    """The first promise that was broken, and the history that broke it."""
    read: dict[tuple[int, int, int, int], tuple[int, int]] = field(default_factory=dict)


def make_scene(folder: Path, *, runs: int = 6) -> Scene:
    """Prepare the data, and the true course of up to `runs` runs in one history."""
    os.environ["ATLAS_CACHE_DIR"] = str(folder / "cache")
    data = make_dataset(folder, words=500)
    seeds = range(DEFAULT_SEED, DEFAULT_SEED + runs)
    return Scene(folder, data, seeds, true_course(folder, make_config(folder, data=data), seeds))


class History:
    """A folder, up to two live actors in it, and the model of what the folder must hold."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.folder = Path(tempfile.mkdtemp(dir=scene.folder, prefix="history-"))
        self.output = self.folder / "run"
        self.arguments = make_config(self.folder, data=scene.data)
        self.model = FolderModel(self.output, scene.truth, scene.read)
        self.actors: list[Actor] = []
        self.done: list[str] = []
        """The actions so far, in words."""
        self._runs = 0

    @property
    def alive(self) -> list[Actor]:
        return [actor for actor in self.actors if actor.lives]

    def how_to_start(self, how: str, which: int) -> tuple[list[str], int | None]:
        """The arguments for one way to start, and the step of the checkpoint that they name."""
        if how == "auto":
            return ["--resume", "auto"], None
        if how == "no-resume" and self._runs + 1 < len(self.scene.seeds):
            self._runs += 1
            return ["--no-resume", "--seed", str(self.scene.seeds[self._runs])], None
        if how == "older" and (saved := self.model.saved()):
            chosen = sorted(saved, key=lambda entry: (entry.step, entry.name))[which % len(saved)]
            # Another process that really trains may save a better atlas_best.pt before this one has read it.
            may_change = chosen.name == "atlas_best.pt" and not self.model.takes_turns
            return ["--resume", str(self.output / chosen.name)], None if may_change else chosen.step
        return [], None

    def add(self, process: Process, how: str, named_step: int | None) -> Actor:
        actor = Actor(process, how, named_step)
        self.actors.append(actor)
        self.scene.counts[f"starts ({how})"] += 1
        return actor

    def check(self, actor: Actor, before: Sequence[Saved]) -> None:
        """Check everything after a turn of `actor`. `before` is what was saved before."""
        self.model.after_turn(actor, self.actors, before)

    def meddle(self, what: str) -> None:
        """Remove the lock, or the folder, or move it away."""
        self.scene.counts[f"{what} taken away"] += 1
        self.done.append(f"{what} taken away")
        for actor in self.alive:
            actor.lost_at = actor.step if actor.lost_at is None else actor.lost_at
        if what == "lock":
            (self.output / "atlas.lock").unlink(missing_ok=True)
            return
        self.model.is_cut = True
        for actor in self.alive:
            actor.has_successor = False  # no file is left that could show it: who saves first, continues
        if what == "folder":
            shutil.rmtree(self.output, ignore_errors=True)
            self.model.forget()
        elif self.output.exists():
            away = self.folder / f"away-{len(self.model.places)}"
            self.output.rename(away)
            self.model.places.append(away)

    def close(self, start_to_the_end: Callable[[], Actor]) -> None:
        """Check that a last start reaches the end of the run, with nothing lost."""
        before = self.model.saved()
        last = start_to_the_end()
        self.check(last, before)
        if last.process.code != 0 or self.model.newest_step() != STEPS:
            raise Broken(f"the last start does not finish the run: {last.process.said[-300:]}")
        self.scene.counts["histories"] += 1
        shutil.rmtree(self.folder)
