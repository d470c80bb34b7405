"""Measure how long a command takes to show its help, and how long training takes to finish its first step.

    python benchmarks/startup.py
    python benchmarks/startup.py --rounds 9 --sequences 32      with the preset's own updates

The figures are wall times of complete commands. In every round, all commands run in turn. The table shows medians,
without the first round, in which the commands read files from the disk.

`atlas train --config tiny` uses a dataset that is already prepared, with GPT-2's vocabulary. Its time is from the start
of the command until metrics.jsonl has the line of the first step. Atlas writes this line after the optimizer step. An
update of `tiny` has 32 sequences, and computing them is not part of the start. So here an update has one sequence of
512 tokens. The table also shows the time of this update, counted from the moment when the model and the data are ready.
Except for the help, no time can be shorter than the time of `import torch`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from results import add_record_option, recorded, version

HELP_AIM, TRAIN_AIM = 0.4, 5.0
PATIENCE = 600.0

ATLAS = [sys.executable, "-m", "atlas"]


def seconds_of(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def prepare_data(folder: Path) -> Path:
    """Create a dataset of one or two megabytes from the documentation in Python's standard library."""
    from atlas.data.text.demo import write_demo_corpus

    corpus = write_demo_corpus(folder / "corpus.jsonl")
    command = [*ATLAS, "prepare", "--input", str(corpus), "--output", str(folder / "data")]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "data"


def first_step(data: Path, output: Path, sequences: int) -> tuple[float, float]:
    """Return the seconds from the command to the end of the first step, and the seconds of this step alone. Then stop
    the run."""
    settings = {
        "data.train_data": data,
        "checkpoint.output_dir": output,
        "training.batch_size": sequences,
        "training.micro_batch_size": min(sequences, 4),
        "training.gradient_accumulation_steps": 1,
        "training.log_interval": 1,
        "device": "cpu",
    }
    command = [*ATLAS, "train", "--config", "tiny"]
    command += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    start = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, stdin=subprocess.DEVNULL)
        try:
            while (line := _first_step(output / "metrics.jsonl")) is None:
                if process.poll() is not None or time.perf_counter() - start > PATIENCE:
                    said.seek(0)
                    raise SystemExit(said.read().decode("utf-8", "replace") + "atlas train made no step")
                time.sleep(0.005)
            seconds = time.perf_counter() - start
        finally:
            process.kill()
            process.wait()
    return seconds, 1 / line["steps_per_second"]


def _first_step(path: Path) -> dict[str, Any] | None:
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError:
        return None
    records = (json.loads(line) for line in lines if line.endswith("\n"))
    return next((record for record in records if record["kind"] == "train"), None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sequences", type=int, default=1, help="sequences per update")
    add_record_option(parser)
    arguments = parser.parse_args()

    commands = {
        "`atlas --help`": [*ATLAS, "--help"],
        "`atlas train --help`": [*ATLAS, "train", "--help"],
        "`import torch`, the floor": [sys.executable, "-c", "import torch"],
    }
    if version("transformers"):
        name = "`from transformers import GPT2LMHeadModel`"
        commands[name] = [sys.executable, "-c", name.strip("`")]
    else:
        print("transformers: is not installed and left out", file=sys.stderr)
    times: dict[str, list[float]] = {}
    steps: list[float] = []
    with tempfile.TemporaryDirectory() as temporary, recorded("Starting", arguments):
        folder = Path(temporary)
        data = prepare_data(folder)
        for number in range(arguments.rounds + 1):
            measured = {name: seconds_of(command) for name, command in commands.items()}
            total, step = first_step(data, folder / f"run-{number}", arguments.sequences)
            if number > 0:
                measured["train"] = total
                for name, seconds in measured.items():
                    times.setdefault(name, []).append(seconds)
                steps.append(step)
        medians = {name: statistics.median(seconds) for name, seconds in times.items()}
        report(medians, statistics.median(steps), arguments)


def report(medians: dict[str, float], step: float, arguments: argparse.Namespace) -> None:
    total = medians.pop("train")
    print(f"medians of {arguments.rounds} rounds in turn\n")
    print("| | seconds | aim | × `import torch` |\n|---|---:|---:|---:|")
    floor = medians["`import torch`, the floor"]
    for name, seconds in medians.items():
        aim = f"{HELP_AIM}" if name == "`atlas --help`" else ""
        print(f"| {name} | {seconds:.2f} | {aim} | {seconds / floor:.2f} |")
    tokens = f"{arguments.sequences} × 512 tokens"
    name = f"`atlas train --config tiny`, to the end of its first step of {tokens}"
    print(f"| {name} | {total:.2f} | {TRAIN_AIM} | {total / floor:.2f} |")
    print(f"| of it that step | {step:.2f} | | |")
    print(f"| of it before the step | {total - step:.2f} | | {(total - step) / floor:.2f} |")


if __name__ == "__main__":
    main()
