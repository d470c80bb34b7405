"""Write a sharded checkpoint as one file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from atlas.errors import CheckpointError
from atlas.training.checkpoint.atomic_write import commit, write_tensors
from atlas.training.checkpoint.load import load_checkpoint
from atlas.training.checkpoint.manifest import FileEntry, read_manifest, sidecar_of


def consolidate(source: Path, target: Path, *, say: Callable[[str], None]) -> int:
    """Write the contents of `source` to one file with a sidecar of its own; its bytes. Raises `CheckpointError`."""
    if target.suffix != ".pt":
        raise CheckpointError(f"{target}: name a file that ends with .pt")
    if taken := next((path for path in (target, sidecar_of(target)) if path.exists()), None):
        raise CheckpointError(f"{taken}: exists: name another file")
    contents, manifest = load_checkpoint(source, say=say), read_manifest(source, check_hash=False)
    staged = target.with_name(target.name + ".tmp")
    try:
        size, sha256 = write_tensors(staged, contents)
        entry = FileEntry(name=target.name, size=size, sha256=sha256)
        if manifest:
            commit(staged, target, manifest.model_copy(update={"folder": None, "files": (entry,)}))
        else:
            os.replace(staged, target)
    except OSError as error:
        staged.unlink(missing_ok=True)
        raise CheckpointError(f"{target}: cannot be written ({error.strerror}): name another place") from None
    return size
