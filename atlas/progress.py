"""Report progress on standard error, as lines and, on a terminal, as a progress bar."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich import progress
from rich.console import Console

_REFRESH_SECONDS = 0.1
Item = TypeVar("Item")


def notify(line: str) -> None:
    """Print one line to standard error, and flush it."""
    print(line, file=sys.stderr, flush=True)


def item_progress(items: Sequence[Item], description: str) -> Iterable[Item]:
    """Yield the items and show a progress bar, if standard error is a terminal."""
    console = Console(stderr=True)
    return progress.track(
        items, description, console=console, transient=True, disable=not console.is_terminal
    )


@contextmanager
def byte_progress(total: int, description: str) -> Iterator[Callable[[int], None]]:
    """Show a progress bar for `total` bytes, if standard error is a terminal. Yield a function that advances the bar by
    a number of bytes. The function may be called often: the bar changes at most ten times a second."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done: None
        return
    kinds = (progress.DownloadColumn, progress.TransferSpeedColumn, progress.TimeRemainingColumn)
    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), *(kind() for kind in kinds))
    with progress.Progress(*columns, console=console) as bar:
        task = bar.add_task(description, total=total)
        waiting, shown = 0, time.monotonic()

        def advance(done: int) -> None:
            nonlocal waiting, shown
            waiting += done
            if time.monotonic() - shown >= _REFRESH_SECONDS:
                bar.advance(task, waiting)
                waiting, shown = 0, time.monotonic()

        yield advance
        bar.advance(task, waiting)
