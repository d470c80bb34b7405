"""What `atlas doctor` tries on this machine: packages, driver, one training step, attention, the compiler, the disk.

Each function measures one thing and returns it as JSON can hold it; `atlas.cli.doctor_facts` judges it.
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

# Half precision rounds the results of 6 operations in each block (two norms, qkv, attention, two of the MLP) forward,
# as many backward, and 4 around the head. Independent roundings add up like a random walk: to √28 times the unit
# roundoff, 2e-2 for bf16 and 3e-3 for fp16. A CPU's step is off by one unit; attention that sees the future, by 0.2.
_ROUNDINGS = 2 * 6 * _SHAPE.num_layers + 4
# The bound of fp32 is wider than its roundings, since GPUs use faster exponentials and add in other orders. A CPU's
# step is off by 3e-7; TF32, which looks like fp32 and is not, has a unit roundoff of 5e-4.
_BOUND_FP32 = 1e-4

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}

_ATTENTION = {"batch": 4, "heads": 12, "tokens": 1024, "head_size": 64}
"""A micro-batch of the preset `small`, or a part of one."""

_BLOCK = 4_000_000  # bytes written at once

_COMPILED = """\
import sys, torch
from atlas.training.devices.compile import why_not_compile
sys.exit(why_not_compile(torch.device(sys.argv[1])))
"""


@dataclass(frozen=True)
class Effort:
    """How much is measured: enough to trust on a person's machine; a test needs less."""

    seconds: float = 0.5  # for each rate
    matrix_size: int | None = None  # None: what keeps the device busy
    copied: int | None = None  # bytes
    disk: int = 128_000_000  # bytes
    compile_seconds: float = 60.0  # at most


def optional_packages() -> dict[str, dict[str, str | None]]:
    """Return, by extra of Atlas's package, the versions of its requirements; None for one that is not installed."""
    required: list[str] = []
    with suppress(importlib.metadata.PackageNotFoundError):  # run from a folder, never installed
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
    """Return the NVIDIA driver's version and the newest CUDA that it supports, such as 580.65.06 and 13.0; None without
    a driver or a card."""
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
    """Compare a training step of a small model with the same in 64 bits on the CPU.

    Returns the relative errors of loss and gradient, their `bound`, whether they are `right`, and the best time in
    about `seconds`. The gradient is compared as one vector: ‖g − g₆₄‖ / ‖g₆₄‖, which is at least the error of its norm.
    Raises `RuntimeError` for what the device cannot compute at all.
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
    is_right = all(error <= bound for error in errors.values())  # not for NaN, which JSON lacks
    finite = {name: error if math.isfinite(error) else None for name, error in errors.items()}
    return {"right": is_right, **finite, "bound": bound, "seconds": best}


def _gradient(model: AtlasLM) -> Tensor:
    """Return the full gradient as one vector of 64 bits on the CPU."""
    return torch.cat([p.grad.cpu().double().flatten() for p in model.parameters() if p.grad is not None])


def working_attention(device: torch.device, dtype: torch.dtype) -> dict[str, bool]:
    """Return which of PyTorch's attention kernels compute here, forward and backward, on a small example."""
    works = dict.fromkeys(_BACKENDS, False)
    for name, backend in _BACKENDS.items():
        if device.type == "mps" and name != "math":
            continue  # PyTorch has no choice of kernels there, and would use another than the requested one
        qkv = torch.randn(3, 2, 2, 64, 64, device=device, dtype=dtype, requires_grad=True)
        with suppress(RuntimeError), warnings.catch_warnings(), sdpa_kernel(backend):
            warnings.simplefilter("ignore")  # a missing kernel is an answer here
            q, k, v = qkv.unbind()
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            (grad,) = torch.autograd.grad(out.sum(), qkv)
            works[name] = bool(grad.isfinite().all())  # waits for the device, and for what failed there
    return works


def time_attention(device: torch.device, dtype: torch.dtype, *, seconds: float) -> dict[str, Any]:
    """Measure each kernel alone, forward and backward, in about `seconds`.

    Returns the one `chosen` by PyTorch (None: unknown here), the `seconds` of each that computes, and the `shape`.
    Queries, keys and values share a tensor, as in the model.
    """
    B, H, T, D = _ATTENTION.values()
    qkv = torch.randn(B, T, 3 * H * D, device=device, dtype=dtype, requires_grad=True)
    q, k, v = (part.view(B, T, H, D).transpose(1, 2) for part in qkv.split(H * D, dim=-1))  # type: ignore[no-untyped-call]
    slope = torch.randn(B, H, T, D, device=device, dtype=dtype)

    def attend() -> None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(out, qkv, slope, retain_graph=True)  # the next call does not split qkv again

    choice: int | None = None
    times: dict[str, float] = {}
    with suppress(RuntimeError, AttributeError):  # scaled_dot_product_attention asks it, but it is not public
        choice = torch._fused_sdp_choice(q, k, v, None, 0.0, True)
    for name, backend in _BACKENDS.items():
        # Missing, not for this device, or out of memory: the kernel gets no time.
        with suppress(RuntimeError), warnings.catch_warnings(), sdpa_kernel(backend):
            warnings.simplefilter("ignore")
            times[name] = best_time(attend, device, seconds=seconds)
    chosen = next((name for name, backend in _BACKENDS.items() if backend.value == choice), None)
    return {"chosen": chosen, "seconds": times, "shape": _ATTENTION}


def try_compile(device: torch.device, *, seconds: float) -> dict[str, Any]:
    """Compile a small function with `torch.compile` in a process of its own, for at most `seconds`.

    Returns the `seconds` that it took and the `reason` why it failed, or None. Its caches go into a folder that is
    removed: an older cache would hide that the compiler is missing.
    """
    start, reason = time.perf_counter(), None
    with tempfile.TemporaryDirectory(prefix="atlas-doctor-", ignore_cleanup_errors=True) as folder:
        settings = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder}
        # Otherwise PyTorch starts a pool of processes, which outlives what is stopped.
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
    """Return `path`, or the nearest of its parents that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if os.path.exists(place))


def measure_disk(folder: Path, *, size: int) -> dict[str, Any]:
    """Write `size` bytes in `folder`, until the disk confirms them, and read them. Raises `OSError`.

    Returns bytes/s to `write` and `read`, and whether they may be `read_from_memory`. The file has no name while it is
    written, so that nothing stays however this ends.
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
