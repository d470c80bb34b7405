"""Ctrl-C, SIGTERM or SIGHUP sets a flag, which training reads between micro-batches. A second Ctrl-C or SIGTERM ends
the process."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

from atlas.errors import Interrupted
from atlas.process import stop_signals

_ECHO = 10.0
"""Seconds after the first signal in which a rank ignores another one. Slurm signals all processes of a job. torchrun is
one of them, and passes its signal on to the ranks, so each rank receives a request twice."""


class Stopped(BaseException):
    """A stop was requested. `StopRequest.check` raises this exception. Within `StopRequest.at_once`, the signal handler
    raises the exception immediately."""


class StopRequest:
    """A context in which the first SIGINT, SIGTERM or SIGHUP (SIGBREAK on Windows) sets `requested` instead of ending
    the process. Under `nohup`, the process still ignores SIGHUP.

    `say` receives a line for the user. The exit of the context restores the previous handlers. Python allows signal
    handlers in the main thread only, so in another thread the context does nothing. With several ranks (`is_alone` is
    false), a signal only sets `asked`. The ranks exchange this flag, and all ranks call `agree` at the same update.
    """

    def __init__(self, say: Callable[[str], None] = lambda line: None, *, is_alone: bool = True) -> None:
        self.asked = False
        self._asked_at = 0.0
        self.requested = False
        self._is_alone = is_alone
        self._say = say
        self._raises = False
        self._previous_handlers = ExitStack()

    @contextmanager
    def at_once(self, *, enabled: bool = True) -> Iterator[None]:
        """A context in which a signal raises `Stopped` immediately, for code that does not read the flag, such as a
        compiler. With several ranks, the context does nothing."""
        self._raises = enabled and self._is_alone
        try:
            yield
        finally:
            self._raises = False

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in stop_signals():
                previous = signal.signal(number, self._handle)
                self._previous_handlers.callback(signal.signal, number, previous)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            is_echo = not self._is_alone and time.monotonic() - self._asked_at < _ECHO
            # When a terminal closes, both the shell and the system send SIGHUP.
            if is_echo or number == getattr(signal, "SIGHUP", None):
                return
            self._previous_handlers.close()
            raise Interrupted
        self.asked, self._asked_at = True, time.monotonic()
        if self._is_alone:
            self.agree()
        if self._raises:
            raise Stopped

    def check(self, *, of_others: bool = False) -> None:
        """Raise `Stopped` if a stop was requested. `of_others` is true if another rank received the request."""
        if of_others and not self.requested:
            self.agree()
        if self.requested:
            raise Stopped

    def agree(self) -> None:
        """Set `requested` and inform the user. With several ranks, all ranks call this method at the same update."""
        self.requested = True
        self._say(
            "stopping after this micro-batch, then saving; a second request ends the run immediately, without saving"
        )

    def __exit__(self, *error: object) -> None:
        self._previous_handlers.close()
