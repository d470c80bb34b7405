"""What a run will take, said before any work: from its config, the size of its text, and a machine or a card."""

from atlas.planning.advice import Advice, advise, advise_on
from atlas.planning.cards import CARDS, Card, card_named, find_card
from atlas.planning.communication import ASSUMED_LINKS, LINKS, Cluster, Communication, Link, cluster_of
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
    lora_parameters,
    memory_of_a_step,
    output_folder_bytes,
    snapshot_bytes,
)
from atlas.planning.fit import largest_micro_batch, memory_advice
from atlas.planning.flops import training_flops_per_token
from atlas.planning.machine import measure_memory
from atlas.planning.presets import PresetPlan, largest_that_fits, plan_presets
from atlas.planning.run import Machine, Run, describe_duration, machine_with, plan_run, seconds_of_update
from atlas.planning.scaling import RankMemory, Scaling, scale
from atlas.planning.speed import Speed, card_speed, update_seconds
from atlas.planning.summary import Summary, summarize

__all__ = [
    "ASSUMED_LINKS",
    "ASSUMED_VOCABULARY",
    "CARDS",
    "LINKS",
    "Advice",
    "Card",
    "Cluster",
    "Communication",
    "InferenceMemory",
    "Link",
    "Machine",
    "Parameters",
    "PresetPlan",
    "RankMemory",
    "Run",
    "Scaling",
    "Speed",
    "Summary",
    "TrainingMemory",
    "advise",
    "advise_on",
    "assume_vocabulary",
    "card_named",
    "card_speed",
    "checkpoint_bytes",
    "cluster_of",
    "count_parameters",
    "describe_duration",
    "estimate_inference_memory",
    "estimate_training_memory",
    "find_card",
    "largest_micro_batch",
    "largest_that_fits",
    "lora_parameters",
    "machine_with",
    "measure_memory",
    "memory_advice",
    "memory_of_a_step",
    "output_folder_bytes",
    "plan_presets",
    "plan_run",
    "scale",
    "seconds_of_update",
    "snapshot_bytes",
    "summarize",
    "training_flops_per_token",
    "update_seconds",
]
