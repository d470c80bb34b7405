"""Out of memory: recognised, answered with fewer sequences at once, and remembered for this machine."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import psutil
import torch

from atlas.config import AtlasConfig
from atlas.data.folder import cache_folder
from atlas.planning import count_parameters, estimate_training_memory, largest_that_fits, plan_presets

_CPU_SIGNS = ("DefaultCPUAllocator", "not enough memory", "MPS backend out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """A GPU's allocator has a class for it, the CPU's a `RuntimeError` with its name in it."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _CPU_SIGNS)


def release_memory(device: torch.device) -> None:
    """Give back what PyTorch's allocator keeps of freed tensors."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def remembered_micro_batch(config: AtlasConfig, device: torch.device) -> int | None:
    """How many sequences fitted at once when this shape ran out of memory on this machine; None if it never did."""
    try:
        value = json.loads(_note(config, device).read_text(encoding="utf-8"))["micro_batch_size"]
        return value if isinstance(value, int) and value >= 1 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember_micro_batch(config: AtlasConfig, device: torch.device, size: int) -> None:
    """Keep it in Atlas's cache folder. A cache that cannot be written costs the next run one more try."""
    note = _note(config, device)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary = note.with_suffix(".tmp")
        temporary.write_text(json.dumps({"micro_batch_size": size}), encoding="utf-8")
        os.replace(temporary, note)
    except OSError:
        pass


def _note(config: AtlasConfig, device: torch.device) -> Path:
    """Named by all that decides how much fits: the model, the arithmetic, the device and its memory."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine = [properties.name, properties.total_memory]
    else:
        machine = [device.type, psutil.virtual_memory().total]
    training = config.training
    facts = [
        config.model.model_dump(mode="json"),
        training.precision,
        training.optimizer,
        training.gradient_checkpointing,
        training.compile,
        machine,
    ]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    return cache_folder() / "micro_batch" / f"{key}.json"


def what_would_help(config: AtlasConfig, *, device: str) -> list[str]:
    """When not even one sequence fits: what would, in the FAQ's order, each with its estimated saving."""
    training = config.training.model_copy(update={"micro_batch_size": 1})
    config = config.model_copy(update={"training": training})
    now = estimate_training_memory(config, device=device).total

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
    plans = [plan for plan in plan_presets(now - 1, device=device) if plan.parameters < parameters]
    if smaller := largest_that_fits(plans):
        less = f"{(now - smaller.memory) / 1e9:.2f} GB less"
        lines.append(f"5. a smaller model, such as --config {smaller.name}, a new run: {less}")
    if training.optimizer != "adafactor":
        less = saving("training", optimizer="adafactor")
        lines.append(f"6. --set training.optimizer=adafactor, a new run: {less}")
    return lines
