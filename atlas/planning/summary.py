"""What a config needs on a machine, in one place."""

from __future__ import annotations

from dataclasses import dataclass

from atlas.config import AtlasConfig
from atlas.planning.advice import Advice, advise_on
from atlas.planning.machine import Machine
from atlas.planning.run import Run, plan_run
from atlas.training.memory.estimate import TrainingMemory, estimate_training_memory
from atlas.training.memory.fit import largest_micro_batch, memory_advice


@dataclass(frozen=True)
class Summary:
    """`advice` is None without a text, `remedies` are empty where the config fits."""

    config: AtlasConfig
    memory: TrainingMemory
    fits: bool
    largest_micro_batch: int
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
    """Summarize a config with a known vocabulary, as a run of `updates` over a text of `text_tokens`; None: unknown."""
    memory = estimate_training_memory(config, device=machine.device)
    largest = largest_micro_batch(config, machine.memory, device=machine.device)
    remedies: list[str] = []
    if memory.total > machine.memory:
        remedies = [f"--set training.micro_batch_size={largest}: fits, and gives the same result"]
        if not largest:
            remedies = memory_advice(config, device=machine.device, available=machine.memory)
    return Summary(
        config=config,
        memory=memory,
        fits=memory.total <= machine.memory,
        largest_micro_batch=largest,
        run=plan_run(config, machine, updates=updates, sequences_per_epoch=sequences_per_epoch),
        advice=advise_on(config.model, text_tokens, name="") if text_tokens else None,
        remedies=remedies,
    )
