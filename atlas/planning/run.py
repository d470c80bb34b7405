"""How much a run reads and computes, and how long that takes."""

from __future__ import annotations

from dataclasses import dataclass

from atlas.config import AtlasConfig, ModelConfig
from atlas.errors import AtlasError
from atlas.planning.cards import Card
from atlas.planning.estimate import count_parameters
from atlas.planning.flops import training_flops_per_token

Range = tuple[float, float]
"""From, to."""

CPU_UTILISATION = 0.65
"""Measured: 395 of the 599 tokens a second that the matrix products of `tiny` allow (benchmarks/RESULTS.md)."""
GPU_UTILISATION = 0.35
"""Assumed, not measured."""
SPREAD = 1.3
"""A time is given from so much less to so much more than the quotient: no more than that is known."""
_UNITS = {"years": 365 * 86400, "days": 86400, "hours": 3600, "minutes": 60}  # in seconds


@dataclass(frozen=True)
class Machine:
    """What a run is planned for."""

    name: str
    device: str
    """`cpu`, `cuda` or `mps`."""
    memory: int
    """Bytes."""
    flops_per_second: float | None = None
    """Of large matrix products in the precision of training; None where it is not known."""
    rate_is: str | None = None
    """Where that rate comes from."""
    bytes_per_second: float | None = None
    """Between the processor and its memory, where it is known."""
    watts: int | None = None
    """At full load, where it is known."""

    @property
    def utilisation_is(self) -> str:
        """Where the part of that rate comes from that training reaches."""
        return "measured" if self.device == "cpu" else "assumed, not measured"


def utilisation(model: ModelConfig, device: str) -> float:
    """The part of the rate of matrix products that training reaches, 0 to 1.

    Products take time with the square of the width C, norms and activations with C: on a CPU C / (C + 200) is what
    benchmarks/utilisation.py measured at 128, 256 and 384. Wider models are taken to reach no more than the last.
    """
    if device != "cpu":
        return GPU_UTILISATION
    return min(CPU_UTILISATION, model.hidden_size / (model.hidden_size + 200))


def machine_with(card: Card, *, precision: str = "auto", memory: int | None = None) -> Machine:
    """A machine with this card, and training in `training.precision` on it; `memory` bytes instead of the card's.

    Raises `AtlasError` for a precision that the card does not compute in.
    """
    if precision.startswith("bf16") and card.precision != "bf16":
        raise AtlasError(
            f"training.precision: {precision}: the {card.name} does not compute in it; use fp16 or auto"
        )
    return Machine(
        name=card.name,
        device="cuda",
        memory=card.memory if memory is None else memory,
        flops_per_second=None if precision == "fp32" else card.tflops * 1e12,
        rate_is=f"its peak in {card.precision if precision == 'auto' else precision} by Atlas's table of cards",
        bytes_per_second=card.bandwidth * 1e9,
        watts=card.watts,
    )


@dataclass(frozen=True)
class Run:
    """What a run comes to; None where that is not known."""

    updates: int | None
    tokens: int | None
    """In all, those read several times counted each time."""
    epochs: float | None
    tokens_per_parameter: float | None
    flops_per_token: int
    flops: int | None
    utilisation: float
    seconds: Range | None
    """Of the updates alone: evaluations and saves come on top."""
    kilowatt_hours: Range | None


def plan_run(
    config: AtlasConfig, machine: Machine, *, updates: int | None, sequences_per_epoch: int | None = None
) -> Run:
    """A run of so many `updates` (None: not known), of which `sequences_per_epoch` sequences are one epoch."""
    per_token, reached = training_flops_per_token(config), utilisation(config.model, machine.device)
    if updates is None:
        return Run(None, None, None, None, per_token, None, reached, None, None)
    sequences = updates * config.training.sequences_per_update
    tokens = sequences * config.model.max_seq_len
    seconds = None
    if machine.flops_per_second:
        middle = tokens * per_token / (machine.flops_per_second * reached)
        seconds = (middle / SPREAD, middle * SPREAD)
    return Run(
        updates=updates,
        tokens=tokens,
        epochs=sequences / sequences_per_epoch if sequences_per_epoch else None,
        tokens_per_parameter=tokens / count_parameters(config.model).total,
        flops_per_token=per_token,
        flops=tokens * per_token,
        utilisation=reached,
        seconds=seconds,
        kilowatt_hours=_energy(seconds, machine.watts),
    )


def _energy(seconds: Range | None, watts: int | None) -> Range | None:
    if seconds is None or watts is None:
        return None
    return seconds[0] * watts / 3.6e6, seconds[1] * watts / 3.6e6


def _two_digits(value: float) -> int:
    return round(value) if value < 100 else int(float(f"{value:.2g}"))


def describe_duration(seconds: Range) -> str:
    """`3 to 5 hours`: two digits at most, in the largest unit of which the longer time is at least two."""
    for name, length in _UNITS.items():
        if seconds[1] >= 2 * length:
            low, high = (_two_digits(time / length) for time in seconds)
            return f"{low:,} to {high:,} {name}"
    return "less than 2 minutes"
