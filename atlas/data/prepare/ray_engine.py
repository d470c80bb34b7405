"""Preparation on a Ray cluster. The cluster's machines read and tokenize the sources. This machine writes the shards.

Batches and results come back in order, so the shards are the same as with one machine, bit for bit. The sources must
have the same paths, or URLs, on every machine.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from atlas.data.prepare.batching import Batch, Position, read_batches, start_ahead
from atlas.data.prepare.split import Part, SplitRule
from atlas.data.prepare.tokenize import Encoded, Encoder
from atlas.data.text.sources import Group
from atlas.errors import AtlasError, DataError

_BUNDLE_BYTES = 64 << 20
"""One task reads several small files of at most this many bytes together, since every task has a fixed cost."""
_AHEAD = 3


def encode_on_ray(
    groups: Sequence[Group], rule: SplitRule, start: Position, encoder: Encoder, workers: int | None
) -> Iterator[tuple[Batch, Encoded]]:
    """Yield each batch after `start` with its tokens, in order. `workers` defaults to the number of the cluster's
    CPUs."""
    ray = _connected()
    workers = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    read = ray.remote(num_cpus=0, num_returns="streaming", _generator_backpressure_num_objects=2 * _AHEAD)(
        _read_bundle
    )
    worker = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=-1)(_Worker)
    pool = itertools.cycle([worker.remote(encoder) for _ in range(workers)])
    readers = start_ahead(lambda bundle: read.remote(*bundle), _bundles(groups, rule, start), 2 * _AHEAD)
    batches = itertools.chain.from_iterable(readers)  # references to batches, in order
    results = start_ahead(lambda batch: next(pool).encode.remote(batch), batches, _AHEAD * workers)
    for result in results:
        yield _fetch(ray, result)


class _Worker:
    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def encode(self, batch: Batch) -> tuple[Batch, Encoded]:
        """Return the batch without its text, and the tokens. The text is no longer needed."""
        bare = [Part("", part.split, part.starts_document, part.ends_document) for part in batch.parts]
        return replace(batch, parts=bare), self._encoder(batch.parts)


def _read_bundle(groups: Sequence[Group], rule: SplitRule, start: Position, first: int) -> Iterator[Batch]:
    """Yield the batches of `groups`, whose first group has the number `first` among all groups."""
    for batch in read_batches(groups, rule, start):
        yield replace(batch, end=Position(batch.end.group + first, batch.end.part))


def _bundles(groups: Sequence[Group], rule: SplitRule, start: Position) -> Iterator[tuple[Any, ...]]:
    """Yield the arguments of `_read_bundle` for each bundle of consecutive groups, from `start` on."""
    if rule.cut_at is not None:
        yield groups, rule, start, 0
        return
    first, part = start
    while first < len(groups):
        size, stop = 0, first
        while stop < len(groups) and (stop == first or size + groups[stop].size <= _BUNDLE_BYTES):
            size += groups[stop].size
            stop += 1
        yield groups[first:stop], rule, Position(0, part), first
        first, part = stop, 0


def _fetch(ray: Any, result: Any) -> tuple[Batch, Encoded]:
    try:
        batch, encoded = ray.get(result)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, AtlasError):
            raise error.cause from None
        raise
    return batch, encoded


def _connected() -> Any:
    try:
        import ray
    except ImportError:
        raise DataError('--engine ray: needs the package ray; pip install "atlas-llm[ray]"') from None
    if not ray.is_initialized():
        ray.init(
            log_to_driver=False, logging_level=logging.WARNING
        )  # connects to RAY_ADDRESS, or starts Ray here
    return ray
