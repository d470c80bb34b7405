"""Progress for the user on standard error: lines, and on a terminal a progress bar in bytes."""

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
    """Show a bar for `total` bytes. Yields a function to call with the number of bytes that were just processed."""
    console = Console(stderr=True)
    kinds = (progress.DownloadColumn, progress.TransferSpeedColumn, progress.TimeRemainingColumn)
    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), *(kind() for kind in kinds))
    with progress.Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.advance(task, done)
