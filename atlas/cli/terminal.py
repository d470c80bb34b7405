"""Terminal output and questions: tables, facts, and text that is safe to print."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import typer

from atlas.cli.choose_text import somebody_can_answer
from atlas.files import on_one_line

USER_MISTAKE = 2
"""The exit code for a user's mistake."""
_LONGEST_LINE = 2000


def ask_or_none() -> Callable[[str], bool] | None:
    """Return a function that asks a yes/no question with the default yes; None if no user can answer."""
    if not somebody_can_answer():
        return None
    return lambda question: typer.confirm(question, default=True, err=True)


def say(*lines: str) -> None:
    """Print lines on standard error. Standard output contains only a command's results."""
    for line in lines:
        typer.echo(line, err=True)


def own_command() -> str:
    """Return the command for this environment's `atlas`: `atlas` if PATH finds it, else `PYTHON -m atlas`."""
    on_path = shutil.which("atlas")
    if on_path and Path(on_path).absolute().parent == Path(sys.executable).absolute().parent:
        return "atlas"
    python = sys.executable
    with suppress(ValueError):  # on Windows, a path on another drive
        python = min(python, os.path.relpath(python), key=len)
    return f"{shlex.quote(python) if os.name != 'nt' else python} -m atlas"


def printable(text: str) -> str:
    """Return the text as one line without control characters, which a terminal could execute.

    Control characters and unpaired surrogates, for example from an untrusted file, become escapes. Characters beyond
    the first `_LONGEST_LINE` are cut off.
    """
    return on_one_line(text[:_LONGEST_LINE]) + ("…" if len(text) > _LONGEST_LINE else "")


def figure(value: float) -> str:
    """Return a number as text: without decimals from 100 on, with one decimal from 1 on, else with two significant
    digits."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def print_facts(facts: Iterable[tuple[str, Any]], *, indent: str = "", width: int = 0) -> None:
    """Print a line for each fact: its name in at least `width` columns, then its value. Facts that are None or empty
    are left out."""
    rows = [(name, str(value)) for name, value in facts if value not in (None, "")]
    width = max([width, *(len(name) for name, _ in rows)])
    for name, value in rows:
        typer.echo(f"{indent}{name:<{width}}  {printable(value)}")


def gibibytes(size: int) -> str:
    """Return a size in bytes as text in GiB, or in MiB if the size is below 0.1 GiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def print_table(rows: Sequence[Sequence[str]], *, right: Iterable[int] = (), err: bool = False) -> None:
    """Print a table with columns as wide as their widest cell. `right` contains the indices of the columns that are
    aligned right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        typer.echo(printable("  ".join(cells).rstrip()), err=err)
