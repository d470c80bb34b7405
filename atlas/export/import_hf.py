"""Import a model of a public family, such as Llama or Qwen, from a local folder in Hugging Face's format.

No code in the folder runs. Atlas reads tensors from safetensors files, settings from JSON files, and the chat template
as text, which runs only in a sandbox.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from atlas.errors import ExportError
from atlas.export.architectures import build_from, import_of
from atlas.export.hf_format import config_in, import_safetensors, sampling_in, state_in, window_of
from atlas.files import check_regular, read_limited
from atlas.model import AtlasLM
from atlas.tokenizer import Tokenizer
from atlas.tokenizer.chat_template import read_chat_template
from atlas.tokenizer.load import with_chat_template

_LARGEST_JSON = 64 << 20


def import_hf(folder: str | Path, *, tokenizer: str | None = None) -> tuple[AtlasLM, Tokenizer]:
    """Return the model in `folder`, in fp32 on the CPU, and a tokenizer. The tokenizer is the folder's own, unless
    `tokenizer` names another tokenizer.

    Raises `ExportError` for a model type that Atlas does not support, for missing, damaged or mismatched files, and for
    pickled weights.
    """
    folder = Path(folder)
    with import_of(folder, "config.json does not fit the weights"):
        config = config_in(_read_json(folder / "config.json"))
        model = build_from(state_in(_read_tensors(folder), config), config)
    own = _read_tokenizer(folder, tokenizer, config.vocabulary)
    return model, with_chat_template(own, read_chat_template(folder))


def read_sampling(folder: Path) -> dict[str, Any]:
    """Return the sampling settings in the folder's generation_config.json; empty without this file."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return {}
    with import_of(folder, ""):
        return sampling_in(_read_json(file))


def window_note(folder: Path, context: int) -> list[str]:
    """Return a note for the user if the window of the model's attention limits its context, else an empty list."""
    stated = _read_json(folder / "config.json")
    positions = stated.get("max_position_embeddings")
    if window_of(stated) != context or not isinstance(positions, int) or positions <= context:
        return []
    return [
        f"the model attends to windows of {context:,} tokens, which Atlas does not compute, so its context is "
        f"{context:,} tokens instead of {positions:,}"
    ]


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of model.safetensors, or of the shards that model.safetensors.index.json names."""
    safetensors = import_safetensors("needs safetensors to be read")
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        try:
            check_regular(folder / file)
            tensors |= safetensors.torch.load_file(folder / file)
        except FileNotFoundError:
            raise ExportError(
                f"{file} is missing, but the index names it: is the download complete?"
            ) from None
        except (OSError, safetensors.SafetensorError) as error:
            raise ExportError(f"{file}: cannot be read: {error!s:.200}; download it again") from None
    return tensors


def _weight_files(folder: Path) -> list[str]:
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    if (folder / "model.safetensors.index.json").is_file():
        places = _read_json(folder / "model.safetensors.index.json").get("weight_map")
        names = set(places.values()) if isinstance(places, dict) else set()
        if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise ExportError("model.safetensors.index.json: does not name files in this folder")
        return sorted(names)
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise ExportError(
            "holds pickled weights, which can run code, so Atlas does not read them; save the model as safetensors, "
            "for example with model.save_pretrained"
        )
    raise ExportError("has no model.safetensors and no model.safetensors.index.json")


def _read_tokenizer(folder: Path, named: str | None, vocab_size: int) -> Tokenizer:
    if named is None and not (folder / "tokenizer.json").is_file():
        raise ExportError(
            f"{folder}: has no tokenizer.json; name its tokenizer with --tokenizer (gpt2, or a tokenizer.json)"
        )
    tokenizer = Tokenizer.load(folder) if named is None else Tokenizer.resolve(named)
    if tokenizer.vocab_size != vocab_size:
        raise ExportError(
            f"{folder}: the model has {vocab_size:,} tokens, but tokenizer {named or 'tokenizer.json'} has "
            f"{tokenizer.vocab_size:,}: they are not from the same model"
        )
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_limited(path, limit=_LARGEST_JSON))
    except FileNotFoundError:
        raise ExportError(f"has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{path.name}: cannot be read: {error!s:.200}") from None
    if not isinstance(content, dict):
        raise ExportError(f"{path.name}: is not a JSON object")
    return content
