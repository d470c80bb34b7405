"""Curves prepared for drawing: each step once, smoothed, and thinned."""

from __future__ import annotations

import itertools
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Indices: TypeAlias = NDArray[np.intp]

MOST_POINTS = 2000


def last_of_each_step(steps: Floats) -> Indices:
    """The indices, in order, of the records that no later record replaces: after a rollback, a run logs steps again.
    The steps of the result rise."""
    later = np.append(np.minimum.accumulate(steps[::-1])[::-1][1:], np.inf)
    return np.flatnonzero(steps < later)


def smooth(values: Floats) -> Floats:
    """The mean around each value, over about a fiftieth of all values, and fewer near the beginning, where a loss falls
    fast. The means ignore NaN, and NaN stays NaN."""
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
    """The indices, in order, of at most `most` values: the smallest and largest of each interval, and both ends."""
    if values.size <= most:
        return np.arange(values.size)
    kept = {0, values.size - 1}
    edges = np.linspace(0, values.size, (most - 2) // 2 + 1).astype(int)
    for start, end in itertools.pairwise(edges):
        interval = values[start:end]
        kept |= {int(start + interval.argmin()), int(start + interval.argmax())}
    return np.array(sorted(kept), dtype=np.intp)
