"""Detect out-of-memory errors, store the micro-batch size and the speed of this machine, and control Python's garbage
collector."""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from atlas.config import AtlasConfig
from atlas.files import cache_folder, read_limited, replacing
from atlas.training.devices.device import Runtime, describe_machine

_LARGEST_NOTE = 1000  # bytes
_CPU_SIGNS = re.compile(
    "DefaultCPUAllocator|not enough memory|MPS backend out of memory|could not (create|execute) a primitive(?! desc)"
)
"""The messages of PyTorch's allocators and of oneDNN. A primitive descriptor fails for other reasons."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` means that memory ran out. On a CPU, PyTorch raises a general `RuntimeError`, and only the
    message shows the reason."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _CPU_SIGNS.search(str(error)) is not None


def release_memory(device: torch.device) -> None:
    """Make PyTorch's allocator release the GPU memory of freed tensors, which the allocator caches."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def collector_spares_the_run(device: torch.device) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each update. On a GPU, the first call exempts all existing objects from Python's
    garbage collection until the context ends.

    These objects live as long as the run. A full collection would visit all of them, and stop training for about 0.2 s
    if PyTorch's compiler is loaded. Objects that are created later are collected as usual.
    """

    @functools.cache  # so that only the first call has an effect
    def after_update() -> None:
        if device.type != "cpu":
            gc.collect()
            gc.freeze()

    try:
        yield after_update
    finally:
        gc.unfreeze()


def remembered_micro_batch(config: AtlasConfig, runtime: Runtime) -> int | None:
    """Return the micro-batch size that an earlier run stored for this config and machine, or None if no run has stored
    one."""
    value = _read(_fit_note(config, runtime), "micro_batch_size")
    return value if isinstance(value, int) and value >= 1 else None


def remember_micro_batch(config: AtlasConfig, runtime: Runtime, size: int) -> None:
    """Store the micro-batch size that fits into memory, for later runs."""
    _write(_fit_note(config, runtime), "micro_batch_size", size)


def remembered_peak_rate(runtime: Runtime) -> float | None:
    """Return the FLOP/s of matrix products on this machine in the run's precision, or None if no run has stored a
    measurement."""
    value = _read(_speed_note(runtime), "flops_per_second")
    return value if isinstance(value, float) and 0 < value < math.inf else None


def remember_peak_rate(runtime: Runtime, rate: float) -> None:
    """Store the FLOP/s of matrix products, for later runs."""
    _write(_speed_note(runtime), "flops_per_second", rate)


def _read(note: Path, key: str) -> Any:
    try:
        return json.loads(read_limited(note, limit=_LARGEST_NOTE))[key]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _write(note: Path, key: str, value: float) -> None:
    """Write `value` to a file in Atlas's cache folder. If the write fails, the next run measures the value again."""
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        with replacing(note) as temporary:
            temporary.write_text(json.dumps({key: value}), encoding="utf-8")


def _speed_note(runtime: Runtime) -> Path:
    """Return the path of the file that stores the measured speed. The file's name is a hash of everything that affects
    the speed."""
    machine = describe_machine(runtime)
    facts = [machine[key] for key in ("torch", "cpu", "cpu_capability", "threads", "device", "precision")]
    return _note("speed", facts)


def _fit_note(config: AtlasConfig, runtime: Runtime) -> Path:
    """Return the path of the file that stores the micro-batch size. The file's name is a hash of everything that
    affects what fits into memory: the model, the training settings, the device and the size of its memory."""
    if runtime.device.type == "cuda":
        properties = torch.cuda.get_device_properties(runtime.device)
        machine = [properties.name, properties.total_memory]
    else:
        machine = [runtime.device.type, psutil.virtual_memory().total]
    training = config.training
    amount = [training.batch_size, training.sequences_per_update, runtime.precision]
    method = [training.optimizer, training.gradient_checkpointing, training.compile]
    model, lora = config.model.model_dump(mode="json"), config.lora.model_dump(mode="json")
    return _note("micro_batch", [model, *amount, *method, lora, machine])


def _note(kind: str, facts: list[Any]) -> Path:
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    return cache_folder() / kind / f"{key}.json"
