"""How long a run is and how its learning rate moves. Pure functions of the config and the step."""

from __future__ import annotations

import math

from atlas.config import TrainingConfig

NO_LIMIT = 10**9


def horizon_steps(
    config: TrainingConfig, sequences_per_epoch: int, *, step: int = 0, sequences_consumed: int = 0
) -> int:
    """The update at which the run ends: the smaller of `epochs` and `max_steps`; with neither, one epoch. With
    `max_hours` alone it is not known until an update has been timed: until then `NO_LIMIT`.

    With `step` and `sequences_consumed`, the end of a run that already came that far.
    """
    epochs = config.epochs if config.epochs or config.max_steps or config.max_hours else 1
    ends = [NO_LIMIT]
    if config.max_steps:
        ends.append(config.max_steps)
    if epochs:
        remaining = max(0, epochs * sequences_per_epoch - sequences_consumed)
        ends.append(step + math.ceil(remaining / config.sequences_per_update))
    return min(ends)


def learning_rate_at(step: int, config: TrainingConfig, horizon: int) -> float:
    """The rate of update `step` (0 is the first): linear warm-up, then `schedule` down to its floor at the horizon.

    Cosine: Loshchilov & Hutter 2016, arXiv:1608.03983. Warm-up, stable, decay (wsd): Hu et al. 2024, arXiv:2404.06395.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    falling = max(1, horizon - config.warmup_steps)
    if config.schedule == "wsd":
        falling = min(falling, max(1, round(config.decay_fraction * horizon)))
    left = min(1.0, max(0.0, (horizon - step) / falling))
    if config.schedule == "cosine":
        left = 0.5 * (1 - math.cos(math.pi * left))
    floor = config.min_learning_rate_ratio
    return config.learning_rate * (floor + (1 - floor) * left)
