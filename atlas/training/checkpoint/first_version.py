"""Recognize checkpoints of Atlas 1.x, the first implementation, and build the error message for them.

A checkpoint of Atlas 1.x is also a zip of tensors and plain values. But its tensors have other names, the file has no
`format_version`, and the JSON file beside it has no checksums. `atlas/export/import_first_version.py` converts such a
checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

TOKEN_EMBEDDING = "embeddings.token_embedding.embedding.weight"
POSITION_EMBEDDING = "embeddings.positional_embedding.embedding.weight"


def is_first_version(contents: Any) -> bool:
    """Whether the tensors in `contents` have the names that Atlas 1.x gave them."""
    weights = contents.get("model_state_dict") if isinstance(contents, dict) else None
    return isinstance(weights, dict) and TOKEN_EMBEDDING in weights and POSITION_EMBEDDING in weights


def refusal(path: Path) -> str:
    """The error message for a checkpoint of Atlas 1.x. Every command except `atlas import` prints it."""
    return f"{path}: is a checkpoint of Atlas 1.x; convert it with: atlas import {path}"
