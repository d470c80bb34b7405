"""What the user sees meanwhile, on standard error: a line, and on a terminal a progress bar in bytes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


def say(line: str) -> None:
    """One line, at once."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def byte_progress(total: int, description: str) -> Iterator[Callable[[int], None]]:
    """Yields the function that is told how many bytes more are done."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.advance(task, done)
