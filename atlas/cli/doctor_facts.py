"""The facts of `atlas doctor` as one JSON object, with the problems that the user should fix.

The reported device, precision and compilation come from the functions that training itself calls.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy
import psutil
import torch
from torch import Tensor

from atlas.config import AtlasConfig
from atlas.errors import first_line
from atlas.machine import COPIED, measure_copy, measure_matrix_products, measure_memory
from atlas.model import AtlasLM
from atlas.planning.doctor import (
    Effort,
    check_step,
    measure_disk,
    nearest_folder,
    nvidia_driver,
    optional_packages,
    time_attention,
    try_compile,
    working_attention,
)
from atlas.training.devices.compile import choose_compile
from atlas.training.devices.device import (
    Runtime,
    choose_device,
    cpu_only_build_with_nvidia_driver,
    describe_machine,
    setup_runtime,
    why_not_in,
)
from atlas.training.loss import linear_cross_entropy
from atlas.training.memory.presets import largest_that_fits, plan_presets
from atlas.version import __version__

Facts = dict[str, Any]
T = TypeVar("T")

PRECISIONS = ("fp32", "bf16", "fp16")

_SMALL_PRODUCT = 256  # large enough to reveal emulation, small enough to be fast even then

_WHY_AUTO = {
    "cuda": "auto uses a CUDA device if PyTorch sees one",
    "mps": "PyTorch sees no CUDA device, but an Apple GPU",
    "cpu": "PyTorch sees neither a CUDA device nor an Apple GPU",
}
"""Type of device → the reason why `--device auto` chooses this type."""


def _problem(value: str, reason: str, remedy: str) -> Facts:
    """Return a problem that the user should fix: the value, the reason and the remedy."""
    return {"value": value, "reason": reason, "remedy": remedy}


def examine(device_name: str, output_dir: Path | None, effort: Effort | None = None) -> Facts:
    """Return all facts that `atlas doctor` reports. The default of `output_dir` is train's output folder.

    Units: bytes, seconds, bytes/s and FLOP/s. Raises `AtlasError` if the requested device does not exist.
    """
    effort = effort or Effort()
    output_dir = output_dir or Path(AtlasConfig().checkpoint.output_dir)
    device = choose_device(device_name)
    problems = _wheel_and_driver()
    facts: Facts = {"versions": _versions(), "machine": _machine()}
    try:
        torch.zeros(1, device=device)
        available = measure_memory(device.type)
    except RuntimeError as error:  # the GPU is full or broken; measure the rest of the machine
        remedy = "check the GPU with nvidia-smi and restart the machine, or train on the CPU: --device cpu"
        problems.append(_problem(f"device {device.type}", f"does not compute ({first_line(error)})", remedy))
    else:
        facts |= _computing(device, available, effort, problems)
    facts["compile"] = try_compile(device, seconds=effort.compile_seconds)
    facts["disk"] = _disk(output_dir, effort, problems)
    facts["train"] = _choice(device_name, device)
    facts["problems"] = problems
    return facts


def _wheel_and_driver() -> list[Facts]:
    """Return a problem if the machine has an NVIDIA card that this PyTorch cannot use."""
    if cpu_only_build_with_nvidia_driver():
        reason = "is a CPU-only build, although this machine has an NVIDIA driver"
        return [_problem(f"PyTorch {torch.__version__}", reason, "install the CUDA build (README, Install)")]
    driver = nvidia_driver()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if driver is None or torch.version.cuda is None or torch.cuda.is_available() or hidden:
        return []
    version, newest = driver
    if int(newest.split(".")[0]) < int(torch.version.cuda.split(".")[0]):
        reason = f"supports CUDA up to {newest}, but this PyTorch is built with CUDA {torch.version.cuda}"
        remedy = "update the driver, or install a PyTorch build with an older CUDA (README, Install)"
    else:
        reason = "is installed, but PyTorch sees no CUDA device"
        remedy = "check the GPU with nvidia-smi; if the driver was updated, restart the machine"
    return [_problem(f"NVIDIA driver {version}", reason, remedy)]


def _versions() -> Facts:
    return {
        "atlas": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "numpy": numpy.__version__,
        "extras": optional_packages(),
    }


def _machine() -> Facts:
    on_cpu = describe_machine(Runtime(torch.device("cpu"), "fp32"))
    driver = nvidia_driver()
    return {
        "system": platform.platform(),
        "cpu": on_cpu["cpu"],
        "cpu_count": os.cpu_count(),
        "cpu_threads": on_cpu["threads"],
        "cpu_capability": on_cpu["cpu_capability"],
        "cpu_bf16": why_not_in("bf16", torch.device("cpu")) is None,
        "memory_total": psutil.virtual_memory().total,
        "memory_available": measure_memory("cpu"),
        "nvidia_driver": driver and driver[0],
        "gpus": _gpus(),
    }


def _gpus() -> list[Facts]:
    if torch.backends.mps.is_available():
        return [{"name": "Apple GPU", "memory_total": torch.mps.recommended_max_memory()}]
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(index)
        capability = {"compute_capability": f"{gpu.major}.{gpu.minor}"}
        gpus.append({"name": gpu.name, "memory_total": gpu.total_memory, **capability})
    return gpus


def _computing(device: torch.device, available: int, effort: Effort, problems: list[Facts]) -> Facts:
    """Measure memory, precisions, speed and attention of a device with `available` bytes of free memory."""
    plans = plan_presets(available, device=device.type)
    largest = largest_that_fits(plans)
    if largest is None:
        needs = min(plan.memory for plan in plans)
        value = f"{available / 2**30:.2f} GiB of memory free on {device.type}"
        reason = f"nano, the smallest preset, needs {needs / 2**30:.2f} GiB"
        problems.append(_problem(value, reason, "close other programs that use this memory"))
    precision = {name: _precision(device, name, effort) for name in PRECISIONS}
    computes = [name for name, step in precision.items() if "error" not in step]
    small = {name: _products(device, name, _SMALL_PRODUCT, effort.seconds / 5) for name in computes}
    for name, step in precision.items():
        step["step_times_fp32"] = _ratio(step.get("seconds"), precision["fp32"].get("seconds"))
        step["product_times_fp32"] = _ratio(small.get("fp32"), small.get(name))
        problems += _wrong_numbers(name, step, device)
    usable = [name for name in computes if precision[name]["refusal"] is None]
    copied = max(1, min(effort.copied or COPIED[device.type], available // 8))
    return {
        "memory": {"device": device.type, "available": available, "preset": largest and largest.name},
        "precision": precision,
        "matrix_products": {
            name: _products(device, name, effort.matrix_size, effort.seconds) for name in usable
        },
        "copy": _unless_full(lambda: measure_copy(device, copied=copied, seconds=effort.seconds)),
        "attention": working_attention(device, _chosen(device).dtype),
        "attention_times": _attention_times(device, effort),
    }


def _attention_times(device: torch.device, effort: Effort) -> Facts | None:
    """Return the times of attention kernels; None on devices without a choice of kernels, or without enough memory."""
    if device.type != "cuda":
        return None
    dtype = _chosen(device).dtype
    return _unless_full(lambda: time_attention(device, dtype, seconds=effort.seconds / 5))


def _precision(device: torch.device, name: str, effort: Effort) -> Facts:
    """Return the result of a training step in this precision. `refusal` is the reason why training does not use the
    precision, or None."""
    step: Facts = {"refusal": why_not_in(name, device)}
    try:
        return step | check_step(Runtime(device, name), _mean_loss, seconds=effort.seconds / 5)
    except RuntimeError as error:
        return step | {"right": False, "error": first_line(error)}


def _mean_loss(model: AtlasLM, inputs: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy(model.hidden_states(inputs), model.head_weight, targets) / targets.numel()


def _wrong_numbers(name: str, step: Facts, device: torch.device) -> list[Facts]:
    """Return a problem if the training step failed or gave wrong numbers, in a precision that training would use."""
    if step["right"] or step["refusal"] is not None:
        return []
    if "error" in step:
        reason = f"does not compute on {device.type} ({step['error']})"
        remedy = "use the build of PyTorch for this machine (README, Install), or --device cpu"
    else:
        reason = (
            f"computes wrong numbers on {device.type}: in one training step the loss is off by "
            f"{_shown(step['loss_error'])} and the gradient by {_shown(step['gradient_error'])}, "
            f"but rounding explains at most {step['bound']:.0e}"
        )
        remedy = "use another precision (--set training.precision=…), or another version of PyTorch and of the driver"
    return [_problem(f"precision {name}", reason, remedy)]


def _shown(error: float | None) -> str:
    return "a non-finite number" if error is None else f"{error:.0e}"


def _products(device: torch.device, name: str, size: int | None, seconds: float) -> float | None:
    dtype = Runtime(device, name).dtype
    return _unless_full(lambda: measure_matrix_products(device, dtype, size=size, seconds=seconds))


def _unless_full(measure: Callable[[], T]) -> T | None:
    """Return the result of `measure()`, or None if the GPU has too little free memory for the tensors of `measure`."""
    try:
        return measure()
    except torch.OutOfMemoryError:
        return None


def _disk(output_dir: Path, effort: Effort, problems: list[Facts]) -> Facts:
    folder = nearest_folder(output_dir)
    try:
        return {"folder": str(folder), **measure_disk(folder, size=effort.disk)}
    except OSError as error:
        reason = f"{folder} cannot be written ({error.strerror})"
        remedy = "free some space or get permission to write there, or choose another --output-dir"
        problems.append(_problem(f"--output-dir {output_dir}", reason, remedy))
        return {"folder": str(folder), "error": error.strerror}


def _choice(device_name: str, device: torch.device) -> Facts:
    """Return the device, precision and compilation that training chooses by default, with the reasons."""
    runtime = _chosen(device)
    others = [name for name in PRECISIONS if name != runtime.precision]
    reasons = [f"{name}: {why_not_in(name, device) or 'can be set'}" for name in others]
    notes: list[str] = []
    compiles = choose_compile(AtlasConfig(), device, say=notes.append)
    why_compile = (
        "auto compiles on CUDA" if compiles else "auto compiles only on CUDA, where compiled code saves time"
    )
    return {
        "device": runtime.device.type,
        "device_reason": _WHY_AUTO[device.type] if device_name == "auto" else f"--device {device_name}",
        "precision": runtime.precision,
        "precision_reason": "; ".join([f"auto on this {device.type}", *reasons]),
        "compile": "on" if compiles else "off",
        "compile_reason": notes[0] if notes else why_compile,
    }


def _chosen(device: torch.device) -> Runtime:
    return setup_runtime(AtlasConfig(device=device.type))


def _ratio(value: float | None, other: float | None) -> float | None:
    return value / other if value and other else None
