"""Commands that change the disk, each with what lies there before, and what must hold after a crash and at the end.

A scene takes place in the current folder, with relative paths, so that its copies in other folders behave the same.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

from atlas.cli import main as atlas
from atlas.data import prepare
from atlas.tokenizer import Tokenizer
from atlas.training.schedule import RunClock
from atlas.training.train import train
from tests.conftest import corpus
from tests.faults.runs import Broken
from tests.runs import layer, on_updates, run_for, write_config

STEPS = 6
RUN = Path("run")

Action = Callable[[], tuple[int, str]]
"""A command: its exit code and its output."""


def command(*words: str) -> Action:
    """`atlas` with these words, called in this process."""

    def run() -> tuple[int, str]:
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said), _known_speed():
            code = atlas([*words])
        return code, said.getvalue()

    return run


def _known_speed() -> contextlib.AbstractContextManager[object]:
    """Runs do not measure the speed of matrix products, which takes time and writes a note."""
    return mock.patch("atlas.training.logs.throughput.remembered_peak_rate", return_value=1e18)


@dataclass(frozen=True)
class Scene:
    """What lies in the current folder before, the command, and other commands that a user may run after a
    crash. `targets` are what the command makes, if it trains no run."""

    name: str
    before: Callable[[], object]
    command: Action
    targets: tuple[str, ...] = ()
    ends_with: int = 0
    """The exit code of the command."""
    is_sealed: bool = False
    """Whether a target is complete only together with a sidecar, so that a part of it is harmless."""
    again: Action | None = None
    """The command after a crash, if it is another one."""
    instead: tuple[Action, ...] = ()
    """Other commands after a crash. They need not end as the command does, and must lose nothing either."""

    @property
    def resume(self) -> Action:
        return self.again or self.command


# What lies there before


def _config(**settings: object) -> dict:
    base = {
        "model__hidden_size": 32,
        "model__dropout": 0.1,
        "training__max_steps": STEPS,
        "training__eval_interval": 2,
        "checkpoint__save_interval": 2,
        "data__num_workers": 0,
        "data__tokenizer": None,
    }
    return layer(RUN, Path("data"), **base | settings)


def _dataset(words: int = 400, output: str = "data", *, shard_tokens: int = 10**6, seed: int = 1) -> object:
    """A small dataset with a tokenizer of its own."""
    lines = corpus(words).splitlines()
    random.Random(seed).shuffle(lines)
    rows = [json.dumps({"text": f"{line} {number}."}) for number, line in enumerate(lines)]
    text = Path(f"rows-{seed}.jsonl")
    text.write_text("\n".join(rows), encoding="utf-8")
    tokenizer = Path("tokenizer.json")
    if not tokenizer.exists():
        prepare([text], "vocabulary", train_tokenizer=280)
        shutil.copy("vocabulary/tokenizer.json", tokenizer)
        shutil.rmtree("vocabulary")
    return prepare([text], output, Tokenizer.load(tokenizer), shard_tokens=shard_tokens, val_fraction=0.2)


def _ready(**settings: object) -> None:
    """A dataset and a config file."""
    _dataset()
    write_config(Path("run.yaml"), _config(**settings))


TRAIN = command("train", "--config", "run.yaml")


def _finished(**settings: object) -> None:
    """A run that is over."""
    _ready(**settings)
    code, said = TRAIN()
    if code != 0:
        raise Broken(said)


def _killed(**settings: object) -> None:
    """A run that was killed after step 5, of which the last checkpoint is of step 4."""
    _ready(**settings)
    child = os.fork()
    if child == 0:
        try:
            with contextlib.redirect_stderr(io.StringIO()), _known_speed():
                run = run_for(_config(**settings))
                on_updates(run, before=lambda: os._exit(0) if run.state.step == 5 else None)
                train(run)
        finally:
            os._exit(1)
    if os.waitpid(child, 0)[1] != 0:
        raise Broken("the run was not killed")


def _older_dataset() -> None:
    _dataset(output="out", shard_tokens=700)


def _export(*words: str) -> Action:
    return command("export", "--checkpoint", "run/atlas_best.pt", *words)


def _older_export(*words: str) -> None:
    """A finished run, and an export of another checkpoint of it."""
    _finished()
    code, said = command("export", "--checkpoint", "run/atlas_step_4.pt", *words)()
    if code != 0:
        raise Broken(said)


def _exported() -> None:
    """A folder to import."""
    _older_export("--format", "hf", "--output", "model")


def _prepare() -> tuple[int, str]:
    """`prepare` from Python, since the command has no option for the length of a shard."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        _dataset(output="out", shard_tokens=2000, seed=2)
    return 0, said.getvalue()


def _interrupted() -> tuple[int, str]:
    """A run that gets SIGTERM after its third update."""
    ends, count = RunClock.update_ends, itertools.count(1)

    def update_ends(clock: RunClock) -> None:
        ends(clock)
        if next(count) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with mock.patch.object(RunClock, "update_ends", update_ends):
        return TRAIN()


# The scenes


def _resume_older(*words: str) -> Action:
    return command("train", "--config", "run.yaml", "--learning-rate", "0.003", *words)


_GGUF = _export("--output", "model.gguf", "--no-verify", "--quantize", "f32")
_HF = _export("--format", "hf", "--output", "model")

PREPARATIONS = [
    Scene("prepare", _dataset, _prepare, targets=("out",)),
    Scene("prepare over an older dataset", _older_dataset, _prepare, targets=("out",)),
]
"""Scenes without a model, which take seconds."""

SCENES = [
    Scene("train", partial(_ready, checkpoint__keep_checkpoints=2), TRAIN),
    Scene(
        "train, slim_old and max_total",
        partial(
            _ready, checkpoint__slim_old=True, checkpoint__max_total="11MB", checkpoint__keep_checkpoints=9
        ),
        TRAIN,
    ),
    Scene(
        "train, sharded",
        partial(_ready, checkpoint__format="sharded", checkpoint__keep_checkpoints=2),
        TRAIN,
    ),
    Scene("train until SIGTERM", _ready, _interrupted, ends_with=130, again=TRAIN),
    Scene("resume after a kill", _killed, TRAIN),
    Scene(
        "--resume OLDER",
        _finished,
        _resume_older("--resume", "run/atlas_step_4.pt"),
        instead=(TRAIN,),
    ),
    Scene("--no-resume", _finished, _resume_older("--no-resume"), instead=(TRAIN,)),
    *PREPARATIONS,
    Scene("export gguf", _finished, _GGUF, targets=("model.gguf",)),
    Scene(
        "export gguf over an older one",
        partial(_older_export, "--output", "model.gguf", "--no-verify"),
        _GGUF,
        targets=("model.gguf",),
    ),
    Scene("export hf", _finished, _HF, targets=("model",)),
    Scene(
        "export hf over an older one",
        partial(_older_export, "--format", "hf", "--output", "model"),
        _HF,
        targets=("model",),
    ),
    Scene(
        "import",
        _exported,
        command("import", "model", "--output-dir", "imported"),
        targets=("imported",),
        is_sealed=True,
    ),
]
