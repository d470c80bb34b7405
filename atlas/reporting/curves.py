"""Curves made fit to be drawn: each step once, smoothed, and thinned."""

from __future__ import annotations

import itertools
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Places: TypeAlias = NDArray[np.intp]

MOST_POINTS = 2000


def last_of_each_step(steps: Floats) -> Places:
    """The places, in order, of the records that no later one undoes: after a rollback the log may go back to an
    earlier step and tell all from there once more. Their steps rise."""
    if not steps.size:
        return np.zeros(0, dtype=np.intp)
    later = np.append(np.minimum.accumulate(steps[::-1])[::-1][1:], np.inf)
    return np.flatnonzero(steps < later)


def smooth(values: Floats) -> Floats:
    """Means around each value, over about a fiftieth of all, fewer near the beginning, where a loss falls fast.
    NaN is left out of the means and stays NaN."""
    n = values.size
    place = np.arange(n)
    half = np.minimum(place, max(2, n // 100))
    first, end = place - half, np.minimum(place + half + 1, n)
    known = np.isfinite(values)
    sums = np.append(0.0, np.cumsum(np.where(known, values, 0.0)))
    counts = np.append(0, np.cumsum(known))
    means = (sums[end] - sums[first]) / np.maximum(counts[end] - counts[first], 1)
    return np.where(known, means, np.nan)


def thin(values: Floats, most: int = MOST_POINTS) -> Places:
    """The places, in order, of at most `most` values: the smallest and largest of each stretch, and both ends."""
    if values.size <= most:
        return np.arange(values.size)
    kept = {0, values.size - 1}
    edges = np.linspace(0, values.size, (most - 2) // 2 + 1).astype(int)
    for start, end in itertools.pairwise(edges):
        stretch = values[start:end]
        kept |= {int(start + stretch.argmin()), int(start + stretch.argmax())}
    return np.array(sorted(kept), dtype=np.intp)
