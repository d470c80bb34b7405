"""`atlas` as one rank of several, with something that goes wrong on one of them in its first life.

    torchrun … tests/ranks.py FAULT@RANK:STEP train …

FAULT: `none`; `kill` and `hang` by a signal, `memory` (PyTorch's out of memory, in the forward pass), `memory-late` (in
a backward pass with the others), `bug`: all in the update after STEP; `save`: killed while a checkpoint of STEP or a
later one is being written; `disk`: full when that of STEP is; `nan`: two updates from STEP on have no finite
loss.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch

from atlas.cli import main
from atlas.training import step as update
from atlas.training.checkpoint import manager as checkpoint
from atlas.training.checkpoint import shard_format as sharded


def before_update(step: int, fault: str) -> None:
    whole = update.Updater._accumulate
    done = []

    def accumulate(self: update.Updater, inputs: torch.Tensor, *rest: Any) -> torch.Tensor | None:
        state = rest[2]
        if state.step == step and not done:
            done.append(True)
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "hang":
                os.kill(os.getpid(), signal.SIGSTOP)
            if fault == "bug":
                raise ValueError("a bug")
            if fault == "nan":
                _poison(self)
            if fault.startswith("memory"):
                _run_out(self, in_backward=fault == "memory-late")
        return whole(self, inputs, *rest)

    update.Updater._accumulate = accumulate  # type: ignore[method-assign]


def _poison(updater: update.Updater) -> None:
    whole, begun = updater.objective.forward, []

    def forward(*arguments: Any, **named: Any) -> torch.Tensor:
        begun.append(True)
        loss = whole(*arguments, **named)
        return loss * float("nan") if len(begun) <= 4 else loss  # each update has two micro-batches

    updater.objective.forward = forward  # type: ignore[method-assign]


def _run_out(updater: update.Updater, *, in_backward: bool) -> None:
    def fail(*args: Any) -> None:
        if in_backward and not updater._runs_with_others:
            return
        handle.remove()
        raise torch.OutOfMemoryError("no memory, by a test")

    model = updater.model
    if in_backward:
        handle = model.final_norm.register_full_backward_hook(fail)
    else:
        handle = model.final_norm.register_forward_pre_hook(fail)


def within_save(step: int, fault: str) -> None:
    """Where bytes are written: by the first rank to one file, by each to its shard."""
    due: list[bool] = []

    def fail() -> None:
        if fault == "save":
            os.kill(os.getpid(), signal.SIGKILL)
        due.clear()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def noting(save: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, contents: Any, kinds: Any, manifest: Any, **named: Any) -> Any:
            if manifest["step"] >= step and not (fault == "disk" and manifest["step"] > step):
                due.append(True)
            return save(self, contents, kinds, manifest, **named)

        return call

    def failing(write: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if due:
                fail()
            return write(*arguments, **named)

        return call

    manager, shards, writer = (
        checkpoint.CheckpointManager,
        sharded.ShardSaver,
        sharded.HuggingFaceStorageWriter,
    )
    manager.save = noting(manager.save)  # type: ignore[method-assign]
    shards.save = noting(shards.save)  # type: ignore[method-assign]
    checkpoint.write_tensors = failing(checkpoint.write_tensors)
    writer.write_data = failing(writer.write_data)  # type: ignore[method-assign]


if __name__ == "__main__":
    fault, _, place = sys.argv[1].partition("@")
    rank, _, step = place.partition(":")
    first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if fault != "none" and first_life and os.environ["RANK"] == rank:
        if fault in ("save", "disk"):
            within_save(int(step), fault)
        else:
            before_update(int(step), fault)
    sys.exit(main(sys.argv[2:]))
