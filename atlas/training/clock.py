"""Time spent training, and how many updates fit into the hours that are given."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable

_FIRST = 2  # updates that also warm up caches, allocators and compilers
_ENOUGH = 10  # measured updates
_PART = 0.02  # of the time, after which fewer will do
_MARGIN = 0.03  # of the time, for updates that take longer than those measured


class RunClock:
    """The time a run has trained, over all its processes, against `hours` (None: no limit)."""

    def __init__(
        self, hours: float | None, *, before: float, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.limit = None if hours is None else hours * 3600
        self._clock = clock
        self._before = before
        self._started = self._update_began = clock()
        self._updates: deque[float] = deque(maxlen=_FIRST + _ENOUGH)

    def update_begins(self) -> None:
        self._update_began = self._clock()

    def update_ends(self) -> None:
        self._updates.append(self._clock() - self._update_began)

    @property
    def elapsed(self) -> float:
        """Seconds."""
        return self._before + self._clock() - self._started

    @property
    def has_measured(self) -> bool:
        """Whether enough updates have been timed to say how long one takes."""
        measured = len(self._updates) - _FIRST
        return measured >= _ENOUGH or (measured >= 1 and self.elapsed > _PART * (self.limit or 0))

    @property
    def seconds_per_update(self) -> float:
        return statistics.fmean(list(self._updates)[_FIRST:])

    def updates_left(self, *, extra_per_update: float, at_the_end: float) -> int:
        """How many more updates fit, each with `extra_per_update` seconds of evaluating and saving, and
        `at_the_end` seconds after the last; at least one."""
        assert self.limit is not None
        left = self.limit * (1 - _MARGIN) - self.elapsed - at_the_end
        return max(1, int(left / (self.seconds_per_update + extra_per_update)))

    def is_over(self, *, at_the_end: float) -> bool:
        """Whether one more update might end too late."""
        longest = max(self._updates, default=0.0)
        return self.limit is not None and self.elapsed + longest + at_the_end > self.limit
