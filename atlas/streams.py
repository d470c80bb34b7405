"""Standard streams that may fail: a pipe whose reader exits, a closed terminal, a full disk, or no stream at all.

Python raises an `OSError` at each failed write, wherever the program happens to print. After `protect_streams`, the
loss of standard error interrupts nothing, since only messages are lost. The loss of standard output raises
`OutputError`, since the result of most commands is lost. After `continue_without_output`, it interrupts nothing either.
"""

from __future__ import annotations

import io
import os
import select
import sys
from typing import Any, TextIO

from atlas.errors import AtlasError


class OutputError(AtlasError):
    """Standard output cannot be written to."""


class _GuardedOutput(io.RawIOBase):
    """An output stream. After a failed write, the stream discards all output."""

    def __init__(self, stream: TextIO, name: str, *, raises: bool) -> None:
        self._stream = stream  # closes `_raw` when nothing refers to it any more
        self._raw = getattr(stream.buffer, "raw", stream.buffer)  # with `python -u`, there is no buffer
        self._name = name
        self.raises = raises
        self.lost: str | None = None
        """The name of the stream and the reason of its first failed write."""

    def write(self, data: Any) -> int:
        """Write some or all of the bytes in the buffer `data`, and return their number. Raise `OutputError` if the
        write fails and `raises` is true."""
        if not memoryview(data).nbytes:
            return 0  # the system would answer with an error; click writes nothing to see whether a stream is binary
        try:
            while (written := self._raw.write(data)) is None:
                select.select([], [self._raw], [])  # another program has made this pipe non-blocking
        except OSError as error:
            self._discard(error)
            return memoryview(data).nbytes
        return written

    def _discard(self, error: OSError) -> None:
        """Let the descriptor discard all output, also that of C++ code and of child processes."""
        if self.lost is None:
            self.lost = f"{self._name}: {error.strerror}"
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        if self.raises:
            raise OutputError(
                f"{self.lost}: the rest of the output is lost; write the output to another place"
            )

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._raw.fileno()

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        return self._raw.isatty()

    def writable(self) -> bool:
        """Return True."""
        return True


_DESCRIPTORS = {"stdout": 1, "stderr": 2}
_NAMES = {"stdout": "standard output", "stderr": "standard error"}
_guarded: dict[str, _GuardedOutput] = {}


def protect_streams(*names: str) -> None:
    """Protect `stdout` or `stderr` as the module describes. A stream that is not a file of the process stays as it is,
    for example in a notebook. Later calls do nothing."""
    for name in names:
        stream = getattr(sys, name)
        if name in _guarded or not _has_descriptor(stream, _DESCRIPTORS[name]):
            continue
        stream.flush()
        guarded = _guarded[name] = _GuardedOutput(stream, _NAMES[name], raises=name == "stdout")
        buffer = io.BufferedWriter(guarded) if hasattr(stream.buffer, "raw") else guarded
        options = {
            key: getattr(stream, key) for key in ("encoding", "errors", "line_buffering", "write_through")
        }
        setattr(sys, name, io.TextIOWrapper(buffer, **options))


def open_closed_streams() -> None:
    """Open descriptors 0 to 2 if they are closed, since otherwise the next files that the program opens would get these
    numbers, and the text for the console. Reading and writing fail, as with a closed descriptor."""
    for descriptor, flags in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_RDONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, flags), True)  # gets the lowest free number
    for name, descriptor in _DESCRIPTORS.items():
        if getattr(sys, name) is None:
            closed = io.BufferedWriter(io.FileIO(descriptor, "w", closefd=False))
            setattr(
                sys, name, io.TextIOWrapper(closed, encoding="utf-8", errors="replace", line_buffering=True)
            )


def _has_descriptor(stream: TextIO, descriptor: int) -> bool:
    try:
        return stream.fileno() == descriptor
    except (AttributeError, OSError, ValueError):
        return False


def continue_without_output() -> None:
    """From now on, a loss of standard output raises no error: what the command does is more than what it prints."""
    for stream in _guarded.values():
        stream.raises = False


def lost_streams() -> list[str]:
    """Return, for each standard stream that was lost, its name and the reason."""
    return [stream.lost for stream in _guarded.values() if stream.lost]
