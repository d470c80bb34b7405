"""GGUF out and in: an `AtlasLM` and its tokenizer as one file that llama.cpp runs, and back.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Names, shapes and which tensors stay
in 32 bits are those of llama.cpp's own converter, `convert_hf_to_gguf.py`.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as TensorType
from torch import Tensor, nn

from atlas.config import ModelConfig
from atlas.errors import AtlasError
from atlas.export.gguf_header import check_header
from atlas.files import flush_folder, flush_to_disk
from atlas.model import AtlasLM
from atlas.tokenizer import ByteLevelTokenizer, Tokenizer

Quantization = Literal["f32", "f16"]

TENSOR_NAMES = {
    "gpt2": {
        "token_embedding.weight": "token_embd.weight",
        "position_embedding.weight": "position_embd.weight",
        "blocks.{}.attention_norm.weight": "blk.{}.attn_norm.weight",
        "blocks.{}.attention_norm.bias": "blk.{}.attn_norm.bias",
        "blocks.{}.attention.qkv.weight": "blk.{}.attn_qkv.weight",
        "blocks.{}.attention.qkv.bias": "blk.{}.attn_qkv.bias",
        "blocks.{}.attention.output.weight": "blk.{}.attn_output.weight",
        "blocks.{}.attention.output.bias": "blk.{}.attn_output.bias",
        "blocks.{}.mlp_norm.weight": "blk.{}.ffn_norm.weight",
        "blocks.{}.mlp_norm.bias": "blk.{}.ffn_norm.bias",
        "blocks.{}.mlp.up.weight": "blk.{}.ffn_up.weight",
        "blocks.{}.mlp.up.bias": "blk.{}.ffn_up.bias",
        "blocks.{}.mlp.down.weight": "blk.{}.ffn_down.weight",
        "blocks.{}.mlp.down.bias": "blk.{}.ffn_down.bias",
        "final_norm.weight": "output_norm.weight",
        "final_norm.bias": "output_norm.bias",
        "lm_head.weight": "output.weight",
    },
}
"""Per llama.cpp architecture: Atlas's name of a tensor → llama.cpp's, `{}` being the block."""

VOCABULARY_ROWS = frozenset({"token_embedding.weight", "lm_head.weight"})
"""Tensors with one row a token; the rows that only pad the vocabulary are not exported."""

FILE_TYPES = {"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16}
MATRIX_TYPES = {"f32": TensorType.F32, "f16": TensorType.F16}
LARGEST_F16 = 65504.0


@dataclass(frozen=True)
class ExportedFile:
    """What was written: the type of each tensor by its name in the file, and the file's size."""

    path: Path
    architecture: str
    tensor_types: dict[str, str]
    num_bytes: int


def export_gguf(
    model: AtlasLM,
    tokenizer: Tokenizer,
    output: str | Path,
    *,
    quantize: Quantization = "f16",
    name: str = "Atlas",
) -> ExportedFile:
    """Write `model` with `tokenizer` inside to `output`, which appears whole or not at all.

    `name` is what programs that list models will call it. Raises `AtlasError` for a tokenizer or weights
    that the file cannot hold and where it cannot be written, `ValueError` if the name table and the
    model's state dict differ.
    """
    output = Path(output)
    vocabulary = exportable(tokenizer, model.config)
    tensors = file_tensors(model)
    types = {tensor: tensor_type(tensor, weights, quantize) for tensor, weights in tensors.items()}
    for tensor, weights in tensors.items():
        _check_range(tensor, weights, types[tensor])

    temporary = output.with_name(output.name + ".tmp")
    writer = gguf.GGUFWriter(temporary, model.config.gguf_architecture)
    writer.add_name(name)
    for key, value in metadata_of(model, vocabulary, quantize).items():
        _add(writer, key, value)
    sizes = {tensor: _num_bytes(weights, types[tensor]) for tensor, weights in tensors.items()}
    for tensor, weights in tensors.items():
        writer.add_tensor_info(tensor, weights.shape, np.dtype(np.float32), sizes[tensor], types[tensor])
    try:
        _check_target(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        _check_space(output, sum(sizes.values()))
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor, weights in tensors.items():  # one converted tensor in memory at a time
                writer.write_tensor_data(gguf.quantize(weights.numpy(), types[tensor]))
            writer.close()
            with open(temporary, "rb+") as file:
                flush_to_disk(file)
            os.replace(temporary, output)
            flush_folder(output.parent)
        finally:
            writer.close()
            temporary.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise AtlasError(f"{output}: cannot be written: {reason}; choose another place") from None
    type_names = {tensor: type.name.lower() for tensor, type in types.items()}
    return ExportedFile(output, model.config.gguf_architecture, type_names, output.stat().st_size)


def exportable(tokenizer: Tokenizer, config: ModelConfig) -> ByteLevelTokenizer:
    """`tokenizer`, if a GGUF file can hold it and its vocabulary is the model's; else `AtlasError`."""
    if not isinstance(tokenizer, ByteLevelTokenizer):
        raise AtlasError(
            f"tokenizer {tokenizer.name}: is custom code, which a GGUF file cannot hold; "
            "train with gpt2 or a tokenizer.json to export"
        )
    if tokenizer.vocab_size != config.vocabulary:
        raise AtlasError(
            f"model.vocab_size {config.vocabulary}: tokenizer {tokenizer.name} has {tokenizer.vocab_size} "
            "tokens, and llama.cpp wants one row for each; train with the tokenizer's size to export"
        )
    return tokenizer


def file_tensors(model: AtlasLM) -> dict[str, Tensor]:
    """llama.cpp's name → fp32 tensor on the CPU, for all that its graph reads.

    Covers the state dict exactly, or raises `ValueError`. llama.cpp's `gpt2` adds every bias, so those that
    the model goes without are written as zeros.
    """
    config = model.config
    names = tensor_names(config)
    state = dict(model.state_dict())
    if not config.bias:
        for name in names.keys() - state.keys():
            if name.endswith(".bias"):
                state[name] = torch.zeros(len(state[name.removesuffix("bias") + "weight"]))
    if different := names.keys() ^ state.keys():
        raise ValueError(f"{config.gguf_architecture} table and state dict differ in {sorted(different)}")
    for name in VOCABULARY_ROWS & state.keys():
        state[name] = state[name][: config.vocabulary]
    return {names[name]: state[name].float().cpu() for name in names}


def metadata_of(model: AtlasLM, tokenizer: ByteLevelTokenizer, quantize: Quantization) -> dict[str, Any]:
    """Everything the file says besides its tensors and the model's name."""
    config, architecture, eos_id = model.config, model.config.gguf_architecture, tokenizer.eos_id
    tokens = tokenizer.token_strings()
    token_types = [int(gguf.TokenType.NORMAL)] * len(tokens)
    token_types[eos_id] = int(gguf.TokenType.CONTROL)
    return {
        "general.type": "model",
        "general.file_type": int(FILE_TYPES[quantize]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        f"{architecture}.context_length": config.max_seq_len,
        f"{architecture}.embedding_length": config.hidden_size,
        f"{architecture}.feed_forward_length": 4 * config.hidden_size,
        f"{architecture}.block_count": config.num_layers,
        f"{architecture}.attention.head_count": config.num_heads,
        f"{architecture}.attention.layer_norm_epsilon": float(np.float32(model.final_norm.eps)),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": token_types,
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in tokenizer.merges()],
        "tokenizer.ggml.bos_token_id": eos_id,
        "tokenizer.ggml.eos_token_id": eos_id,
        "tokenizer.ggml.add_bos_token": False,
    }


def tensor_names(config: ModelConfig) -> dict[str, str]:
    """Atlas's name → llama.cpp's, of each tensor of a model of this shape."""
    table = TENSOR_NAMES[config.gguf_architecture]
    names = {a.format(block): b.format(block) for block in range(config.num_layers) for a, b in table.items()}
    if config.tie_embeddings:
        del names["lm_head.weight"]
    return names


def tensor_type(name: str, tensor: Tensor, quantize: Quantization) -> TensorType:
    """Vectors and positions stay in 32 bits, as llama.cpp's converter keeps them: they cost nothing."""
    return TensorType.F32 if tensor.ndim == 1 or name == "position_embd.weight" else MATRIX_TYPES[quantize]


def read_gguf(path: str | Path) -> tuple[AtlasLM, dict[str, Any]]:
    """The model that a GGUF file of ours holds, in fp32 and evaluation mode, and the file's metadata.

    Everything comes from the file: shape, norm epsilon, and the weights as their type has rounded them.
    Raises `AtlasError` for a file that is not whole or of another architecture.
    """
    try:
        check_header(Path(path))
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        if metadata["general.architecture"] not in TENSOR_NAMES:
            known, found = ", ".join(TENSOR_NAMES), metadata["general.architecture"]
            raise AtlasError(f"{path}: holds architecture {found}; Atlas reads {known}")
        tensors = {
            tensor.name: torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
            for tensor in reader.tensors
        }
        return _read_model(metadata, tensors).eval(), metadata
    except FileNotFoundError:
        raise AtlasError(f"{path}: no such file") from None
    except (OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[-1].strip()
        raise AtlasError(f"{path}: is not a whole GGUF file: {reason:.200}; export it again") from None


def _read_model(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> AtlasLM:
    architecture = metadata["general.architecture"]
    config = ModelConfig(
        hidden_size=metadata[f"{architecture}.embedding_length"],
        num_layers=metadata[f"{architecture}.block_count"],
        num_heads=metadata[f"{architecture}.attention.head_count"],
        vocab_size=len(metadata["tokenizer.ggml.tokens"]),
        max_seq_len=metadata[f"{architecture}.context_length"],
        tie_embeddings="output.weight" not in tensors,
    )
    padding = config.padded_vocab_size - config.vocabulary
    state = {ours: tensors.pop(theirs) for ours, theirs in tensor_names(config).items()}
    if tensors:
        raise ValueError(f"holds tensors that {architecture} has not: {', '.join(tensors)}")
    for name in VOCABULARY_ROWS & state.keys():
        state[name] = nn.functional.pad(state[name], (0, 0, 0, padding))
    with torch.device("meta"):
        model = AtlasLM(config)
    model.load_state_dict(state, assign=True)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = float(metadata[f"{architecture}.attention.layer_norm_epsilon"])
    return model


def _num_bytes(tensor: Tensor, type: TensorType) -> int:
    block_length, block_bytes = gguf.GGML_QUANT_SIZES[type]
    return tensor.numel() // block_length * block_bytes


def _check_range(name: str, tensor: Tensor, type: TensorType) -> None:
    largest = tensor.abs().max().item()
    if not np.isfinite(largest):
        raise AtlasError(f"{name}: holds values that are not numbers; export an earlier checkpoint")
    if type is TensorType.F16 and largest > LARGEST_F16:
        raise AtlasError(
            f"{name}: holds {largest:.3g}, more than f16's {LARGEST_F16:.0f}; use --quantize f32"
        )


def _check_target(output: Path) -> None:
    """A slip of the hand must not put the export in the place of a checkpoint."""
    if output.is_file():
        with open(output, "rb") as file:
            if file.read(4) not in (b"GGUF", b""):
                raise AtlasError(f"{output}: exists and is not a GGUF file; choose another name")


def _check_space(output: Path, needed: int) -> None:
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        raise AtlasError(
            f"{output}: needs {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free there; "
            "free some space or choose another place"
        )


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
