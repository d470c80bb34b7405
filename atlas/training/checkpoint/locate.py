"""Build the file names of checkpoints, list the checkpoints in a folder, and find the checkpoint that a user names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atlas.errors import CheckpointError
from atlas.files import was_url
from atlas.training.checkpoint.manifest import (
    SHARDS,
    Manifest,
    read_manifest,
    shards_of,
    sidecar_of,
    written_later,
)

_NAMES = {
    "step": "atlas_step_{step}",
    "epoch": "atlas_epoch_{epoch}_step_{step}",
    "interrupt": "atlas_interrupt_step_{step}",
    "best": "atlas_best",
}
"""The file name of each kind of checkpoint, without `.pt`. `list_checkpoints` lists the checkpoints of one step in this
order of kinds."""


def checkpoint_name(kind: str, contents: Mapping[str, Any]) -> str:
    """The file name of a checkpoint of this kind, with the step and the epoch in `contents`."""
    return f"{_NAMES[kind].format_map(contents)}.pt"


def is_temporary(name: str) -> bool:
    """Whether a save uses this name for an unfinished file or folder."""
    return name == "atlas_writing.tmp" or (
        name.endswith(".tmp") and is_checkpoint_file(re.sub(r"(\.old)?\.tmp$", "", name))
    )


def is_checkpoint_file(name: str) -> bool:
    """Whether this is the name of a checkpoint, its sidecar, or the folder of a sharded checkpoint."""
    stem = re.sub(r"\.(pt|json)$", "", name)
    return kind_of(Path(stem)) is not None or re.fullmatch(SHARDS, stem) is not None


def kind_of(path: Path) -> str | None:
    """The kind of a checkpoint, from its file name, or None if the name belongs to no kind."""
    stem = path.name.removesuffix(".pt")
    names = {kind: name.format(step=r"\d+", epoch=r"\d+") for kind, name in _NAMES.items()}
    return next((kind for kind, name in names.items() if re.fullmatch(name, stem)), None)


def find_checkpoint(path: str | Path) -> Path:
    """The path of the checkpoint that a user names. For a sharded checkpoint, this is the sidecar's path without
    `.json`.

    If there is no file `best_model.pt`, this name means `atlas_best.pt`. The user may omit `.pt`, or write `.json`
    instead of `.pt`. Raises `CheckpointError` if there is no such checkpoint.
    """
    path = Path(path)
    if path.suffix == ".json" and path.with_suffix(".pt").is_file():
        path = path.with_suffix(".pt")
    best = path.with_name("atlas_best.pt") if path.name == "best_model.pt" and not path.is_file() else None
    if best and (best.is_file() or shards_of(best.with_suffix(""))):
        path = best
    if path.is_file() and path.suffix != ".json":
        return path
    name = path.with_suffix("") if path.suffix in (".pt", ".json") else path
    if shards_of(name):
        return name
    if path.name and not path.suffix and path.with_suffix(".pt").is_file():
        return path.with_suffix(".pt")
    if name.name and (later := written_later(sidecar_of(name))):
        raise CheckpointError(f"{sidecar_of(name)}: {later}")
    if path.is_dir():
        raise CheckpointError(
            f"{path}: is a folder; name a checkpoint in it, such as {path / 'atlas_best.pt'}"
        )
    if was_url(path):
        raise CheckpointError(f"{path}: is a URL; download the checkpoint, and give the path of the file")
    beside = sorted(p.name for p in path.parent.glob("*.pt"))
    below = sorted(map(str, path.parent.glob("*/atlas_best.pt")))
    hint = "train a model first (atlas train)"
    if beside or below:
        hint = f"there are {', '.join(beside[:5])}" if beside else f"there is {' and '.join(below[:3])}"
    raise CheckpointError(f"{path}: no such checkpoint; {hint}")


def checkpoint_paths(folder: Path) -> list[Path]:
    """The paths of all checkpoints in `folder`, including damaged ones. Checkpoints in one file come first, then
    sharded checkpoints. Both groups are sorted by path."""
    sharded = (path.with_suffix("") for path in sorted(folder.glob("atlas_*.json")))
    return [*sorted(folder.glob("atlas_*.pt")), *(path for path in sharded if shards_of(path))]


def list_checkpoints(folder: Path) -> list[tuple[Manifest, Path]]:
    """(manifest, path) of each checkpoint in `folder` whose size matches its sidecar. The latest step comes first;
    checkpoints of the same step are sorted by kind."""
    order = [*_NAMES]
    pairs = [
        (manifest, path)
        for path in checkpoint_paths(folder)
        if kind_of(path) and (manifest := read_manifest(path, check_hash=False))
    ]
    return sorted(pairs, key=lambda pair: (-pair[0].step, order.index(pair[0].kind), pair[1].name))
