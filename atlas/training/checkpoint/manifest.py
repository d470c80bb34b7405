"""The sidecar of a checkpoint: a manifest with the size and the sha256 of each of its files.

Without `--resume PATH`, a run resumes only from a checkpoint that has a sidecar. The file `atlas_step_100.pt` needs the
sidecar `atlas_step_100.json` in the same folder. A save has three steps:

1. Write the bytes to a temporary file, and flush this file to the disk.
2. Write the sidecar atomically (temporary file, fsync, rename).
3. Rename the temporary file of step 1 to its final name. After this step, the checkpoint exists.

When a save overwrites a checkpoint such as `atlas_best`, the sidecar accepts both the old bytes and the new bytes
(`replaces`) until step 3 is complete. So a kill at any moment leaves either the old checkpoint or the new one intact. A
kill never leaves a checkpoint's file without a matching sidecar.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from atlas.files import encodable, read_limited, replacing, sha256_of

FORMAT_VERSION = 1
"""The format of a complete checkpoint."""
SHARED_BASE_VERSION = 2
"""The format of a checkpoint of a LoRA run, which shares the weights of its base with the run's other checkpoints."""
BASE_FILE = "base.pt"
"""The file in the folder of a LoRA run that has the weights of its base, see `base.py`."""
STATE_FILE = "state.json"
"""The file in a sharded checkpoint that contains everything except the tensors."""
SHARDS = r"^atlas_step_[0-9]+(-[0-9]+)?$"
"""The names of folders for sharded checkpoints. A sidecar can name no other folder, since Atlas removes the folders of
old checkpoints."""
LARGEST_COUNT = 2**48
"""The largest valid number of updates or sequences. A run of a million sequences per second reaches this number in nine
years."""
_LARGEST_SIDECAR = 32 << 20  # bytes; enough for a checkpoint that thousands of ranks wrote

Count = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
_Loss = Annotated[float | None, AfterValidator(lambda loss: loss if math.isfinite(loss or 0) else None)]
"""A loss or None. NaN and infinity become None, since JSON cannot represent them."""


FileName = Annotated[str, Field(pattern=r"^\.{0,2}[^./\\:\x00-\x1f][^/\\:\x00-\x1f]*$", max_length=255)]
"""The name of a file, without a folder."""
FolderName = Annotated[str, Field(pattern=SHARDS)]

_Path = Annotated[
    str | None, BeforeValidator(lambda path: encodable(path) if isinstance(path, str) else path)
]
"""A path as text. A byte that is not UTF-8 becomes an escape, since JSON cannot represent it."""


class FileEntry(BaseModel):
    """One file of a checkpoint: its name without a folder, its size in bytes and its hash."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    name: FileName
    size: int = Field(ge=0, lt=2**63)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """The description of a checkpoint. With it, Atlas can list checkpoints without opening their files."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())
    format: Literal["atlas-checkpoint"] = "atlas-checkpoint"
    format_version: int = Field(FORMAT_VERSION, ge=1, le=SHARED_BASE_VERSION)
    kind: Literal["step", "epoch", "best", "interrupt"]
    step: Count
    epoch: Count
    loss: _Loss = None
    val_loss: _Loss = None
    perplexity: _Loss = None
    sequences_consumed: Count
    model: dict[str, Any]
    data_fingerprint: str
    initialized_from: _Path = None
    slim: bool = False
    """Whether the checkpoint has no optimizer state. Such a checkpoint can be loaded, but a run cannot resume from
    it."""
    folder: FolderName | None = None
    """The name of the folder with the files of a sharded checkpoint; None for a checkpoint in one file. Several
    checkpoints may share one folder."""
    files: tuple[FileEntry, ...] = Field(min_length=1, max_length=100_000)
    base: FileEntry | None = None
    """The file with the frozen weights of a LoRA run, or None if the checkpoint is complete."""
    replaces: Manifest | None = None

    @model_validator(mode="after")
    def _replaces_one(self) -> Manifest:
        """Refuse a chain of more than two manifests. Otherwise a forged sidecar could make Atlas hash a file many
        times."""
        if self.replaces is not None and self.replaces.replaces is not None:
            raise ValueError("a replaced manifest cannot replace another manifest")
        return self

    def matches(self, path: Path, *, check_hash: bool, advance: Callable[[int], None]) -> bool:
        """Whether this manifest describes the checkpoint `path`. If the checkpoint is one file, its name is not
        compared, since a user may rename the file."""
        places = [path] if self.folder is None else [path.parent / self.folder / e.name for e in self.files]
        if len(places) != len(self.files):
            return False
        pairs = list(zip(places, self.files, strict=True))
        if not all(place.is_file() and place.stat().st_size == entry.size for place, entry in pairs):
            return False
        return not check_hash or all(sha256_of(place, advance) == entry.sha256 for place, entry in pairs)


def sidecar_of(checkpoint: Path) -> Path:
    """The path of a checkpoint's sidecar, whether it exists or not."""
    return checkpoint.with_suffix(".json")


def shards_of(checkpoint: Path) -> Path | None:
    """The folder with the files of a sharded checkpoint; None for a checkpoint in one file.

    The sidecar `checkpoint` + `.json` names the folder. Without a sidecar, `checkpoint` itself is the folder if it
    contains `state.json`.
    """
    if checkpoint.suffix or not checkpoint.name:  # `.` and `/` have no name
        return None
    manifest = _parse_sidecar(checkpoint)
    if manifest is None:
        return checkpoint if (checkpoint / STATE_FILE).is_file() else None
    return checkpoint.parent / manifest.folder if manifest.folder else None


def _parse_sidecar(checkpoint: Path) -> Manifest | None:
    try:
        return Manifest.model_validate_json(read_limited(sidecar_of(checkpoint), limit=_LARGEST_SIDECAR))
    except (OSError, ValidationError):
        return None


def written_later(sidecar: Path) -> str | None:
    """The reason and the remedy if a later version of Atlas wrote `sidecar`, else None. Atlas does not use such a
    sidecar, since it may describe its checkpoint in another way."""
    try:
        facts = json.loads(read_limited(sidecar, limit=_LARGEST_SIDECAR))
        version = facts["format_version"] if facts["format"] == "atlas-checkpoint" else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    if not isinstance(version, int) or version <= SHARED_BASE_VERSION:
        return None
    return f"has format version {version!r:.20}, which a later version of Atlas wrote: update Atlas"


def checkpoint_size(checkpoint: Path) -> int:
    """The size of a checkpoint in bytes: the size of its file, or of all files in its folder."""
    shards = shards_of(checkpoint)
    if shards is None:
        return checkpoint.stat().st_size
    return sum(path.stat().st_size for path in shards.iterdir()) if shards.is_dir() else 0


def read_manifest(
    checkpoint: Path, *, check_hash: bool, advance: Callable[[int], None] = lambda done: None
) -> Manifest | None:
    """The manifest in the sidecar that describes the bytes of `checkpoint` on the disk, or None if there is no such
    manifest.

    Without `check_hash`, only the sizes must match. With `check_hash`, the sha256 must match too; after each read,
    `advance` is called with the number of bytes read. If a kill left a sidecar that accepts both old and new bytes, the
    sha256 is always compared.
    """
    manifest = _parse_sidecar(checkpoint)
    check_hash = check_hash or (manifest is not None and manifest.replaces is not None)
    while manifest is not None and not manifest.matches(checkpoint, check_hash=check_hash, advance=advance):
        manifest = manifest.replaces
    return manifest


def write_manifest(checkpoint: Path, manifest: Manifest) -> None:
    """Write the sidecar of `checkpoint` atomically and flush it to the disk."""
    with replacing(sidecar_of(checkpoint)) as temporary:
        temporary.write_text(manifest.model_dump_json(indent=2, exclude_none=True) + "\n", encoding="utf-8")
