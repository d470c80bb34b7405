"""Run `atlas train` with `tiny` in bf16 and in fp32 with the same seed, and kill and resume a run.

The run in fp32 is the reference, and is not compiled. After the same number of sequences, the losses of the resumed run
must equal those of the run that was not killed, within 1e-3.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu.figures import Figures, Setup
from gpu.training import TINY

LIMIT = 70
STEPS, SAVE_INTERVAL = 60, 30
TOLERANCE = 1e-3
SUBJECTS = ("The river", "An old mill", "A small boat", "The bridge", "Every child", "Nobody")
VERBS = ("waits for", "runs past", "counts", "remembers", "throws stones at", "hides")
OBJECTS = ("the water", "a ring", "the reeds in winter", "the surface", "its own bank", "the dark fish")


def text_file(setup: Setup) -> Path:
    """About 3 MB of made-up sentences, 100 kB in a rehearsal. They are the same every time."""
    path = setup.scratch / "text.txt"
    size = 100_000 if setup.rehearse else 3_000_000
    if not path.exists():
        generator = random.Random(0)
        sentences: list[str] = []
        while size > 0:
            number = generator.randrange(10_000)
            words = [generator.choice(part) for part in (SUBJECTS, VERBS, OBJECTS)]
            sentences.append(f"{number}. {' '.join(words)}.\n")
            size -= len(sentences[-1])
        path.write_text("".join(sentences), encoding="utf-8")
    return path


def prepare(name: str, setup: Setup, **training: Any) -> tuple[list[str], Path]:
    """The command of a new run of the preset, as a user would give it, and its folder."""
    folder = setup.scratch / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)
    settings = {
        "seed": 1,
        "device": setup.device,
        "data.train_data": text_file(setup),
        "data.tokenizer": "tests.toy:tokenizer" if setup.rehearse else "gpt2",
        "training.max_steps": STEPS,
        "training.warmup_steps": 10,
        "training.log_interval": 1,
        "tracking.samples": 0,
        "checkpoint.output_dir": folder,
        "checkpoint.save_interval": SAVE_INTERVAL,
        "checkpoint.background": "false",  # a save in the background may end after the last update
    }
    settings |= {f"training.{key}": value for key, value in training.items()}
    if setup.rehearse:
        settings |= {f"model.{key}": value for key, value in TINY.items()}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    return [sys.executable, "-m", "atlas", "train", "--config", "tiny", *words], folder


def steps(folder: Path) -> list[dict[str, Any]]:
    """The records of the updates so far. The last line may be incomplete."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in records if record["kind"] == "train"]


def add_curve(name: str, folder: Path, figures: Figures, **values: Any) -> list[float]:
    records = steps(folder)
    losses = [record["loss"] for record in records]
    if [record["step"] for record in records] != list(range(1, STEPS + 1)):
        raise SystemExit(f"{name}: the steps are {[record['step'] for record in records]}")
    figures.add(name, losses=losses, tokens=records[-1]["tokens"], **values)
    return losses


def bf16(setup: Setup, figures: Figures) -> None:
    command, folder = prepare("bf16", setup, precision=half(setup))
    subprocess.run(command, check=True)
    add_curve("bf16", folder, figures)


def half(setup: Setup) -> str:
    """Whether the device has bf16, which not every CPU has."""
    return "fp32" if setup.rehearse else "bf16"


def fp32(setup: Setup, figures: Figures) -> None:
    command, folder = prepare("fp32", setup, precision="fp32", compile="off")
    subprocess.run(command, check=True)
    losses = add_curve("fp32", folder, figures)
    if other := figures.get("bf16"):
        figures.add("bf16 beside fp32", largest_difference=difference(losses, other["losses"]))


def killed(setup: Setup, figures: Figures) -> None:
    """Kill a run with SIGKILL after a save, resume it, and compare it with the run that was not killed."""
    reference = figures.get("bf16")
    if reference is None:
        raise SystemExit("the run to compare with did not end")
    command, folder = prepare("killed", setup, precision=half(setup))
    process = subprocess.Popen(command)
    while process.poll() is None and not (
        steps(folder) and saved(folder) and last(folder) > saved(folder)[-1]
    ):
        time.sleep(0.01)
    if process.poll() is not None:
        raise SystemExit(f"the run ended with {process.returncode} before it was killed")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    killed_at, resumed_from = last(folder), saved(folder)[-1]
    subprocess.run([*command, "--resume", "auto"], check=True)
    losses = add_curve("resumed", folder, figures, killed_at=killed_at, resumed_from=resumed_from)
    worst = difference(losses[resumed_from:], reference["losses"][resumed_from:])
    same = steps(folder)[-1]["tokens"] == reference["tokens"]
    figures.add("resumed beside not killed", largest_difference=worst, same_number_of_sequences=same)
    if worst > TOLERANCE or not same:
        raise SystemExit(f"the resumed run's losses differ by {worst:.2e}, more than {TOLERANCE:.0e}")


def last(folder: Path) -> int:
    return int(steps(folder)[-1]["step"])


def saved(folder: Path) -> list[int]:
    """The steps of the checkpoints, in order."""
    return sorted(int(path.stem.rpartition("_")[2]) for path in folder.glob("atlas_step_*.pt"))


def difference(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


JOBS = {"bf16": bf16, "killed and resumed": killed, "fp32": fp32}
