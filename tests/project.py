"""A user's folder with an archive of text, and the scripts run in it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.archive import write_zip

ROOT = Path(__file__).parents[1]

# default.yaml as the FAQ's user has it, but for sizes.
CONFIG = """\
model:
  hidden_size: 8
  num_layers: 2
  num_heads: 2
  vocab_size: 50257
  max_seq_len: 16
training:
  batch_size: 20
  max_steps: 44
  learning_rate: 2e-2
  warmup_steps: 3
  log_interval: 1
  eval_interval: 10
checkpoint:
  save_interval: 7
  background: false  # with updates of milliseconds a save in the background may be dropped
"""

ARTICLES = [f"Town {n}\n\nTown {n} has {n + 3} mills on its river." for n in range(120)]


@dataclass(frozen=True)
class Stage:
    """What a command said, and the output folder as it left it."""

    code: int
    output: str
    errors: str
    sidecars: dict[str, dict[str, Any]]
    metrics: list[dict[str, Any]]

    def losses(self) -> dict[int, float]:
        return {line["step"]: line["loss"] for line in self.metrics if line["kind"] == "train"}

    def steps(self, kind: str) -> list[int]:
        return sorted(card["step"] for card in self.sidecars.values() if card["kind"] == kind)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Project:
    """A user's folder: configs/, data/, checkpoints/."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        (folder / "configs").mkdir()
        (folder / "data" / "raw").mkdir(parents=True)
        self.write("configs/default.yaml", CONFIG)
        text = "\n\n\n".join(ARTICLES) + "\n"
        parts = {"1of2/wiki_00": text[: len(text) // 2], "2of2/wiki_00": text[len(text) // 2 :]}
        write_zip(folder / "data/raw/archive.zip", {"AllCombined.txt": text, **parts})

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def run(self, command: str, *, output_dir: str = "checkpoints", typed: str | None = None) -> Stage:
        """Run the script in this process, as `python scripts/X.py …` in the project's folder would.

        With `typed`, at a terminal at which that is typed.
        """
        python, script, *arguments = shlex.split(command.replace("\\\n", " "), comments=True)
        assert python == "python"
        output, errors, code = io.StringIO(), io.StringIO() if typed is None else Terminal(), 0
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            patch.setattr(sys, "argv", [script, *arguments])
            patch.setattr(sys, "stdin", io.StringIO() if typed is None else Terminal(typed))
            patch.delenv("CI", raising=False)
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
                try:
                    runpy.run_path(str(ROOT / script), run_name="__main__")
                except SystemExit as stop:
                    code = int(stop.code or 0)
        return self._left(output_dir, code, output.getvalue(), errors.getvalue())

    def run_process(self, command: str) -> Stage:
        """The same as a process of its own."""
        _, script, *arguments = shlex.split(command.replace("\\\n", " "), comments=True)
        done = subprocess.run(
            [sys.executable, ROOT / script, *arguments],
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        return self._left("checkpoints", done.returncode, done.stdout, done.stderr)

    def _left(self, output_dir: str, code: int, output: str, errors: str) -> Stage:
        folder = self.folder / output_dir
        sidecars = {path.stem: json.loads(path.read_text("utf-8")) for path in folder.glob("atlas_*.json")}
        log = folder / "metrics.jsonl"
        lines = log.read_text("utf-8").splitlines() if log.exists() else []
        return Stage(code, output, errors, sidecars, [json.loads(line) for line in lines])
