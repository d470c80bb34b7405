"""The checks of `atlas doctor`: packages, driver, one training step, attention, the compiler, and the disk.

Each function measures one part of the machine and returns values that JSON can hold. `atlas.cli.doctor_facts` decides
from these values whether the part works.
"""

from __future__ import annotations

import copy
import errno
import importlib.metadata
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from atlas.config import ModelConfig
from atlas.machine import best_time
from atlas.model import AtlasLM, build_model
from atlas.training.devices.device import Runtime

LossOf = Callable[[AtlasLM, Tensor, Tensor], Tensor]
"""`(model, inputs (B, T), targets (B, T)) → mean loss`, a scalar."""

_SHAPE = ModelConfig(hidden_size=64, num_layers=2, num_heads=2, vocab_size=256, max_seq_len=64)
_BATCH = 2

# In half precision, the forward pass of a block rounds the results of 6 operations: two norms, qkv, attention, and two
# in the MLP. The backward pass rounds 6 results too. There are 4 more roundings around the head. Independent roundings
# add up like a random walk, to √28 times the unit roundoff: 2e-2 for bf16 and 3e-3 for fp16. On a CPU, the measured
# error is one unit roundoff. If attention were not causal, the error would be 0.2.
_ROUNDINGS = 2 * 6 * _SHAPE.num_layers + 4
# The bound for fp32 is larger than the rounding errors of fp32, since GPUs use faster exponentials and add in other
# orders. On a CPU, the measured error is 3e-7. If a GPU silently computes in TF32, the error exceeds the bound, because
# TF32 has a unit roundoff of 5e-4.
_BOUND_FP32 = 1e-4

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}

_ATTENTION = {"batch": 4, "heads": 12, "tokens": 1024, "head_size": 64}
"""The shape of attention in the preset `small`, for 4 sequences."""

_BLOCK = 4_000_000  # bytes per write

_COMPILED = """\
import sys, torch
from atlas.training.devices.compile import why_not_compile
sys.exit(why_not_compile(torch.device(sys.argv[1])))
"""


@dataclass(frozen=True)
class Effort:
    """The size and duration of the measurements. The defaults give reliable results on a user's machine. Tests use
    smaller values."""

    seconds: float = 0.5  # per measured rate
    matrix_size: int | None = None  # None: large enough to keep the device busy
    copied: int | None = None  # bytes of the copied tensor; None: the default of `measure_copy`
    disk: int = 128_000_000  # bytes of the written file
    compile_seconds: float = 60.0  # at most


def optional_packages() -> dict[str, dict[str, str | None]]:
    """Return a dict: optional extra of `atlas-llm` → required package → installed version, or None if the package is
    missing."""
    required: list[str] = []
    with suppress(importlib.metadata.PackageNotFoundError):  # Atlas runs without installation
        required = importlib.metadata.requires("atlas-llm") or []
    found: dict[str, dict[str, str | None]] = {}
    for requirement in required:
        named = re.match(r"([\w.-]+).*extra\s*==\s*['\"]([\w-]+)['\"]", requirement)
        if named and named[2] != "dev":
            version = None
            with suppress(importlib.metadata.PackageNotFoundError):
                version = importlib.metadata.version(named[1])
            found.setdefault(named[2], {})[named[1]] = version
    return found


def nvidia_driver() -> tuple[str, str] | None:
    """Return the NVIDIA driver's version and the newest CUDA version that the driver supports, such as 580.65.06 and
    13.0. Return None if there is no driver or no card."""
    import pynvml

    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        try:
            if pynvml.nvmlDeviceGetCount():
                cuda = int(pynvml.nvmlSystemGetCudaDriverVersion_v2())
                return str(pynvml.nvmlSystemGetDriverVersion()), f"{cuda // 1000}.{cuda % 1000 // 10}"
        finally:
            pynvml.nvmlShutdown()
    return None


def check_step(runtime: Runtime, loss_of: LossOf, *, seconds: float) -> dict[str, Any]:
    """Compare a training step of a small model with the same step in fp64 on the CPU.

    Returns the relative errors of loss and gradient, their `bound`, whether no error exceeds the bound (`right`), and
    the seconds of the fastest step. The step is repeated for about `seconds`. The gradients of all parameters form one
    vector g. The error of g is ‖g − g₆₄‖ / ‖g₆₄‖, which is at least the relative error of the gradient norm. Raises
    `RuntimeError` if the device cannot compute the step.
    """
    device, dtype, scale = runtime.device, runtime.dtype, runtime.grad_scaler().get_scale()
    model = build_model(_SHAPE, seed=0)
    tokens = torch.randint(_SHAPE.vocabulary, (_BATCH, _SHAPE.max_seq_len + 1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    exact_model = copy.deepcopy(model).double()
    exact_loss = F.cross_entropy(exact_model(inputs).flatten(0, 1), targets.flatten())
    exact_loss.backward()  # type: ignore[no-untyped-call]
    exact_gradient = _gradient(exact_model)

    model, inputs, targets = model.to(device), inputs.to(device), targets.to(device)
    loss = torch.zeros(())

    def step() -> None:
        nonlocal loss
        model.zero_grad()
        with runtime.autocast():
            loss = loss_of(model, inputs, targets)
        (loss * scale).backward()  # type: ignore[no-untyped-call]

    best = best_time(step, device, seconds=seconds)
    bound = _BOUND_FP32 if dtype == torch.float32 else math.sqrt(_ROUNDINGS) * torch.finfo(dtype).eps / 2
    difference = _gradient(model) / scale - exact_gradient
    errors = {
        "loss_error": abs(loss.item() / exact_loss.item() - 1),
        "gradient_error": float(difference.norm() / exact_gradient.norm()),
    }
    is_right = all(error <= bound for error in errors.values())  # false for NaN
    # JSON has no NaN.
    finite = {name: error if math.isfinite(error) else None for name, error in errors.items()}
    return {"right": is_right, **finite, "bound": bound, "seconds": best}


def _gradient(model: AtlasLM) -> Tensor:
    """Return the gradients of all parameters as one fp64 vector on the CPU."""
    return torch.cat([p.grad.cpu().double().flatten() for p in model.parameters() if p.grad is not None])


def working_attention(device: torch.device, dtype: torch.dtype) -> dict[str, bool]:
    """Return a dict: attention kernel of PyTorch → whether the kernel works on this device, forward and backward."""
    works = dict.fromkeys(_BACKENDS, False)
    for name, backend in _BACKENDS.items():
        if device.type == "mps" and name != "math":
            continue  # PyTorch ignores the requested kernel on MPS and uses its own
        qkv = torch.randn(3, 2, 2, 64, 64, device=device, dtype=dtype, requires_grad=True)
        with suppress(RuntimeError), warnings.catch_warnings(), sdpa_kernel(backend):
            warnings.simplefilter("ignore")  # PyTorch warns of a missing kernel, which is a valid result here
            q, k, v = qkv.unbind()
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            (grad,) = torch.autograd.grad(out.sum(), qkv)
            works[name] = bool(grad.isfinite().all())  # waits for the device, so that its errors appear here
    return works


def time_attention(device: torch.device, dtype: torch.dtype, *, seconds: float) -> dict[str, Any]:
    """Measure the time of each attention kernel, forward and backward, for about `seconds` per kernel.

    Returns the kernel `chosen` by PyTorch (None: unknown), the `seconds` that each working kernel needs, and the
    `shape` of the attention. Queries, keys and values share a tensor, as in the model.
    """
    B, H, T, D = _ATTENTION.values()
    qkv = torch.randn(B, T, 3 * H * D, device=device, dtype=dtype, requires_grad=True)
    q, k, v = (part.view(B, T, H, D).transpose(1, 2) for part in qkv.split(H * D, dim=-1))  # type: ignore[no-untyped-call]
    slope = torch.randn(B, H, T, D, device=device, dtype=dtype)

    def attend() -> None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(out, qkv, slope, retain_graph=True)  # keeps the split of qkv for later calls

    choice: int | None = None
    times: dict[str, float] = {}
    with suppress(RuntimeError, AttributeError):  # PyTorch does not document this function
        choice = torch._fused_sdp_choice(q, k, v, None, 0.0, True)
    for name, backend in _BACKENDS.items():
        # A kernel that is missing, does not support this device or runs out of memory gets no entry in `times`.
        with suppress(RuntimeError), warnings.catch_warnings(), sdpa_kernel(backend):
            warnings.simplefilter("ignore")
            times[name] = best_time(attend, device, seconds=seconds)
    chosen = next((name for name, backend in _BACKENDS.items() if backend.value == choice), None)
    return {"chosen": chosen, "seconds": times, "shape": _ATTENTION}


def try_compile(device: torch.device, *, seconds: float) -> dict[str, Any]:
    """Compile a small function with `torch.compile` in a separate process, for at most `seconds`.

    Returns the `seconds` of the attempt, and the `reason` why the attempt failed. The `reason` is None if the attempt
    succeeded. The process uses a new cache folder, which is deleted afterwards: an older cache would hide that the
    compiler is missing.
    """
    start, reason = time.perf_counter(), None
    with tempfile.TemporaryDirectory(prefix="atlas-doctor-", ignore_cleanup_errors=True) as folder:
        settings = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder}
        # With more threads, PyTorch starts a pool of processes, which would continue to run after the timeout.
        settings["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        try:
            done = subprocess.run(
                [sys.executable, "-c", _COMPILED, device.type],
                env=os.environ | settings,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=seconds,
                check=False,
            )
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        except subprocess.TimeoutExpired:
            reason = f"did not finish in {seconds:g} seconds"
    return {"seconds": time.perf_counter() - start, "reason": reason}


def nearest_folder(path: Path) -> Path:
    """Return `path` if it exists, or else its nearest existing parent."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if os.path.exists(place))


def measure_disk(folder: Path, *, size: int) -> dict[str, Any]:
    """Write `size` bytes to a file in `folder`, wait until the disk has stored them, and read the file.

    Returns the bytes/s of `write` and `read`. `read_from_memory` is true if the system may have read the bytes from its
    cache instead of the disk. Raises `OSError`. The file has no name, so that no file remains even if the process is
    killed.
    """
    if shutil.disk_usage(folder).free < 2 * size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    block = os.urandom(min(_BLOCK, size))  # a disk may compress zeros
    blocks = math.ceil(size / len(block))
    drops_cache = hasattr(os, "posix_fadvise")
    with tempfile.TemporaryFile(buffering=0, prefix=".atlas-doctor-", dir=folder) as file:
        start = time.perf_counter()
        for _ in range(blocks):
            file.write(block)
        os.fsync(file.fileno())
        writing = time.perf_counter() - start
        if drops_cache:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start = time.perf_counter()
        while file.readinto(bytearray(len(block))):
            pass
        reading = time.perf_counter() - start
    total = blocks * len(block)
    return {"write": total / writing, "read": total / reading, "read_from_memory": not drops_cache}
