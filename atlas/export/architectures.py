"""What can leave Atlas, what llama.cpp calls each tensor, and in which parts and order of rows it wants them.

Names and orders are those of llama.cpp's own converter, `convert_hf_to_gguf.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from atlas.config import ModelConfig
from atlas.errors import ExportError
from atlas.tokenizer import ByteLevelTokenizer, Tokenizer
from atlas.tokenizer.foreign import ForeignTokenizer

_LLAMA = {
    "token_embedding.weight": "token_embd.weight",
    "blocks.{}.attention_norm.weight": "blk.{}.attn_norm.weight",
    "blocks.{}.attention.q.weight": "blk.{}.attn_q.weight",
    "blocks.{}.attention.k.weight": "blk.{}.attn_k.weight",
    "blocks.{}.attention.v.weight": "blk.{}.attn_v.weight",
    "blocks.{}.attention.output.weight": "blk.{}.attn_output.weight",
    "blocks.{}.mlp_norm.weight": "blk.{}.ffn_norm.weight",
    "blocks.{}.mlp.gate.weight": "blk.{}.ffn_gate.weight",
    "blocks.{}.mlp.value.weight": "blk.{}.ffn_up.weight",
    "blocks.{}.mlp.down.weight": "blk.{}.ffn_down.weight",
    "final_norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
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
    "llama": _LLAMA,
    "qwen3": {
        **_LLAMA,
        "blocks.{}.attention.q_norm.weight": "blk.{}.attn_q_norm.weight",
        "blocks.{}.attention.k_norm.weight": "blk.{}.attn_k_norm.weight",
    },
}
"""Per llama.cpp architecture: Atlas's name of a tensor → llama.cpp's, `{}` being the block."""


def architecture_of(config: ModelConfig) -> str:
    """llama.cpp's name for what this model computes. Raises `ExportError` where it has none."""
    if config.gguf_architecture is None:
        raise ExportError(f"the model is for Atlas only: {config.train_only}, and train again to export")
    return config.gguf_architecture


def exportable_tokenizer(tokenizer: Tokenizer, config: ModelConfig) -> ByteLevelTokenizer:
    """`tokenizer`, if a file can hold it and the model, and its vocabulary is the model's; else `AtlasError`."""
    architecture_of(config)
    if isinstance(tokenizer, ForeignTokenizer):
        raise ExportError(
            f"tokenizer {tokenizer.name}: is another model's, whose split a GGUF file has no word for; take --format hf"
        )
    if not isinstance(tokenizer, ByteLevelTokenizer):
        raise ExportError(
            f"tokenizer {tokenizer.name}: is custom code, which no file can hold; "
            "train with gpt2 or a tokenizer.json to export"
        )
    if tokenizer.vocab_size != config.vocabulary:
        raise ExportError(
            f"model.vocab_size {config.vocabulary}: tokenizer {tokenizer.name} has {tokenizer.vocab_size} "
            "tokens, and other programs want one row for each; train with the tokenizer's size to export"
        )
    return tokenizer


def tensor_names(config: ModelConfig) -> dict[str, str]:
    """Atlas's name → llama.cpp's, of each tensor of a model of this shape."""
    return names_in(TENSOR_NAMES, config)


def names_in(tables: Mapping[str, Mapping[str, str]], config: ModelConfig) -> dict[str, str]:
    """The names that a table of these, by architecture, gives to the tensors of a model of this shape."""
    table = tables[architecture_of(config)]
    names = {a.format(block): b.format(block) for block in range(config.num_layers) for a, b in table.items()}
    if config.tie_embeddings:
        del names["lm_head.weight"]
    return names


def exportable_state(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A state dict in the parts that other programs want, still by Atlas's names. GPT-2 adds every bias there, so those
    that the model goes without are zeros."""
    if architecture_of(config) != "gpt2":
        return separated(state, config)
    state = dict(state)
    for name in () if config.bias else tensor_names(config):
        if name.endswith(".bias"):
            state[name] = torch.zeros(len(state[name.removesuffix("bias") + "weight"]))
    return state


def for_llama_cpp(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The same, with the rows in llama.cpp's order."""
    parts = exportable_state(state, config)
    if config.gguf_architecture == "llama":
        parts = {name: _pairs_as_neighbours(name, tensor, config) for name, tensor in parts.items()}
    return parts


def from_llama_cpp(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The other way round: the state dict that a model of ours loads."""
    if config.gguf_architecture == "llama":
        state = {name: _pairs_as_halves(name, tensor, config) for name, tensor in state.items()}
    return joined(state, config)


def separated(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """`qkv` as `q`, `k` and `v`, and SwiGLU's `up` as `gate` and `value`: of weights, and of biases where there are."""
    parts = {}
    for name, tensor in state.items():
        room, _, kind = name.rpartition(".")
        if names := _parts_of(room, config):
            for part, rows in zip(names, torch.split(tensor, list(names.values())), strict=True):
                parts[f"{part}.{kind}"] = rows
        else:
            parts[name] = tensor
    return parts


def joined(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The other way round."""
    state = dict(state)
    for block in range(config.num_layers):
        for room in (f"blocks.{block}.attention.qkv", f"blocks.{block}.mlp.up"):
            names = _parts_of(room, config)
            for kind in ("weight", "bias"):
                if names and f"{next(iter(names))}.{kind}" in state:
                    state[f"{room}.{kind}"] = torch.cat([state.pop(f"{part}.{kind}") for part in names])
    return state


def _parts_of(room: str, config: ModelConfig) -> dict[str, int]:
    """What a linear layer is made of, with the rows of each part; nothing where it is of one piece."""
    if room.endswith("attention.qkv"):
        place = room.removesuffix("qkv")
        queries, keys = config.num_heads * config.head_size, config.kv_heads * config.head_size
        return {f"{place}q": queries, f"{place}k": keys, f"{place}v": keys}
    if room.endswith("mlp.up") and config.mlp == "swiglu":
        place = room.removesuffix("up")
        return {f"{place}gate": config.mlp_width, f"{place}value": config.mlp_width}
    return {}


def _pairs_as_neighbours(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """Rows of q and k so that rope's pairs (i, i + D/2) of a head come to lie side by side, as llama.cpp's `llama`
    wants them. Their products stay the same."""
    if not name.endswith(("attention.q.weight", "attention.k.weight")):
        return tensor
    heads = tensor.view(-1, 2, config.head_size // 2, tensor.shape[1])
    return heads.transpose(1, 2).reshape(tensor.shape)


def _pairs_as_halves(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    if not name.endswith(("attention.q.weight", "attention.k.weight")):
        return tensor
    heads = tensor.view(-1, config.head_size // 2, 2, tensor.shape[1])
    return heads.transpose(1, 2).reshape(tensor.shape)
