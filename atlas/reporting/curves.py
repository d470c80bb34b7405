"""Prepare curves for charts: remove repeated steps, smooth values, and reduce the number of points."""

from __future__ import annotations

import itertools
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Indices: TypeAlias = NDArray[np.intp]

MOST_POINTS = 2000


def last_of_each_step(steps: Floats) -> Indices:
    """Return the indices of the records that no later record replaces, in ascending order.

    After a rollback, a run logs the repeated steps again. A later record with the same or a smaller step replaces a
    record, so the steps at the returned indices increase strictly.
    """
    later = np.append(np.minimum.accumulate(steps[::-1])[::-1][1:], np.inf)
    return np.flatnonzero(steps < later)


def smooth(values: Floats) -> Floats:
    """Return a centered moving average over about a fiftieth of all values.

    The window is narrower near the beginning, where a loss falls fast. The averages ignore NaN, and NaN values stay
    NaN.
    """
    n = values.size
    place = np.arange(n)
    half = np.minimum(place, max(2, n // 100))
    first, end = place - half, np.minimum(place + half + 1, n)
    known = np.isfinite(values)
    sums = np.append(0.0, np.cumsum(np.where(known, values, 0.0)))
    counts = np.append(0, np.cumsum(known))
    means = (sums[end] - sums[first]) / np.maximum(counts[end] - counts[first], 1)
    return np.where(known, means, np.nan)


def thin(values: Floats, most: int = MOST_POINTS) -> Indices:
    """Return the ascending indices of at most `most` values: the first and the last value, and the smallest and the
    largest value of each interval."""
    if values.size <= most:
        return np.arange(values.size)
    kept = {0, values.size - 1}
    edges = np.linspace(0, values.size, (most - 2) // 2 + 1).astype(int)
    for start, end in itertools.pairwise(edges):
        interval = values[start:end]
        kept |= {int(start + interval.argmin()), int(start + interval.argmax())}
    return np.array(sorted(kept), dtype=np.intp)
