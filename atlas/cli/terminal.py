"""Questions at a terminal, if there is one; and text as a terminal shows it."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from unicodedata import category

import typer

from atlas.cli.choose_text import somebody_can_answer

USER_MISTAKE, INTERRUPTED = 2, 130
"""Exit codes."""
_LONGEST_LINE = 2000
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def ask_or_none() -> Callable[[str], bool] | None:
    """A function that asks a yes/no question, with yes as default; None if nobody can answer, so that nothing hangs."""
    if not somebody_can_answer():
        return None
    return lambda question: typer.confirm(question, default=True, err=True)


def say(*lines: str) -> None:
    """Print lines on standard error. Standard output has a command's results only."""
    for line in lines:
        typer.echo(line, err=True)


def own_command() -> str:
    """The command that calls the `atlas` of this environment: its name if it is on PATH, else through its Python."""
    on_path = shutil.which("atlas")
    if on_path and Path(on_path).absolute().parent == Path(sys.executable).absolute().parent:
        return "atlas"
    python = sys.executable
    with suppress(ValueError):  # Windows: another drive
        python = min(python, os.path.relpath(python), key=len)
    return f"{shlex.quote(python) if os.name != 'nt' else python} -m atlas"


def printable(text: str) -> str:
    """One line that a terminal shows and does not execute. Control characters and halves of characters, which may come
    from a stranger's file, become escapes."""
    shown = "".join(ascii(c)[1:-1] if category(c) in _UNSEEN else c for c in text[:_LONGEST_LINE])
    return shown + ("…" if len(text) > _LONGEST_LINE else "")


def figure(value: float) -> str:
    """A number with two or more digits, and no decimals from 100 on."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def print_facts(facts: Iterable[tuple[str, Any]], *, indent: str = "", width: int = 0) -> None:
    """Print a line for each fact, with its name in front in `width` or more columns, except for facts that are None or
    empty."""
    rows = [(name, str(value)) for name, value in facts if value not in (None, "")]
    width = max([width, *(len(name) for name, _ in rows)])
    for name, value in rows:
        typer.echo(f"{indent}{name:<{width}}  {printable(value)}")


def gibibytes(size: int) -> str:
    """A size of memory in GiB, or a small one in MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def print_table(rows: Sequence[Sequence[str]], *, right: Iterable[int] = (), err: bool = False) -> None:
    """Print columns as wide as their widest cell; those numbered in `right` are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        typer.echo(printable("  ".join(cells).rstrip()), err=err)
