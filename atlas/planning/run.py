"""The tokens, FLOPs, time and energy of a run.

For a CPU, the time of an update comes from two measurements: the rate of the CPU's matrix products, and the fraction of
this rate that training reached in a benchmark. For a GPU, `atlas.planning.speed` estimates the time from FLOPs and
memory traffic. For an Apple GPU, the fraction is assumed, not measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from atlas.config import AtlasConfig, ModelConfig
from atlas.model.cost import count_parameters, training_flops_per_token
from atlas.planning.machine import Machine
from atlas.planning.speed import update_seconds

Range = tuple[float, float]
"""The low and the high end of an estimate."""

CPU_UTILISATION = 0.65
"""Fraction of a CPU's matrix-product rate that training reaches. Measured with the preset `tiny`: 395 tokens per
second, where its matrix products alone would allow 599 (benchmarks/RESULTS.md)."""
MPS_UTILISATION = 0.35
"""Fraction of an Apple GPU's matrix-product rate that training reaches: assumed, not measured."""
SPREAD = 1.3
"""The accuracy of an estimated time. The time is reported as a range, from estimate / `SPREAD` to estimate ·
`SPREAD`."""
_UNITS = {"years": 365 * 86400, "days": 86400, "hours": 3600, "minutes": 60}  # in seconds


def utilisation(model: ModelConfig, device: str) -> float:
    """Return the fraction of the rate of matrix products that training reaches on a CPU or an Apple GPU.

    The time of matrix products grows with the square of the width C, and the time of norms and activations grows with
    C. On a CPU, benchmarks/utilisation.py measured C / (C + 200) for the widths 128, 256 and 384. For wider models, the
    fraction is assumed to stay at `CPU_UTILISATION`, the measured value of the preset `tiny`.
    """
    if device != "cpu":
        return MPS_UTILISATION
    return min(CPU_UTILISATION, model.hidden_size / (model.hidden_size + 200))


def seconds_of_update(config: AtlasConfig, machine: Machine) -> float | None:
    """Return the time of one update in seconds, without evaluations and saves, or None if the speed is not known."""
    if machine.speed is not None:
        return update_seconds(config, machine.speed)
    if machine.flops_per_second is None:
        return None
    tokens = config.training.sequences_per_update * config.model.max_seq_len
    reached = machine.flops_per_second * utilisation(config.model, machine.device)
    return tokens * training_flops_per_token(config) / reached


@dataclass(frozen=True)
class Run:
    """The plan of a run: tokens, FLOPs, time and energy; None for unknown values."""

    updates: int | None
    tokens: int | None
    """All tokens that the run reads. Repeated tokens count each time."""
    epochs: float | None
    tokens_per_parameter: float | None
    flops_per_token: int
    flops: int | None
    utilisation: float | None
    """Fraction of the machine's FLOP/s that the updates reach."""
    seconds: Range | None
    """Seconds of the updates, without evaluations and saves."""
    kilowatt_hours: Range | None


def plan_run(
    config: AtlasConfig, machine: Machine, *, updates: int | None, sequences_per_epoch: int | None = None
) -> Run:
    """Plan a run of `updates` updates (None: not known) over data with `sequences_per_epoch` sequences per epoch."""
    per_token, seconds_each = training_flops_per_token(config), seconds_of_update(config, machine)
    tokens_each = config.training.sequences_per_update * config.model.max_seq_len
    tokens = updates and updates * tokens_each
    epochs = reached = seconds = energy = None
    if seconds_each is not None and machine.flops_per_second is not None:
        reached = tokens_each * per_token / seconds_each / machine.flops_per_second
    if updates is not None and sequences_per_epoch:
        epochs = updates * config.training.sequences_per_update / sequences_per_epoch
    if updates is not None and seconds_each is not None:
        seconds = low, high = spread(updates * seconds_each)
        if machine.watts is not None:
            energy = low * machine.watts / 3.6e6, high * machine.watts / 3.6e6
    return Run(
        updates=updates,
        tokens=tokens,
        epochs=epochs,
        tokens_per_parameter=tokens and tokens / count_parameters(config.model).total,
        flops_per_token=per_token,
        flops=tokens and tokens * per_token,
        utilisation=reached,
        seconds=seconds,
        kilowatt_hours=energy,
    )


def spread(seconds: float) -> Range:
    """Return the expected range of a time that was estimated as `seconds`."""
    return seconds / SPREAD, seconds * SPREAD


def _two_digits(value: float) -> int:
    return round(value) if value < 100 else int(float(f"{value:.2g}"))


def describe_duration(seconds: Range) -> str:
    """Return a duration as text, such as `3 to 5 hours`, with at most two significant digits. The unit is the largest
    unit in which the longer time is 2 or more."""
    for name, length in _UNITS.items():
        if seconds[1] >= 2 * length:
            low, high = (_two_digits(time / length) for time in seconds)
            return f"{low:,} to {high:,} {name}"
    return "less than 2 minutes"
