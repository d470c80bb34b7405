"""Remove old checkpoints: by number, by bytes, and when the disk is nearly full. The best is never removed."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from atlas.training.checkpoint.atomic_write import replace_checkpoint
from atlas.training.checkpoint.manifest import Manifest, read_manifest, shards_of, sidecar_of
from atlas.training.checkpoint.validate import read_plain

Found = Sequence[tuple[Manifest, Path]]
"""Checkpoints with their manifests, the latest step first."""

RESUMABLE = 2
"""This many of the newest step checkpoints are never removed for space, and keep their optimizer state."""


@dataclass(frozen=True)
class Space:
    """Whether `needed` bytes may be written, and which checkpoints must be removed first."""

    needed: int
    free: int
    limit: str
    victims: tuple[Path, ...] = ()

    @property
    def is_enough(self) -> bool:
        """Whether the space suffices once the victims are removed."""
        return self.free >= self.needed


def find_space(folder: Path, found: Found, needed: int, *, max_total: int | None) -> Space:
    """How to get `needed` bytes: on the disk, and within `max_total` bytes of checkpoints.

    For the disk, step checkpoints beyond the newest two are removed, the oldest first. For `max_total` every one may be
    removed but the newest and the best. None is removed if that would not suffice.
    """
    disk = shutil.disk_usage(folder).free
    steps = [entry for entry in found if entry[0].kind == "step"]
    space = _choose_victims(Space(needed, disk, "free on the disk"), steps[RESUMABLE:])
    if max_total is None or not space.is_enough:
        return space
    allowed = max_total - sum(_size(path) for _, path in found if path not in space.victims)
    others = [entry for entry in found[1:] if entry[0].kind != "best" and entry[1] not in space.victims]
    within = _choose_victims(Space(needed, allowed, "left of checkpoint.max_total"), others)
    return replace(within, victims=(*space.victims, *within.victims))


def _choose_victims(space: Space, candidates: Found) -> Space:
    free, victims = space.free, []
    for _, path in reversed(candidates):  # the oldest first
        if free >= space.needed:
            break
        victims.append(path)
        free += _size(path)
    return replace(space, free=free, victims=tuple(victims)) if free >= space.needed else space


def surplus(found: Found, kind: str, keep: int) -> list[Path]:
    """The checkpoints of a kind beyond the newest `keep`."""
    return [path for manifest, path in found if manifest.kind == kind and kind != "best"][keep:]


def remove(path: Path) -> None:
    """Remove a checkpoint: the file before its sidecar, since a sidecar alone means nothing, but a file alone looks
    like a checkpoint from elsewhere. A folder that another name shares stays."""
    for file in _files_of(path):
        if file.is_dir():
            remove_folder(file)
        else:
            file.unlink(missing_ok=True)


def _files_of(path: Path) -> list[Path]:
    """A checkpoint's file, or its folder unless another name shares it; then its sidecar. For any other file,
    itself."""
    shards = shards_of(path)
    if shards is None:
        return [path, sidecar_of(path)] if path.suffix == ".pt" else [path]
    others = (other.with_suffix("") for other in shards.parent.glob("atlas_*.json"))
    is_shared = any(other.name != path.name and shards_of(other) == shards for other in others)
    return [sidecar_of(path)] if is_shared else [shards, sidecar_of(path)]


def remove_folder(folder: Path) -> None:
    """Rename the folder, then remove it, so that no kill leaves a part of a folder that looks complete."""
    renamed = folder.with_name(folder.name + ".old.tmp")
    shutil.rmtree(renamed, ignore_errors=True)
    if folder.exists():
        os.replace(folder, renamed)
    shutil.rmtree(renamed, ignore_errors=True)


def move_aside(folder: Path, files: Sequence[Path]) -> Path:
    """Move checkpoints, each with its sidecar, and other `files` to a new `previous-N` in `folder`; return its path."""
    numbered = (folder / f"previous-{number}" for number in itertools.count(1))
    target = next(path for path in numbered if not path.exists())
    target.mkdir()
    for file in (file for path in files for file in _files_of(path)):
        if file.exists():
            shutil.move(file, target / file.name)
    return target


def drop_optimizer_state(path: Path) -> None:
    """Rewrite a checkpoint without its optimizer state, with AdamW two thirds of its bytes. Raises `OSError`."""
    manifest = read_manifest(path, check_hash=True)
    if manifest is None or manifest.slim:
        return
    key = "optimizer_state_dict"
    contents = read_plain(path, remedy="it stays as it is", without=(key,)) | {key: {}}
    replace_checkpoint(path, contents, manifest.model_copy(update={"slim": True}))


def _size(path: Path) -> int:
    """The bytes that are free once it is removed."""
    file = _files_of(path)[0]
    if file.is_dir():
        return sum(shard.stat().st_size for shard in file.iterdir())
    return file.stat().st_size if file == path and file.exists() else 0
