"""Remove old checkpoints if there are too many, or if they need too much space. The best checkpoint is never
removed."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from atlas.files import flush_folder, remove_leftover
from atlas.training.checkpoint.atomic_write import replace_checkpoint
from atlas.training.checkpoint.manifest import (
    BASE_FILE,
    Manifest,
    checkpoint_size,
    read_manifest,
    shards_of,
    sidecar_of,
)
from atlas.training.checkpoint.validate import read_plain

Found = Sequence[tuple[Manifest, Path]]
"""Pairs of a manifest and the path of its checkpoint, the latest step first."""

RESUMABLE = 2
"""The number of step checkpoints, the newest ones, that keep their optimizer state. Atlas never removes these
checkpoints to free the disk."""
_SHARD = re.compile(r".*\.safetensors|state\.json|\.metadata|.*\.safetensors\.index\.json")


class Space(NamedTuple):
    """The space for a new checkpoint: `free` bytes after the checkpoints `victims` are removed. `limit` names the limit
    that applies, for a message."""

    free: int
    limit: str
    victims: list[Path]


def find_space(folder: Path, found: Found, needed: int, *, max_total: int | None) -> Space:
    """Choose the checkpoints to remove, so that `needed` bytes fit on the disk and into `max_total`, if it is set. All
    checkpoints together may use `max_total` bytes.

    To free the disk, step checkpoints other than the newest two may be removed, the oldest first. To stay within
    `max_total`, every checkpoint except the newest and the best may be removed. If this is not enough, `free` in the
    result is less than `needed`.
    """
    steps = [entry for entry in found if entry[0].kind == "step"]
    on_disk = Space(shutil.disk_usage(folder).free, "free on the disk", [])
    space = _choose_victims(on_disk, needed, steps[RESUMABLE:])
    if max_total is None or space.free < needed:
        return space
    allowed = max_total - sum(_size(path) for _, path in found if path not in space.victims)
    others = [entry for entry in found[1:] if entry[0].kind != "best" and entry[1] not in space.victims]
    return _choose_victims(Space(allowed, "left of checkpoint.max_total", space.victims), needed, others)


def _choose_victims(space: Space, needed: int, candidates: Found) -> Space:
    free, victims = space.free, [*space.victims]
    for _, path in reversed(candidates):  # the oldest first
        if free < needed:
            victims.append(path)
            free += _size(path)
    return Space(free, space.limit, victims) if free >= needed else space


def surplus(found: Found, kind: str, keep: int) -> list[Path]:
    """The paths of all checkpoints of one kind except the newest `keep`. For the kind `best`, the list is empty."""
    return [path for manifest, path in found if manifest.kind == kind and kind != "best"][keep:]


def remove(path: Path) -> None:
    """Remove a checkpoint: first its file or folder, then its sidecar.

    If a kill leaves only the sidecar, Atlas ignores this sidecar. In the other order, a kill could leave only the file,
    which would look like a downloaded checkpoint. A folder that another checkpoint shares is not removed.
    """
    for file in files_of(path):
        if file.is_dir():
            remove_folder(file)
        else:
            file.unlink(missing_ok=True)


def files_of(path: Path, *, among: Collection[Path] = ()) -> list[Path]:
    """The paths to remove or move with a checkpoint: its file or folder, and its sidecar. A folder that another
    checkpoint shares is left out, unless that checkpoint is `among` those to move. For any other file, the result is
    only that file."""
    shards = shards_of(path)
    if shards is None:
        return [path, sidecar_of(path)] if path.suffix == ".pt" and path.name != BASE_FILE else [path]
    others = {
        sidecar.with_suffix("") for sidecar in shards.parent.glob("atlas_*.json") if sidecar not in among
    }
    is_shared = any(shards_of(other) == shards for other in others - {path, *among})
    return [sidecar_of(path)] if is_shared else [shards, sidecar_of(path)]


def remove_folder(folder: Path) -> None:
    """Rename the folder, then remove it, so that neither a kill nor a power cut leaves an incomplete folder under the
    old name. A folder with other files than those of a sharded checkpoint stays."""
    renamed = folder.with_name(folder.name + ".old.tmp")
    if has_only_shards(renamed):
        remove_leftover(renamed)
    if has_only_shards(folder) and not renamed.exists():
        os.replace(folder, renamed)
        flush_folder(folder.parent)
        remove_leftover(renamed)


def has_only_shards(folder: Path) -> bool:
    """Return whether a path is a folder with nothing but the files of a sharded checkpoint, complete or not."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return all(_SHARD.fullmatch(entry.name) and not entry.is_dir() for entry in folder.iterdir())


def drop_optimizer_state(path: Path) -> None:
    """Rewrite a checkpoint without its optimizer state. With AdamW, this state is two thirds of the checkpoint. Raises
    `OSError`."""
    manifest = read_manifest(path, check_hash=True)
    if manifest is None or manifest.slim:
        return
    key = "optimizer_state_dict"
    contents = read_plain(path, remedy="it stays as it is", without=(key,)) | {key: {}}
    replace_checkpoint(path, contents, manifest.model_copy(update={"slim": True}))


def _size(path: Path) -> int:
    """The bytes that are freed if the checkpoint is removed; 0 if another checkpoint shares its folder."""
    return checkpoint_size(path) if len(files_of(path)) > 1 else 0
