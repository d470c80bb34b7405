"""Write a LoRA adapter in the format of Hugging Face's `peft`: adapter_config.json and adapter_model.safetensors.

The format: https://huggingface.co/docs/peft/main/en/developer_guides/checkpoint.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from atlas.config import LoraConfig, ModelConfig
from atlas.errors import ExportError
from atlas.export.architectures import separated
from atlas.export.hf_format import import_safetensors, names_of, save_tensors
from atlas.export.huggingface import tokenizer_config
from atlas.outputs import write_folder
from atlas.tokenizer import Tokenizer

_TABLES = ("token_embedding", "lm_head")
_FILES = ("adapter_config.json", "tokenizer_config.json", "tokenizer.json", "adapter_model.safetensors")


def export_adapter(
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    lora: LoraConfig,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    base: str = "",
) -> Path:
    """Write the low-rank updates in `weights`, a training state dict, to `folder`, with the tokenizer and its chat
    template. Return `folder`. `base` is the folder of the base model.

    Raises `ExportError` if there are no low-rank updates. Raises `AtlasError` if `folder` contains other files or
    cannot be written.
    """
    import_safetensors("--format peft: needs safetensors")
    if not lora.rank:
        raise ExportError(
            "--format peft: all weights of this model were trained (lora.rank 0); use --format hf"
        )
    tensors = adapter_tensors(weights, config)
    modules = sorted({_target(name) for name in tensors})
    stated: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules,
        # Hugging Face stores the matrices of GPT-2 as (in, out).
        "fan_in_fan_out": config.gguf_architecture == "gpt2",
        "inference_mode": True,
    }

    def write(folder: Path) -> None:
        (folder / _FILES[0]).write_text(json.dumps(stated, indent=2) + "\n", encoding="utf-8")
        settings = tokenizer_config(tokenizer, config.max_seq_len, tokenizer.chat_template)
        (folder / _FILES[1]).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        tokenizer.save(folder / _FILES[2])
        save_tensors(tensors, folder / _FILES[3])
        # safetensors creates a file that only its owner can read
        shutil.copymode(folder / _FILES[0], folder / _FILES[3])

    return write_folder(Path(folder), _FILES, write)


def adapter_tensors(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """PEFT's name → tensor, for the matrices A and B of each low-rank update. If PEFT splits a matrix of Atlas, each
    split gets a copy of A. PEFT has two updates for tied embeddings, which get the same matrices."""
    names, tensors = names_of(config), {}
    for module in [name.removesuffix(".lora_b") for name in weights if name.endswith(".lora_b")]:
        a, b = weights[f"{module}.lora_a"], weights[f"{module}.lora_b"]
        if module in _TABLES:
            a, b = a.float(), b[: config.vocabulary].float()
            if module == "token_embedding":
                theirs = f"base_model.model.{names['token_embedding.weight'].removesuffix('.weight')}"
                tensors[f"{theirs}.lora_embedding_A"] = b.T.contiguous()
                tensors[f"{theirs}.lora_embedding_B"] = a.T.contiguous()
            if module == "lm_head" or config.tie_embeddings:
                tensors["base_model.model.lm_head.lora_A.weight"] = a.clone()
                tensors["base_model.model.lm_head.lora_B.weight"] = b.contiguous().clone()
            continue
        splits = {f"{module}.weight": b}
        if config.gguf_architecture != "gpt2":
            splits = separated(splits, config)
        for split, rows in splits.items():
            theirs = f"base_model.model.{names[split].removesuffix('.weight')}"
            tensors[f"{theirs}.lora_A.weight"] = a.float().clone()
            tensors[f"{theirs}.lora_B.weight"] = rows.float().contiguous()
    return tensors


def _target(name: str) -> str:
    """The name by which PEFT finds the module of a tensor. It includes the parent module, since GPT-2 has two modules
    called c_proj."""
    module = re.sub(r"\.lora_.*", "", name.removeprefix("base_model.model."))
    return ".".join(module.split(".")[-2:])
