"""A signal while Atlas imports its packages ends the command at once, with one line."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runs import REPOSITORY

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")

SLOW_IMPORT = """
import importlib.abc, os, signal, sys

class Signalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "{module}":
            os.kill(os.getpid(), signal.{signal})

sys.meta_path.insert(0, Signalled())
from atlas.cli import main
sys.exit(main(["info", "nano"]))
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_in_an_import_is_not_lost(name: str) -> None:
    """`numpy.matrixlib` is imported by compiled code of PyTorch, which discards errors."""
    code = SLOW_IMPORT.format(module="numpy.matrixlib", signal=name)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 130
    assert done.stderr == "interrupted\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_at_any_moment_of_the_start_ends_it(tmp_path: Path, text_file: Path, name: str) -> None:
    chance = random.Random(1)
    words = ["train", "--config", "nano", "--train-data", str(text_file), "--output-dir"]
    for number in range(20):
        with open(tmp_path / f"said-{number}.txt", "wb") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", "atlas", *words, str(tmp_path / f"run-{number}")],
                cwd=REPOSITORY,
                stdout=said,
                stderr=said,
                stdin=subprocess.DEVNULL,
            )
        time.sleep(chance.uniform(0.3, 3))
        process.send_signal(getattr(signal, name))
        assert process.wait(60) == 130
        text = (tmp_path / f"said-{number}.txt").read_text(encoding="utf-8", errors="replace")
        assert "Traceback" not in text
        assert "error:" not in text
