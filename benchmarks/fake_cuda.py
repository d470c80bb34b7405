"""Imitate a CUDA device on a machine without one.

Atlas's code runs on PyTorch's fake tensors, which have a device, a shape and a dtype but no values. Autograd, autocast,
compilation and optimizers are PyTorch's own.

    device = FakeCuda()     # before anything imports torch
    with device, waits() as asked:
        …                   # code that uses cuda
    print(asked.seen)

Fake CUDA finds operations on tensors of two devices, dtypes that an operator does not support, and places where the
host waits for the GPU. Fake CUDA computes no values, does not find inputs that a CUDA kernel does not support, and does
not measure speed. A Python list as an index raises an error; on a GPU, the host would wait for a copy of the list. A
CPU build of PyTorch lacks a device guard for CUDA. `fake_cuda.cpp` is such a guard; g++ builds it once, in about 6 s.
`tests/cuda_path` runs Atlas on fake CUDA, and `roofline.py` computes bytes and FLOPs from the shapes.
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
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

GiB = 1 << 30


def why_not() -> str | None:
    """Return what this machine lacks for fake CUDA, or None if fake CUDA works here."""
    if sys.platform != "linux":
        return "fake CUDA needs Linux"
    if (
        not (_torch_folder() / "lib/libtorch_cpu.so").exists()
        or (_torch_folder() / "lib/libtorch_cuda.so").exists()
    ):
        return "fake CUDA needs a CPU build of PyTorch"  # another build has its own hooks and guard
    return None if shutil.which("g++") else "fake CUDA needs g++ (apt install g++)"


def _torch_folder() -> Path:
    """Return the folder of PyTorch, without importing PyTorch."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def build_guard() -> Path:
    """Return the library that is built from `fake_cuda.cpp` for the installed PyTorch."""
    source = Path(__file__).with_suffix(".cpp")
    torch_root = _torch_folder()
    version = (torch_root / "version.py").read_bytes()
    key = hashlib.sha256(source.read_bytes() + version + str(torch_root).encode()).hexdigest()[:12]
    library = Path(tempfile.gettempdir()) / f"atlas-fake-cuda-{key}.so"
    if not library.exists():
        made = library.with_suffix(f".{os.getpid()}")  # several processes may build the library
        libraries = [f"-L{torch_root}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_root}/lib"]
        options = ["-std=c++20", "-O0", "-fPIC", "-shared", f"-I{torch_root}/include"]
        subprocess.run(["g++", *options, str(source), "-o", str(made), *libraries], check=True)
        made.replace(library)
    return library


class Card:
    """The properties that PyTorch reports for the device."""

    name = "Fake GPU"
    total_memory = 12 * GiB
    major, minor = 8, 6
    multi_processor_count = 28
    uuid = "0"
    warp_size = 32
    gcnArchName = ""
    max_threads_per_multi_processor = 1536
    regs_per_multiprocessor = 65536


class Runtime:
    """The CUDA functions that Atlas calls directly, for page-locked memory. Each returns 0: success."""

    cudaHostRegister = staticmethod(lambda address, size, flags: 0)
    cudaHostUnregister = staticmethod(lambda address: 0)


class FakeCuda:
    """Fake CUDA for the rest of this process, from the first `with` on.

    `mode` is `FakeTensorMode` or a class derived from it; the mode sees every operator. `backend` is the backend of
    `torch.compile`, since no kernel can be built here. With `backend` None, functions are not compiled. `backend` may
    be changed at any time.
    """

    def __init__(
        self, mode: type[Any] | None = None, *, backend: Callable[..., Any] | str | None = None
    ) -> None:
        assert "torch" not in sys.modules, "the guard must be there before PyTorch is"
        ctypes.CDLL(str(build_guard()))
        from torch._subclasses.fake_tensor import FakeTensorMode

        # Create the mode before CUDA seems available: later, the mode would ask the driver.
        self.mode = (mode or FakeTensorMode)(allow_non_fake_inputs=True)
        self.backend = backend
        _pretend()
        _compile_with(self)

    def __enter__(self) -> None:
        self.mode.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self.mode.__exit__(*exception)


def _pretend() -> None:
    """Replace the functions of PyTorch's Python side that need CUDA."""
    import torch
    import torch.nn.attention.flex_attention as flex
    import torch.nn.functional as F
    from torch._subclasses.fake_tensor import FakeTensor

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
        "synchronize": lambda *device: _note("WAIT"),
        "empty_cache": lambda: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "is_current_stream_capturing": lambda: False,
        "cudart": lambda: Runtime,
        "get_rng_state": lambda *device: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *state: None,
        "Stream": _Stream,
        "current_stream": _Stream,
        "stream": lambda stream: nullcontext(),
        "set_stream": lambda stream: None,
        "device": lambda device: nullcontext(),
        "set_per_process_memory_fraction": _limit_memory,
        "CUDAGraph": _Graph,
        "graph": lambda graph, **options: nullcontext(),
        "graph_pool_handle": lambda: (0, 0),
    }
    for name, answer in answers.items():
        setattr(cuda, name, answer)
    cuda.random.get_rng_state = cuda.get_rng_state
    torch.autograd.set_multithreading_enabled(False)  # threads of autograd would not know the mode

    torch.nn.Module._apply = _apply  # type: ignore[assignment, method-assign]
    F.scaled_dot_product_attention = _attention(F.scaled_dot_product_attention)
    flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True  # otherwise FlexAttention would compile itself
    torch.tensor, torch.as_tensor = _tensor(torch.tensor), _tensor(torch.as_tensor)
    FakeTensor.tolist = _tolist  # type: ignore[method-assign]
    # Replace inference mode by `no_grad`: only then does PyTorch decompose composite operators before a mode sees them.
    inference_mode = torch.inference_mode
    torch.inference_mode = lambda mode=True: (  # type: ignore[assignment, misc]
        torch.no_grad() if mode is True else torch.no_grad()(mode) if callable(mode) else inference_mode(mode)
    )


def _limit_memory(fraction: float, device: Any = None) -> None:
    if getattr(device, "index", 0) is None:  # as in PyTorch
        raise ValueError(f"Expected a torch.device with a specified index or an integer, but got:{device}")


class _Stream:
    def __init__(self, device: Any = None) -> None:
        pass

    def wait_stream(self, other: _Stream) -> None:
        pass


class _Graph:
    """A CUDA graph that only records that it was run."""

    def replay(self) -> None:
        _note("GRAPH")


def _apply(self: Any, change: Callable[[Any], Any], recurse: bool = True, memo: Any = None) -> Any:
    """Replacement for `Module._apply`, which `Module.to` calls.

    On another device a parameter becomes a new object, since a real parameter cannot get fake memory, and a fake
    parameter cannot change its device. On the same device, a parameter stays the same object, as an optimizer expects.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensor

    memo = {} if memo is None else memo
    for child in self.children():
        _apply(child, change, memo=memo)
    for name, parameter in self._parameters.items():
        if parameter is not None:
            if id(parameter) not in memo:
                changed = change(parameter.detach())
                if isinstance(parameter, FakeTensor) and changed.device == parameter.device:
                    parameter.data, changed = changed, parameter
                    if parameter.grad is not None:
                        parameter.grad = change(parameter.grad)
                else:
                    changed = torch.nn.Parameter(changed, parameter.requires_grad)
                memo[id(parameter)] = parameter, changed
            self._parameters[name] = memo[id(parameter)][1]
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = change(buffer)
    return self


def _attention(real: Callable[..., Any]) -> Callable[..., Any]:
    """Return attention that calls the kernels of a GPU, since a CPU build calls other kernels."""
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
        if attn_mask is None and q.dtype != torch.float32:  # FlashAttention itself supports shared keys
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
    """Return `torch.tensor` for a device without real memory. The mode must see that the numbers move to the device."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensor

    def tensor(data: Any, *arguments: Any, device: Any = None, **options: Any) -> Any:
        made = real(data, *arguments, **options)
        zeros = torch.zeros(made.shape, dtype=made.dtype)
        if isinstance(zeros, FakeTensor):
            made = zeros
        return made if device is None else made.to(device)

    return tensor


def _tolist(tensor: Any) -> Any:
    """Return made-up numbers. The host waits once for all numbers."""
    number = tensor.new_zeros(()).item()
    for size in reversed(tensor.shape):
        number = [number] * size
    return number


def _compile_with(device: FakeCuda) -> None:
    """Make `torch.compile`, and `Module.compile`, use the backend of `device`."""
    import torch

    real = torch.compile

    def compile(model: Any = None, **options: Any) -> Any:
        if model is None:
            return lambda model: compile(model, **options)
        if device.backend is None:
            return model
        kept = {name: options[name] for name in ("fullgraph", "dynamic") if name in options}
        return real(model, backend=device.backend, **kept)

    torch.compile = compile  # type: ignore[assignment]


_counters: list[Counter[str]] = []
"""The counters of the active `waits` modes."""


def _note(kind: str) -> None:
    for seen in _counters[-1:]:
        seen[f"{kind} {_place()}"] += 1


def waits() -> Any:
    """Return a dispatch mode for use inside `FakeCuda`. Its counter `seen` has the keys `KIND module.function`.

    The kinds in which the host waits for the device are `WAIT`, and the copies `D2H wait` and `H2D wait`. The copies
    `D2H async` and `H2D async` do not wait. Numbers that the host reads are made up: 1.0, True and 7.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    aten = torch.ops.aten
    of_data = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}

    class Waits(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: Counter[str] = Counter()

        supports_higher_order_operators = True

        @classmethod
        def is_infra_mode(cls) -> bool:
            return True  # `torch.compile` does nothing under a mode that is not `infra`

        def __enter__(self) -> Any:
            _counters.append(self.seen)
            return super().__enter__()

        def __exit__(self, *exception: Any) -> None:
            _counters.pop()
            super().__exit__(*exception)

        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if not isinstance(operator, torch._ops.OpOverload):  # FlexAttention
                return operator(*args, **kwargs)
            packet = operator.overloadpacket
            if packet in (aten.index, aten.index_put, aten.index_put_) and args[0].is_cuda:
                args = (args[0], [*map(_index, args[1])], *args[2:])
            elif of_data.intersection(operator.tags) and any(tensor.is_cuda for tensor in _tensors(args)):
                _note("WAIT")
            if packet in (aten._local_scalar_dense, aten.item):
                [tensor] = args
                return 1.0 if tensor.is_floating_point() else True if tensor.dtype == torch.bool else 7
            if packet is aten.equal:
                return True
            if packet is aten.nonzero and args[0].is_cuda:
                return torch.empty(3, args[0].dim(), dtype=torch.long, device=args[0].device)
            if packet is aten._to_copy and (target := kwargs.get("device")) is not None:
                _note_copy(args[0].device.type, torch.device(target).type, kwargs.get("non_blocking"))
            if packet is aten.copy_:
                _note_copy(args[1].device.type, args[0].device.type, len(args) > 2 and args[2])
            return operator(*args, **kwargs)

    return Waits()


def _note_copy(source: str, target: str, is_async: Any) -> None:
    kind = {("cuda", "cpu"): "D2H", ("cpu", "cuda"): "H2D"}.get((source, target))
    if kind:
        _note(f"{kind} {'async' if is_async else 'wait'}")


def _index(index: Any) -> Any:
    """Return the index as a GPU needs it. A CPU tensor is copied to the GPU. For a mask, the host must know the number
    of true entries."""
    import torch

    if index is None:
        return None
    if not index.is_cuda:
        _note("H2D wait")
        index = torch.zeros(index.shape, dtype=index.dtype, device="cuda")
    if index.dtype in (torch.bool, torch.uint8):
        _note("WAIT")
        index = torch.zeros(3, dtype=torch.long, device="cuda")
    return index


def _tensors(values: Any) -> Iterator[Any]:
    import torch

    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _place() -> str:
    """Return `module.function` of the Atlas code that made this call. If PyTorch's optimizers or clipping are in
    between, their `module.function` comes first.

    Comprehensions and lambdas get no name, so that the result is the same in every version of Python.
    """
    atlas = sys.modules.get("atlas")
    ours = f"{Path(str(atlas.__file__)).parent}/" if atlas else "\0"
    libraries = ("/torch/optim/", "/torch/nn/utils/", "/torch/amp/", "/torchao/")
    names: list[str] = []
    frame = sys._getframe(2)
    while frame:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if not name.startswith("<"):
            if file.startswith(ours):
                return " < ".join([*names, f"{Path(file).stem}.{name}"])
            if not names and any(folder in file for folder in libraries):
                names.append(f"{Path(file).stem}.{name}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(names)
