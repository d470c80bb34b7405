"""Runs small enough for a test, and whether two of them are one and the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

import torch
import yaml

from atlas.config.loader import nested, overlay
from atlas.training.checkpoint.load import load_checkpoint
from atlas.training.launch import start_run
from atlas.training.micro_batch import gradient_within_memory
from atlas.training.resume import Request, choose_start
from atlas.training.run import Run
from atlas.training.state import Result
from atlas.training.step import Gradient, Update
from atlas.training.train import train, train_step

REPOSITORY = Path(__file__).parents[1]


def layer(folder: Path, text: Path, **settings_: object) -> dict:
    """A run small enough for a test; keys with __ are dotted, as in training__max_steps=3."""
    base = {
        "device": "cpu",
        "model": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_seq_len": 16},
        "data": {"train_data": str(text), "tokenizer": "tests.toy:tokenizer"},
        "training": {
            "batch_size": 4,
            "max_steps": 6,
            "warmup_steps": 1,
            "log_interval": 1,
            "learning_rate": 1e-2,
        },
        "tracking": {"samples": 0},  # texts take longer here than the updates
        # A save in the background may be dropped where updates take milliseconds; these tests count checkpoints.
        "checkpoint": {"output_dir": str(folder), "save_interval": 100, "background": False},
    }
    for key, value in settings_.items():
        base = overlay(base, nested(key.replace("__", "."), value))
    return base


def run_for(explicit: dict, **request: object) -> Run:
    return start_run(choose_start(Request(explicit, **request)))


def trained(explicit: dict, **request: object) -> tuple[Run, Result]:
    run = run_for(explicit, **request)
    return run, train(run)


def on_updates(
    run: Run, *, before: Callable[[], object] = lambda: None, after: Callable[[], object] = lambda: None
) -> None:
    """Call something before and after each update of a run, by the clock that times it."""
    begins, ends = run.clock.update_begins, run.clock.update_ends

    def update_begins() -> None:
        before()
        begins()

    def update_ends() -> None:
        ends()
        after()

    run.clock.update_begins, run.clock.update_ends = update_begins, update_ends  # type: ignore[method-assign]


def stopped_and_resumed(explicit: dict) -> None:
    """Stop a run after its second update, and resume it to its end."""
    run = run_for(explicit)

    def stop() -> None:
        run.stop.requested = run.state.step == 2

    on_updates(run, after=stop)
    assert train(run).outcome == "interrupted"
    assert run.checkpoints.lock is not None
    run.checkpoints.lock.release()
    trained(explicit, resume="auto")


def update(run: Run, *batch: torch.Tensor) -> Update | None:
    """One update of a run, from the next sequences or from those of `batch`."""
    return train_step(run, iter([batch]) if batch else run.batches())


def gradient_of(run: Run, batch: tuple[torch.Tensor, ...]) -> Gradient:
    """The gradient of a batch, left in the parameters."""
    gradient = gradient_within_memory(run.learner, batch, run.state, stop=run.stop, say=run.log.say)
    assert gradient is not None
    return gradient


def logged(folder: Path, kind: str = "train") -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def hard_config(folder: Path, text: Path) -> dict:
    """Dropout, accumulation with an uneven split, validation, and an epoch's end on the way (at step 34)."""
    explicit = layer(folder, text, model__dropout=0.2, training__max_steps=40, training__warmup_steps=5)
    for key, value in {
        "training.batch_size": 5,
        "training.gradient_accumulation_steps": 2,
        "training.micro_batch_size": 4,
        "training.eval_interval": 8,
        "training.loss": "tests.toy:stalling_loss",
        "checkpoint.save_interval": 6,
        "checkpoint.background": True,
        "data.num_workers": 1,
    }.items():
        explicit = overlay(explicit, nested(key, value))
    return explicit


def write_config(path: Path, explicit: dict) -> Path:
    path.write_text(yaml.safe_dump(explicit), encoding="utf-8")
    return path


def config_flags(config: Path) -> list[str]:
    """The flags for a config file. Those of the code that the file names follow: Atlas does not import it otherwise."""
    explicit = yaml.safe_load(config.read_text(encoding="utf-8"))
    code = {
        "data.tokenizer": explicit.get("data", {}).get("tokenizer"),
        "training.loss": explicit.get("training", {}).get("loss"),
    }
    asked = [f"--set={key}={value}" for key, value in code.items() if value]
    return ["--config", str(config), *asked]


def start_process(
    config: Path, *arguments: str, stderr: int | IO[str] = subprocess.PIPE, **environment: str
) -> subprocess.Popen[str]:
    """`atlas train --config CONFIG ARGUMENTS` as a user's shell would start it, without a terminal."""
    variables = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(REPOSITORY), **environment}
    command = [sys.executable, "-m", "atlas", "train", *config_flags(config), *arguments]
    return subprocess.Popen(command, env=variables, stdin=subprocess.DEVNULL, stderr=stderr, text=True)


def same_bits(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_bits(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same_bits, one, other))
    return one == other


def resumes_with_the_same_bits(explicit: dict, folder: Path) -> dict:
    """Six updates, saved after the third, then again from there: the same checkpoint, whose contents are returned."""
    trained(explicit)
    complete = load_checkpoint(folder / "atlas_step_6.pt")
    losses = [line["loss"] for line in logged(folder)]
    trained(explicit, resume=str(folder / "atlas_step_3.pt"))
    again = load_checkpoint(folder / "atlas_step_6.pt")
    for key in STATE:
        assert same_bits(complete[key], again[key]), key
    assert [line["loss"] for line in logged(folder)] == losses
    return complete


STATE = (
    "model_state_dict",
    "optimizer_state_dict",
    "step",
    "sequences_consumed",
    "loss",
    "val_loss",
    "best_loss",
)


def assert_same_run(one: Path, other: Path, *, steps: int) -> None:
    """The last checkpoint's state and every number in the log but the timings, bit for bit; each step once."""
    first, second = (load_checkpoint(_last_checkpoint(folder, steps)) for folder in (one, other))
    for key in STATE:
        assert same_bits(first[key], second[key]), f"{key} differs between {one} and {other}"
    for folder in (one, other):
        assert [line["step"] for line in logged(folder)] == list(range(1, steps + 1)), (
            f"each step once: {folder}"
        )
    for kind in ("train", "validation"):
        for left, right in zip(
            lines_without_timings(one, kind), lines_without_timings(other, kind), strict=True
        ):
            assert left == right, f"{left} in {one}, {right} in {other}"


def _last_checkpoint(folder: Path, steps: int) -> Path:
    """That of the last step; where a full disk had no room for two, it is the best that was saved there."""
    last = folder / f"atlas_step_{steps}.pt"
    return last if last.exists() else folder / "atlas_best.pt"


TIMINGS = ("data_wait", "utilisation", "memory")


def lines_without_timings(folder: Path, kind: str) -> list[dict]:
    return [
        {key: value for key, value in line.items() if "second" not in key and key not in TIMINGS}
        for line in logged(folder, kind)
    ]
