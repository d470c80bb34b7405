"""Import a checkpoint of Atlas 1.x.

No code in the file runs: see `atlas/training/checkpoint/safe_unpickle.py`. The shapes of the tensors give the model's
sizes. The number of heads, the activation and the norm epsilon come from the config that the model was trained with.
Without this config, the caller must give the number of heads. Atlas then uses the default activation and norm epsilon
of Atlas 1.x.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atlas.config import ModelConfig
from atlas.config.loader import read_sections, resolve
from atlas.errors import ExportError
from atlas.export.architectures import build_from, exportable_state, import_of, names_in, with_biases
from atlas.model import AtlasLM
from atlas.tokenizer import Tokenizer
from atlas.training.checkpoint.first_version import POSITION_EMBEDDING, TOKEN_EMBEDDING, is_first_version
from atlas.training.checkpoint.validate import read_values

TENSOR_NAMES = with_biases(
    {
        "token_embedding": TOKEN_EMBEDDING.removesuffix(".weight"),
        "position_embedding": POSITION_EMBEDDING.removesuffix(".weight"),
        "blocks.{}.attention_norm": "blocks.{}.ln1",
        "blocks.{}.attention.qkv": "blocks.{}.attn.qkv_proj",
        "blocks.{}.attention.output": "blocks.{}.attn.out_proj",
        "blocks.{}.mlp_norm": "blocks.{}.ln2",
        "blocks.{}.mlp.up": "blocks.{}.mlp.fc1",
        "blocks.{}.mlp.down": "blocks.{}.mlp.fc2",
        "final_norm": "ln_f",
        "lm_head": "lm_head",
    }
)
"""Atlas's name of a tensor → the name of this tensor in Atlas 1.x. `{}` stands for the number of the block."""

_LINEAR_BIASES = re.compile(r"blocks\.\d+\.(attn\.(qkv|out)_proj|mlp\.fc[12])\.bias")
_NOT_NEEDED = ("optimizer_state_dict", "scheduler_state_dict")
_NARROWEST_HEAD = 8
_PRESETS = {512: 8, 768: 12, 1024: 16, 1280: 20}
"""hidden_size → num_heads, in the presets of Atlas 1.x."""
_REMEDY = "give a checkpoint of Atlas 1.x, or a folder in Hugging Face's format"

Layer = Mapping[Any, Any]


def import_first_version(
    path: str | Path,
    *,
    num_heads: int | None = None,
    config: str | Path | None = None,
    tokenizer: str | None = None,
) -> tuple[AtlasLM, Tokenizer, list[str]]:
    """Return the model in the file `path` (fp32, on the CPU), its tokenizer, and notes on what was assumed or omitted.

    `config` is a YAML file of Atlas 1.x. `num_heads` overrides the number of heads in this file. Raises `ExportError`
    if `path` is not a complete checkpoint of Atlas 1.x, or if the number of heads is unknown.
    """
    path = Path(path)
    contents = read_values(path, remedy=_REMEDY, without=_NOT_NEEDED)
    if not is_first_version(contents):
        if isinstance(contents, dict) and "format_version" in contents:
            raise ExportError(f"{path}: needs no import: it already has the current format")
        raise ExportError(f"{path}: is not a checkpoint of Atlas 1.x: {_REMEDY}")
    stated = _model_section(read_sections(config) if config else contents.get("config"))
    metadata = contents.get("metadata")
    step = metadata.get("step") if isinstance(metadata, Mapping) else None
    trained = f" after {step:,} steps" if type(step) is int else ""
    notes = [
        f"the weights{trained} are converted, but not the optimizer state: to fine-tune, use atlas train --init-from"
    ]
    if not stated:
        notes.append(
            "the file does not record the activation and norm_eps: Atlas assumes gelu and 1e-5, the defaults of Atlas "
            "1.x. If your config differs, name it with --config"
        )
    with import_of(path, "the shapes of its tensors do not match"):
        weights = _checked(contents["model_state_dict"])
        own, rows = Tokenizer.resolve(tokenizer or "gpt2"), len(weights[TOKEN_EMBEDDING])
        # With GPT-2's tokenizer, Atlas 1.x built embeddings with 4 rows too many. The training data never contained the
        # 4 tokens of these rows.
        if own.name == "gpt2" and rows > own.vocab_size:
            notes.append(
                f"the last {rows - own.vocab_size} of {rows:,} tokens are left out: GPT-2's tokenizer has "
                f"{own.vocab_size:,}, and Atlas 1.x trained on no other tokens"
            )
        elif own.vocab_size != rows:
            raise ExportError(
                f"has {rows:,} tokens, but tokenizer {own.name} has {own.vocab_size:,}: name the right tokenizer with "
                "--tokenizer"
            )
        shape = _shape_of(weights, own.vocab_size, stated, num_heads)
        names = names_in({"gpt2": TENSOR_NAMES}, shape).items()
        state = {ours: weights[theirs].float() for ours, theirs in names if theirs in weights}
        model = build_from(exportable_state(state, shape), shape)
    return model, own, notes


def _model_section(config: Any) -> Layer:
    """Return the numbers and strings in the `model` section of a config. A config without sections counts as a `model`
    section."""
    section = config.get("model", config) if isinstance(config, Mapping) else {}
    entries = section.items() if isinstance(section, Mapping) else ()
    return {key: value for key, value in entries if isinstance(value, (int, float, str))}


def _checked(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return `weights` if its names and tensors are valid.

    Raises `ExportError` unless the names are exactly those in `TENSOR_NAMES`, for some number of blocks. Only the
    biases of linear layers may be missing. Only tied embeddings may share memory.
    """
    for name, tensor in weights.items():
        is_plain = isinstance(name, str) and isinstance(tensor, Tensor) and tensor.dim() in (1, 2)
        if not is_plain or not tensor.is_floating_point() or not tensor.is_contiguous():
            raise ExportError(f"{name!s:.80} is not a matrix or vector of floating-point numbers")
        if not tensor.isfinite().all():
            raise ExportError(f"{name!s:.80} holds numbers that are not finite: take an earlier checkpoint")
    blocks = [name for name in weights if re.fullmatch(r"blocks\.\d+\.ln1\.weight", name)]
    expected = {theirs.format(block) for block in range(len(blocks)) for theirs in TENSOR_NAMES.values()}
    if not any(_LINEAR_BIASES.fullmatch(name) for name in weights):  # model.use_bias: false
        expected = {name for name in expected if not _LINEAR_BIASES.fullmatch(name)}
    if missing := sorted(expected - weights.keys()) or (["blocks.0.ln1.weight"] if not blocks else []):
        raise ExportError(f"lacks {len(missing)} tensors, such as {missing[0]}: is the file complete?")
    if unknown := sorted(weights.keys() - expected):
        raise ExportError(
            f"holds {len(unknown)} tensors that Atlas 1.x did not have, such as {unknown[0]:.80}"
        )
    storages = {tensor.untyped_storage().data_ptr() for tensor in weights.values()}
    if len(storages) < len(weights) - _is_tied(weights):
        raise ExportError("several of its tensors share memory")
    return dict(weights)


def _is_tied(weights: Mapping[str, Tensor]) -> bool:
    table, head = weights[TOKEN_EMBEDDING], weights["lm_head.weight"]
    return table.data_ptr() == head.data_ptr() or torch.equal(table, head)


def _shape_of(
    weights: Mapping[str, Tensor], vocab_size: int, stated: Layer, num_heads: int | None
) -> ModelConfig:
    tables = weights[TOKEN_EMBEDDING], weights[POSITION_EMBEDDING], weights["blocks.0.mlp.fc1.weight"]
    if any(table.dim() != 2 for table in tables):
        raise ExportError("an embedding or fc1 is not a matrix")
    (rows, hidden_size), (max_seq_len, _), (mlp_size, _) = (table.shape for table in tables)
    found = {
        "hidden_size": hidden_size,
        "num_layers": sum(name.endswith(".ln1.weight") for name in weights),
        "vocab_size": rows,
        "max_seq_len": max_seq_len,
    }
    for key, value in found.items():
        if str(stated.get(key, value)) != str(value):
            raise ExportError(
                f"has {key} {value}, but the config has {stated[key]!s:.40}: give the config that the model was "
                "trained with"
            )
    if (activation := stated.get("activation", "gelu")) != "gelu":
        raise ExportError(
            f"has the activation {activation!s:.40}, which Atlas does not support: train a new model"
        )
    if not (heads := num_heads or stated.get("num_heads")):
        most = max(1, hidden_size // _NARROWEST_HEAD)
        possible = ", ".join(str(n) for n in range(1, most + 1) if hidden_size % n == 0)
        preset = _PRESETS.get(hidden_size)
        usual = f"; the preset of Atlas 1.x with this hidden_size has {preset} heads" if preset else ""
        raise ExportError(
            "does not record its number of attention heads: name the config that the model was "
            f"trained with (--config FILE), or set --num-heads to one of {possible} "
            f"(hidden_size {hidden_size:,}){usual}"
        )
    shape = {
        **found,
        "vocab_size": vocab_size,
        "num_heads": heads,
        "mlp_size": mlp_size,
        "norm_eps": stated.get("norm_eps", 1e-5),
        "mlp": "gelu_exact",
        "tie_embeddings": _is_tied(weights),
    }
    return resolve({"model": shape}).model
