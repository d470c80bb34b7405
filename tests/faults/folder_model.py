"""What an output folder must hold while processes start, stop and die in it, checked from outside.

The checks read files and the output of the processes, and nothing inside Atlas. Each broken rule raises `Broken`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from tests.faults.forked import NEVER
from tests.faults.runs import Broken, resumed_step, sound_checkpoint
from tests.faults.trajectory import Trajectory, hash_of

_ENDS = (0, 2, 130)
_BEGAN = re.compile(r"^model: [\d,]+ parameters|^nothing to do: the run is complete", re.M)
_FINISHED = re.compile(r"^finished at step \d+", re.M)
_COMPLETE = re.compile(r"^nothing to do: the run is complete at step (\d+)", re.M)


class Process(Protocol):
    """What the model needs to know about a process: its exit code, or None while the process lives, the number of
    updates that it has begun, and what it printed."""

    @property
    def code(self) -> int | None: ...
    @property
    def updates(self) -> int: ...
    @property
    def said(self) -> str: ...


@dataclass(eq=False)
class Actor:
    """A process in the folder. `how` says how it was started: plain, auto, no-resume or older."""

    process: Process
    how: str
    named_step: int | None = None
    """The step of the checkpoint that `--resume` names."""
    killed: bool = False
    began: int | None = None
    """The step from which it resumed, 0 for a new run, None before it has said so."""
    lost_at: int | None = None
    """The step in progress when somebody removed the lock, or when another process then began."""
    has_successor: bool = False
    """Whether another process has begun since then."""

    @property
    def lives(self) -> bool:
        return self.process.code is None

    @property
    def moves(self) -> bool:
        """Whether it may be moving files aside now, or has ended before it was done."""
        return self.how in ("no-resume", "older") and self.process.code not in (0, 2) and self.began is None

    @property
    def trains(self) -> bool:
        return self.process.updates > 0

    @property
    def step(self) -> int:
        return (self.began or 0) + self.process.updates


class Saved(NamedTuple):
    """A sound checkpoint in a folder: the seed of its run, its step, its name, and the inode of its file."""

    seed: int
    step: int
    name: str
    inode: int


@dataclass
class FolderModel:
    """The rules of one output folder, `top`, and of what was moved out of it."""

    top: Path
    truth: Trajectory
    read: dict[tuple[int, int, int, int], tuple[int, int]]
    """Checkpoints that were read before, by inode and time of file and sidecar: their seeds and steps."""
    places: list[Path] = field(default_factory=list)
    """Output folders that were moved away as a whole."""
    newest: dict[int, int] = field(default_factory=dict)
    best: dict[int, float] = field(default_factory=dict)
    """For each seed, what may not be lost: the newest step, and the lowest validation loss of a best checkpoint."""
    takes_turns: bool = True
    """Whether only one process runs at a time, so that what changes is the work of this process."""
    is_cut: bool = False
    """Whether the folder was taken away while a process trained. Then its log may begin at a later step."""
    unfinished_move: bool = False
    """Whether a process was killed while it may have been moving files, and none has begun since."""

    def saved(self) -> list[Saved]:
        """The sound checkpoints in the output folder."""
        return [*self._saved_in(self.top)]

    def newest_step(self) -> int:
        """The newest step that a process can resume from; 0 if there is no checkpoint."""
        return max((saved.step for saved in self.saved()), default=0)

    def forget(self) -> None:
        """The output folder was removed on purpose."""
        self.newest.clear()
        self.best.clear()

    def after_turn(self, actor: Actor, actors: Iterable[Actor], before: Sequence[Saved]) -> None:
        """Check everything after `actor` alone has run for a while. `before` is what was saved before its turn."""
        others = [other for other in actors if other is not actor]
        self._check_process(actor)
        self._check_beginning(actor, others, before)
        if actor.lost_at is not None:
            for new in {*self.saved()} - {*before}:
                for other in others:
                    other.has_successor |= other.lives and other.lost_at is not None
                if actor.has_successor and new.step > actor.lost_at:
                    raise Broken(
                        f"two writers: {new.name} of step {new.step} was saved by a process whose lock was removed at "
                        f"step {actor.lost_at}, and which has a successor"
                    )
        training = [
            other for other in (actor, *others) if other.lives and other.trains and other.lost_at is None
        ]
        if len(training) > 1:
            raise Broken("two processes train in one folder")
        if not actor.lives and actor.moves:
            self.unfinished_move = True
        self.check(moving=any(other.moves and other.lives for other in (actor, *others)))

    def _check_process(self, actor: Actor) -> None:
        code, said = actor.process.code, actor.process.said
        if "Traceback" in said:
            raise Broken(f"a traceback: {said[-600:]}")
        if code is None or (code == -9 and actor.killed):
            return
        if code == -15 and (not actor.trains or _FINISHED.search(said)):
            return  # the signal came before the run or after it
        if code not in _ENDS:
            raise Broken(f"exit code {code}: {said[-300:]}")
        errors = [line for line in said.splitlines() if line.startswith("error:")]
        if len(errors) != (code == 2):
            raise Broken(f"exit code {code} with {len(errors)} lines of error: {said[-300:]}")

    def _check_beginning(self, actor: Actor, others: Sequence[Actor], before: Sequence[Saved]) -> None:
        """A process that has just said from where it starts must have taken the newest that was there."""
        said = actor.process.said
        if actor.began is not None or not _BEGAN.search(said):
            return
        complete = _COMPLETE.search(said)
        actor.began = int(complete[1]) if complete else resumed_step(said)
        for other in others:
            if other.lost_at is not None:
                other.lost_at, other.has_successor = other.step, self.takes_turns
        was_unfinished, self.unfinished_move = self.unfinished_move, False
        there = max((saved.step for saved in before), default=0)
        if actor.how == "older" and actor.named_step not in (None, actor.began):
            raise Broken(f"started from step {actor.began}, not from the named step {actor.named_step}")
        if (
            actor.how in ("plain", "auto")
            and actor.began < there
            and not was_unfinished
            and actor.lost_at is None
        ):
            raise Broken(f"silently started from step {actor.began}, but step {there} was saved")

    def check(self, *, moving: bool = False) -> None:
        """Check the files. While files are `moving`, some may be in neither place yet."""
        folders = [
            folder for place in (self.top, *self.places) for folder in (place, *place.glob("previous-*"))
        ]
        saved = {folder: [*self._saved_in(folder)] for folder in folders}
        if moving or self.unfinished_move:
            return
        for folder in folders:
            self._check_folder(folder, saved[folder])
        newest: dict[int, int] = {}
        best: dict[int, float] = {}
        for seed, step, name, _ in (entry for entries in saved.values() for entry in entries):
            newest[seed] = max(step, newest.get(seed, 0))
            if name == "atlas_best.pt":
                best[seed] = min(self.truth.val_losses[seed, step], best.get(seed, 1e9))
        for seed, step in self.newest.items():
            if newest.get(seed, -1) < step:
                raise Broken(
                    f"lost: step {step} of the run with seed {seed}; the newest is {newest.get(seed)}"
                )
        for seed, loss in self.best.items():
            if best.get(seed, 1e9) > loss:
                raise Broken(f"lost: the best checkpoint of the run with seed {seed}")
        self.newest, self.best = newest, best

    def _saved_in(self, folder: Path) -> Iterable[Saved]:
        """The sound checkpoints in a folder. Each must have the bits of the true course."""
        for sidecar in sorted(folder.glob("atlas_*.json")):
            file = sidecar.with_suffix(".pt")
            if not file.exists():
                continue
            status = file.stat(), sidecar.stat()
            key = tuple(fact for one in status for fact in (one.st_ino, one.st_mtime_ns))
            if key not in self.read:
                contents = sound_checkpoint(sidecar)
                assert contents is not None
                seed, step = contents["config"]["seed"], contents["step"]
                if hash_of(contents) != self.truth.states[seed, step]:
                    raise Broken(
                        f"{folder.name}/{file.name}: its bits are not those of step {step}, seed {seed}"
                    )
                self.read[key] = seed, step  # type: ignore[index]
            yield Saved(*self.read[key], file.name, file.stat().st_ino)  # type: ignore[index]

    def _check_folder(self, folder: Path, saved: Sequence[Saved]) -> None:
        """No checkpoint without its sidecar; every step once in the log, up to the newest checkpoint, of one run."""
        for file in folder.glob("atlas_*.pt"):
            if not file.with_suffix(".json").exists():
                raise Broken(f"{folder.name}/{file.name}: has lost its sidecar")
        log = folder / "metrics.jsonl"
        if folder.name.startswith("previous-") and not log.exists():
            return  # the newer checkpoints of a run that continued from an older one
        text = log.read_text(encoding="utf-8") if log.exists() else ""
        lines = [json.loads(line) for line in text.split("\n")[:-1]]
        trained = {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}
        steps = [line["step"] for line in lines if line["kind"] == "train"]
        first = steps[0] if steps and self.is_cut else 1
        if steps != [*range(first, first + len(steps))]:
            raise Broken(f"{folder.name}/metrics.jsonl: its steps are {steps}")
        seeds = {seed for seed, _ in self.truth.states}
        fitting = {
            s for s in seeds if all(loss == self.truth.losses[s, step] for step, loss in trained.items())
        }
        val_losses = {line["step"]: line["val_loss"] for line in lines if line["kind"] == "validation"}
        if not any(
            all(loss == self.truth.val_losses[s, step] for step, loss in val_losses.items()) for s in fitting
        ):
            raise Broken(f"{folder.name}/metrics.jsonl: its losses are those of no run")
        last = NEVER if self.is_cut and not steps else first + len(steps) - 1
        for seed, step, name, _ in saved:
            if seed not in fitting or step > last:
                raise Broken(
                    f"{folder.name}/{name}: is of step {step}, seed {seed}, but metrics.jsonl ends at step "
                    f"{last} of seed {'/'.join(map(str, sorted(fitting)))}"
                )
