"""The choice of the pipeline's training text, before any package is installed.

`scripts/run_pipeline.sh` and `.ps1` run this file by its path, with any Python. The file therefore imports only the
standard library.
"""

from __future__ import annotations

import argparse
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


def choose_text(data: str | None, *, command: str, ask: Callable[[str], str] | None) -> str | None:
    """Return the path of the training text, or None for the demo.

    The path is `data` if given, else `ARCHIVE` if this file exists, else the user's answer. `ask` is None if no user
    can answer. `command` is the command that the user called, for messages.

    Raises `NoTextError` if there is no text.
    """
    if data is not None:
        data = os.path.expanduser(data)
        if reason := _why_not(data):
            raise NoTextError(
                f"--data {data}: {reason}; give a text file, a folder of text files, or an archive"
            )
        return data
    if ARCHIVE.exists():
        return str(ARCHIVE)
    if ask is None:
        raise NoTextError(
            f"{ARCHIVE}: does not exist, and --data is not set. Use your text with {command} --data FOLDER_OR_FILE, "
            f"see all steps on Python's documentation with {command} --demo, or download the FAQ's archive from "
            f"{ORIGIN}"
        )
    question = "Folder or file to train on (Enter: Python's own documentation, as a demo): "
    while answer := ask(question).strip():
        path = _path_of(answer)
        reason = _why_not(path)
        if reason is None:
            return path
        question = f"{path}: {reason}. Folder or file (Enter: the demo): "
    return None


def _path_of(answer: str) -> str:
    """Return the path that the user typed or dragged into the terminal. A terminal quotes a dragged path or escapes its
    spaces."""
    if Path(answer).exists():
        return answer
    try:
        words = shlex.split(answer, posix=os.name != "nt")
    except ValueError:  # a quote that is not closed
        words = []
    return os.path.expanduser(words[0].strip("\"'") if len(words) == 1 else answer)


def _why_not(path: str) -> str | None:
    """Return the reason why `path` cannot contain text; None if the path may contain text."""
    if not path.strip():
        return "is empty"
    try:
        if _LINK_OR_PATTERN.search(path) or Path(path).is_file():
            return None
        if Path(path).is_dir():
            return None if any(Path(path).iterdir()) else "is an empty folder"
    except OSError as error:
        return error.strerror or "cannot be read"
    return "no such file or folder"


def somebody_can_answer() -> bool:
    """Whether a user can answer: standard input and standard error are terminals, and no CI system runs the command."""
    streams = (sys.stdin, sys.stderr)  # a closed stream is None
    return all(stream and stream.isatty() for stream in streams) and not os.environ.get("CI")


def ask_person(question: str) -> str:
    """Print the question and return the line that the user types. Raises `KeyboardInterrupt` at the end of input."""
    print(question, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        print(file=sys.stderr)
        raise KeyboardInterrupt
    return line


def _main(command: str, arguments: Sequence[str]) -> int:
    """Print the option that the choice of text adds to `arguments`, if any, and return the exit code."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--data", nargs="?")
    for flag in ("--demo", "--help", "-h", "--yes"):
        parser.add_argument(flag, action="store_true")
    given, _ = parser.parse_known_args(arguments)
    if given.data is None and (given.demo or given.help or given.h):
        return 0
    try:
        ask = ask_person if somebody_can_answer() and not given.yes else None
        text = choose_text(given.data, command=command, ask=ask)
    except NoTextError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    if text is None:
        print("--demo")
    elif given.data is None:
        print(f"--data={text}")
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1], sys.argv[2:]))
