"""Questions to a person, only where there is one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from unicodedata import category

import typer

_LONGEST_LINE = 2000
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def ask_or_none() -> Callable[[str], bool] | None:
    """A yes/no question with yes as default; None where nobody can answer it, so that nothing ever hangs."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()) or os.environ.get("CI"):
        return None
    return lambda question: typer.confirm(question, default=True, err=True)


def printable(text: str) -> str:
    """One line that a terminal shows and does not obey: control characters, and halves of characters, are
    written as escapes, since they may come from a stranger's file."""
    shown = "".join(ascii(c)[1:-1] if category(c) in _UNSEEN else c for c in text[:_LONGEST_LINE])
    return shown + ("…" if len(text) > _LONGEST_LINE else "")
