"""Out of memory: recognised, answered with fewer sequences at once, and remembered for this machine; so is speed. And
the garbage collector."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from atlas.config import AtlasConfig
from atlas.files import cache_folder
from atlas.training.devices.device import Runtime, describe_machine

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


@contextmanager
def collector_spares_the_run(device: torch.device) -> Iterator[Callable[[], None]]:
    """A function to call after each update. On a GPU its first call exempts all objects that exist by then from
    Python's garbage collection, until the run ends: they live as long as it does, and a full collection looks at all
    of them, which stops training for some 0.2 s with PyTorch's compiler loaded. Later objects are collected as usual.
    """
    is_frozen = device.type == "cpu"

    def after_update() -> None:
        nonlocal is_frozen
        if not is_frozen:
            is_frozen = True
            gc.collect()
            gc.freeze()

    try:
        yield after_update
    finally:
        gc.unfreeze()


def remembered_micro_batch(config: AtlasConfig, device: torch.device) -> int | None:
    """How many sequences fit at once on this machine, as was found for this config; None if nobody tried."""
    value = _read(_note(config, device), "micro_batch_size")
    return value if isinstance(value, int) and value >= 1 else None


def remember_micro_batch(config: AtlasConfig, device: torch.device, size: int) -> None:
    _keep(_note(config, device), "micro_batch_size", size)


def recall_peak_rate(runtime: Runtime) -> float | None:
    """FLOP/s that matrix products reach on this machine in the run's precision; None if nobody measured it."""
    value = _read(_speed_note(runtime), "flops_per_second")
    return value if isinstance(value, float) and 0 < value < math.inf else None


def remember_peak_rate(runtime: Runtime, rate: float) -> None:
    _keep(_speed_note(runtime), "flops_per_second", rate)


def _read(note: Path, key: str) -> Any:
    try:
        return json.loads(note.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(note: Path, key: str, value: float) -> None:
    """In Atlas's cache folder. A cache that cannot be written costs the next run one more try."""
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary = note.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps({key: value}), encoding="utf-8")
        os.replace(temporary, note)
    except OSError:
        pass


def _speed_note(runtime: Runtime) -> Path:
    """Named by all that decides how fast products are."""
    machine = describe_machine(runtime)
    facts = [machine[key] for key in ("torch", "cpu", "cpu_capability", "threads", "device", "precision")]
    return cache_folder() / "speed" / f"{_key(facts)}.json"


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
        training.sequences_per_update,
        training.precision,
        training.optimizer,
        training.gradient_checkpointing,
        training.compile,
        config.lora.model_dump(mode="json"),
        machine,
    ]
    return cache_folder() / "micro_batch" / f"{_key(facts)}.json"


def _key(facts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
