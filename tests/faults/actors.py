"""Two processes on one output folder, in random histories; a model of the folder is checked after each action.

The actions: start, start with `--no-resume`, resume the latest or an older checkpoint, SIGTERM, SIGKILL, and in the
middle of training remove the lock, remove the folder or move it away. Most histories use forked children that stop
before any operation on a file, so that the other one can act between any two of them (`forked.py`). Hypothesis chooses
these histories, and shortens one that breaks a promise. Other histories use real processes, which act at random times.

To try another version of Atlas, copy `tests/` over that version's, and run the same command there.
"""

from __future__ import annotations

import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import hypothesis
from hypothesis import strategies as st
from hypothesis.internal.conjecture import engine
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.faults.folder_model import Actor
from tests.faults.forked import Forked
from tests.faults.history import ACTIONS, VICTIMS, WAYS, History, Scene, make_scene
from tests.faults.real_actors import real_histories
from tests.faults.runs import Broken, command, options
from tests.faults.trajectory import STEPS

_SHRINKING_S = 60
Turn = dict[str, int]
_TURNS = st.one_of(
    st.fixed_dictionaries({"operations": st.integers(1, 12)}),
    st.fixed_dictionaries({"operations": st.integers(1, 160)}),
    st.fixed_dictionaries({"updates": st.integers(1, STEPS)}),
    st.fixed_dictionaries({"updates": st.integers(1, 3)}),
    st.just({}),
)
"""How far an actor goes before the other one may act: the arguments of `Forked.proceed`."""


class ForkedHistories(RuleBasedStateMachine):
    """Random histories of forked actors."""

    scene: Scene

    def __init__(self) -> None:
        super().__init__()
        self.history = History(self.scene)
        self.is_sound = True

    def _turn(self, what: str, act: Callable[[], Actor]) -> None:
        """Let one actor act, and check everything."""
        self.history.done.append(what)
        with self._recorded():
            before = self.history.model.saved()
            actor = act()
            self.history.check(actor, before)

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """Record the first promise that is broken: Hypothesis reports only the one that it has shortened."""
        self.is_sound = False
        try:
            yield
        except Broken as error:
            self.scene.first_broken = self.scene.first_broken or f"{error}\n  {', '.join(self.history.done)}"
            raise
        self.is_sound = True

    def _chosen(self, which: int) -> tuple[Actor, Forked]:
        actor = self.history.alive[which % len(self.history.alive)]
        assert isinstance(actor.process, Forked)
        return actor, actor.process

    def _fork(self, how: str, which: int = 0) -> tuple[Actor, Forked]:
        words, step = self.history.how_to_start(how, which)
        how = how if words else "plain"
        said = self.history.folder / f"said-{len(self.history.actors)}.txt"
        process = Forked([*self.history.arguments, *words], said, self.history.output)
        return self.history.add(process, how, step), process

    @initialize(updates=st.integers(1, STEPS))
    def begin(self, updates: int) -> None:
        self.start("plain", 0, {"updates": updates})

    @precondition(lambda self: len(self.history.alive) < 2)
    @rule(how=st.sampled_from(WAYS), which=st.integers(0, 5), turn=_TURNS)
    def start(self, how: str, which: int, turn: Turn) -> None:
        def act() -> Actor:
            actor, process = self._fork(how, which)
            if process.code is None:
                process.proceed(**turn)
            return actor

        self._turn(f"start ({how} {which}) {turn}", act)

    @precondition(lambda self: self.history.alive)
    @rule(which=st.integers(0, 1), turn=_TURNS)
    def proceed(self, which: int, turn: Turn) -> None:
        def act() -> Actor:
            actor, process = self._chosen(which)
            process.proceed(**turn)
            return actor

        self._turn(f"proceed {which} {turn}", act)

    @precondition(lambda self: self.history.alive)
    @rule(which=st.integers(0, 1), turn=_TURNS)
    def terminate(self, which: int, turn: Turn) -> None:
        self.scene.counts["SIGTERM"] += 1
        self.history.done.append("SIGTERM")
        self._chosen(which)[1].send(signal.SIGTERM)
        self.proceed(which, turn)

    @precondition(lambda self: self.history.alive)
    @rule(which=st.integers(0, 1))
    def kill(self, which: int) -> None:
        def act() -> Actor:
            actor, process = self._chosen(which)
            actor.killed = True
            process.send(signal.SIGKILL)
            return actor

        self.scene.counts["SIGKILL"] += 1
        self._turn(f"SIGKILL {which}", act)

    @rule(how=st.sampled_from(WAYS), which=st.integers(0, 5), operations=st.integers(1, 60))
    def kill_in_start(self, how: str, which: int, operations: int) -> None:
        """Stop all actors, start one, and kill it before it trains."""
        while self.history.alive:
            self.terminate(0, {})
        self.start(how, which, {"operations": operations})
        if self.history.alive:
            self.kill(0)

    @precondition(lambda self: len(self.history.alive) == 1)
    @rule(
        updates=st.integers(1, 4),
        how=st.sampled_from(WAYS),
        which=st.integers(0, 5),
        operations=st.integers(1, 30),
        turn=_TURNS,
    )
    def hand_over(self, updates: int, how: str, which: int, operations: int, turn: Turn) -> None:
        """Let one actor train, and start the other shortly before the first one stops. The other then continues."""
        self.proceed(0, {"updates": updates})
        if self.history.alive:
            self.start(how, which, {"operations": operations})
            self.terminate(0, {})
        if self.history.alive:
            self.proceed(0, turn)

    @precondition(lambda self: self.history.alive and all(a.process.is_in_update for a in self.history.alive))
    @rule(what=st.sampled_from(VICTIMS))
    def meddle(self, what: str) -> None:
        self.history.meddle(what)

    def teardown(self) -> None:
        while self.history.alive:
            if self.is_sound:
                self.kill(0)
            else:
                self._chosen(0)[1].send(signal.SIGKILL)
        if self.is_sound:
            with self._recorded():
                self.history.close(self._last)
            if (done := self.scene.counts["histories"]) % 50 == 0:
                print(f"actors: {done} histories", file=sys.stderr, flush=True)

    def _last(self) -> Actor:
        actor, process = self._fork("plain")
        if process.code is None:
            process.proceed()
        return actor


def forked_histories(scene: Scene, *, histories: int, seed: int) -> None:
    """Try this many histories of forked actors. Raises `Broken` with a short history that breaks a promise."""
    machine = hypothesis.seed(seed)(type("ForkedHistories", (ForkedHistories,), {"scene": scene}))
    settings = hypothesis.settings(
        max_examples=histories,
        stateful_step_count=ACTIONS,
        deadline=None,
        database=None,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    try:
        with mock.patch.object(engine, "MAX_SHRINKING_SECONDS", _SHRINKING_S):
            run_state_machine_as_test(machine, settings=settings)
    except (Broken, hypothesis.errors.Flaky) as error:
        notes = "\n  ".join(line for note in getattr(error, "__notes__", []) for line in note.splitlines())
        raise Broken(f"{scene.first_broken}\n  shortened: {error}\n  {notes}") from error


def two_actors(folder: Path, *, histories: int, real: int, seed: int, runs: int = 6) -> list[str]:
    """Try random histories of two actors. Return the counts as lines."""
    scene = make_scene(folder, runs=runs)
    forked_histories(scene, histories=histories, seed=seed)
    lines = [f"actors: forked (--seed {seed}): {_in_words(scene.counts)}"]
    scene.counts.clear()
    if real:
        real_histories(scene, histories=real, seed=seed)
        lines.append(f"  real processes: {_in_words(scene.counts)}")
    return [
        *lines,
        "  lost: 0; logged twice: 0; silently started from an older step: 0; two writers: 0; hanging: 0; tracebacks: 0",
    ]


def _in_words(counts: Counter[str]) -> str:
    return ", ".join(f"{number} {what}" for what, number in counts.most_common())


def main() -> int:
    parser = options("actors", rounds=50)
    parser.add_argument("--histories", type=int, default=2000, metavar="N", help="of forked actors")
    asked = parser.parse_args()
    return command(
        "actors",
        lambda folder: two_actors(folder, histories=asked.histories, real=asked.rounds, seed=asked.seed),
    )


if __name__ == "__main__":
    sys.exit(main())
