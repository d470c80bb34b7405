"""Which text the pipeline trains on, decided before anything is installed.

`scripts/run_pipeline.sh` and `.ps1` run this file by its path, with any Python: it uses the standard library only, and
nothing else of Atlas.
"""

from __future__ import annotations

import os
import re
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
    while answer := os.path.expanduser(ask(question).strip().strip("\"'")):
        reason = _why_not(answer)
        if reason is None:
            return answer, False
        question = f"{answer}: {reason}. Folder or file (Enter: the demo): "
    return None, True


def _why_not(path: str) -> str | None:
    """Why there is no text at `path`; None if there may be."""
    if _LINK_OR_PATTERN.search(path) or Path(path).is_file():
        return None
    if Path(path).is_dir():
        return None if any(Path(path).iterdir()) else "is an empty folder"
    return "no such file or folder"


def ask_person(question: str) -> str:
    """One line typed at the terminal. Raises `KeyboardInterrupt` at the end of input."""
    print(question, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise KeyboardInterrupt
    return line


def _main(command: str, arguments: Sequence[str]) -> int:
    """Print the options that the person's answer adds to `arguments`, one a line."""
    if {"--demo", "--help", "-h"} & set(arguments) and not _value_of("--data", arguments):
        return 0
    has_terminal = sys.stdin.isatty() and sys.stderr.isatty() and not os.environ.get("CI")
    given = _value_of("--data", arguments)
    try:
        text, is_demo = choose_text(
            given, command=command, ask=ask_person if has_terminal and "--yes" not in arguments else None
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
    for word, following in zip(arguments, [*arguments[1:], None]):  # noqa: B905 - of the same length
        if word == option:
            return following
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1], sys.argv[2:]))
