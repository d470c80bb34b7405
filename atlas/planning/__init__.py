"""What a run will take, said before any work: from the config alone, and what this machine has."""

from atlas.planning.advice import Advice, advise
from atlas.planning.estimate import (
    ASSUMED_VOCABULARY,
    InferenceMemory,
    Parameters,
    TrainingMemory,
    assume_vocabulary,
    checkpoint_bytes,
    count_parameters,
    estimate_inference_memory,
    estimate_training_memory,
    memory_of_a_step,
    output_folder_bytes,
    snapshot_bytes,
)
from atlas.planning.machine import measure_memory
from atlas.planning.presets import PresetPlan, largest_that_fits, plan_presets

__all__ = [
    "ASSUMED_VOCABULARY",
    "Advice",
    "InferenceMemory",
    "Parameters",
    "PresetPlan",
    "TrainingMemory",
    "advise",
    "assume_vocabulary",
    "checkpoint_bytes",
    "count_parameters",
    "estimate_inference_memory",
    "estimate_training_memory",
    "largest_that_fits",
    "measure_memory",
    "memory_of_a_step",
    "output_folder_bytes",
    "plan_presets",
    "snapshot_bytes",
]
