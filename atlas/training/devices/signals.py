"""Ctrl-C, SIGTERM and SIGHUP set a flag that the loop reads between micro-batches; a second one ends the process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

from atlas.errors import Interrupted


class Stopped(BaseException):
    """A stop was requested: raised by `StopRequest.check`, and anywhere within `StopRequest.at_once`."""


class StopRequest:
    """While entered, the first SIGINT, SIGTERM or SIGHUP (SIGBREAK on Windows) sets `requested` instead of ending the
    process. Under `nohup` SIGHUP stays ignored.

    `say` gets a line for the user. The exit restores the handlers. Outside the main thread Python allows no handlers,
    so nothing changes there. With several ranks (`is_alone` false) a signal only sets `asked`. The ranks exchange it
    and all call `agree` at the same update.
    """

    def __init__(self, say: Callable[[str], None] = lambda line: None, *, is_alone: bool = True) -> None:
        self.asked = False
        self.requested = False
        self._is_alone = is_alone
        self._say = say
        self._raises = False
        self._previous_handlers = ExitStack()

    @contextmanager
    def at_once(self, *, enabled: bool = True) -> Iterator[None]:
        """Within this context a request raises `Stopped`, for work that does not read the flag, such as a
        compiler's."""
        self._raises = enabled and self._is_alone
        try:
            yield
        finally:
            self._raises = False

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
                number = getattr(signal, name, None)
                if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                    previous = signal.signal(number, self._handle)
                    self._previous_handlers.callback(signal.signal, number, previous)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            self._previous_handlers.close()
            raise Interrupted
        self.asked = True
        if self._is_alone:
            self.agree()
        if self._raises:
            raise Stopped

    def check(self, *, of_others: bool = False) -> None:
        """Raise `Stopped` if a stop was requested, here or, as the caller found out, on another rank."""
        if of_others and not self.requested:
            self.agree()
        if self.requested:
            raise Stopped

    def agree(self) -> None:
        """Stop, since this process or, as all ranks know, some rank was asked to."""
        self.requested = True
        self._say(
            "stopping after this micro-batch, then saving; a second request ends at once, without saving"
        )

    def __exit__(self, *error: object) -> None:
        self._previous_handlers.close()
