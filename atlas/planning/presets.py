"""Which of the presets this machine, or another, can train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from atlas.config import AtlasConfig
from atlas.config.loader import read_yaml, resolve
from atlas.config.presets import preset_names, preset_path
from atlas.planning.estimate import assume_vocabulary, count_parameters, estimate_training_memory


@dataclass(frozen=True)
class PresetPlan:
    """A preset against a machine's memory, in bytes."""

    name: str
    config: AtlasConfig
    parameters: int
    memory: int
    fits: bool


def plan_presets(available: int, *, device: str, vocab_size: int | None = None) -> list[PresetPlan]:
    """Every preset, smallest first, against `available` bytes on `device` (`cpu`, `cuda` or `mps`); with a dataset's
    `vocab_size` in place of its own."""
    plans = []
    for name in preset_names():
        config = resolve(read_yaml(preset_path(name)))
        if vocab_size is not None:
            model = config.model.model_copy(update={"vocab_size": vocab_size})
            config = config.model_copy(update={"model": model})
        config = assume_vocabulary(config)
        memory = estimate_training_memory(config, device=device).total
        plans.append(
            PresetPlan(name, config, count_parameters(config.model).total, memory, memory <= available)
        )
    return plans


def largest_that_fits(plans: Sequence[PresetPlan]) -> PresetPlan | None:
    """The one with the most parameters, among equals the first, which trades less time for memory."""
    return max((plan for plan in plans if plan.fits), key=lambda plan: plan.parameters, default=None)
