"""Tokenize batches: in this process, in other processes on this machine, or on a Ray cluster.

All three ways give the same results in the same order. The number of unfinished batches is limited, so memory stays
constant for a text of any size.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from atlas.data.prepare.batching import Batch, Position, read_batches, start_ahead
from atlas.data.prepare.split import Part, SplitRule
from atlas.data.prepare.tokenize import Encoded, Encoder
from atlas.data.prepare.workspace import WorkerKilled
from atlas.data.text.sources import Sources
from atlas.errors import DataError
from atlas.progress import notify

if TYPE_CHECKING:
    from loky import ProcessPoolExecutor

_AHEAD = 3
"""Unfinished batches per worker: one batch is being tokenized, and two batches wait."""
_WORTH_A_WORKER = 4_000_000
"""Bytes of text per worker. With less text, starting another process takes longer than the process saves."""
_CHECK_SECONDS = 5.0
"""Seconds to wait for a result before checking whether a worker has died."""

_encoder: Encoder | None = None
"""In a worker process: the encoder that its initializer received."""


@dataclass(frozen=True)
class WorkerPool:
    """`workers` processes that tokenize. None means at most one process per core, and fewer for a small text."""

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
        """Return each batch after `start` with its tokens, in order."""
        if self.engine == "ray":
            from atlas.data.prepare.ray_engine import encode_on_ray

            return encode_on_ray(sources.groups, rule, start, encoder, self.workers)
        batches = read_batches(sources.groups, rule, start)
        workers = self.workers or min(_cores(), max(1, sources.total_bytes // _WORTH_A_WORKER))
        if workers > 1 and (reason := _cannot_travel(encoder)):
            name = encoder.tokenizer.name
            notify(f"tokenizer {name}: cannot be sent to other processes ({reason}); one core tokenizes")
            workers = 1
        return _encode_here(batches, encoder, workers)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cannot_travel(encoder: Encoder) -> str | None:
    """Return why `encoder`, which may contain a user's tokenizer, cannot be sent to another process, or None."""
    from loky.backend.reduction import dumps

    try:
        dumps(encoder)
    except Exception as error:  # any error that the user's object raises
        return f"{error!s:.100}"
    return None


def _encode_here(batches: Iterable[Batch], encoder: Encoder, workers: int) -> Iterator[tuple[Batch, Encoded]]:
    """Tokenize on this machine, in `workers` processes. If `workers` is 1, this process tokenizes."""
    if workers == 1:
        for batch in batches:
            yield batch, encoder(batch.parts)
        return
    with _pool(encoder, workers) as pool:

        def submit(batch: Batch) -> tuple[Batch, Future[Encoded]]:
            # `pool.submit` may start worker processes. Until a worker ignores SIGINT, Ctrl-C would kill it.
            with _signals_blocked():
                return batch, pool.submit(_encode, batch.parts)

        for batch, future in start_ahead(submit, batches, _AHEAD * workers):
            yield batch, _result(future, pool)


@contextmanager
def _pool(encoder: Encoder, workers: int) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of worker processes. At the end of this context, also after an exception, the processes end.

    The pool comes from loky. The new processes do not run the user's script again, and start without the modules that
    this process has loaded. The pool reports when one of its processes is killed.
    """
    import loky

    pool = loky.ProcessPoolExecutor(
        workers,
        initializer=_begin,
        initargs=(encoder, os.getpid()),
        env={"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
    )
    try:
        yield pool
    except BaseException as error:
        # Terminate the workers and close the pipe, so that no thread waits for a result that is half sent.
        for worker in [*pool._processes.values()]:
            worker.terminate()
        pool._result_queue._writer.close()
        pool.shutdown(kill_workers=True)
        if not isinstance(error, loky.process_executor.TerminatedWorkerError):
            raise
        raise WorkerKilled(
            "a worker process was killed, perhaps because memory ran out; run the same command again with fewer "
            "--workers to resume the work so far"
        ) from None
    pool.shutdown()


def _result(future: Future[Encoded], pool: ProcessPoolExecutor) -> Encoded:
    """Wait for a result and return it. Raises `TerminatedWorkerError` if a worker is dead at two checks in a row. A
    worker that is killed while sending leaves half a result in the pipe, and loky would wait forever for the rest."""
    from loky.process_executor import TerminatedWorkerError

    dead: set[int] = set()
    while not wait([future], timeout=_CHECK_SECONDS).done:
        dead_before, dead = dead, {pid for pid, worker in [*pool._processes.items()] if not worker.is_alive()}
        if dead & dead_before:
            raise TerminatedWorkerError
    return future.result()


def _begin(encoder: Encoder, parent: int) -> None:
    """Prepare a worker process."""
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes, but only the parent reacts
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    _encoder = encoder
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process when its parent has ended. Otherwise the workers of a killed parent would wait forever."""
    while os.getppid() == parent and psutil.pid_exists(parent):  # the second check is for Windows
        time.sleep(0.5)
    os._exit(1)


def _encode(parts: list[Part]) -> Encoded:
    assert _encoder is not None
    return _encoder(parts)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # A terminal that closes sends SIGHUP to all processes, but only the parent reacts.
    stop = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stop)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
