"""Checks in forked processes: each starts in milliseconds, since its parent has imported everything."""

from __future__ import annotations

import contextlib
import gc
import os
import select
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from tests.faults.runs import Broken

Case = TypeVar("Case")


@contextlib.contextmanager
def run_in(folder: Path) -> Iterator[None]:
    """A context with `folder` as the current folder."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def check_each(cases: Sequence[Case], check: Callable[[Case], object]) -> Iterator[tuple[Case, str]]:
    """Call `check` for each case in a process of its own, one process a core. Yield each case with the message of its
    `Broken`, or an empty text."""
    gc.collect()
    gc.freeze()  # the children then share the pages of all objects
    running: dict[int, tuple[int, Case]] = {}
    waiting = list(reversed(cases))
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            case = waiting.pop()
            reader, pid = _start(check, case)
            running[reader] = pid, case
        for reader in select.select([*running], [], [])[0]:
            pid, case = running.pop(reader)
            with os.fdopen(reader, encoding="utf-8") as file:
                message = file.read()
            status = os.waitpid(pid, 0)[1]
            yield case, message or ("" if status == 0 else f"the check ended with status {status}")


def _start(check: Callable[[Case], object], case: Case) -> tuple[int, int]:
    """A pipe with what the process has to say, and the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reader)
            message = _message_of(check, case)
            os.write(writer, message.encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    return reader, pid


def _message_of(check: Callable[[Case], object], case: Case) -> str:
    try:
        check(case)
    except (Broken, AssertionError) as error:
        return str(error) or type(error).__name__
    except BaseException:
        return traceback.format_exc()
    return ""
