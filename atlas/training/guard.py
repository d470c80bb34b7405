"""Watches the numbers, so that a run that has gone wrong says so instead of saving it."""

from __future__ import annotations

import math

from atlas.errors import AtlasError


def require_finite(loss: float, grad_norm: float, *, step: int, first: int, last: int) -> None:
    """Refuse an update whose loss or gradient is not a number, before it reaches the weights.

    `first` and `last` are the positions, in the run's order, of the update's sequences.
    """
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    raise AtlasError(
        f"step {step}: loss {loss}, gradient norm {grad_norm} (sequences {first} to {last} of the run): the update "
        "was not applied and the checkpoints are good; the usual remedy is a lower --learning-rate, more "
        "warmup_steps, or precision fp32"
    )
