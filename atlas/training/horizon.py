"""`training.max_hours`: turned into the update at which the schedule ends, and kept to."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from atlas.training.samples import sample

if TYPE_CHECKING:
    from atlas.training.train import Trainer


def is_out_of_time(trainer: Trainer) -> bool:
    """Whether one more update might end too late; said, if so."""
    world, clock = trainer.world, trainer.clock
    if clock.limit is None:
        return False
    at_the_end = trainer.saver.expected_seconds(trainer.num_bytes)
    if not world.broadcast(clock.is_over(at_the_end=at_the_end)):
        return False
    planned = (
        f" of {trainer.total} planned: updates took longer than when they were measured"
        if trainer.total
        else ""
    )
    hours = f"{trainer.config.training.max_hours:g} h"
    trainer.log.say(
        f"the {hours} are over at step {trainer.state.step}{planned}; a larger --max-hours goes on"
    )
    return True


def plan_horizon(trainer: Trainer) -> None:
    """Turn `training.max_hours` into the update at which the schedule ends, from the speed so far."""
    training, state, clock, world = trainer.config.training, trainer.state, trainer.clock, trainer.world
    evaluation = 0.0
    if trainer.val_data:
        start = time.perf_counter()
        some = trainer.val_windows[: state.eval_batch_size]
        trainer.loss_on(some)
        measured = time.perf_counter()
        sample(trainer)
        evaluation = (measured - start) * len(trainer.val_windows) / len(some)
        evaluation += time.perf_counter() - measured
    extra = (
        evaluation / training.eval_interval + trainer.saver.stall / trainer.config.checkpoint.save_interval
    )
    at_the_end = evaluation + trainer.saver.expected_seconds(trainer.num_bytes)
    left = clock.updates_left(extra_per_update=extra, at_the_end=at_the_end)
    state.horizon = world.broadcast(min(state.horizon, state.step + left))
    state.is_planned = True
    trainer.log.total(state.horizon)
    trainer.log.say(
        f"an update takes {clock.seconds_per_update:.3g} s: the run is planned to end at step {state.horizon:,}, "
        f"within {training.max_hours:g} h"
    )
