"""Where batches are tokenized: in this process, in others on this machine, or on a Ray cluster.

All give the same results in the same order; only so many batches are under way at once, so that memory stays
flat however large the text.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from atlas.data.prepare.batching import Batch, Position, read_batches
from atlas.data.prepare.split import Part, SplitRule
from atlas.data.prepare.tokenize import Encoded, Encoder
from atlas.data.prepare.workspace import WorkerKilled
from atlas.data.text.sources import Sources
from atlas.errors import DataError
from atlas.progress import say
from atlas.tokenizer import CustomTokenizer

if TYPE_CHECKING:
    from loky import ProcessPoolExecutor

_AHEAD = 3
"""Batches under way for each worker: one in work, the others waiting."""
_WORTH_A_WORKER = 4_000_000
"""Bytes of text below which starting a process costs more than it saves."""
_LOOK_SECONDS = 5.0
"""How long a result is waited for before it is looked whether a worker is gone."""

_encoder: Encoder | None = None
"""In a worker process: what its initializer was given."""


@dataclass(frozen=True)
class WorkerPool:
    """Who tokenizes: `workers` processes (None: one for each core, none for a small text)."""

    workers: int | None = None
    engine: str = "local"

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise DataError(f"--workers {self.workers}: must be at least 1")
        if self.engine not in ("local", "ray"):
            raise DataError(f"--engine {self.engine}: must be local or ray")

    def encode(
        self, sources: Sources, rule: SplitRule, start: Position, encoder: Encoder
    ) -> Iterator[tuple[Batch, Encoded]]:
        """Each batch behind `start` with its tokens, in order."""
        if self.engine == "ray":
            from atlas.data.prepare.ray_engine import encode_on_ray

            return encode_on_ray(sources.groups, rule, start, encoder, self.workers)
        return _encode_here(
            read_batches(sources.groups, rule, start), encoder, self._processes(sources, encoder)
        )

    def _processes(self, sources: Sources, encoder: Encoder) -> int:
        workers = self.workers or min(_cores(), max(1, sources.total_bytes // _WORTH_A_WORKER))
        if workers > 1 and (reason := _cannot_travel(encoder)):
            say(f"tokenizer {encoder.tokenizer.name}: stays in this process, one core tokenizes ({reason})")
            return 1
        return workers


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cannot_travel(encoder: Encoder) -> str | None:
    """Why a tokenizer of one's own cannot be sent to another process."""
    if not isinstance(encoder.tokenizer, CustomTokenizer):
        return None
    from loky.backend.reduction import dumps

    try:
        dumps(encoder)
    except Exception as error:  # whatever a stranger's object raises
        return f"{error!s:.100}"
    return None


def _encode_here(batches: Iterable[Batch], encoder: Encoder, workers: int) -> Iterator[tuple[Batch, Encoded]]:
    """By one worker: in this process itself."""
    if workers == 1:
        for batch in batches:
            yield batch, encoder(batch.parts)
        return
    with _pool(encoder, workers) as submit:
        under_way: deque[tuple[Batch, Callable[[], Encoded]]] = deque()
        for batch in batches:
            under_way.append((batch, submit(batch.parts)))
            if len(under_way) >= _AHEAD * workers:
                batch, result = under_way.popleft()
                yield batch, result()
        for batch, result in under_way:
            yield batch, result()


@contextmanager
def _pool(encoder: Encoder, workers: int) -> Iterator[Callable[[list[Part]], Callable[[], Encoded]]]:
    """Processes that are gone when this is left, however it is left. Loky's, since they do not run the user's
    script again, start without what this process has loaded, and say so when one is killed."""
    import loky

    pool = loky.ProcessPoolExecutor(
        workers,
        initializer=_begin,
        initargs=(encoder, os.getpid()),
        env={"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
    )
    finished = False

    def submit(parts: list[Part]) -> Callable[[], Encoded]:
        with _signals_held_back():  # it may start processes, and they are born deaf to Ctrl-C
            future = pool.submit(_encode, parts)
        return lambda: _result(future, pool)

    try:
        yield submit
        finished = True
    except loky.process_executor.TerminatedWorkerError:
        raise WorkerKilled(
            "a worker process was killed, as where memory runs out: run the same command again with fewer --workers; "
            "it goes on from what is done"
        ) from None
    finally:
        if not finished:
            _kill(pool)
        pool.shutdown(wait=True, kill_workers=not finished)


def _result(future: Future[Encoded], pool: ProcessPoolExecutor) -> Encoded:
    """A worker that is killed while it sends leaves half a result in the pipe, and loky would wait for the other
    half for ever: one that was gone at two looks, and still no result, is taken for that."""
    from loky.process_executor import TerminatedWorkerError

    gone: set[int] = set()
    while not wait([future], timeout=_LOOK_SECONDS).done:
        gone_before, gone = gone, {pid for pid, worker in [*pool._processes.items()] if not worker.is_alive()}
        if gone & gone_before:
            raise TerminatedWorkerError
    return future.result()


def _kill(pool: ProcessPoolExecutor) -> None:
    """With the workers dead and this process's own end of their pipe closed, nobody waits for what they send."""
    for worker in [*pool._processes.values()]:
        worker.terminate()
    pool._result_queue._writer.close()


def _begin(encoder: Encoder, parent: int) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all, and the parent decides
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    _encoder = encoder
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A parent that was killed leaves its workers waiting for it for ever."""
    while os.getppid() == parent and psutil.pid_exists(parent):  # the second is for Windows
        time.sleep(0.5)
    os._exit(1)


def _encode(parts: list[Part]) -> Encoded:
    assert _encoder is not None
    return _encoder(parts)


@contextmanager
def _signals_held_back() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
