"""Preparation on a Ray cluster. The cluster's machines read and tokenize the sources. This machine writes the shards.

Batches and results come back in order, so the shards are the same as with one machine, bit for bit. The sources must
have the same paths, or URLs, on every machine. Machines may leave and join the cluster during the preparation. Ray runs
the tasks of a lost machine again on the other machines.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from atlas.data.prepare.batching import Batch, Position, read_batches, start_ahead
from atlas.data.prepare.split import Part, SplitRule
from atlas.data.prepare.tokenize import Encoded, Encoder
from atlas.data.prepare.workspace import WorkerKilled
from atlas.data.text.sources import Group
from atlas.errors import AtlasError, DataError, first_line

_BUNDLE_BYTES = 64 << 20
"""One task reads several small files of at most this many bytes together, since every task has a fixed cost."""
_AHEAD = 3
"""Unfinished batches per CPU: one batch is being tokenized, and two batches wait."""
_RETRIES = 20
"""How often Ray runs a task again whose process or machine was lost. With more retries, a batch that always uses up the
memory would take too long to be reported."""


def encode_on_ray(
    groups: Sequence[Group], rule: SplitRule, start: Position, encoder: Encoder, workers: int | None
) -> Iterator[tuple[Batch, Encoded]]:
    """Yield each batch after `start` with its tokens, in order. At most `workers` tasks tokenize at the same time; None
    means one task per CPU of the cluster."""
    ray = _connected()
    streaming = {"num_returns": "streaming", "_generator_backpressure_num_objects": 2 * _AHEAD}
    read = ray.remote(num_cpus=0, max_retries=_RETRIES, **streaming)(_read_bundle)
    encode = ray.remote(num_cpus=1, max_retries=_RETRIES)(_encode)
    shared = [ray.put(encoder)]  # in a list, so that Ray does not unpickle the encoder for every task
    readers = start_ahead(lambda bundle: read.remote(*bundle), _bundles(groups, rule, start), 2 * _AHEAD)
    results: deque[Any] = deque()
    running: list[Any] = []
    for batch in itertools.chain.from_iterable(readers):  # references to batches, in order
        tasks = workers or int(ray.cluster_resources().get("CPU", 1))  # machines leave and join
        while len(results) >= _AHEAD * max(1, tasks):
            yield _fetch(ray, results.popleft())
        while workers and len(running) >= workers:
            running = ray.wait(running, fetch_local=False)[1]
        results.append(encode.remote(shared, batch))
        running.append(results[-1])
    while results:
        yield _fetch(ray, results.popleft())


def _encode(shared: list[Any], batch: Batch) -> tuple[Batch, Encoded]:
    """Return the batch without its text, and the tokens. The text is no longer needed."""
    bare = [Part("", part.split, part.starts_document, part.ends_document) for part in batch.parts]
    return replace(batch, parts=bare), _encoder(shared[0])(batch.parts)


@functools.lru_cache(maxsize=1)
def _encoder(reference: Any) -> Encoder:
    """Return the encoder. A process of Ray runs many tasks, and unpickles the encoder only once."""
    import ray

    encoder: Encoder = ray.get(reference)
    return encoder


def _read_bundle(groups: Sequence[Group], rule: SplitRule, start: Position, first: int) -> Iterator[Batch]:
    """Yield the batches of `groups`, whose first group has the number `first` among all groups."""
    for batch in read_batches(groups, rule, start):
        yield replace(batch, end=Position(batch.end.group + first, batch.end.part))


def _bundles(groups: Sequence[Group], rule: SplitRule, start: Position) -> Iterator[tuple[Any, ...]]:
    """Yield the arguments of `_read_bundle` for each bundle of consecutive groups, from `start` on."""
    if rule.cuts is not None:
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
    except ray.exceptions.RayError as error:
        raise WorkerKilled(
            f"Ray could not finish a task ({first_line(error)}); check the machines of the cluster, then run the same "
            "command again to resume the work so far"
        ) from None
    return batch, encoded


def _connected() -> Any:
    try:
        import ray
    except ImportError:
        raise DataError('--engine ray: needs the package ray; pip install "atlas-llm[ray]"') from None
    if not ray.is_initialized():
        # Connect to RAY_ADDRESS, or start Ray on this machine.
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    return ray
