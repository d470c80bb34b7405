"""Write an `AtlasLM` and its tokenizer to a GGUF file, the format of llama.cpp, and read such files.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The metadata of the model and
the choice of tensors that stay in 32 bits follow llama.cpp's own converter, `convert_hf_to_gguf.py`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as TensorType
from pydantic import ValidationError
from torch import Tensor

from atlas.config import ModelConfig
from atlas.config.model import RopeScaling
from atlas.errors import ExportError
from atlas.export.architectures import (
    ROTATED,
    SWITCHES,
    TENSOR_NAMES,
    architecture_of,
    build_from,
    for_llama_cpp,
    from_llama_cpp,
    import_of,
    tensor_names,
)
from atlas.export.gguf_header import check_header
from atlas.export.quantize import Quantization, as_type, check_available, file_type, num_bytes, tensor_type
from atlas.export.vocabulary import add_metadata, check_tokenizer, vocabulary_of
from atlas.files import explain_failed_write
from atlas.model import AtlasLM
from atlas.model.rope import stretching
from atlas.outputs import place_of_file, replacing_output
from atlas.tokenizer import Tokenizer

_SIZES = {
    "max_seq_len": "context_length",
    "hidden_size": "embedding_length",
    "mlp_size": "feed_forward_length",
    "num_layers": "block_count",
    "num_heads": "attention.head_count",
}
_ROTATED_SIZES = {
    **_SIZES,
    "num_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
_SHAPE = {
    "gpt2": {**_SIZES, "norm_eps": "attention.layer_norm_epsilon"},
    **dict.fromkeys(SWITCHES, _ROTATED_SIZES),
}
"""Per architecture: a field of `ModelConfig` → the metadata key for this field, without the architecture's name in
front."""
_OPTIONAL = ("attention.head_count_kv", "attention.key_length", "rope.freq_base")
"""Keys that are missing where the value is that of `ModelConfig`'s default."""
ROPE_FACTORS, _SCALING = "rope_freqs.weight", "atlas.rope_scaling"
"""The tensor with the factors of `RopeScaling`, and the key with its settings."""
_LLAMAS = [RopeScaling(factor=8), RopeScaling(factor=32)]  # Llama 3.1 and 3.3; Llama 3.2


def export_gguf(
    model: AtlasLM,
    tokenizer: Tokenizer,
    output: str | Path,
    *,
    quantize: Quantization = "f16",
    name: str = "Atlas",
    license: str | None = None,
    chat_template: str | None = None,
) -> dict[str, str]:
    """Write `model` and `tokenizer` to the file `output`, which appears complete or not at all. Return the name of each
    tensor in the file → the type of this tensor.

    `name` is the name that other programs show for the model. `license` is an SPDX identifier such as `mit`.
    `chat_template` is a Jinja template. Raises `ExportError` if the file cannot hold the tokenizer or the weights, or
    cannot be written. Raises `ValueError` if the table of tensor names and the model's state dict differ.
    """
    output = Path(output)
    check_tokenizer(tokenizer, model.config)
    check_available(quantize)
    tensors = file_tensors(model)
    types = tensor_types(model, tensors, quantize)

    writer = gguf.GGUFWriter(None, architecture_of(model.config))
    about = {"general.name": name, "general.size_label": _size_label(model.num_parameters())}
    about |= {"general.license": license or "", "tokenizer.chat_template": chat_template or ""}
    add_metadata(writer, {**about, **metadata_of(model, tokenizer, quantize)})
    sizes = {tensor: num_bytes(weights.numel(), types[tensor]) for tensor, weights in tensors.items()}
    for tensor, weights in tensors.items():
        _check_range(tensor, weights, types[tensor])
        writer.add_tensor_info(tensor, weights.shape, np.dtype(np.float32), sizes[tensor], types[tensor])
    with explain_failed_write(output, "choose another place", kind=ExportError):
        _check_place(place_of_file(output), sum(sizes.values()))
        with replacing_output(output) as temporary, closing(writer):
            writer.write_header_to_file(temporary)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor, weights in tensors.items():  # only one converted tensor is in memory at a time
                writer.write_tensor_data(as_type(weights.numpy(), types[tensor]))
    return {tensor: type.name.lower() for tensor, type in types.items()}


def file_tensors(model: AtlasLM) -> dict[str, Tensor]:
    """llama.cpp's name → fp32 tensor on the CPU, for each tensor of the model.

    Raises `ValueError` if the table of tensor names and the state dict differ.
    """
    config = model.config
    names, state = tensor_names(config), for_llama_cpp(model.state_dict(), config)
    if different := names.keys() ^ state.keys():
        raise ValueError(f"{config.gguf_architecture} table and state dict differ in {sorted(different)}")
    tensors = {names[name]: state[name].float().cpu() for name in names}
    if config.rope_scaling is not None:
        tensors[ROPE_FACTORS] = stretching(config.head_size, config.rope_theta, config.rope_scaling)
    return tensors


def metadata_of(model: AtlasLM, tokenizer: Tokenizer, quantize: Quantization) -> dict[str, Any]:
    """GGUF's key → value, for the metadata of the model's shape, the quantization and the tokenizer."""
    config = model.config
    return {
        "general.type": "model",
        "general.file_type": file_type(quantize),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **{f"{architecture_of(config)}.{key}": value for key, value in _shape_in_file(config).items()},
        **({_SCALING: config.rope_scaling.model_dump_json()} if config.rope_scaling else {}),
        **vocabulary_of(tokenizer),
    }


def _size_label(parameters: int) -> str:
    """The rounded number of parameters in the style of model names, such as `124M`."""
    for unit, suffix in ((1e9, "B"), (1e6, "M")):
        if parameters >= unit:
            return f"{parameters / unit:.3g}{suffix}"
    return f"{parameters / 1e3:.3g}K"


def _shape_in_file(config: ModelConfig) -> dict[str, Any]:
    """GGUF's key → value, for the metadata of the model's shape. The keys lack the architecture's name in front."""
    sizes, architecture = config.resolved_sizes, architecture_of(config)
    shape = {key: sizes[field] for field, key in _SHAPE[architecture].items()}
    if architecture != "gpt2":
        shape |= {"vocab_size": config.vocabulary, "rope.dimension_count": config.head_size}
        shape["attention.value_length"] = config.head_size
    return shape | {key: float(np.float32(value)) for key, value in shape.items() if isinstance(value, float)}


def tensor_types(model: AtlasLM, tensors: dict[str, Tensor], quantize: Quantization) -> dict[str, TensorType]:
    """The name of each tensor → the type of this tensor in the file."""
    return {
        name: tensor_type(name, tensor.shape, quantize, model.config.num_layers, model.config.tie_embeddings)
        for name, tensor in tensors.items()
    }


def read_gguf(path: str | Path) -> tuple[AtlasLM, dict[str, Any]]:
    """Return the model in a GGUF file, in fp32 and evaluation mode, and the file's metadata.

    The shape, the norm epsilon and the weights come from the file. The weights are rounded to the types in the file.
    Raises `ExportError` if the file is incomplete, or has a model that Atlas does not know.
    """
    with open_gguf(path) as reader:
        if reader.byte_order == "S":  # `gguf.dequantize` would take the bytes in the wrong order
            raise ExportError(
                f"{path}: has the byte order of another machine; convert it with gguf-convert-endian"
            )
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        if (found := metadata["general.architecture"]) not in TENSOR_NAMES:
            raise ExportError(f"{path}: has the architecture {found}; Atlas reads {', '.join(TENSOR_NAMES)}")
        tensors = {
            tensor.name: torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
            for tensor in reader.tensors
        }
        with import_of(Path(path), "its metadata do not fit its weights"):
            config = _config_in_file(metadata, tied="output.weight" not in tensors)
            if (factors := tensors.pop(ROPE_FACTORS, None)) is not None:
                scaling = _scaling_with(factors, config, metadata)
                config = config.model_copy(update={"rope_scaling": scaling})
        state = {ours: tensors.pop(theirs) for ours, theirs in tensor_names(config).items()}
        if tensors:
            raise ValueError(
                f"holds tensors that {config.gguf_architecture} does not have: {', '.join(tensors)}"
            )
        return build_from(from_llama_cpp(state, config), config), metadata


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return the metadata of any GGUF file. No tensor is read. Raises `ExportError` if the file cannot be read."""
    with open_gguf(path) as reader:
        return {name: field.contents() for name, field in reader.fields.items()}


@contextmanager
def open_gguf(path: str | Path) -> Iterator[gguf.GGUFReader]:
    """A context with a reader for any GGUF file. Raises `ExportError` if the file is missing, cut off or damaged."""
    try:
        check_header(Path(path))
        yield gguf.GGUFReader(path)
    except FileNotFoundError:
        raise ExportError(f"{path}: no such file: atlas export writes GGUF files") from None
    except (OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        if Path(path).suffix == ".pt":
            raise ExportError(f"{path}: is a checkpoint, not a GGUF file: atlas export converts it") from None
        reason = (str(error).splitlines() or [type(error).__name__])[-1].strip()
        raise ExportError(
            f"{path}: is not a complete GGUF file: {reason:.200}; download or export it again"
        ) from None


def _config_in_file(metadata: dict[str, Any], *, tied: bool) -> ModelConfig:
    architecture = metadata["general.architecture"]
    stated = {key.removeprefix(f"{architecture}."): value for key, value in metadata.items()}
    if unknown := _not_computed(stated):
        raise ExportError(f"is a model with {unknown}, which Atlas does not compute")
    keys = {
        field: key for field, key in _SHAPE[architecture].items() if key in stated or key not in _OPTIONAL
    }
    if missing := [key for key in keys.values() if key not in stated]:
        raise ExportError(f"has no {architecture}.{missing[0]}")
    if "tokenizer.ggml.tokens" not in metadata:
        raise ExportError("has no tokenizer.ggml.tokens, so the number of its tokens is not known")
    shape = {field: stated[key] for field, key in keys.items()}
    family = {} if architecture == "gpt2" else ROTATED | SWITCHES[architecture]
    vocab_size = len(metadata["tokenizer.ggml.tokens"])
    try:
        config = ModelConfig(**shape, **family, vocab_size=vocab_size, tie_embeddings=tied)
    except ValidationError as error:
        wrong = error.errors()[0]
        field = str(wrong["loc"][0]) if wrong["loc"] else ""
        value = f"{architecture}.{keys[field]} {shape[field]!s:.60}: " if field in keys else ""
        raise ExportError(f"{value}{wrong['msg'].removeprefix('Value error, ')}") from None
    if architecture != "gpt2" and stated.get("rope.dimension_count", config.head_size) != config.head_size:
        raise ExportError("is a model with RoPE in a part of a head, which Atlas does not compute")
    return config


def _not_computed(stated: dict[str, Any]) -> str | None:
    """Return a feature of the model in a file that Atlas does not compute, or None."""
    if stated.get("expert_count"):
        return "experts"
    if stated.get("attention.causal") is False:
        return "attention to later tokens"
    scales = [stated.get(key, 1.0) for key in ("rope.scaling.factor", "rope.scale_linear")]
    kind = stated.get("rope.scaling.type", "linear")  # as in llama.cpp
    if kind not in ("none", "linear") or (kind == "linear" and any(scale != 1.0 for scale in scales)):
        return f"RoPE scaled by the type {kind!s:.40}"
    return None


def _scaling_with(factors: Tensor, config: ModelConfig, metadata: dict[str, Any]) -> RopeScaling:
    """Return the settings with which RoPE's wavelengths are stretched by `factors`. llama.cpp's files have no key for
    these settings, so they are those that Atlas wrote, or those of a model of Llama."""
    stated = metadata.get(_SCALING)
    try:
        known = [RopeScaling.model_validate_json(stated)] if stated else _LLAMAS
    except ValidationError:
        raise ExportError(f"{_SCALING} {stated!s:.60}: is not what Atlas writes") from None
    for scaling in known:
        if torch.allclose(factors, stretching(config.head_size, config.rope_theta, scaling), rtol=1e-5):
            return scaling
    raise ExportError(f"{ROPE_FACTORS} stretches RoPE in a way that Atlas does not know")


def _check_range(name: str, tensor: Tensor, type: TensorType) -> None:
    largest = tensor.abs().max().item()
    if not np.isfinite(largest):
        raise ExportError(f"{name}: holds values that are not finite; export an earlier checkpoint")
    if type is TensorType.F16 and largest > (limit := torch.finfo(torch.float16).max):
        raise ExportError(
            f"{name}: holds {largest:.3g}, above f16's maximum of {limit:.0f}; use --quantize f32"
        )


def _check_place(output: Path, needed: int) -> None:
    """Create the folder of `output`. Raises `ExportError` if the disk has less than `needed` bytes of free space.
    Raises `ExportError` also if `output` exists and is not a GGUF file, so that a typing error cannot overwrite a
    checkpoint."""
    if output.is_file():
        with open(output, "rb") as file:
            if file.read(4) not in (b"GGUF", b""):
                raise ExportError(f"{output}: exists and is not a GGUF file; choose another name")
    output.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        raise ExportError(
            f"{output}: needs {needed / 1e6:,.1f} MB, but only {free / 1e6:,.1f} MB are free on its disk; "
            "free some space or choose another place"
        )
