"""The base of a LoRA run: the file `base.pt` in the run's folder, which the run's checkpoints share.

LoRA never changes the weights of its base, so a run writes them once. A checkpoint of the run then stores only what
changes, the low-rank updates and the optimizer's state, with the size and the sha256 of `base.pt`. `atlas_best.pt` is
complete, so that a user can move it alone. `base.pt` is a complete checkpoint too, of the model before the run.

`base.pt` is not a hard link to the checkpoint that the run started from, since one bad block on the disk, or a program
that overwrites the file in place, would then damage both.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atlas.errors import AtlasError, CheckpointError
from atlas.files import explain_failed_write, replacing, sha256_of
from atlas.model import is_lora
from atlas.training.checkpoint.atomic_write import write_tensors
from atlas.training.checkpoint.manifest import BASE_FILE, FORMAT_VERSION, SHARED_BASE_VERSION, FileEntry
from atlas.training.checkpoint.validate import is_base, read_plain, refuse_missing_weights

_KEPT_FACTS = ("chat_form", "context", "imported_from", "sampling")


def refuse_other_base(folder: Path) -> None:
    """Raise `AtlasError` if `folder` has a file `base.pt` that no run wrote, or that cannot be read."""
    path = folder / BASE_FILE
    if os.path.lexists(path) and not is_base(path):
        raise AtlasError(
            f"{path}: is not the base of a LoRA run, or is damaged, and this run would replace it: rename it, or "
            "choose another --output-dir"
        )


def find_base(folder: Path, contents: Mapping[str, Any], *, proven: FileEntry | None) -> FileEntry | None:
    """Return the entry of `base.pt` in `folder` if it has the frozen weights in `contents`, the contents of a run's
    checkpoint, else None.

    `proven` describes the base that the run's start has read from a checkpoint in `folder`, or is None.
    """
    path = folder / BASE_FILE
    if proven and path.is_file() and path.stat().st_size == proven.size:
        return proven
    if not path.is_file() or not _holds(path, _frozen(contents["model_state_dict"])):
        return None
    return FileEntry(name=BASE_FILE, size=path.stat().st_size, sha256=sha256_of(path))


def write_base(folder: Path, contents: Mapping[str, Any]) -> FileEntry:
    """Write the frozen weights in `contents`, the contents of a run's checkpoint, to `base.pt` in `folder`. Return the
    entry of the file. Raises `AtlasError` if the file cannot be written."""
    path, frozen = folder / BASE_FILE, _frozen(contents["model_state_dict"])
    # A run that writes the file again, after the file was damaged, must write the same bytes.
    base = {
        "format_version": FORMAT_VERSION,
        "is_base": True,
        "model_state_dict": frozen,
        "config": {
            "model": contents["config"]["model"] | {"dropout": 0.0}
        },  # a resume may change the dropout
        "tokenizer": contents["tokenizer"],
        "data": {key: contents["data"][key] for key in _KEPT_FACTS if key in contents["data"]},
        "initialized_from": contents["initialized_from"],
        **dict.fromkeys(("step", "sequences_consumed", "horizon"), 0),
    }
    with (
        explain_failed_write(path, "free some space, or choose another --output-dir"),
        replacing(path) as temporary,
    ):
        size, sha256 = write_tensors(temporary, base)
    return FileEntry(name=BASE_FILE, size=size, sha256=sha256)


def without_base(contents: Mapping[str, Any], base: FileEntry) -> dict[str, Any]:
    """Return the contents of a checkpoint without the weights that `base` has."""
    return {
        **contents,
        "format_version": SHARED_BASE_VERSION,
        "model_state_dict": {k: v for k, v in contents["model_state_dict"].items() if is_lora(k)},
        "base": base.model_dump(),
    }


def with_base(contents: dict[str, Any], path: Path, *, remedy: str) -> dict[str, Any]:
    """Return the contents of the checkpoint `path`, with the weights of the base that they name, if any. Raises
    `CheckpointError` if the base is missing, damaged or another one."""
    named = contents.pop("base", None)
    if named is None:
        return contents
    entry = FileEntry.model_validate(named)
    base = path.with_name(entry.name)
    if not base.is_file():
        raise CheckpointError(
            f"{path}: has only the low-rank updates of a LoRA run, and its base {base} is missing: copy {entry.name} "
            f"from the run's folder, or {remedy}"
        )
    if not is_intact(base, entry):
        raise CheckpointError(
            f"{path}: {base} is damaged, or is not the base of this checkpoint (its sha256 differs): {remedy}"
        )
    weights = read_plain(base, remedy=remedy)["model_state_dict"]
    contents["model_state_dict"] = {**weights, **contents["model_state_dict"]}
    refuse_missing_weights(contents, path, remedy)
    return contents


def is_intact(base: Path, entry: FileEntry) -> bool:
    """Return whether `base` is the file that `entry` describes."""
    return base.is_file() and base.stat().st_size == entry.size and sha256_of(base) == entry.sha256


def _frozen(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if not is_lora(name)}


def _holds(path: Path, weights: Mapping[str, Tensor]) -> bool:
    """Return whether a base has exactly these weights. A damaged one has not."""
    try:
        held = read_plain(path, remedy="")["model_state_dict"]
    except CheckpointError:
        return False
    return held.keys() == weights.keys() and all(
        held[name].dtype == tensor.dtype and torch.equal(held[name], tensor.cpu())
        for name, tensor in weights.items()
    )
