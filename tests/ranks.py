"""`atlas` as one rank of several, with a fault on one of them before its first restart.

    torchrun … tests/ranks.py FAULT@RANK:STEP train …

FAULT: `none`; `kill` and `hang` by a signal, `memory` (PyTorch's out of memory, in the forward pass), `memory-late` (in
a backward pass with the others), `bug`: all in the update after STEP; `save`: killed while a checkpoint of STEP or a
later one is being written; `slow`: this writing takes five seconds; `disk`: full when that of STEP is; `nan`: two
updates from STEP on have no finite loss.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from atlas.cli import main
from atlas.training import micro_batch as training
from atlas.training.checkpoint import manager as checkpoint
from atlas.training.checkpoint import shard_saver as sharded
from atlas.training.devices.world import World
from atlas.training.run import Learner
from atlas.training.state import TrainState


def before_update(step: int, fault: str) -> None:
    original = training.accumulate_gradient
    done = []

    def accumulate(learner: Learner, batch: Any, state: TrainState, **named: Any) -> Any:
        if state.step == step and not done:
            done.append(True)
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "hang":
                os.kill(os.getpid(), signal.SIGSTOP)
            if fault == "bug":
                raise ValueError("a bug")
            if fault == "nan":
                _poison(learner)
            if fault.startswith("memory"):
                _run_out(learner, in_backward=fault == "memory-late")
        return original(learner, batch, state, **named)

    training.accumulate_gradient = accumulate


def _poison(learner: Learner) -> None:
    original, begun = learner.objective.forward, []

    def forward(*arguments: Any, **named: Any) -> torch.Tensor:
        begun.append(True)
        loss = original(*arguments, **named)
        return loss * float("nan") if len(begun) <= 4 else loss  # each update has two micro-batches

    learner.objective.forward = forward  # type: ignore[method-assign]


def _run_out(learner: Learner, *, in_backward: bool) -> None:
    """In a backward pass: once this rank sums values with the others, which begins with the loss."""
    add_up, is_joint = World.all_reduce_async, []

    def joining(world: World, tensor: torch.Tensor) -> Any:
        if not in_backward or tensor.dtype == torch.float32:
            is_joint.append(True)
        return add_up(world, tensor)

    World.all_reduce_async = joining  # type: ignore[method-assign]

    def fail(*args: Any) -> None:
        if in_backward and not is_joint:
            return
        handle.remove()
        raise torch.OutOfMemoryError("no memory, by a test")

    model = learner.model
    if in_backward:
        handle = model.final_norm.register_full_backward_hook(fail)
    else:
        handle = model.final_norm.register_forward_pre_hook(fail)


def within_save(step: int, fault: str) -> None:
    """Fail where bytes are written: by the first rank to one file, or by each rank to its shard."""
    due: list[bool] = []

    def fail() -> None:
        if fault == "save":
            os.kill(os.getpid(), signal.SIGKILL)
        due.clear()
        if fault == "slow":
            return time.sleep(5)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def noting(save: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, contents: Any, kinds: Any, **named: Any) -> Any:
            if contents["step"] >= step and not (fault == "disk" and contents["step"] > step):
                due.append(True)
            return save(self, contents, kinds, **named)

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
        if fault in ("save", "slow", "disk"):
            within_save(int(step), fault)
        else:
            before_update(int(step), fault)
    sys.exit(main(sys.argv[2:]))
