"""Peak memory of training the largest presets, beside what `atlas plan` estimates: see `benchmarks/memory.py`."""

from __future__ import annotations

import functools

from gpu.figures import Figures, Setup

LIMIT = 50


def peak(preset: str, setup: Setup, figures: Figures) -> None:
    from memory import config_of, measure

    from atlas.planning import estimate_training_memory, measure_memory

    real = "nano" if setup.rehearse else preset
    config = config_of(real, None, setup.device)
    parts = measure(real, None, setup.device, measure_memory(setup.device))
    if isinstance(parts, str):
        raise SystemExit(parts)
    total = sum(parts.values())
    estimated = estimate_training_memory(config, device=setup.device).total
    figures.add(
        preset,
        peak_bytes=total,
        parts=parts,
        estimated_bytes=estimated,
        error=round(estimated / total - 1, 4),
        micro_batch=config.training.batch_size,
    )


JOBS = {preset: functools.partial(peak, preset) for preset in ("default", "xlarge", "ultra")}
