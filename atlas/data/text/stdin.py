"""Standard input as a source. Atlas keeps the text in a file during the preparation, because standard input can be read
only once."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from atlas.errors import DataError
from atlas.progress import notify

STANDARD_INPUT = "-"
DEFAULT_OUTPUT = Path("data", "processed", "stdin")
_CHUNK = 1 << 20


@contextmanager
def spooled_standard_input(inputs: Sequence[str | Path], output: str | Path | None) -> Iterator[Path | None]:
    """Yield a file beside `output` with the text from standard input, or None if `inputs` do not name standard input.

    Atlas reads the file several times, for example to choose the split and to train a tokenizer. After a kill, the call
    that resumes does not use the file. Instead, that call reads standard input again, from the start.
    """
    if STANDARD_INPUT not in map(str, inputs):
        yield None
        return
    if sys.stdin is None or sys.stdin.isatty():
        state = "closed" if sys.stdin is None else "a terminal"
        raise DataError(f"-: standard input is {state}; pipe text into it, or name a file")
    target = (DEFAULT_OUTPUT if output is None else Path(output)).absolute()
    made = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.with_name(f".{target.name}.stdin-{os.getpid()}")
    try:
        with path.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file, _CHUNK)
            notify(
                f"standard input: Atlas read {file.tell() / 1e6:,.1f} MB from the start, and keeps them in {path} "
                "during the work"
            )
        yield path
    finally:
        path.unlink(missing_ok=True)
        with suppress(OSError):  # a folder that is not empty ends the loop
            for folder in made:
                folder.rmdir()
