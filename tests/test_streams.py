"""Standard streams that fail, in small processes without PyTorch. `python -m tests.faults.console` runs commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import REPOSITORY

pytestmark = pytest.mark.skipif(os.name == "nt", reason="uses a shell and /dev/full")

PROGRAM = r"""
import sys
from pathlib import Path
from atlas.streams import continue_without_output, lost_streams, open_closed_streams, protect_streams

open_closed_streams()
protect_streams("stdout", "stderr")
if "run" in sys.argv:
    continue_without_output()
with open("file", "w") as file:
    print("messages", file=sys.stderr)
    try:
        print("results", flush=True)
    except Exception as error:
        Path("raised").write_text(f"{type(error).__name__}: {error}")
    file.write("content of the file")
print("more", file=sys.stderr)
print("more", flush=True)
Path("lost").write_text("\n".join(lost_streams()))
"""


def run(
    folder: Path, redirect: str, *arguments: str, unbuffered: bool = False
) -> tuple[list[str], str | None]:
    """Run `PROGRAM` in a shell with a redirection. Return the lost streams, and what `print` raised."""
    (folder / "program.py").write_text(PROGRAM, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1" * unbuffered}
    words = f"{sys.executable} program.py {' '.join(arguments)} {redirect}"
    done = subprocess.run(
        ["bash", "-c", words], cwd=folder, env=environment, check=False, capture_output=True
    )
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr
    assert b"ignored" not in done.stderr
    assert (folder / "file").read_text() == "content of the file"
    raised = folder / "raised"
    lost = (folder / "lost").read_text().splitlines()
    return lost, raised.read_text() if raised.exists() else None


@pytest.mark.parametrize("unbuffered", [False, True])
def test_a_lost_result_is_an_error(tmp_path: Path, unbuffered: bool) -> None:
    lost, raised = run(tmp_path, ">/dev/full", unbuffered=unbuffered)
    assert lost == ["standard output: No space left on device"]
    assert raised is not None
    assert raised.startswith("OutputError: standard output: No space left on device: ")


def test_lost_messages_are_not_an_error(tmp_path: Path) -> None:
    assert run(tmp_path, "2>/dev/full") == (["standard error: No space left on device"], None)


def test_a_run_continues_without_its_output(tmp_path: Path) -> None:
    assert run(tmp_path, ">/dev/full", "run") == (["standard output: No space left on device"], None)


@pytest.mark.parametrize("redirect", ["<&- >&- 2>&-", ">&- 2>&-", "<&- >&-", "<&- 2>&-", ">&-", "2>&-"])
def test_no_file_gets_the_text_of_a_closed_stream(tmp_path: Path, redirect: str) -> None:
    lost, raised = run(tmp_path, redirect)
    closed = [
        f"standard {name}" for name, sign in (("output", " >&-"), ("error", "2>&-")) if sign in f" {redirect}"
    ]
    assert lost == [f"{name}: Bad file descriptor" for name in closed]
    assert (raised is not None) == ("standard output" in closed)


def test_intact_streams_stay_as_they_are(tmp_path: Path) -> None:
    assert run(tmp_path, ">out 2>err") == ([], None)
    assert (tmp_path / "out").read_text() == "results\nmore\n"
    assert (tmp_path / "err").read_text() == "messages\nmore\n"
