"""Find the presets that this machine, or another one, can train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from atlas.config import AtlasConfig
from atlas.config.loader import read_yaml, resolve
from atlas.config.presets import preset_names, preset_path
from atlas.model.cost import count_parameters
from atlas.training.memory.estimate import estimate_training_memory

ASSUMED_VOCABULARY = 2048
"""The assumed `vocab_size` of a config that leaves it to the dataset: the size of the demo's byte-level BPE."""


@dataclass(frozen=True)
class PresetPlan:
    """A preset, the bytes that its training needs, and whether they fit into a machine's memory."""

    name: str
    config: AtlasConfig
    parameters: int
    memory: int
    fits: bool


def assume_vocabulary(config: AtlasConfig) -> AtlasConfig:
    """Return the config with a `vocab_size`: its own, or `ASSUMED_VOCABULARY` if the config leaves it to the
    dataset."""
    if config.model.vocab_size is not None:
        return config
    return config.replace("model", vocab_size=ASSUMED_VOCABULARY)


def plan_presets(
    available: int, *, device: str, vocab_size: int | None = None, open_vocab_size: int = ASSUMED_VOCABULARY
) -> list[PresetPlan]:
    """Plan every preset, smallest first, for `available` bytes on `device` (`cpu`, `cuda` or `mps`).

    `vocab_size` replaces the `vocab_size` of every preset, as a dataset does. `open_vocab_size` is for presets without
    a `vocab_size`.
    """
    plans = []
    for name in preset_names():
        config = resolve(read_yaml(preset_path(name)))
        config = config.replace("model", vocab_size=vocab_size or config.model.vocab_size or open_vocab_size)
        memory = estimate_training_memory(config, device=device).total
        parameters = count_parameters(config.model).total
        plans.append(PresetPlan(name, config, parameters, memory, memory <= available))
    return plans


def largest_that_fits(plans: Sequence[PresetPlan]) -> PresetPlan | None:
    """Return the plan with the most parameters that fits, or None. If several are equally large, return the first,
    which trades less time for memory."""
    return max((plan for plan in plans if plan.fits), key=lambda plan: plan.parameters, default=None)
