"""All that a config comes to on a machine, in one place."""

from __future__ import annotations

from dataclasses import dataclass

from atlas.config import AtlasConfig
from atlas.model.cost import Parameters, count_parameters
from atlas.planning.advice import Advice, advise_on
from atlas.planning.inference import InferenceMemory, estimate_inference_memory
from atlas.planning.run import Machine, Run, plan_run
from atlas.training.memory.estimate import (
    TrainingMemory,
    checkpoint_bytes,
    estimate_training_memory,
    output_folder_bytes,
    snapshot_bytes,
)
from atlas.training.memory.fit import largest_micro_batch, memory_advice


@dataclass(frozen=True)
class Summary:
    """Memory and disk in bytes; `advice` is None without a text, `remedies` are empty where the config fits."""

    config: AtlasConfig
    parameters: Parameters
    training: TrainingMemory
    generating: InferenceMemory
    snapshot: int
    checkpoint: int
    output_folder: int
    largest_micro_batch: int
    fits: bool
    run: Run
    advice: Advice | None
    remedies: list[str]


def summarize(
    config: AtlasConfig,
    machine: Machine,
    *,
    updates: int | None,
    sequences_per_epoch: int | None = None,
    text_tokens: int | None = None,
) -> Summary:
    """A config whose vocabulary is known, as a run of `updates` over a text of `text_tokens`, as far as these are."""
    training = estimate_training_memory(config, device=machine.device)
    largest = largest_micro_batch(config, machine.memory, device=machine.device)
    fits = training.total <= machine.memory
    return Summary(
        config=config,
        parameters=count_parameters(config.model),
        training=training,
        generating=estimate_inference_memory(config.model, device=machine.device),
        snapshot=snapshot_bytes(config),
        checkpoint=checkpoint_bytes(config),
        output_folder=output_folder_bytes(config),
        largest_micro_batch=largest,
        fits=fits,
        run=plan_run(config, machine, updates=updates, sequences_per_epoch=sequences_per_epoch),
        advice=advise_on(config.model, text_tokens, name="") if text_tokens else None,
        remedies=[] if fits else _remedies(config, machine, largest),
    )


def _remedies(config: AtlasConfig, machine: Machine, largest: int) -> list[str]:
    if largest:
        return [f"--set training.micro_batch_size={largest}: fits, and gives the same result"]
    return memory_advice(config, device=machine.device, available=machine.memory)
