"""Choose the device and precision of a run, seed its random numbers, and describe the machine."""

from __future__ import annotations

import hashlib
import platform
import re
import shutil
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from atlas.config import AtlasConfig
from atlas.config.fields import DEVICE
from atlas.errors import AtlasError
from atlas.machine import cpu_computes_in_bf16, cpu_info
from atlas.training.devices.parallel import refuse_parallel_alone
from atlas.training.devices.world import ALONE, World
from atlas.version import __version__

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """A device and the precision of its matrix products. Weights are bf16 with `bf16-true` and fp32 otherwise. The
    precision does not affect the dtype of the optimizer's state."""

    device: torch.device
    precision: str
    compiles: bool = False
    """Whether the model's blocks are compiled."""
    world: World = ALONE
    parallel: str = "none"
    """The way in which the ranks share the model: `none`, `ddp` or `fsdp`."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of matrix products."""
        return _DTYPES[self.precision.removesuffix("-true")]

    @property
    def weights_dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return torch.bfloat16 if self.precision == "bf16-true" else torch.float32

    def autocast(self) -> AbstractContextManager[Any]:
        """Return PyTorch's context in which matrix products run in this precision."""
        if self.precision == "fp32":
            return nullcontext()
        # Autocast's cache of converted weights is off. Each weight is used once per forward pass, so the cache would
        # save no time. The cache would also keep every converted weight in memory until the end of the pass, even with
        # gradient checkpointing.
        return torch.autocast(self.device.type, dtype=self.dtype, cache_enabled=False)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Return a scaler of the loss, so that small gradients do not underflow in fp16. In other precisions the scaler
        is disabled."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")


def setup_runtime(
    config: AtlasConfig, world: World = ALONE, *, saved: Mapping[str, Any] | None = None
) -> Runtime:
    """Return the runtime for the config's `device` and `training.precision`. With several ranks on CUDA, each rank uses
    its own GPU.

    `saved` is the description of the machine in a checkpoint whose run resumes with the same setting. Then the run
    keeps its precision, if this machine has it. The caller sets the field `parallel` later, with `choose_parallel`.
    Raises `AtlasError` if the device or the precision is not available.
    """
    device = choose_device(config.device)
    if world.local_size > 1 and device.type == "cuda":
        if ":" in config.device:
            raise AtlasError(
                f"device: {config.device}: names one GPU for {world.local_size} processes, but each process needs its "
                "own GPU: use --device cuda"
            )
        if world.local_rank >= torch.cuda.device_count():
            raise AtlasError(
                f"rank {world.rank}: {world.local_size} processes run on this machine, but it has "
                f"{torch.cuda.device_count()} GPUs: lower torchrun's --nproc-per-node, or train on the CPU with "
                "--device cpu"
            )
        device = torch.device("cuda", world.local_rank)
    precision = _choose_precision(config.training.precision, device, saved or {})
    refuse_parallel_alone(config)
    return Runtime(device, precision, world=world)


def choose_device(name: str) -> torch.device:
    """Return the device named `name`: `cpu`, `cuda`, `cuda:N`, `mps`, or `auto`.

    `auto` selects the first available device of cuda, mps and cpu. With `cuda:N`, the function also makes this GPU
    PyTorch's current GPU. Raises `AtlasError` for a device that does not exist.
    """
    if not re.fullmatch(DEVICE, name):
        raise AtlasError(f"device: {name}: is not one of auto, cpu, cuda, cuda:N, mps")
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if has_cuda else "mps" if has_mps else "cpu"
    kind, _, number = name.partition(":")
    if kind == "cuda" and not has_cuda:
        raise AtlasError(f"device: {name}: {_why_no_cuda()}; or train and generate on the CPU: --device cpu")
    if kind == "mps" and not has_mps:
        raise AtlasError("device: mps: this PyTorch sees no Apple GPU; use --device cpu")
    if not number:
        return torch.device(kind)
    if int(number) >= torch.cuda.device_count():
        there = ", ".join(f"cuda:{index}" for index in range(torch.cuda.device_count()))
        raise AtlasError(f"device: {name}: does not exist; this machine has {there}")
    torch.cuda.set_device(int(number))  # PyTorch's queries for memory and names use the current GPU
    return torch.device(kind, int(number))


def cpu_only_build_with_nvidia_driver() -> bool:
    """Whether the machine has an NVIDIA driver, but this PyTorch is a build for CPUs only. Training would then silently
    run on the CPU, and take days longer."""
    has_driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    return has_driver and torch.version.cuda is None and torch.version.hip is None


def _why_no_cuda() -> str:
    if cpu_only_build_with_nvidia_driver():
        return "this PyTorch is a CPU-only build, but an NVIDIA driver is installed: install the CUDA build (README)"
    return "this PyTorch sees no CUDA device: check the driver with nvidia-smi"


def why_not_in(precision: str, device: torch.device) -> str | None:
    """Return the reason why `device` does not support `precision`, a value of `training.precision`. Return None if the
    device supports it."""
    if device.type == "mps" and precision == "bf16-true":
        return "is not supported on mps"
    precision = precision.removesuffix("-true")
    if device.type == "mps" and precision == "bf16" and not torch.backends.mps.is_macos_or_newer(14, 0):
        return "needs macOS 14"
    if device.type == "cuda" and precision == "bf16" and not _gpu_has_bf16():
        return "this GPU does not compute in it"
    if device.type == "cpu" and precision == "bf16" and not cpu_computes_in_bf16():
        return "this CPU lacks bf16 arithmetic, and would be slower than in fp32"
    if device.type == "cpu" and precision == "fp16":
        return "a CPU has no fast arithmetic for it"
    return None


def _choose_precision(asked: str, device: torch.device, saved: Mapping[str, Any]) -> str:
    if asked != "auto":
        reason = why_not_in(asked, device)
        if reason and not saved:
            raise AtlasError(f"training.precision: {asked}: {reason}; use {_own_precision(device)} or auto")
        return _own_precision(device) if reason else asked
    # `saved["device"]` is the name of a GPU, or the type of another device.
    type_before = saved.get("device", "cpu") if saved.get("device", "cpu") in ("cpu", "mps") else "cuda"
    before = saved.get("precision")
    if before in _DTYPES and type_before == device.type and why_not_in(before, device) is None:
        return str(before)
    return _own_precision(device)


def _own_precision(device: torch.device) -> str:
    """Return the precision that `auto` selects on `device`."""
    if device.type == "cuda":
        return "bf16" if _gpu_has_bf16() else "fp16"
    return "bf16" if device.type == "cpu" and cpu_computes_in_bf16() else "fp32"


def as_computed(config: AtlasConfig, runtime: Runtime) -> AtlasConfig:
    """Return `config` with the precision that the run has, for estimates. A resumed run keeps its precision."""
    return config.replace("training", precision=runtime.precision)


def computes_in_half(precision: str, device: str) -> bool:
    """Whether a new run with this `training.precision` computes matrix products in half precision. `device` is `cpu`,
    `cuda` or `mps`. A GPU may be one of another machine."""
    if precision == "auto":
        return device == "cuda" or (device == "cpu" and cpu_computes_in_bf16())
    return precision != "fp32"


def choose_weights_dtype(asked: str, device: torch.device) -> torch.dtype:
    """Return the dtype of weights and KV cache for inference on `device`. `asked` is `f32`, `bf16`, `f16` or `auto`.

    `auto` selects bf16 on CUDA and on a CPU that compute in it, otherwise fp16 on CUDA, and fp32 on other devices, such
    as an Apple GPU. Raises `AtlasError` for a dtype that the device does not support.
    """
    names = {"auto": _own_precision(device), "f32": "fp32", "bf16": "bf16", "f16": "fp16"}
    if asked not in names:
        raise AtlasError(f"--dtype {asked}: is not one of {', '.join(names)}")
    if reason := why_not_in(names[asked], device):
        raise AtlasError(f"--dtype {asked}: {reason}; use f32 or auto")
    return _DTYPES[names[asked]]


def _gpu_has_bf16() -> bool:
    # By default this query also returns true for older cards, which only emulate bf16 and are very slow.
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def seed_micro_step(seed: int, update: int, position: int) -> None:
    """Seed PyTorch for a micro-batch. Dropout then does not depend on earlier steps, so a checkpoint needs no generator
    state.

    `position` is the index of the micro-batch's first sequence in the update, counted over all ranks.
    """
    torch.manual_seed(_seed_of(seed, update, 0, position))  # the 0 gives the same seeds as in older versions


def rounding_generator(seed: int, update: int, device: torch.device) -> torch.Generator:
    """Return the random generator for the stochastic rounding of the weights in an update. The generator's seed depends
    only on the run's seed and the number of the update."""
    return torch.Generator(device).manual_seed(_seed_of(seed, update, "rounding"))


def _seed_of(*place: int | str) -> int:
    text = " ".join(map(str, place)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def describe_machine(runtime: Runtime) -> dict[str, Any]:
    """Return the properties of the machine and its software that affect the bits of a result. On a CPU, a resumed run
    gives the same bits if all these properties are the same as in the checkpoint."""
    device = runtime.device
    name = re.search(r"^model name\s*: *(.*\S)", cpu_info(), re.MULTILINE)
    return {
        "atlas": __version__,
        "torch": str(torch.__version__),
        "python": ".".join(map(str, sys.version_info[:3])),
        "system": platform.system(),
        "cpu": name[1] if name else platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "precision": runtime.precision,
        "compiled": "yes" if runtime.compiles else "no",
    }


def restore_machine(saved: dict[str, Any], runtime: Runtime, *, asked: str) -> list[str]:
    """Set PyTorch's number of threads to the number in the checkpoint. Return a line for each remaining difference
    between this machine and the properties in `saved`. `asked` is the run's `training.precision`: if it is `auto`, a
    line also says when this machine could compute in a faster precision."""
    threads = saved.get("threads")
    if isinstance(threads, int) and 1 <= threads <= 4096:
        torch.set_num_threads(threads)
    here = describe_machine(runtime)
    reason = why_not_in(str(saved.get("precision")), runtime.device)
    reasons = {"precision": f" ({reason})"} if reason else {}
    lines = [
        f"{key}: {saved[key]} when saved, {here[key]} here{reasons.get(key, '')}: the run continues, but not with the "
        "same bits"
        for key in ("torch", "cpu", "cpu_capability", "threads", "device", "precision", "compiled")
        if key in saved and saved[key] != here[key]
    ]
    faster = _own_precision(runtime.device)
    if asked == "auto" and saved.get("precision") == runtime.precision != faster:
        lines.append(
            f"precision: {runtime.precision}, as when the run was saved; to train in {faster}, add "
            f"--set training.precision={faster}"
        )
    return lines
