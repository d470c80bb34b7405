"""What all kinds of faults share: a run to damage, its process, and its files, read without Atlas."""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from atlas.config.loader import nested, overlay
from tests.conftest import corpus
from tests.runs import hard_config, start_process, write_config

PROGRESS = re.compile(r"^step \d+/\d+ ", re.M)
PATIENCE_S = 120.0
"""How long a process may take to its next step, on any machine; what takes longer hangs."""


class Broken(Exception):
    """A broken promise, in one line."""


@dataclass
class Run:
    """A run in `folder`: its output folder, config file and cache are side by side, with the output of its process."""

    folder: Path
    output: Path

    @property
    def said(self) -> Path:
        return self.folder / "said.txt"

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Start or resume this run in its own process, on one thread."""
        environment = {
            "OMP_NUM_THREADS": "1",
            "ATLAS_CACHE_DIR": str(self.folder / "cache"),
            "ATLAS_TEST_STALL_AT": "",
            **environment,
        }
        with open(self.said, "w", encoding="utf-8") as said:
            return start_process(self.folder / "run.yaml", *arguments, stderr=said, **environment)

    def finish(self, *arguments: str) -> str:
        """Let it run to its end. Return its output."""
        return self.wait(self.start(*arguments))

    def wait(self, process: subprocess.Popen[str]) -> str:
        """Wait for a process of this run. Return its output."""
        if (code := process.wait()) != 0:
            raise Broken(f"exit code {code} where the run should have finished: {self.last_words()}")
        return self.said.read_text(encoding="utf-8")

    def last_words(self) -> str:
        lines = self.said.read_text(encoding="utf-8", errors="replace").splitlines()
        return " / ".join(lines[-3:])


def hard_run(folder: Path, *, words: int = 970, **settings: object) -> Run:
    """A run with dropout, uneven accumulation, validation and epochs that end; keys with __ are dotted."""
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text.txt"
    text.write_text(corpus(words), encoding="utf-8")
    explicit = hard_config(folder / "run", text)
    for key, value in settings.items():
        explicit = overlay(explicit, nested(key.replace("__", "."), value))
    write_config(folder / "run.yaml", explicit)
    return Run(folder, Path(explicit["checkpoint"]["output_dir"]))


def wait_for_progress(process: subprocess.Popen[str], run: Run) -> None:
    """Wait for the first line of progress: how long a start takes differs from machine to machine."""
    deadline = time.monotonic() + PATIENCE_S
    while not PROGRESS.search(run.said.read_text(encoding="utf-8", errors="replace")):
        if process.poll() is not None:
            return
        if time.monotonic() > deadline:
            process.kill()
            process.wait()
            raise Broken(f"no progress within {PATIENCE_S:.0f} s: {run.last_words()}")
        time.sleep(0.005)


# Its files, read without Atlas


def sound_checkpoints(folder: Path) -> dict[str, int]:
    """Name → step of the checkpoints that match their sidecars, with every byte compared and every tensor read.

    Raises `Broken` for one that does not match its sidecar, and for one that matches but torch cannot read.
    """
    steps = {}
    for sidecar in sorted(folder.glob("atlas_*.json")):
        described = json.loads(sidecar.read_text(encoding="utf-8"))
        if not described.get("folder"):
            if contents := sound_checkpoint(sidecar):
                steps[f"{sidecar.stem}.pt"] = contents["step"]
            continue
        places = [folder / described["folder"] / file["name"] for file in described["files"]]
        if not all(path.exists() for path in places):
            continue  # its removal had begun
        steps[sidecar.stem] = described["step"]
        for path, file in zip(places, described["files"], strict=True):
            if hashlib.sha256(path.read_bytes()).hexdigest() != file["sha256"]:
                raise Broken(f"{path}: its bytes are none that its sidecar names")
    return steps


def sound_checkpoint(sidecar: Path) -> dict | None:
    """The contents of the checkpoint that a sidecar describes; None if its file is missing. Raises `Broken`."""
    checkpoint = sidecar.with_suffix(".pt")
    if not checkpoint.exists():
        return None  # killed between the two removals of an old checkpoint
    vouched = json.loads(sidecar.read_text(encoding="utf-8"))
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    while vouched and vouched["files"][0]["sha256"] != digest:
        vouched = vouched.get("replaces")
    if not vouched:
        raise Broken(f"{checkpoint.name}: its bytes are none that its sidecar names")
    try:
        contents: dict = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:
        raise Broken(f"{checkpoint.name}: cannot be read ({type(error).__name__})") from error
    if contents["step"] != vouched["step"]:
        raise Broken(f"{checkpoint.name}: is of step {contents['step']}, its sidecar says {vouched['step']}")
    return contents


def resumed_step(said: str) -> int:
    """The step from which a process resumed, by its output; 0 for a new run."""
    found = re.search(r"^resuming .* at step (\d+) of", said, re.M)
    return int(found[1]) if found else 0


# Commands


def shown(total: int, what: str) -> Iterator[int]:
    """The numbers below `total`, with a bar on a terminal and a line for every ten elsewhere."""
    if sys.stderr.isatty():
        yield from track(range(total), description=what, console=Console(stderr=True))
        return
    for number in range(total):
        yield number
        if (number + 1) % 10 == 0:
            print(f"{what}: {number + 1} of {total}", file=sys.stderr, flush=True)


@contextmanager
def own_folder(kind: str) -> Iterator[Path]:
    """A folder for the faults of one command, removed if all went well, else kept and named."""
    folder = Path(tempfile.mkdtemp(prefix=f"atlas-{kind}-"))
    try:
        yield folder
    except BaseException:
        print(f"what lies on the disk is kept in {folder}", file=sys.stderr)
        raise
    shutil.rmtree(folder)


def command(kind: str, run: Callable[[Path], list[str]]) -> int:
    """Run one kind of faults and print its counts. Return the exit code."""
    torch.set_num_threads(1)
    try:
        with own_folder(kind) as folder:
            lines = run(folder)
    except (Broken, AssertionError) as error:
        print(f"{kind}: BROKEN: {error}")
        return 1
    print("\n".join(lines))
    return 0


def options(kind: str, *, rounds: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m tests.faults.{kind}")
    parser.add_argument("--rounds", type=int, default=rounds, metavar="N")
    parser.add_argument(
        "--seed", type=int, default=random.randrange(1 << 32), help="left out, another each time"
    )
    return parser
