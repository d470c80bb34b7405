"""Write a model folder that `transformers` and vLLM can load: safetensors, config.json, tokenizer.json, a model card.

The formats: https://huggingface.co/docs/safetensors and https://huggingface.co/docs/transformers/main_classes/configuration.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from atlas.errors import ExportError
from atlas.export.hf_format import (
    CLASSES,
    config_out,
    import_safetensors,
    sampling_in,
    save_tensors,
    state_out,
)
from atlas.export.vocabulary import check_tokenizer
from atlas.files import encodable
from atlas.model import AtlasLM
from atlas.outputs import write_folder
from atlas.tokenizer import Tokenizer
from atlas.tokenizer.foreign import ForeignTokenizer

HFType = Literal["f32", "f16", "bf16"]
_OWN_SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95}
_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def export_hf(
    model: AtlasLM,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    dtype: HFType = "f32",
    name: str = "Atlas",
    facts: Mapping[str, Any] | None = None,
    license: str | None = None,
    chat_template: str | None = None,
) -> Path:
    """Write `model` and `tokenizer` to `folder`, which appears complete or not at all. An earlier export in `folder` is
    replaced. Return `folder`.

    `facts` is the checkpoint's metadata, which the model card shows. `license` is an SPDX identifier. `chat_template`
    is a Jinja template. Raises `ExportError` if the format cannot hold the tokenizer or the model, or if `dtype` cannot
    hold the weights. Raises `AtlasError` if `folder` contains other files or cannot be written.
    """
    import_safetensors("--format hf: needs safetensors")
    folder = Path(folder)
    check_tokenizer(tokenizer, model.config)
    kind, ids, stops = _DTYPES[dtype], special_ids(tokenizer), sorted(tokenizer.stop_ids)
    shown = _sampling(facts or {})
    state = state_out(model.state_dict(), model.config)
    tensors = {tensor_name: tensor.to(kind) for tensor_name, tensor in state.items()}
    for tensor_name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ExportError(f"{tensor_name}: holds values that {dtype} cannot hold; use --quantize f32")
    configs = {
        "config.json": config_out(model.config, dtype=str(kind).split(".")[1]) | ids,
        "generation_config.json": shown | ids | {"eos_token_id": stops if len(stops) > 1 else stops[0]},
        "tokenizer_config.json": tokenizer_config(tokenizer, model.config.max_seq_len, chat_template),
    }
    card = _model_card(model, name, dtype, facts or {}, license, answers=chat_template is not None)

    def write(folder: Path) -> None:
        for file, content in configs.items():
            (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        tokenizer.save(folder / "tokenizer.json")
        (folder / "README.md").write_text(encodable(card), encoding="utf-8")
        save_tensors(tensors, folder / "model.safetensors")
        # safetensors creates a file that only its owner can read
        shutil.copymode(folder / "README.md", folder / "model.safetensors")

    return write_folder(folder, (*configs, "tokenizer.json", "README.md", "model.safetensors"), write)


def _sampling(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sampling settings for generation_config.json: those of the imported model, or those of `atlas
    generate`."""
    stated = facts.get("data", {}).get("sampling")
    return sampling_in(json.loads(stated)) if isinstance(stated, str) else _OWN_SAMPLING


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the ids of the special tokens, by their names in config.json. A model of Atlas begins and pads a text with
    the token that ends it."""
    eos_id = tokenizer.eos_id
    if not isinstance(tokenizer, ForeignTokenizer):
        return {"bos_token_id": eos_id, "eos_token_id": eos_id, "pad_token_id": eos_id}
    bos, pad = tokenizer.special.bos, tokenizer.special.pad
    ids = {"bos_token_id": bos, "eos_token_id": eos_id, "pad_token_id": eos_id if pad is None else pad}
    return {name: id for name, id in ids.items() if id is not None}


def tokenizer_config(tokenizer: Tokenizer, context: int, chat_template: str | None) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    named = tokenizer.named_tokens()
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": token for name, token in ({"pad": named["eos"]} | named).items()},
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        **({"chat_template": chat_template} if chat_template else {}),
    }


def _model_card(
    model: AtlasLM, name: str, dtype: str, facts: Mapping[str, Any], license: str | None, *, answers: bool
) -> str:
    config, sequences = model.config, facts.get("sequences_consumed")
    settings = facts.get("config", {})
    training, trained = settings.get("training", {}), settings.get("model", {}).get("max_seq_len", 0)
    losses = {"training loss": facts.get("loss"), "validation loss": facts.get("val_loss")}
    rows = {
        "parameters": f"{model.num_parameters():,}",
        "architecture": f"{CLASSES[str(config.gguf_architecture)]}: {config.num_layers} layers × {config.hidden_size}, "
        f"{config.num_heads} heads",
        "context": f"{config.max_seq_len:,} tokens",
        "vocabulary": f"{config.vocabulary:,} tokens",
        "weights": dtype,
        "trained on": facts.get("data", {}).get("train_data"),
        "updates": facts.get("step"),
        "tokens seen": f"{sequences * trained:,}" if sequences and trained else None,
        "optimizer": training.get("optimizer"),
        "peak learning rate": training.get("learning_rate"),
        **{name: f"{loss:.4f} nats per token" for name, loss in losses.items() if loss is not None},
        "started from": facts.get("initialized_from"),
    }
    example = 'ids = tokenizer("The river", return_tensors="pt").input_ids'
    does = "answers messages" if answers else "continues text"
    if answers:
        example = (
            'talk = [{"role": "user", "content": "What colour is the sky?"}]\n'
            'options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}\n'
            "ids = tokenizer.apply_chat_template(talk, **options).input_ids"
        )
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items() if value is not None)
    return f"""---
library_name: transformers
pipeline_tag: text-generation{f"{chr(10)}license: {license}" if license else ""}
---

# {name}

A language model trained from scratch with [Atlas](https://github.com/juliuspleunes4/Atlas). It {does}.

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
{example}
print(tokenizer.decode(model.generate(ids, max_new_tokens=100)[0]))
```
"""
