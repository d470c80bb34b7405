"""Write a sharded checkpoint as one file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from atlas.errors import CheckpointError
from atlas.files import explain_failed_write
from atlas.training.checkpoint.atomic_write import replace_checkpoint
from atlas.training.checkpoint.load import load_checkpoint
from atlas.training.checkpoint.manifest import read_manifest, sidecar_of


def consolidate(source: Path, target: Path, *, say: Callable[[str], None]) -> int:
    """Write the checkpoint `source` to the file `target`, with a sidecar if `source` has a sidecar. Return the size of
    `target` in bytes. Raises `CheckpointError`."""
    if target.suffix != ".pt":
        raise CheckpointError(f"{target}: name a file that ends with .pt")
    if taken := next((path for path in (target, sidecar_of(target)) if path.exists()), None):
        raise CheckpointError(f"{taken}: exists: name another file")
    contents, manifest = load_checkpoint(source, say=say), read_manifest(source, check_hash=False)
    with explain_failed_write(target, "choose another path", kind=CheckpointError):
        return replace_checkpoint(target, contents, manifest)
