"""Detect faulty updates, which Atlas does not apply. List the possible causes if faulty updates end a run.

An update is faulty if its loss or gradient norm is not finite. With `guard.spikes`, a spike is a fault too: a loss or
gradient norm far above those of recent updates.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from atlas.config import GuardConfig, TrainingConfig
from atlas.training.checkpoint.validate import are_finite
from atlas.training.devices.device import Runtime
from atlas.training.devices.world import World
from atlas.training.state import TrainState

_WINDOW, _FEWEST = 128, 32


@dataclass(frozen=True)
class Fault:
    """The reason why Atlas does not apply an update, or rolls a run back. A benign fault is a gradient overflow that is
    normal in fp16."""

    reason: str
    is_benign: bool = False
    is_spike: bool = False


def check_update(
    loss: float, grad_norm: float, *, state: TrainState, guard: GuardConfig, loss_scale: float | None = None
) -> Fault | None:
    """Return the fault of an update with this loss and gradient norm, or None.

    `loss_scale` is the loss scale in fp16, and None in other precisions. The function uses `loss_scale` only if
    `grad_norm` is not finite. In fp16 a gradient overflow at a scale above 1 is normal: the scaler halves the scale
    until no gradient overflows. An overflow at a scale of 1 or less, or without loss scaling, means that the run
    diverges.
    """
    if not math.isfinite(loss):
        return Fault(f"loss {loss}")
    if not math.isfinite(grad_norm):
        if loss_scale is not None and loss_scale > 1:
            return Fault(f"fp16 gradient overflow at loss scale {loss_scale:g}", is_benign=True)
        if loss_scale is not None:
            return Fault(f"fp16 gradients do not fit at any loss scale (now {loss_scale:g})")
        return Fault(f"gradient norm {grad_norm}")
    if guard.spikes != "off":
        checks = ("loss", loss, state.recent_losses), ("gradient norm", grad_norm, state.recent_norms)
        for name, value, recent in checks:
            if (score := z_score(value, recent)) > guard.spike_z_score:
                reason = f"{name} {value:.4g} is {score:.1f} standard deviations above the mean"
                return Fault(reason, is_spike=True)
    return None


def weights_fault(model: nn.Module, world: World) -> Fault | None:
    """Return a fault if a weight of any rank is not finite, else None. Every rank must call this function.

    `check_update` cannot detect such weights, since the loss and the gradient norm are computed before the weights
    change.
    """
    own = [getattr(weight, "to_local", lambda weight=weight: weight)() for weight in model.parameters()]
    return Fault("weights that are not finite") if world.any(not are_finite(own)) else None


def z_score(value: float, recent: Sequence[float]) -> float:
    """Return how many standard deviations `value` lies above the mean of `recent`. Return 0 if `recent` has fewer than
    `_FEWEST` values."""
    if len(recent) < _FEWEST:
        return 0.0
    mean, deviation = statistics.fmean(recent), statistics.pstdev(recent)
    return (value - mean) / max(deviation, 1e-3 * abs(mean), 1e-12)


def count(
    state: TrainState, loss: float, grad_norm: float, fault: Fault | None, *, guard: GuardConfig
) -> None:
    """Record the loss, gradient norm and fault of an update in `state`. The recent losses and norms include spikes, so
    that a lasting shift stops counting as a spike."""
    if fault is None:
        state.loss, state.bad_in_a_row = loss, 0
        state.first_loss = loss if state.first_loss is None else state.first_loss
        state.loss_since_save.add(loss)
        state.loss_since_evaluation.add(loss)
    else:
        state.skipped += 1
        state.bad_in_a_row += not (fault.is_benign or fault.is_spike)
    if guard.spikes != "off" and (fault is None or fault.is_spike):
        state.recent_losses = [*state.recent_losses, loss][-_WINDOW:]
        state.recent_norms = [*state.recent_norms, grad_norm][-_WINDOW:]


def diagnose(training: TrainingConfig, *, rate: float, runtime: Runtime, sequences: str) -> list[str]:
    """Return the possible causes to check when a run cannot continue. Each line is one cause, and the most likely is
    first."""
    lines = [
        f"the learning rate: {rate:.2e} in the last update, {training.learning_rate:.2e} at its peak, after "
        f"{training.warmup_steps} steps of warm-up; 1e-4 to 5e-3 is usual: lower --learning-rate, or "
        "increase training.warmup_steps",
        f"the data: the last updates used {sequences}",
    ]
    if training.grad_clip == 0 or training.grad_clip > 1:
        clip = training.grad_clip or "off"
        lines.insert(1, f"gradient clipping: training.grad_clip is {clip}; 1.0 is usual")
    if runtime.precision == "fp16":
        lines.insert(0, "the precision: fp16 overflows above 65,504: --set training.precision=bf16, or fp32")
    if training.loss:
        lines.insert(0, f"your loss {training.loss}: look for a logarithm of zero or a division by zero")
    if runtime.device.type != "cpu":
        lines.append("the GPU: if the run works with --device cpu, check the GPU's memory, clocks and driver")
    return [f"to check, {number}: {line}" for number, line in enumerate(lines, start=1)]
