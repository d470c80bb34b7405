"""Convert model configs and state dicts to and from the format of Hugging Face's `transformers`.

Atlas supports the model types `gpt2`, `llama` and `qwen3`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from atlas.config import ModelConfig
from atlas.config.loader import resolve
from atlas.errors import ConfigError, ExportError, first_line
from atlas.export.architectures import (
    ROTATED,
    VOCABULARY_ROWS,
    architecture_of,
    exportable_state,
    joined,
    names_in,
    tables,
)

CLASSES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}

_NAMES = tables(gpt2=1, llama=2)
_LLAMA_SIZES: dict[str, tuple[str, Any]] = {
    "hidden_size": ("hidden_size", 4096),
    "mlp_size": ("intermediate_size", 11008),
    "num_layers": ("num_hidden_layers", 32),
    "num_heads": ("num_attention_heads", 32),
    "num_kv_heads": ("num_key_value_heads", None),
    "head_dim": ("head_dim", None),
    "vocab_size": ("vocab_size", 32000),
    "max_seq_len": ("max_position_embeddings", 2048),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "tie_embeddings": ("tie_word_embeddings", False),
}
_SIZES: dict[str, dict[str, tuple[str, Any]]] = {
    "gpt2": {
        "hidden_size": ("n_embd", 768),
        "mlp_size": ("n_inner", None),
        "num_layers": ("n_layer", 12),
        "num_heads": ("n_head", 12),
        "vocab_size": ("vocab_size", 50257),
        "max_seq_len": ("n_positions", 1024),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
        "tie_embeddings": ("tie_word_embeddings", True),
    },
    "llama": _LLAMA_SIZES,
    "qwen3": {
        **_LLAMA_SIZES,
        "mlp_size": ("intermediate_size", 22016),
        "head_dim": ("head_dim", 128),
        "vocab_size": ("vocab_size", 151936),
        "max_seq_len": ("max_position_embeddings", 32768),
    },
}
"""Per model type: a field of `ModelConfig` → the key in config.json, and the default of `transformers` for this key."""
_SILU_WITHOUT_BIASES: dict[str, tuple[Any, ...]] = {
    "rope_scaling": (None,),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
}
_COMPUTED: dict[str, dict[str, tuple[Any, ...]]] = {
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    "llama": _SILU_WITHOUT_BIASES,
    "qwen3": _SILU_WITHOUT_BIASES,
}
"""Per model type: a key of config.json → the values that Atlas supports. The first value is the default of
`transformers`."""
_NOT_WEIGHTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
"""Suffixes of tensors that older versions of `transformers` saved besides the weights: masks and RoPE's frequencies."""


def import_safetensors(problem: str) -> Any:
    """Import and return the package safetensors. Raises `ExportError` with the text `problem` if the package is not
    installed."""
    try:
        import safetensors.torch
    except ImportError:
        raise ExportError(f'{problem}; pip install "atlas-llm[hf]"') from None
    return safetensors


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file. Raises `OSError`, for which the package has an error of its own."""
    import safetensors.torch

    try:
        safetensors.torch.save_file(dict(tensors), path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise OSError(first_line(error)) from None


def names_of(config: ModelConfig) -> dict[str, str]:
    """Atlas's name → Hugging Face's name, for each tensor of a model with this config."""
    return names_in(_NAMES, config)


def state_out(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Convert a state dict of Atlas to Hugging Face's format. The rows that only pad the vocabulary are omitted."""
    split = exportable_state(state, config)
    return {theirs: _transposed(split[ours], ours, config) for ours, theirs in names_of(config).items()}


def state_in(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Convert tensors in Hugging Face's format to an fp32 state dict for `build_from`. Raises `ExportError` if tensors
    are missing or unknown, or if the vocabulary does not have the size in `config`."""
    found = {
        _full_name(name, config): tensor
        for name, tensor in tensors.items()
        if not name.endswith(_NOT_WEIGHTS)
    }
    names = names_of(config)
    if config.tie_embeddings:
        found.pop("lm_head.weight", None)  # some files hold the shared matrix twice
    if missing := sorted(set(names.values()) - found.keys()):
        raise ExportError(f"lacks {len(missing)} tensors, such as {missing[0]}: is the download complete?")
    if unknown := sorted(found.keys() - set(names.values())):
        raise ExportError(f"holds {len(unknown)} tensors that Atlas does not know, such as {unknown[0]}")
    state = {}
    for ours, theirs in names.items():
        tensor = found[theirs].float()
        if ours in VOCABULARY_ROWS and len(tensor) != config.vocabulary:
            raise ExportError(
                f"{theirs} has {len(tensor):,} rows, but vocab_size in config.json is {config.vocabulary:,}: "
                "the two files are not from the same model"
            )
        state[ours] = _transposed(tensor, ours, config)
    return joined(state, config)


def _full_name(name: str, config: ModelConfig) -> str:
    """Return the name of a tensor with the prefix `transformer.` or `model.`. Checkpoints without an LM head, such as
    OpenAI's GPT-2, omit this prefix."""
    if name.startswith("lm_head."):
        return name
    prefix = "transformer." if config.gguf_architecture == "gpt2" else "model."
    return name if name.startswith(prefix) else prefix + name


def _transposed(tensor: Tensor, name: str, config: ModelConfig) -> Tensor:
    """Return the tensor, transposed if it is a matrix of a linear layer of GPT-2. Hugging Face stores these matrices as
    (in, out)."""
    is_turned = config.gguf_architecture == "gpt2" and name.startswith("blocks.") and tensor.dim() == 2
    return (tensor.T if is_turned else tensor).contiguous()


def config_out(config: ModelConfig, *, dtype: str) -> dict[str, Any]:
    """The content of config.json for a model with this config. `dtype` is PyTorch's name of the weights' type."""
    family, sizes = architecture_of(config), config.resolved_sizes
    content: dict[str, Any] = {
        "architectures": [CLASSES[family]],
        "model_type": family,
        "torch_dtype": dtype,
        **{key: sizes[field] for field, (key, _) in _SIZES[family].items()},
    }
    if family == "gpt2":
        dropouts = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout)
        activation = "gelu" if config.mlp == "gelu_exact" else "gelu_new"
        return content | dropouts | {"activation_function": activation}
    return content | {"rope_theta": config.rope_theta, "hidden_act": "silu", "attention_bias": False}


def config_in(stated: Mapping[str, Any]) -> ModelConfig:
    """Convert the content of a config.json to a `ModelConfig`. Missing keys get the defaults of `transformers`. Raises
    `ExportError` for values that Atlas does not support."""
    family = stated.get("model_type")
    if family not in CLASSES:
        raise ExportError(f"config.json: model_type {family!s:.60}: Atlas imports {', '.join(CLASSES)}")
    for key, values in _COMPUTED[family].items():
        if (value := stated.get(key, values[0])) not in values:
            raise ExportError(
                f"config.json: {key} {value!s:.60}: Atlas supports only {' or '.join(map(str, values))}"
            )
    shape = {field: stated.get(key, default) for field, (key, default) in _SIZES[family].items()}
    if family == "gpt2":
        shape["mlp"] = "gelu_exact" if stated.get("activation_function") == "gelu" else "gelu"
    else:
        shape |= {**ROTATED, "rope_theta": _rope_theta(stated), "qk_norm": family == "qwen3"}
    try:
        return resolve({"model": shape}).model
    except ConfigError as error:
        raise ExportError(f"config.json: {error}") from None


def _rope_theta(stated: Mapping[str, Any]) -> Any:
    """The base of RoPE. The base is in `rope_parameters` since `transformers` 5, and in `rope_theta` before. The
    default is 10,000."""
    parameters = stated.get("rope_parameters") or {}
    if (kind := parameters.get("rope_type", "default")) != "default":
        raise ExportError(
            f"config.json: rope_parameters of type {kind!s:.60}: Atlas supports only the default"
        )
    return parameters.get("rope_theta", stated.get("rope_theta", 10_000.0))
