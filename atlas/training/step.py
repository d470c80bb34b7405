"""One update: forward and backward passes of the micro-batches, gradient clipping and the optimizer step."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from atlas.config import AtlasConfig
from atlas.data.sequences.dataset import IGNORE_INDEX
from atlas.model import add_lora, build_model
from atlas.process import lasting_blocks_apart
from atlas.training.devices.compile import compile_blocks, filled_up, refuse_failed_compilation
from atlas.training.devices.device import Runtime, rounding_generator, seed_micro_step
from atlas.training.devices.parallel import gather_full, no_sync_except_last
from atlas.training.devices.signals import StopRequest
from atlas.training.guard import Fault, check_update
from atlas.training.loss import load_loss
from atlas.training.optimizers.bf16 import step_rounding_weights
from atlas.training.run import Learner
from atlas.training.state import TrainState

Batch = Sequence[Tensor]
"""Inputs, targets and, with document masks, document numbers: (N, T) each, on the CPU."""


@dataclass(frozen=True)
class Gradient:
    """The result of `accumulate_gradient`; the gradient itself is in the parameters' `grad`.

    `loss` is the mean over the valid targets of all ranks, a scalar on the device. `num_valid` is the number of these
    targets.
    """

    loss: Tensor
    num_valid: int


@dataclass(frozen=True)
class Update:
    """The result of an update. An update with a `fault` was not applied."""

    loss: float
    grad_norm: float
    fault: Fault | None
    learning_rate: float


def fresh_learner(config: AtlasConfig, runtime: Runtime) -> Learner:
    """Return a learner with new weights, for updates outside a run."""
    model = build_model(config.model, seed=config.seed)
    if config.lora.rank:
        add_lora(model, config.lora)
    custom_loss = load_loss(config.training.loss) if config.training.loss else None
    learner = Learner(model, config, runtime, custom_loss)
    if runtime.compiles:
        compile_blocks(model)
    model.train()
    return learner


def accumulate_gradient(
    learner: Learner,
    batch: Batch,
    state: TrainState,
    *,
    stop: StopRequest,
    before_reduction: Callable[[], None] = lambda: None,
) -> Gradient:
    """Compute the gradient of a batch of (N, T) tensors in micro-batches of `state.micro_batch_size` sequences.

    The loss is the sum over the valid targets, divided by the number of valid targets in the whole update. So the split
    into micro-batches does not change the loss. The function calls `before_reduction` before the ranks sum their
    gradients. Raises `Stopped` if a stop was requested on any rank.
    """
    runtime, world, targets = learner.runtime, learner.runtime.world, batch[1]
    num_sequences = len(targets)
    size = state.micro_batch_size
    if runtime.compiles:
        size = even_split(num_sequences, size)
    clear_gradient(learner)
    counts = functools.cache(world.sums_async(_num_valid(targets), stop.asked))
    total = torch.zeros((), device=runtime.device)
    wait: Callable[[], object] = counts
    for start in range(0, num_sequences, size):
        stop.check()
        micro = [column[start : start + size] for column in batch]
        num_valid = _num_valid(micro[1])
        if num_valid == 0 and world.size == 1:
            continue
        is_last = start + size >= num_sequences
        if runtime.compiles and learner.objective.custom_loss is None:
            micro = filled_up(micro, size)
        seed_micro_step(learner.config.seed, state.step, world.rank * num_sequences + start)
        apart = nullcontext() if learner.has_computed else lasting_blocks_apart()
        with apart, no_sync_except_last(learner.wrapped, is_last=is_last):
            with runtime.autocast():
                columns = [_to_device(column, runtime.device) for column in micro]
                loss = learner.wrapped(*columns, num_valid=num_valid)
                num_valid_of_all, num_asked = counts()
                stop.check(of_others=num_asked > 0)
                loss = loss / max(1, num_valid_of_all)
            total += loss.detach()
            if is_last:
                before_reduction()
                wait = world.all_reduce_async(total)
            # PyTorch averages gradients over ranks. Multiplying the loss by the number of ranks gives the sum.
            learner.scaler.scale(loss * world.size).backward()
        learner.has_computed = True
    wait()
    return Gradient(total, int(counts()[0]))


def apply_gradient(learner: Learner, gradient: Gradient, state: TrainState, *, rate: float) -> Update:
    """Clip the gradient and apply the optimizer step with learning rate `rate`.

    If `check_update` finds a fault, the weights and the optimizer state stay unchanged. The host waits for the device
    once, to read the loss and the gradient norm.
    """
    config, optimizer, scaler = learner.config, learner.optimizer, learner.scaler
    for group in optimizer.param_groups:
        group["lr"] = rate
    if gradient.num_valid == 0:
        clear_gradient(learner)
        return Update(0.0, 0.0, None, rate)
    scaler.unscale_(optimizer)
    limit = config.training.grad_clip or math.inf
    grad_norm = torch.nn.utils.clip_grad_norm_(list(learner.model.parameters()), limit)
    grad_norm = gather_full(grad_norm, to_cpu=False)
    figures = torch.stack([gradient.loss, grad_norm.to(gradient.loss)])
    steps_by_flag = _skips_by_flag(learner)
    if steps_by_flag:
        # The optimizer changes nothing if `found_inf` is 1. So the device can continue before the host has read the
        # loss and the norm.
        optimizer.found_inf = (~figures.isfinite().all()).float()  # type: ignore[attr-defined]
        optimizer.step()
    loss, norm = figures.tolist()
    # To read the scale, the host has to wait once more, so read the scale only after an overflow.
    scale = scaler.get_scale() if scaler.is_enabled() and not math.isfinite(norm) else None
    fault = check_update(loss, norm, state=state, guard=config.guard, loss_scale=scale)
    if fault is None and not steps_by_flag:
        _step(learner, state.step)
    scaler.update()
    clear_gradient(learner)
    return Update(loss, norm, fault, rate)


def even_split(num_sequences: int, micro_batch_size: int) -> int:
    """Return the smallest micro-batch size that gives as many micro-batches as `micro_batch_size`. Compiled code then
    needs the least padding."""
    return -(-num_sequences // -(-num_sequences // micro_batch_size))


def clear_gradient(learner: Learner) -> None:
    """Free the gradients. Under DDP, set the gradients to zero instead, since DDP keeps gradients in its buckets."""
    learner.optimizer.zero_grad(set_to_none=learner.runtime.parallel != "ddp")


def _num_valid(targets: Tensor) -> int:
    return int((targets != IGNORE_INDEX).sum())


def _to_device(column: Tensor, device: torch.device) -> Tensor:
    return column.to(device, non_blocking=True)


def _skips_by_flag(learner: Learner) -> bool:
    """Whether the optimizer's kernel itself skips a faulty update: it changes nothing if the flag `found_inf` is 1.
    AdamW's kernel has this flag on a CPU and on CUDA. The flag does not cover spikes."""
    return (
        isinstance(learner.optimizer, torch.optim.AdamW)
        and learner.runtime.device.type in ("cpu", "cuda")
        and learner.runtime.parallel != "fsdp"
        and learner.runtime.weights_dtype == torch.float32
        and not learner.scaler.is_enabled()
        and learner.config.guard.spikes == "off"
    )


def _step(learner: Learner, step: int) -> None:
    config, runtime = learner.config, learner.runtime
    try:
        if runtime.weights_dtype == torch.float32:
            learner.scaler.step(learner.optimizer)
        else:
            step_rounding_weights(learner.optimizer, rounding_generator(config.seed, step, runtime.device))
    except RuntimeError as error:
        what = f"training.optimizer: {config.training.optimizer}: its step"
        instead = "start a new run with training.optimizer adafactor or muon, which need no compiler"
        refuse_failed_compilation(error, what=what, instead=instead)
        raise
