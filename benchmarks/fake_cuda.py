"""A CUDA device where none is: the real code runs on PyTorch's fake tensors, which have a device, a shape and a dtype
but no memory, with real autograd, autocast, compilation and optimizers.

    device = FakeCuda()     # before anything imports torch
    with device, waits() as asked:
        …                   # code that asks for cuda
    print(asked.seen)

It shows tensors on two devices, dtypes that an operator refuses, waits of the host, and by their shapes the kernels'
bytes and FLOPs (`roofline.py`). It shows no numbers, no kernel that refuses its input, and no true speed. A CPU build
of PyTorch lacks a device guard for CUDA: `fake_cuda.cpp`, which g++ builds once into the temporary folder, in some 6 s.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GiB = 1 << 30


def why_not() -> str | None:
    """What is missing here; None where it works."""
    if sys.platform != "linux":
        return "fake CUDA needs Linux"
    return None if shutil.which("g++") else "fake CUDA needs g++ (apt install g++)"


def build_guard() -> Path:
    """The library of `fake_cuda.cpp` for the PyTorch that is installed."""
    source = Path(__file__).with_suffix(".cpp")
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    torch_root = Path(spec.origin).parent
    version = (torch_root / "version.py").read_bytes()
    key = hashlib.sha256(source.read_bytes() + version + str(torch_root).encode()).hexdigest()[:12]
    library = Path(tempfile.gettempdir()) / f"atlas-fake-cuda-{key}.so"
    if not library.exists():
        made = library.with_suffix(f".{os.getpid()}")  # several processes may build it
        libraries = [f"-L{torch_root}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_root}/lib"]
        options = ["-std=c++20", "-O0", "-fPIC", "-shared", f"-I{torch_root}/include"]
        subprocess.run(["g++", *options, str(source), "-o", str(made), *libraries], check=True)
        made.replace(library)
    return library


class Card:
    """What PyTorch tells of the device."""

    name = "Fake GPU"
    total_memory = 12 * GiB
    major, minor = 8, 6
    multi_processor_count = 28
    uuid = "0"
    warp_size = 32
    gcnArchName = ""
    max_threads_per_multi_processor = 1536
    regs_per_multiprocessor = 65536


class FakeCuda:
    """Fake CUDA for the rest of this process, from the first `with` on. `mode` is a `FakeTensorMode` class of one's own
    (it sees every operator), or PyTorch's."""

    def __init__(self, mode: type[Any] | None = None) -> None:
        assert "torch" not in sys.modules, "the guard must be there before PyTorch is"
        ctypes.CDLL(str(build_guard()))
        from torch._subclasses.fake_tensor import FakeTensorMode

        # Made before CUDA seems to be there: it would ask the driver then.
        self.mode = (mode or FakeTensorMode)(allow_non_fake_inputs=True)
        _pretend()

    def __enter__(self) -> None:
        self.mode.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self.mode.__exit__(*exception)


def _pretend() -> None:
    """PyTorch's Python side, which a CPU build compiles without CUDA."""
    import torch
    import torch.nn.functional as F

    cuda = torch.cuda
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_properties": lambda *device: Card,
        "get_device_name": lambda *device: Card.name,
        "get_device_capability": lambda *device: (Card.major, Card.minor),
        "mem_get_info": lambda *device: (Card.total_memory, Card.total_memory),
        "max_memory_allocated": lambda *device: 0,
        "memory_stats": lambda *device: {},
        "synchronize": lambda *device: None,
        "empty_cache": lambda: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "is_current_stream_capturing": lambda: False,
        "get_rng_state": lambda *device: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *state: None,
    }
    for name, answer in answers.items():
        setattr(cuda, name, answer)
    cuda.random.get_rng_state = cuda.get_rng_state
    torch.autograd.set_multithreading_enabled(False)  # threads of its own would not know the mode

    torch.nn.Module._apply = _apply  # type: ignore[assignment, method-assign]
    F.scaled_dot_product_attention = _attention(F.scaled_dot_product_attention)
    torch.tensor = _tensor(torch.tensor)
    # Operators made of others are taken apart before a mode sees them only where gradients are off in the usual way.
    inference_mode = torch.inference_mode
    torch.inference_mode = lambda mode=True: (  # type: ignore[assignment, misc]
        torch.no_grad() if mode is True else torch.no_grad()(mode) if callable(mode) else inference_mode(mode)
    )


def _apply(self: Any, change: Callable[[Any], Any], recurse: bool = True, memo: Any = None) -> Any:
    """`Module.to`: a parameter becomes a new one, since the memory of a real one cannot be given to a fake one."""
    import torch

    memo = {} if memo is None else memo
    for child in self.children():
        _apply(child, change, memo=memo)
    for name, parameter in self._parameters.items():
        if parameter is not None:
            if id(parameter) not in memo:
                changed = torch.nn.Parameter(change(parameter.detach()), parameter.requires_grad)
                memo[id(parameter)] = parameter, changed
            self._parameters[name] = memo[id(parameter)][1]
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = change(buffer)
    return self


def _attention(real: Callable[..., Any]) -> Callable[..., Any]:
    """The kernels that a GPU would choose: a CPU build chooses its own."""
    import torch

    aten = torch.ops.aten

    def attention(
        q: Any,
        k: Any,
        v: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        if q.device.type != "cuda":
            options = {"scale": scale, "enable_gqa": enable_gqa}
            return real(q, k, v, attn_mask, dropout_p, is_causal, **options)
        if torch.is_autocast_enabled("cuda"):
            q, k, v = (tensor.to(torch.get_autocast_dtype("cuda")) for tensor in (q, k, v))
        if attn_mask is None and q.dtype != torch.float32:  # FlashAttention shares keys by itself
            return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
        if enable_gqa:
            k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], 1) for tensor in (k, v))
        bias = attn_mask
        if bias is not None:
            if bias.dtype == torch.bool:
                bias = torch.zeros((), dtype=q.dtype, device=q.device).where(bias, -torch.inf)
            bias = bias.to(q.dtype).expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        efficient = aten._scaled_dot_product_efficient_attention
        return efficient(q, k, v, bias, True, dropout_p, is_causal, scale=scale)[0]

    return attention


def _tensor(real: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.tensor` on the device: made on the CPU, then moved, which the mode sees."""
    import torch

    def tensor(data: Any, *arguments: Any, device: Any = None, **options: Any) -> Any:
        made = real(data, *arguments, **options)
        return made if device is None else torch.zeros(made.shape, dtype=made.dtype).to(device)

    return tensor


def waits() -> Any:
    """A dispatch mode for inside `FakeCuda`: its `seen` counts `KIND operator @ file:line < file:line`, for what makes
    the host wait for the device (`WAIT`, `D2H`) or copies to it (`H2D`). Numbers that the host asks for are made up."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    aten = torch.ops.aten

    class Waits(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: Counter[str] = Counter()

        def note(self, kind: str, operator: Any) -> None:
            self.seen[f"{kind} {operator} @ {_place()}"] += 1

        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if operator in (aten._local_scalar_dense.default, aten.item.default):
                [tensor] = args
                if tensor.is_cuda:
                    self.note("WAIT", operator)
                return 1.0 if tensor.is_floating_point() else True if tensor.dtype == torch.bool else 7
            if operator is aten.nonzero.default and args[0].is_cuda:
                self.note("WAIT", operator)
                return torch.empty(3, args[0].dim(), dtype=torch.long, device=args[0].device)
            if operator is aten._to_copy.default and (target := kwargs.get("device")) is not None:
                pair = args[0].device.type, torch.device(target).type
                how = "async" if kwargs.get("non_blocking") else "wait"
                if pair in (("cuda", "cpu"), ("cpu", "cuda")):
                    self.note(f"{'D2H' if pair[0] == 'cuda' else 'H2D'} {how}", operator)
            if operator is aten.copy_.default and args[0].device != args[1].device:
                how = "async" if len(args) > 2 and args[2] else "wait"
                self.note(f"{'D2H' if args[1].is_cuda else 'H2D'} {how}", operator)
            return operator(*args, **kwargs)

    return Waits()


def _place() -> str:
    """The two innermost lines of Atlas, or of PyTorch's optimizers, that led here."""
    ours = str(ROOT / "atlas")
    frames = []
    for frame in reversed(traceback.extract_stack()):
        for folder in (ours, "/torch/optim", "/torch/nn/utils", "/torch/amp", "/torchao"):
            if folder in frame.filename:
                name = frame.filename.split(folder)[-1]
                frames.append(f"{Path(folder).name}{name}:{frame.lineno}")
                break
    return " < ".join(frames[:2])
