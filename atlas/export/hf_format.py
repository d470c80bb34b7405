"""Convert model configs and state dicts to and from the format of Hugging Face's `transformers`.

Atlas supports the model types `gpt2`, `llama`, `qwen2`, `qwen3` and `smollm3`. It also reads `mistral` and `phi3`,
which compute the same as `llama`, within the window of their attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atlas.config import ModelConfig
from atlas.config.loader import resolve
from atlas.errors import ConfigError, ExportError, first_line
from atlas.export.architectures import (
    ROTATED,
    SWITCHES,
    VOCABULARY_ROWS,
    architecture_of,
    exportable_state,
    joined,
    names_in,
    tables,
)

CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
_AS_LLAMA = ("mistral", "phi3")
"""Model types that Atlas reads as `llama`."""

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
_QWEN_SIZES = _LLAMA_SIZES | {
    "mlp_size": ("intermediate_size", 22016),
    "num_kv_heads": ("num_key_value_heads", 32),
    "vocab_size": ("vocab_size", 151936),
    "max_seq_len": ("max_position_embeddings", 32768),
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
    "qwen2": _QWEN_SIZES,
    "qwen3": {**_QWEN_SIZES, "head_dim": ("head_dim", 128)},
    "smollm3": {
        **_LLAMA_SIZES,
        "hidden_size": ("hidden_size", 2048),
        "num_layers": ("num_hidden_layers", 36),
        "num_heads": ("num_attention_heads", 16),
        "num_kv_heads": ("num_key_value_heads", 4),
        "vocab_size": ("vocab_size", 128256),
        "max_seq_len": ("max_position_embeddings", 32768),
        "tie_embeddings": ("tie_word_embeddings", True),
    },
    "mistral": {
        **_LLAMA_SIZES,
        "mlp_size": ("intermediate_size", 14336),
        "num_kv_heads": ("num_key_value_heads", 8),
        "max_seq_len": ("max_position_embeddings", 131072),
    },
    "phi3": {
        **_LLAMA_SIZES,
        "hidden_size": ("hidden_size", 3072),
        "mlp_size": ("intermediate_size", 8192),
        "vocab_size": ("vocab_size", 32064),
        "max_seq_len": ("max_position_embeddings", 4096),
        "norm_eps": ("rms_norm_eps", 1e-5),
    },
}
"""Per model type: a field of `ModelConfig` → the key in config.json, and the default of `transformers` for this key."""
_SILU_WITHOUT_BIASES: dict[str, tuple[Any, ...]] = {
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
    **dict.fromkeys(("llama", "qwen3", "smollm3", "mistral"), _SILU_WITHOUT_BIASES),
    "qwen2": {key: values for key, values in _SILU_WITHOUT_BIASES.items() if key != "attention_bias"},
    "phi3": {"hidden_act": ("silu",), "partial_rotary_factor": (1.0,)},
}
"""Per model type: a key of config.json → the values that Atlas supports. The first value is the default of
`transformers`."""
_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_context": "original_max_position_embeddings",
}
"""A field of `RopeScaling` → the key in config.json."""
_DEFAULT_WINDOWS = {"mistral": 4096}
"""Model type → the default of `transformers` for `sliding_window`."""
_SAMPLING: dict[str, tuple[tuple[type, ...], float, float]] = {
    "do_sample": ((bool,), 0, 1),
    **dict.fromkeys(("temperature", "repetition_penalty"), ((int, float), 0, 1000)),
    **dict.fromkeys(("top_p", "min_p", "typical_p"), ((int, float), 0, 1)),
    "top_k": ((int,), 0, 10**9),
}
"""A sampling setting in generation_config.json → the types of its values, the lowest and the highest value."""
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
        name: tensor
        for full, tensor in tensors.items()
        if not full.endswith(_NOT_WEIGHTS)
        for name, tensor in _unfused(_full_name(full, config), tensor, config)
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


def _unfused(name: str, tensor: Tensor, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield a tensor, or the matrices that are one tensor in Phi-3."""
    keys = config.kv_heads * config.head_size
    fused = {
        "qkv_proj": {"q_proj": config.num_heads * config.head_size, "k_proj": keys, "v_proj": keys},
        "gate_up_proj": {"gate_proj": config.mlp_width, "up_proj": config.mlp_width},
    }
    module = name.removesuffix(".weight").rpartition(".")[2]
    if module not in fused:
        yield name, tensor
        return
    if len(tensor) != sum(fused[module].values()):
        raise ExportError(f"{name} has {len(tensor):,} rows: config.json does not fit the weights")
    parts = torch.split(tensor, [*fused[module].values()])
    for split, part in zip(fused[module], parts, strict=True):
        yield name.replace(module, split), part


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
    content |= {"rope_theta": config.rope_theta, "hidden_act": "silu", "attention_bias": False}
    if scaling := config.rope_scaling:
        stated = {key: getattr(scaling, field) for field, key in _SCALING.items()}
        content["rope_scaling"] = {"rope_type": "llama3", **stated}
    if config.nope_interval:
        content["no_rope_layer_interval"] = config.nope_interval
    return content


def config_in(stated: Mapping[str, Any]) -> ModelConfig:
    """Convert the content of a config.json to a `ModelConfig`. Missing keys get the defaults of `transformers`. Raises
    `ExportError` for values that Atlas does not support."""
    try:
        return _config_in(stated)
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise ExportError(f"config.json: holds a value of a wrong kind: {error!s:.200}") from None


def _config_in(stated: Mapping[str, Any]) -> ModelConfig:
    family = str(stated.get("model_type"))
    if family not in _SIZES:
        raise ExportError(f"config.json: model_type {family!s:.60}: Atlas imports {', '.join(_SIZES)}")
    for key, values in _COMPUTED[family].items():
        if (value := stated.get(key, values[0])) not in values:
            raise ExportError(
                f"config.json: {key} {value!s:.60}: Atlas supports only {' or '.join(map(str, values))}"
            )
    shape = {field: stated.get(key, default) for field, (key, default) in _SIZES[family].items()}
    if family == "gpt2":
        shape["mlp"] = "gelu_exact" if stated.get("activation_function") == "gelu" else "gelu"
    else:
        shape |= {**ROTATED, **_rope(stated), **SWITCHES.get(family, {})}
        shape["max_seq_len"] = min(shape["max_seq_len"], window_of(stated) or shape["max_seq_len"])
    if family == "smollm3":
        shape["nope_interval"] = _nope_interval(stated, shape["num_layers"])
    try:
        return resolve({"model": shape}).model
    except ConfigError as error:
        raise ExportError(f"config.json: {error}") from None


def window_of(stated: Mapping[str, Any]) -> int | None:
    """Return the number of tokens to which each token of a model attends, or None for all. Within this window,
    attention is full attention, so Atlas takes no longer context."""
    family = str(stated.get("model_type"))
    return stated.get("sliding_window", _DEFAULT_WINDOWS.get(family)) if family in _AS_LLAMA else None


def sampling_in(stated: Any) -> dict[str, Any]:
    """Return the sampling settings in the content of a generation_config.json. Values that mean nothing are left
    out."""
    found = stated if isinstance(stated, dict) else {}
    return {
        key: found[key]
        for key, (kinds, least, most) in _SAMPLING.items()
        if type(found.get(key)) in kinds and least <= found[key] <= most
    }


def _rope(stated: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of RoPE. They are in `rope_parameters` since `transformers` 5, and in `rope_theta` and
    `rope_scaling` before. The default of `rope_theta` is 10,000."""
    parameters = {**(stated.get("rope_scaling") or {}), **(stated.get("rope_parameters") or {})}
    if (part := parameters.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ExportError(f"config.json: partial_rotary_factor {part!s:.60}: Atlas rotates whole heads")
    theta = parameters.get("rope_theta", stated.get("rope_theta", 10_000.0))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta}
    if kind != "llama3" or (missing := [key for key in _SCALING.values() if key not in parameters]):
        problem = f"of type {kind!s:.60}" if kind != "llama3" else f"without {missing[0]}"
        raise ExportError(
            f"config.json: rope_parameters {problem}: Atlas supports the types default and llama3 (Llama 3.1 to 3.3)"
        )
    return {"rope_theta": theta, "rope_scaling": {field: parameters[key] for field, key in _SCALING.items()}}


def _nope_interval(stated: Mapping[str, Any], num_layers: int) -> int:
    """Return the interval of the blocks without RoPE. Raises `ExportError` unless it is 4, as llama.cpp has it."""
    if (interval := stated.get("no_rope_layer_interval", 4)) != 4:
        raise ExportError(
            f"config.json: no_rope_layer_interval {interval!s:.60}: Atlas imports only models with 4"
        )
    listed = stated.get("no_rope_layers") or []
    expected = [int((layer + 1) % 4 != 0) for layer in range(min(num_layers, len(listed)))]
    if listed and (len(listed) != num_layers or listed != expected):
        raise ExportError(
            "config.json: no_rope_layers: Atlas imports only models with RoPE in all but each fourth"
        )
    return 4
