"""Choose the GGUF type of each tensor, and convert weights to this type.

The types follow llama.cpp's own rule for models without experts and without an importance matrix. The rule is in
`llama_tensor_get_type_impl` and `tensor_type_fallback`, in llama.cpp's `src/llama-quant.cpp`. The package `gguf`
converts weights to most types, but cannot write K-quants. For K-quants, Atlas calls ggml's own function, which is in
the package `xllamacpp`.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
from pathlib import Path
from typing import Any, Literal, get_args

import gguf
import numpy as np
from gguf import GGMLQuantizationType as TensorType
from gguf import LlamaFileType as FileType
from numpy.typing import NDArray

from atlas.errors import ExportError

Quantization = Literal[
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_1", "q5_0", "q4_k_m", "q4_1", "q4_0"
]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)
"""The values of `--quantize`, from the largest file to the smallest."""

_FALLBACKS = {
    TensorType.Q4_K: TensorType.Q5_0,
    TensorType.Q5_K: TensorType.Q5_1,
    TensorType.Q6_K: TensorType.Q8_0,
}
"""K-quant → the type that replaces this K-quant if the length of a matrix's rows is not a multiple of 256."""
_UNQUANTIZED = (TensorType.F32, TensorType.F16, TensorType.BF16)


def file_type(quantize: Quantization) -> int:
    """GGUF's number for the quantization of a file."""
    return int(FileType["ALL_F32" if quantize == "f32" else f"MOSTLY_{quantize.upper()}"])


def tensor_type(
    name: str, shape: tuple[int, ...], quantize: Quantization, num_layers: int, is_tied: bool
) -> TensorType:
    """The GGUF type of the tensor that llama.cpp calls `name`.

    Vectors and position embeddings stay in f32, since they are small. In quantized files, the LM head has at least 6
    bits per weight. With a `_k_m` quantization, the matrix that contains attention's value projection and the MLP's
    down projection also have at least 6 bits per weight, in some layers.
    """
    if len(shape) == 1 or name == "position_embd.weight":
        return TensorType.F32
    kind = TensorType[quantize.removesuffix("_m").upper()]
    if kind in _UNQUANTIZED:
        return kind
    columns = shape[-1]
    if name == ("token_embd.weight" if is_tied else "output.weight"):
        if columns % _block_length(kind):
            kind = TensorType.Q8_0
        elif kind is not TensorType.Q8_0:
            kind = TensorType.Q6_K
    elif (
        quantize.endswith("_k_m")
        and (layer := re.fullmatch(r"blk\.(\d+)\.(attn_v|attn_qkv|ffn_down)\.weight", name))
        and _has_more_bits(int(layer[1]), num_layers)
    ):
        kind = TensorType.Q6_K
    if columns % _block_length(kind):
        kind = _FALLBACKS.get(kind, TensorType.F16)
    return kind if columns % _block_length(kind) == 0 else TensorType.F16


def _has_more_bits(layer: int, num_layers: int) -> bool:
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def _block_length(kind: TensorType) -> int:
    return int(gguf.GGML_QUANT_SIZES[kind][0])


def num_bytes(count: int, kind: TensorType) -> int:
    """The size in bytes of `count` weights of type `kind`. `count` must be a multiple of the block length."""
    length, size = gguf.GGML_QUANT_SIZES[kind]
    return count // length * size


def check_available(quantize: Quantization) -> None:
    """Raise `ExportError` if `quantize` is a K-quant and ggml is not installed."""
    if "_k" in quantize:
        _ggml(quantize)


def as_type(weights: NDArray[np.float32], kind: TensorType) -> NDArray[Any]:
    """Convert fp32 weights to type `kind`. Return the array that a GGUF file stores. Raises `ExportError` for a K-quant
    if ggml is not installed."""
    if kind not in _FALLBACKS:
        return gguf.quantize(weights, kind)
    rows = np.ascontiguousarray(weights, dtype=np.float32)
    out = np.empty((len(rows), num_bytes(rows.shape[1], kind)), dtype=np.uint8)
    ggml = _ggml(kind.name.lower())
    written = ggml(int(kind), rows.ctypes.data, out.ctypes.data, 0, len(rows), rows.shape[1], None)
    if written != out.nbytes:
        raise RuntimeError(f"ggml_quantize_chunk wrote {written} bytes, not {out.nbytes}")
    return out


@functools.cache
def _ggml(quantize: str) -> Any:
    """Return ggml's function `ggml_quantize_chunk(type, from, to, start, rows, columns, importance)`. Raises
    `ExportError` if the function is missing; the message names `quantize`."""
    found = importlib.util.find_spec("xllamacpp")
    problem = "the package xllamacpp is not installed"
    if found is not None and found.origin is not None:
        problem = "the installed xllamacpp lacks the function ggml_quantize_chunk"
        for path in sorted(Path(found.origin).parent.glob("xllamacpp*")):
            try:
                function = ctypes.CDLL(str(path)).ggml_quantize_chunk
            except (OSError, AttributeError):  # not a library, or a library without the function
                continue
            function.restype = ctypes.c_size_t
            number, pointer = ctypes.c_int64, ctypes.c_void_p
            function.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
            return function
    raise ExportError(
        f'--quantize {quantize}: needs ggml, and {problem}; pip install "atlas-llm[llama]", or use q8_0, q5_1 or q4_1'
    )
