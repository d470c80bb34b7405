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
    """How many sequences fit at once on this machine, as was found for this config; None if nobody tried."""
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
        training.batch_size,
        training.sequences_per_update > training.batch_size,
        training.precision,
        training.optimizer,
        training.gradient_checkpointing,
        training.compile,
        config.lora.model_dump(mode="json"),
        machine,
    ]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    return cache_folder() / "micro_batch" / f"{key}.json"
