"""Checkpoints of Atlas 1.x, the first implementation: how Atlas recognises them, and the error message for them.

They are zips of tensors and plain values too. But their tensors have other names, they have no `format_version`, and
the JSON file beside them has no checksums. `atlas/export/import_first_version.py` converts them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

TOKEN_EMBEDDING = "embeddings.token_embedding.embedding.weight"
POSITION_EMBEDDING = "embeddings.positional_embedding.embedding.weight"


def is_first_version(contents: Any) -> bool:
    """Whether `contents` come from a checkpoint of Atlas 1.x, by the names of the tensors."""
    weights = contents.get("model_state_dict") if isinstance(contents, dict) else None
    return isinstance(weights, dict) and TOKEN_EMBEDDING in weights and POSITION_EMBEDDING in weights


def refusal(path: Path) -> str:
    """The error message for such a checkpoint in every command but `atlas import`."""
    return f"{path}: is a checkpoint of the first Atlas (1.x); convert it with: atlas import {path}"
