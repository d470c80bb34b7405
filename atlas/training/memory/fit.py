"""Find the largest micro-batch that fits into memory, and list remedies if not even one sequence fits."""

from __future__ import annotations

import bisect

from atlas.config import AtlasConfig
from atlas.model.cost import count_parameters
from atlas.training.memory.estimate import estimate_training_memory
from atlas.training.memory.presets import largest_that_fits, plan_presets


def largest_micro_batch(config: AtlasConfig, available: int, *, device: str) -> int:
    """Return the largest micro-batch whose estimate is within `available` bytes, or 0 if not even one sequence fits.

    An update of a single micro-batch holds no gradients when activations peak. So a single micro-batch with all
    sequences of the update may fit even if a smaller micro-batch does not.
    """
    every = config.training.sequences_per_update

    def memory(micro_batch: int) -> int:
        return _estimate(config, device, "training", micro_batch_size=micro_batch)

    if memory(every) <= available:
        return every
    too_many = min(every, available + 1)  # since a sequence needs more than one byte
    return bisect.bisect_right(range(1, too_many), available, key=memory)


def memory_advice(config: AtlasConfig, *, device: str, available: int | None = None) -> list[str]:
    """List the remedies if not even one sequence fits, in the order of the FAQ, each with an estimate of the saved
    memory.

    The suggested smaller model fits into `available` bytes. Without `available`, the suggested model only needs less
    memory than the model of `config`.
    """
    config = config.replace("training", micro_batch_size=1)
    training, now = config.training, estimate_training_memory(config, device=device).total

    def less(memory: int) -> str:
        return f"{(now - memory) / 1e9:.2f} GB less"

    def saving(section: str, **changes: object) -> str:
        return less(_estimate(config, device, section, **changes))

    checkpointing = "2. gradient checkpointing: already on"
    if not training.gradient_checkpointing:
        saved = saving("training", gradient_checkpointing=True)
        checkpointing = f"2. --set training.gradient_checkpointing=true: {saved}"
    half = max(1, config.model.max_seq_len // 2)
    lines = [
        f"a micro-batch of one sequence needs an estimated {now / 1e9:.2f} GB. Remedies, in this order:",
        "1. batch_size: no effect, since a micro-batch already has only one sequence",
        checkpointing,
        f"3. --set model.max_seq_len={half} (needs a new run): {saving('model', max_seq_len=half)}",
        "4. gradient accumulation: no effect, for the same reason as 1",
    ]
    parameters = count_parameters(config.model).total
    plans = plan_presets(min(now - 1, now if available is None else available), device=device)
    if smaller := largest_that_fits([plan for plan in plans if plan.parameters < parameters]):
        saved = less(smaller.memory)
        lines.append(f"5. a smaller model, such as --config {smaller.name} (needs a new run): {saved}")
    if training.optimizer != "adafactor":
        saved = saving("training", optimizer="adafactor")
        lines.append(f"6. --set training.optimizer=adafactor (needs a new run): {saved}")
    return lines


def _estimate(config: AtlasConfig, device: str, section: str, **changes: object) -> int:
    return estimate_training_memory(config.replace(section, **changes), device=device).total
