"""Convert state dicts to the layouts of llama.cpp and Hugging Face: tensor names, split matrices and order of rows.

The names and orders for llama.cpp are those of llama.cpp's own converter, `convert_hf_to_gguf.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atlas.config import ModelConfig
from atlas.errors import AtlasError, ExportError
from atlas.model import AtlasLM

_BLOCK, _LAYER = "transformer.h.{}.", "model.layers.{}."
MODULES = {
    # Atlas: (llama.cpp, GPT-2 in Hugging Face's format, Llama and Qwen3 in Hugging Face's format)
    "token_embedding": ("token_embd", "transformer.wte", "model.embed_tokens"),
    "position_embedding": ("position_embd", "transformer.wpe", ""),
    "blocks.{}.attention_norm": ("blk.{}.attn_norm", _BLOCK + "ln_1", _LAYER + "input_layernorm"),
    "blocks.{}.attention.qkv": ("blk.{}.attn_qkv", _BLOCK + "attn.c_attn", ""),
    "blocks.{}.attention.q": ("blk.{}.attn_q", "", _LAYER + "self_attn.q_proj"),
    "blocks.{}.attention.k": ("blk.{}.attn_k", "", _LAYER + "self_attn.k_proj"),
    "blocks.{}.attention.v": ("blk.{}.attn_v", "", _LAYER + "self_attn.v_proj"),
    "blocks.{}.attention.output": ("blk.{}.attn_output", _BLOCK + "attn.c_proj", _LAYER + "self_attn.o_proj"),
    "blocks.{}.mlp_norm": ("blk.{}.ffn_norm", _BLOCK + "ln_2", _LAYER + "post_attention_layernorm"),
    "blocks.{}.mlp.up": ("blk.{}.ffn_up", _BLOCK + "mlp.c_fc", ""),
    "blocks.{}.mlp.gate": ("blk.{}.ffn_gate", "", _LAYER + "mlp.gate_proj"),
    "blocks.{}.mlp.value": ("blk.{}.ffn_up", "", _LAYER + "mlp.up_proj"),
    "blocks.{}.mlp.down": ("blk.{}.ffn_down", _BLOCK + "mlp.c_proj", _LAYER + "mlp.down_proj"),
    "final_norm": ("output_norm", "transformer.ln_f", "model.norm"),
    "lm_head": ("output", "lm_head", "lm_head"),
    "blocks.{}.attention.q_norm": ("blk.{}.attn_q_norm", "", _LAYER + "self_attn.q_norm"),
    "blocks.{}.attention.k_norm": ("blk.{}.attn_k_norm", "", _LAYER + "self_attn.k_norm"),
}
"""Atlas's name of a module → the names of this module in other programs. `{}` stands for the number of the block. An
empty name means that the program has no such module."""


_QKV = ("attention.q.weight", "attention.k.weight", "attention.v.weight")


def with_biases(modules: Mapping[str, str]) -> dict[str, str]:
    """Atlas's name → the other program's name, for each weight and bias of `modules`. Embeddings and the LM head have
    no bias."""
    return {
        f"{ours}.{kind}": f"{theirs}.{kind}"
        for ours, theirs in modules.items()
        for kind in ("weight", "bias")
        if kind == "weight" or not ours.endswith(("embedding", "lm_head"))
    }


def tables(gpt2: int, llama: int) -> dict[str, dict[str, str]]:
    """Per architecture: Atlas's name of a tensor → the other program's name. `gpt2` and `llama` are indices into the
    tuples of `MODULES`. The index `llama` is also for the other architectures with RoPE."""
    of_gpt2 = with_biases({ours: theirs[gpt2] for ours, theirs in MODULES.items() if theirs[1]})
    of_qwen3 = {f"{ours}.weight": f"{theirs[llama]}.weight" for ours, theirs in MODULES.items() if theirs[2]}
    of_llama = {a: b for a, b in of_qwen3.items() if not a.endswith(("q_norm.weight", "k_norm.weight"))}
    qkv = [name.removesuffix("weight") for name in of_llama if name.endswith(_QKV)]
    of_qwen2 = of_llama | {
        f"{name}bias": f"{of_llama[name + 'weight'].removesuffix('weight')}bias" for name in qkv
    }
    return {"gpt2": of_gpt2, "llama": of_llama, "qwen2": of_qwen2, "qwen3": of_qwen3, "smollm3": of_llama}


TENSOR_NAMES = tables(gpt2=0, llama=0)
"""Per llama.cpp architecture: Atlas's name of a tensor → llama.cpp's name. `{}` stands for the number of the block."""


ROTATED: dict[str, Any] = {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False}
"""The settings of `ModelConfig` that are the same for all architectures with RoPE."""
SWITCHES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "smollm3": {"nope_interval": 4},
}
"""Architecture with RoPE → the settings of `ModelConfig` in which it differs from Llama."""
_NEIGHBOURS = ("llama", "smollm3")
VOCABULARY_ROWS = frozenset({"token_embedding.weight", "lm_head.weight"})
"""Names of the tensors with one row per token of the vocabulary. Exports omit the rows that only pad the vocabulary."""


def build_from(state: Mapping[str, Tensor], config: ModelConfig) -> AtlasLM:
    """Build a model in evaluation mode from `state`, an fp32 state dict without the rows that pad the vocabulary."""
    padding = config.padded_vocab_size - config.vocabulary
    padded = {name: F.pad(state[name], (0, 0, 0, padding)) for name in VOCABULARY_ROWS & state.keys()}
    with torch.device("meta"):
        model = AtlasLM(config)
    model.load_state_dict({**state, **padded}, assign=True)
    return model.eval()


@contextmanager
def import_of(source: Path, misfit: str) -> Iterator[None]:
    """A context that turns each `AtlasError` into an `ExportError` that names `source`. A `RuntimeError`, which PyTorch
    raises for tensors with wrong shapes, becomes an `ExportError` with the text `misfit`."""
    try:
        yield
    except RuntimeError as error:
        raise ExportError(f"{source}: {misfit}: {str(error).splitlines()[-1].strip()}") from None
    except AtlasError as error:
        raise ExportError(f"{source}: {error}") from None


def architecture_of(config: ModelConfig) -> str:
    """The name of the llama.cpp architecture that computes this model. Raises `ExportError` if there is none."""
    if config.gguf_architecture is None:
        raise ExportError(f"the model is for Atlas only: {config.train_only}, and train again to export")
    return config.gguf_architecture


def tensor_names(config: ModelConfig) -> dict[str, str]:
    """Atlas's name → llama.cpp's name, for each tensor of a model with this config."""
    return names_in(TENSOR_NAMES, config)


def names_in(by_architecture: Mapping[str, Mapping[str, str]], config: ModelConfig) -> dict[str, str]:
    """Atlas's name → the other program's name, for each tensor of a model with this config. `by_architecture` contains
    a table of names per architecture."""
    table = by_architecture[architecture_of(config)]
    names = {a.format(block): b.format(block) for block in range(config.num_layers) for a, b in table.items()}
    if config.tie_embeddings:
        del names["lm_head.weight"]
    return names


def exportable_state(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return a state dict whose matrices are split as in other programs. The names follow Atlas's scheme.

    The rows that pad the vocabulary are omitted. Other programs expect all biases in GPT-2, so a bias that the model
    lacks becomes a vector of zeros.
    """
    state = {**state, **{name: state[name][: config.vocabulary] for name in VOCABULARY_ROWS & state.keys()}}
    if architecture_of(config) != "gpt2":
        return separated(state, config)
    for name in tensor_names(config):
        if name.endswith(".bias") and name not in state:
            state[name] = torch.zeros(len(state[name.removesuffix("bias") + "weight"]))
    return state


def for_llama_cpp(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return the result of `exportable_state`, with rows in llama.cpp's order.

    For the architectures `llama` and `smollm3`, llama.cpp's RoPE rotates pairs of neighbouring rows of q and k. Atlas's
    RoPE rotates the pairs of rows i and i + D/2 of each head. The new order does not change the products of q and k.
    """
    return _with_rows(exportable_state(state, config), config, from_shape=(2, config.head_size // 2))


def from_llama_cpp(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Invert `for_llama_cpp`. Return a state dict for `build_from`."""
    return joined(_with_rows(state, config, from_shape=(config.head_size // 2, 2)), config)


def _with_rows(
    state: Mapping[str, Tensor], config: ModelConfig, *, from_shape: tuple[int, int]
) -> dict[str, Tensor]:
    """Reorder the rows of q and k if the architecture is `llama` or `smollm3`. The rows of each head are arranged in a
    matrix of `from_shape`, and this matrix is transposed."""
    result = dict(state)
    for name, tensor in state.items() if config.gguf_architecture in _NEIGHBOURS else ():
        if name.endswith(("attention.q.weight", "attention.k.weight")):
            heads = tensor.view(-1, *from_shape, tensor.shape[1])
            result[name] = heads.transpose(1, 2).reshape(tensor.shape)
    return result


def separated(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Split `qkv` into `q`, `k` and `v`, and SwiGLU's `up` into `gate` and `value`, for weights and biases."""
    separate = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        splits = _splits(module, config) or {module: len(tensor)}
        for split, rows in zip(splits, torch.split(tensor, list(splits.values())), strict=True):
            separate[f"{split}.{kind}"] = rows
    return separate


def joined(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Invert `separated`: join the split matrices of each linear layer."""
    state = dict(state)
    for block in range(config.num_layers):
        for module in (f"blocks.{block}.attention.qkv", f"blocks.{block}.mlp.up"):
            splits = _splits(module, config)
            for kind in ("weight", "bias"):
                if splits and f"{next(iter(splits))}.{kind}" in state:
                    state[f"{module}.{kind}"] = torch.cat([state.pop(f"{split}.{kind}") for split in splits])
    return state


def _splits(module: str, config: ModelConfig) -> dict[str, int]:
    """The name and the number of rows of each matrix that the linear layer `module` joins; empty if the layer has only
    one matrix."""
    parent = module.rpartition(".")[0]
    if module.endswith("attention.qkv"):
        queries, keys = config.num_heads * config.head_size, config.kv_heads * config.head_size
        return {f"{parent}.q": queries, f"{parent}.k": keys, f"{parent}.v": keys}
    if module.endswith("mlp.up") and config.mlp == "swiglu":
        return {f"{parent}.gate": config.mlp_width, f"{parent}.value": config.mlp_width}
    return {}
