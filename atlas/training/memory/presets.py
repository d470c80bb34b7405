"""Find the presets that a machine can train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from atlas.config import AtlasConfig
from atlas.config.loader import read_yaml, resolve
from atlas.config.presets import preset_names, preset_path
from atlas.model.cost import count_parameters
from atlas.training.memory.estimate import estimate_training_memory

ASSUMED_VOCABULARY = 2048
"""The `vocab_size` that estimates assume if the config leaves it to the dataset. It is the size of the demo's
byte-level BPE."""


@dataclass(frozen=True)
class PresetPlan:
    """A preset, its number of parameters, the bytes that its training needs, and whether they fit into the memory of a
    machine."""

    name: str
    config: AtlasConfig
    parameters: int
    memory: int
    fits: bool


def assume_vocabulary(config: AtlasConfig) -> AtlasConfig:
    """Return the config, with `vocab_size` set to `ASSUMED_VOCABULARY` if the config leaves it to the dataset."""
    if config.model.vocab_size is not None:
        return config
    return config.replace("model", vocab_size=ASSUMED_VOCABULARY)


def plan_presets(
    available: int,
    *,
    device: str,
    precision: str = "auto",
    vocab_size: int | None = None,
    open_vocab_size: int = ASSUMED_VOCABULARY,
) -> list[PresetPlan]:
    """Return a plan of every preset, the smallest first, for a `device` (`cpu`, `cuda` or `mps`) with `available`
    bytes.

    If `vocab_size` is given, it replaces the `vocab_size` of every preset, like the vocabulary of a dataset. Otherwise,
    presets without a `vocab_size` get `open_vocab_size`. All presets get the `precision`.
    """
    plans = []
    for name in preset_names():
        config = resolve(read_yaml(preset_path(name)))
        config = config.replace("model", vocab_size=vocab_size or config.model.vocab_size or open_vocab_size)
        config = config.replace("training", precision=precision)
        memory = estimate_training_memory(config, device=device).total
        parameters = count_parameters(config.model).total
        plans.append(PresetPlan(name, config, parameters, memory, memory <= available))
    return plans


def largest_that_fits(plans: Sequence[PresetPlan]) -> PresetPlan | None:
    """Return the plan with the most parameters among those that fit, or None if none fits. Among equally large models,
    return the first, which spends the least time to save memory."""
    return max((plan for plan in plans if plan.fits), key=lambda plan: plan.parameters, default=None)
