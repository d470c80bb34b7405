"""Given hours: the schedule is planned once to end within them and kept on resume, and the run ends in time."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atlas.training.checkpoint.load import load_checkpoint
from atlas.training.run import Run
from atlas.training.schedule import NO_LIMIT, RunClock
from atlas.training.train import train
from tests.runs import layer, logged, run_for, trained


class FakeTime:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@given(
    hours=st.floats(0.01, 1000),
    seconds_per_update=st.floats(0.001, 30),
    extra=st.floats(0, 5),
    at_the_end=st.floats(0, 20),
    before=st.floats(0, 10),
)
def test_a_planned_run_ends_in_time_if_the_speed_stays(
    hours: float, seconds_per_update: float, extra: float, at_the_end: float, before: float
) -> None:
    fake = FakeTime()
    clock = RunClock(hours, before=before, clock=fake)
    done = 0
    while not clock.has_measured:
        clock.update_begins()
        fake.now += seconds_per_update * (20 if done == 0 else 1)  # the first one compiles
        clock.update_ends()
        done += 1
    assert done <= 12
    assert clock.seconds_per_update == pytest.approx(seconds_per_update)
    left = clock.updates_left(extra_per_update=extra, at_the_end=at_the_end)
    end = clock.elapsed + left * (seconds_per_update + extra) + at_the_end
    assert end <= hours * 3600 or left == 1
    one_more = end + seconds_per_update + extra
    assert one_more > hours * 3600 * 0.95 or left == 1  # and the time is used


def test_it_is_over_when_one_more_update_and_the_save_might_not_fit() -> None:
    fake = FakeTime()
    clock = RunClock(1.0, before=1800, clock=fake)
    for _ in range(3):
        clock.update_begins()
        fake.now += 60
        clock.update_ends()
    assert clock.elapsed == 1980
    assert not clock.is_over(at_the_end=10)
    fake.now = 100 + 1800 - 69
    assert clock.is_over(at_the_end=10)
    assert not RunClock(None, before=0).is_over(at_the_end=1e9)


def slowed(run: Run, seconds: float) -> None:
    forward = run.learner.objective.forward

    def slow(*columns: object, **named: object) -> object:
        time.sleep(seconds)
        return forward(*columns, **named)

    run.learner.objective.forward = slow


def test_max_hours_plans_the_schedule_and_a_resumed_run_keeps_the_plan(
    tmp_path: Path, text_file: Path
) -> None:
    explicit = layer(tmp_path / "run", text_file, training__max_hours=4 / 3600, checkpoint__save_interval=20)
    del explicit["training"]["max_steps"]
    run = run_for(explicit)
    assert run.state.horizon == NO_LIMIT
    begin = time.perf_counter()
    result = train(run)
    assert time.perf_counter() - begin < 4.5
    assert result.outcome in (
        "finished",
        "stopped in time",
    )  # in time, if this machine was slower than measured
    planned = run.state.horizon
    assert planned < NO_LIMIT
    assert f"planned to end at step {planned:,}" in (tmp_path / "run" / "training.log").read_text()
    assert load_checkpoint(tmp_path / "run" / f"atlas_step_{result.step}.pt")["horizon"] == planned
    if result.outcome == "finished":
        rates = [line["learning_rate"] for line in logged(tmp_path / "run")]
        assert rates[-1] < 0.11 * max(rates)  # the cosine has reached its end
    again = run_for(explicit)
    assert again.state.horizon == planned
    assert again.state.seconds > 1


def test_a_run_ends_in_time_on_a_machine_that_gets_slower(tmp_path: Path, text_file: Path) -> None:
    explicit = layer(tmp_path / "run", text_file, training__max_hours=2 / 3600, training__max_steps=100_000)
    run = run_for(explicit)
    total = run.log.total

    def then_slow(horizon: int) -> None:
        total(horizon)
        slowed(run, 0.2)

    run.log.total = then_slow  # called when the end is planned
    begin = time.perf_counter()
    result = train(run)
    assert time.perf_counter() - begin < 3
    assert result.outcome == "stopped in time"
    assert result.step < run.state.horizon
    assert (tmp_path / "run" / f"atlas_step_{result.step}.pt") in result.saved


def test_steps_that_end_sooner_win_over_hours(tmp_path: Path, text_file: Path) -> None:
    run, result = trained(layer(tmp_path / "run", text_file, training__max_hours=1.0, training__max_steps=15))
    assert (result.outcome, result.step) == ("finished", 15)
    assert run.state.is_planned
