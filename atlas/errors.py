"""The errors that the user can fix.

An `AtlasError` carries one line that names the value, the reason and the remedy. The command line prints this line and
exits with code 2. Code that calls Atlas from Python can tell from the subclass of `AtlasError` which part of Atlas
failed. `explain` returns such a line for an unexpected error that the user's files or machine caused. Any other
exception is a bug in Atlas, and the command line prints its traceback.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import traceback
from collections.abc import Iterable
from pathlib import Path

_PACKAGE = Path(__file__).parent
_FAULTS_OF_A_DISK = {errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC, errno.EROFS, errno.ESTALE}
"""Error codes of a disk that is full, broken, read-only or no longer there. `explain` needs these codes because the
`OSError` of a failed read or write contains no file name."""
_DEEPEST_CALL = 100
"""A `RecursionError` whose traceback has `_DEEPEST_CALL` or more frames of Atlas is a bug in Atlas."""


class AtlasError(Exception):
    """An error that the user can fix. The message is one line: value, reason, remedy."""


class ConfigError(AtlasError):
    """A setting that is unknown, misplaced or out of range, or a config file that cannot be read."""


class TokenizerError(AtlasError):
    """A tokenizer that cannot be loaded, trained or used."""


class DataError(AtlasError):
    """Text or a prepared dataset that cannot be read, prepared or trained on."""


class CheckpointError(AtlasError):
    """A checkpoint that is missing, damaged, or does not fit the run."""


class ExportError(AtlasError):
    """A model that cannot be exported or imported, or an exported file that failed the verification in llama.cpp."""


class EndedElsewhere(Exception):
    """Raised to end this process after another process of the run has failed and has printed the reason."""


INTERRUPTED = 130
"""The exit code of an interrupted command."""


class Interrupted(KeyboardInterrupt):
    """Raised when a signal asks the process to end.

    Atlas does not raise a plain `KeyboardInterrupt`. After a plain `KeyboardInterrupt` has passed through `exec` or
    `eval` of a string, CPython may kill its own process with SIGINT instead of returning Atlas's exit code. This
    happened in 4 of 16 runs that were interrupted during imports.
    """


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that gives a reason, or the name of the error's class.

    The line is cut to 200 characters. PyTorch's compiler first prints a line that names its backend, and gloo first
    prints a location in PyTorch's source code. The function skips both.
    """
    lines = (re.sub(r"^\[\S+\] ", "", line.strip()) for line in str(error).splitlines())
    reasons = (line for line in lines if line and not line.endswith("raised:"))
    return next(reasons, type(error).__name__)[:200]


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """Return a question that suggests the known name closest to `name`, or `otherwise` if no known name is close."""
    close = difflib.get_close_matches(name, [*known], n=1)
    return f"did you mean {close[0]}?" if close else otherwise


def explain(error: BaseException) -> str | None:
    """Return one line with value, reason and remedy for an error that the user's files or machine caused, else None.

    Such errors are `MemoryError`, some kinds of `OSError`, and a `RecursionError` in a parser that Atlas called. A
    `RecursionError` in Atlas itself is a bug. An `OSError` is explained if it names a file outside the package, or if a
    disk is full or fails.
    """
    frames = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    own = [frame for frame in frames if frame.is_relative_to(_PACKAGE)]
    place = f" (in {own[-1].relative_to(_PACKAGE.parent).as_posix()})" if own else ""
    if isinstance(error, MemoryError):
        detail = f": {error}" if str(error) else ""
        return f"out of memory{place}{detail}; use a smaller file or model, or a machine with more memory"
    if isinstance(error, RecursionError) and frames and len(own) < _DEEPEST_CALL:
        return f"an input file is nested too deeply{place}: {error}; check the files and simplify them"
    if isinstance(error, OSError):
        name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else None
        if name is not None and not Path(name).absolute().is_relative_to(_PACKAGE):
            return (
                f"{name:.200}: {error.strerror or error}{place}; check the path, its permissions and the disk"
            )
        if name is None and error.errno in _FAULTS_OF_A_DISK:
            return f"disk error: {error.strerror}{place}; free some space, or check the disk"
    return None
