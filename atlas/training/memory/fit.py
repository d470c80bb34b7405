"""How many sequences fit into memory at once, and what helps where not even one does."""

from __future__ import annotations

import bisect

from atlas.config import AtlasConfig
from atlas.model.cost import count_parameters
from atlas.training.memory.estimate import estimate_training_memory
from atlas.training.memory.presets import largest_that_fits, plan_presets


def largest_micro_batch(config: AtlasConfig, available: int, *, device: str) -> int:
    """The most sequences at once whose estimate is within `available` bytes, 0 if not even one is.

    Of an update that runs all its sequences at once no gradients wait while activations peak, so that it may fit
    where one of fewer at once does not.
    """
    every = config.training.sequences_per_update

    def memory(at_once: int) -> int:
        training = config.training.model_copy(update={"micro_batch_size": at_once})
        changed = config.model_copy(update={"training": training})
        return estimate_training_memory(changed, device=device).total

    if memory(every) <= available:
        return every
    more_than_ever_fit = min(every, available + 1)  # a sequence takes more than a byte
    return bisect.bisect_right(range(1, more_than_ever_fit), available, key=memory)


def memory_advice(config: AtlasConfig, *, device: str, available: int | None = None) -> list[str]:
    """When not even one sequence fits: what would, in the FAQ's order, each with its estimated saving.

    `available` bytes are there for a smaller model; left out, fewer than this one takes.
    """
    training = config.training.model_copy(update={"micro_batch_size": 1})
    config = config.model_copy(update={"training": training})
    now = estimate_training_memory(config, device=device).total
    room = now if available is None else available

    def saving(section: str, **changes: object) -> str:
        changed = config.model_copy(update={section: getattr(config, section).model_copy(update=changes)})
        return f"{(now - estimate_training_memory(changed, device=device).total) / 1e9:.2f} GB less"

    lines = [f"estimated need with one sequence at once: {now / 1e9:.2f} GB. In this order:"]
    lines.append(
        "1. batch_size: one sequence runs at once already; training.batch_size takes no memory of its own"
    )
    if training.gradient_checkpointing:
        lines.append("2. gradient checkpointing: is on already")
    else:
        less = saving("training", gradient_checkpointing=True)
        lines.append(f"2. --set training.gradient_checkpointing=true: {less}")
    half = max(1, config.model.max_seq_len // 2)
    lines.append(f"3. --set model.max_seq_len={half}, a new run: {saving('model', max_seq_len=half)}")
    lines.append("4. gradient accumulation: one sequence at once is that already")
    parameters = count_parameters(config.model).total
    plans = plan_presets(min(now - 1, room), device=device)
    if smaller := largest_that_fits([plan for plan in plans if plan.parameters < parameters]):
        less = f"{(now - smaller.memory) / 1e9:.2f} GB less"
        lines.append(f"5. a smaller model, such as --config {smaller.name}, a new run: {less}")
    if training.optimizer != "adafactor":
        less = saving("training", optimizer="adafactor")
        lines.append(f"6. --set training.optimizer=adafactor, a new run: {less}")
    return lines
