"""The length of a run, its learning rate, and how many updates fit into `training.max_hours`."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable

from atlas.config import TrainingConfig

NO_LIMIT = 10**9
_WARM_UP = 2  # the first updates are not measured: caches, allocators and compilers warm up
_ENOUGH = 10  # the number of measured updates that suffices to plan the run
_SHARE = 0.02  # after this fraction of the time limit, one measured update suffices
_MARGIN = 0.03  # fraction of the time limit in reserve: later updates may be slower than the measured ones


def horizon_steps(
    config: TrainingConfig, sequences_per_epoch: int, *, step: int = 0, sequences_consumed: int = 0
) -> int:
    """Return the step at which the run ends: after `epochs` or `max_steps`, whichever comes first, or after one epoch
    if neither is set.

    If only `max_hours` is set, the end is unknown until Atlas has timed some updates, so the result is `NO_LIMIT`.
    `step` and `sequences_consumed` are the progress that a resumed run has already made.
    """
    epochs = config.epochs if config.epochs or config.max_steps or config.max_hours else 1
    end = min(config.max_steps or NO_LIMIT, NO_LIMIT)
    if epochs:
        remaining = max(0, epochs * sequences_per_epoch - sequences_consumed)
        end = min(end, step + math.ceil(remaining / config.sequences_per_update))
    return end


def length_of(config: TrainingConfig) -> tuple[object, ...]:
    """Return the settings that determine the step at which the schedule ends."""
    return config.max_steps, config.epochs, config.sequences_per_update, config.max_hours


def learning_rate_at(step: int, config: TrainingConfig, horizon: int) -> float:
    """Return the learning rate of update `step`, counted from 0. The rate rises linearly during the warm-up, then
    follows `schedule`, and reaches its minimum at the horizon.

    Cosine: Loshchilov & Hutter 2016, arXiv:1608.03983. Warm-up, stable, decay (wsd): Hu et al. 2024, arXiv:2404.06395.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    falling = max(1, horizon - config.warmup_steps)
    if config.schedule == "wsd":
        falling = min(falling, max(1, round(config.decay_fraction * horizon)))
    left = min(1.0, max(0.0, (horizon - step) / falling))
    if config.schedule == "cosine":
        left = 0.5 * (1 - math.cos(math.pi * left))
    floor = config.min_learning_rate_ratio
    return config.learning_rate * (floor + (1 - floor) * left)


class RunClock:
    """A clock of the training time of a run. `before` is the time in seconds before the run was resumed. `hours` is the
    time limit of the run, or None."""

    def __init__(
        self, hours: float | None, *, before: float, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.limit = None if hours is None else hours * 3600
        self._clock = clock
        self._before = before
        self._started = self._update_began = clock()
        self._updates: deque[float] = deque(maxlen=_WARM_UP + _ENOUGH)

    def start(self) -> None:
        """Start the clock. The time before the training loop is not training time."""
        self._started = self._update_began = self._clock()

    def update_begins(self) -> None:
        """Start timing an update."""
        self._update_began = self._clock()

    def update_ends(self) -> None:
        """Finish timing an update."""
        self._updates.append(self._clock() - self._update_began)

    @property
    def elapsed(self) -> float:
        """The training time so far, in seconds."""
        return self._before + self._clock() - self._started

    @property
    def has_measured(self) -> bool:
        """Whether enough updates have been timed to know how long an update takes."""
        measured = len(self._updates) - _WARM_UP
        return measured >= _ENOUGH or (measured >= 1 and self.elapsed > _SHARE * (self.limit or 0))

    @property
    def seconds_per_update(self) -> float:
        """The mean seconds of the measured updates."""
        return statistics.fmean(list(self._updates)[_WARM_UP:])

    def updates_left(self, *, extra_per_update: float, at_the_end: float) -> int:
        """Return the number of updates, at least 1, that still fit into the time limit. Each update takes
        `extra_per_update` more seconds for evaluation and saving. The run takes `at_the_end` seconds after its last
        update."""
        assert self.limit is not None
        left = self.limit * (1 - _MARGIN) - self.elapsed - at_the_end
        return max(1, int(left / (self.seconds_per_update + extra_per_update)))

    def is_over(self, *, at_the_end: float) -> bool:
        """Whether the run might exceed its time limit with one more update and the `at_the_end` seconds after that
        update."""
        longest = max(self._updates, default=0.0)
        return self.limit is not None and self.elapsed + longest + at_the_end > self.limit
