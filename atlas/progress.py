"""Report progress on standard error, as lines and, on a terminal, as a progress bar in bytes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress
from rich.console import Console


def notify(line: str) -> None:
    """Print one line to standard error, and flush it."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def byte_progress(total: int, description: str) -> Iterator[Callable[[int], None]]:
    """Show a progress bar for `total` bytes. Yield a function that advances the bar by a number of bytes."""
    console = Console(stderr=True)
    kinds = (progress.DownloadColumn, progress.TransferSpeedColumn, progress.TimeRemainingColumn)
    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), *(kind() for kind in kinds))
    with progress.Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.advance(task, done)
