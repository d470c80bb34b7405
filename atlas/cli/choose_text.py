"""Which text the pipeline trains on, decided before anything is installed.

`scripts/run_pipeline.sh` and `.ps1` run this file by its path, with any Python: it uses the standard library only, and
nothing else of Atlas.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ARCHIVE = Path("data", "raw", "archive.zip")
ORIGIN = "https://www.kaggle.com/datasets/ffatty/plaintext-wikipedia-simpleenglish"
_LINK_OR_PATTERN = re.compile(r"://|[*?\[]")


class NoTextError(Exception):
    """There is no text to train on. The message is one line: value, reason, remedy."""


def choose_text(
    data: str | None, *, command: str, ask: Callable[[str], str] | None = None
) -> tuple[str | None, bool]:
    """(path of the text, whether the demo was chosen instead): `data` if it is given, else the archive of the FAQ, else
    what a person answers. `ask` is None where nobody can answer; `command` is what the user called.

    Raises `NoTextError` if the text is not there.
    """
    if data is not None:
        data = os.path.expanduser(data)
        if reason := _why_not(data):
            raise NoTextError(f"--data {data}: {reason}; give a text file, a folder of them, or an archive")
        return data, False
    if ARCHIVE.exists():
        return str(ARCHIVE), False
    if ask is None:
        raise NoTextError(
            f"{ARCHIVE}: is not there, and no text is named. Train on your own with {command} --data FOLDER_OR_FILE, "
            f"see the whole road on Python's documentation with {command} --demo, or download the FAQ's archive from "
            f"{ORIGIN}"
        )
    question = "Folder or file to train on (Enter: Python's own documentation, as a demo): "
    while answer := ask(question).strip():
        path = _path_of(answer)
        reason = _why_not(path)
        if reason is None:
            return path, False
        question = f"{path}: {reason}. Folder or file (Enter: the demo): "
    return None, True


def _path_of(answer: str) -> str:
    """The path that a person typed, or dragged into the terminal, which quotes it or escapes its blanks."""
    if Path(answer).exists():
        return answer
    try:
        words = shlex.split(answer, posix=os.name != "nt")
    except ValueError:  # a quote that is not closed
        words = []
    return os.path.expanduser(words[0].strip("\"'") if len(words) == 1 else answer)


def _why_not(path: str) -> str | None:
    """Why there is no text at `path`; None if there may be."""
    if not path.strip():
        return "names nothing"
    try:
        if _LINK_OR_PATTERN.search(path) or Path(path).is_file():
            return None
        if Path(path).is_dir():
            return None if any(Path(path).iterdir()) else "is an empty folder"
    except OSError as error:
        return error.strerror or "cannot be read"
    return "no such file or folder"


def somebody_can_answer() -> bool:
    """Whether questions and answers go to a terminal."""
    streams = (sys.stdin, sys.stderr)  # None where they are closed
    return all(stream and stream.isatty() for stream in streams) and not os.environ.get("CI")


def ask_person(question: str) -> str:
    """One line typed at the terminal. Raises `KeyboardInterrupt` at the end of input."""
    print(question, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        print(file=sys.stderr)
        raise KeyboardInterrupt
    return line


def _main(command: str, arguments: Sequence[str]) -> int:
    """Print the options that the person's answer adds to `arguments`, one a line."""
    if {"--demo", "--help", "-h"} & set(arguments) and _value_of("--data", arguments) is None:
        return 0
    given = _value_of("--data", arguments)
    try:
        text, is_demo = choose_text(
            given,
            command=command,
            ask=ask_person if somebody_can_answer() and "--yes" not in arguments else None,
        )
    except NoTextError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    if is_demo:
        print("--demo")
    elif given is None and text:
        print(f"--data={text}")
    return 0


def _value_of(option: str, arguments: Sequence[str]) -> str | None:
    """The last value that is given, as the command takes it."""
    value = None
    for place, word in enumerate(arguments):
        if word == option and place + 1 < len(arguments):
            value = arguments[place + 1]
        elif word.startswith(f"{option}="):
            value = word.partition("=")[2]
    return value


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1], sys.argv[2:]))
