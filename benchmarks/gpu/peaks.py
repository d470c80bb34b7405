"""Measure the peak memory of training the largest presets, and compare it with the estimate of `atlas plan`.

Each preset trains in eager mode and with compiled blocks. The compiled blocks keep as few tensors as on a card that is
short of memory. See also `benchmarks/memory.py`.
"""

from __future__ import annotations

import functools

from gpu.figures import Figures, Setup

LIMIT = 60
PRESETS = ("default", "xlarge", "ultra")


def peak(preset: str, compiled: bool, setup: Setup, figures: Figures) -> None:
    from memory import config_of, measure

    from atlas.machine import measure_memory
    from atlas.training.memory.estimate import estimate_training_memory

    real = "nano" if setup.rehearse else preset
    config = config_of(real, None, setup.device)
    free = measure_memory(setup.device)
    parts = measure(real, None, setup.device, free, compiled=compiled and not setup.rehearse)
    if isinstance(parts, str):
        raise SystemExit(parts)
    total = sum(parts.values())
    estimated = estimate_training_memory(config, device=setup.device).total
    figures.add(
        f"{preset}, compiled" if compiled else preset,
        peak_bytes=total,
        parts=parts,
        estimated_bytes=estimated,
        error=round(estimated / total - 1, 4),
        micro_batch=config.training.batch_size,
    )


JOBS = {preset: functools.partial(peak, preset, False) for preset in PRESETS} | {
    f"{preset}, compiled": functools.partial(peak, preset, True) for preset in PRESETS
}
