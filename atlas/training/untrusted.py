"""A checkpoint file may come from anywhere: what is checked before its tensors are believed.

Nothing in a file is run: `torch.load(..., weights_only=True)` builds tensors and plain values only.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from atlas.errors import AtlasError
from atlas.training.manifest import FORMAT_VERSION

_REQUIRED = {
    "model_state_dict": dict,
    "config": dict,
    "tokenizer": dict,
    "data": dict,
    "step": int,
    "sequences_consumed": int,
    "horizon": int,
}


def read_plain(path: Path, *, remedy: str) -> dict[str, Any]:
    """The contents of a checkpoint file on the CPU: plain values and tensors. Raises `AtlasError`.

    `remedy` ends the message: which file to take instead.
    """
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        names_code = re.search(r"Unsupported (?:global|class|operand)\W+(?:GLOBAL )?([\w.]+)", str(error))
        reason = f"it holds {names_code[1]}" if names_code else type(error).__name__
        raise AtlasError(
            f"{path}: is not a checkpoint of plain tensors, refused without running it ({reason}): "
            "take one that atlas train wrote"
        ) from None
    return _check_contents(contents, path, remedy)


def check_zip(path: Path, *, remedy: str) -> None:
    """Refuse a file that is no zip, or whose bytes are not those that its own checksums (CRC-32) name."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError, NotImplementedError, EOFError) as error:
        raise AtlasError(f"{path}: is not an Atlas checkpoint, or is cut off ({error}): {remedy}") from None
    if broken:
        raise AtlasError(f"{path}: is damaged (checksum of {broken}): {remedy}")


def _check_contents(contents: Any, path: Path, remedy: str) -> dict[str, Any]:
    if not isinstance(contents, dict) or "format_version" not in contents:
        raise AtlasError(
            f"{path}: holds tensors but is not an Atlas checkpoint (no format_version): take one that atlas train wrote"
        )
    version = contents["format_version"]
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise AtlasError(
            f"{path}: has checkpoint format {version}; this Atlas reads up to {FORMAT_VERSION}: update Atlas"
        )
    for key, kind in _REQUIRED.items():
        if not isinstance(contents.get(key), kind):
            raise AtlasError(
                f"{path}: is not a whole Atlas checkpoint ({key} is missing or not a {kind.__name__}): "
                f"{remedy}"
            )
    return contents
