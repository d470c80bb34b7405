"""The one true course of a tiny run: which bits its state has after each step, for each seed.

A run that is stopped and resumed must have the same bits. So every checkpoint that any run of the same settings saves
is compared with this course, whoever saved it and when.
"""

from __future__ import annotations

import hashlib
import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from atlas.data.prepare.pipeline import prepare
from tests.conftest import corpus
from tests.faults.forked import LOSS, Forked
from tests.faults.runs import Broken, sound_checkpoint

STEPS, SAVE_INTERVAL = 6, 2
DEFAULT_SEED = 1337


@dataclass(frozen=True)
class Trajectory:
    """The true course of a run by (seed, step): a hash of its state, its training loss and its validation loss."""

    states: dict[tuple[int, int], str]
    losses: dict[tuple[int, int], float]
    val_losses: dict[tuple[int, int], float]


def make_config(folder: Path, *, data: Path) -> list[str]:
    """Write `run.yaml`, the settings of a tiny run on the prepared `data`. Return the arguments that train it."""
    settings = {
        "device": "cpu",
        "model": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_seq_len": 16, "dropout": 0.1},
        "data": {"train_data": str(data), "num_workers": 0},
        "training": {
            "batch_size": 2,
            "micro_batch_size": 2,
            "max_steps": STEPS,
            "warmup_steps": 1,
            "log_interval": 1,
            "eval_interval": SAVE_INTERVAL,
            "eval_sequences": 8,
            "learning_rate": 1e-2,
        },
        "tracking": {"samples": 0},
        "checkpoint": {
            "output_dir": str(folder / "run"),
            "save_interval": SAVE_INTERVAL,
            "keep_checkpoints": 2,
            "background": False,
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return ["train", "--config", str(folder / "run.yaml"), "--set", f"training.loss={LOSS}"]


def make_dataset(folder: Path, *, words: int, shard_tokens: int = 10**6) -> Path:
    """Prepare a tiny dataset with a validation split in `folder`, and return its path."""
    text, data = folder / "text.jsonl", folder / "data"
    words_of = corpus(words).split()
    documents = (" ".join(words_of[start : start + 20]) for start in range(0, words, 20))
    text.write_text("".join(json.dumps({"text": one}) + "\n" for one in documents), encoding="utf-8")
    prepare([text], data, train_tokenizer=300, val_fraction=0.15, shard_tokens=shard_tokens, workers=1)
    return data


def finish(process: Forked) -> str:
    """Let a process run to its end, which must be a success. Return its output."""
    if process.code is None:
        process.proceed()
    if process.code != 0:
        raise Broken(f"exit code {process.code}: {process.said[-500:]}")
    return process.said


def true_course(folder: Path, arguments: list[str], seeds: range | tuple[int, ...]) -> Trajectory:
    """Train with each seed without a fault, and record every step."""
    truth = Trajectory({}, {}, {})
    every_step = {
        "checkpoint.save_interval": 1,
        "training.eval_interval": 1,
        "checkpoint.keep_checkpoints": STEPS,
    }
    changes = [word for key, value in every_step.items() for word in ("--set", f"{key}={value}")]
    for seed in seeds:
        output = folder / f"true-{seed}"
        start = [*arguments, *changes, "--output-dir", str(output), "--seed", str(seed)]
        first = Forked(start, folder / "said.txt", output)
        if first.code is not None:
            raise Broken(f"exit code {first.code}: {first.said[-500:]}")
        first.proceed(updates=1)
        first.send(signal.SIGTERM)  # saves step 0
        first.proceed()
        finish(Forked(start, folder / "said.txt", output))
        for sidecar in output.glob("atlas_*.json"):
            contents = sound_checkpoint(sidecar)
            assert contents is not None
            truth.states[seed, contents["step"]] = hash_of(contents)
        for line in map(json.loads, (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()):
            if line["kind"] == "train":
                truth.losses[seed, line["step"]] = line["loss"]
            if line["kind"] == "validation":
                truth.val_losses[seed, line["step"]] = line["val_loss"]
    return truth


def hash_of(contents: dict) -> str:
    """A hash of the state in a checkpoint: weights, optimizer state, step, and place in the data."""
    digest = hashlib.sha256()
    keys = "model_state_dict", "optimizer_state_dict", "step", "sequences_consumed"
    _add(digest, {key: contents[key] for key in keys})
    return digest.hexdigest()


def _add(digest: Any, value: object) -> None:
    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode() + value.contiguous().numpy().tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            digest.update(str(key).encode())
            _add(digest, value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            _add(digest, item)
    else:
        digest.update(repr(value).encode())
