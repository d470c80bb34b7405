"""Questions to a person, only where there is one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import typer


def ask_or_none() -> Callable[[str], bool] | None:
    """A yes/no question with yes as default; None where nobody can answer it, so that nothing ever hangs."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()) or os.environ.get("CI"):
        return None
    return lambda question: typer.confirm(question, default=True, err=True)
