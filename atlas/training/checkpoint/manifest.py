"""The sidecar of a checkpoint: a manifest of its files, without which they are none.

`atlas_step_100.pt` is a checkpoint if `atlas_step_100.json` beside it names its size and sha256. The bytes are
flushed under another name, then the sidecar is put in place (temp file, fsync, rename), then the bytes get their
name: that rename is the moment from which the checkpoint exists. While a name such as `atlas_best` is
overwritten, the sidecar accepts both the old bytes and the new ones (`replaces`), so that a kill at any moment
leaves one of the two, whole, and never a file that nobody vouches for.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from atlas.files import flush_folder, flush_to_disk, read_limited, sha256_of

FORMAT_VERSION = 1
STATE_FILE = "state.json"
"""In a sharded checkpoint, what is not a tensor."""
LARGEST_COUNT = 2**48
"""Of updates and sequences; a run of a million sequences a second gets there in nine years."""
_CHUNK = 1 << 20
_LARGEST_SIDECAR = 32 << 20  # of a checkpoint that thousands of ranks wrote

_Count = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
_Loss = Annotated[float | None, AfterValidator(lambda loss: loss if math.isfinite(loss or 0) else None)]
"""JSON has no NaN and no infinity."""


class FileEntry(BaseModel):
    """One file of a checkpoint, by its name without a folder."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    name: str = Field(pattern=r"^[^/\\:\x00-\x1f]+$", max_length=255)
    size: int = Field(ge=0, lt=2**63)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """What a checkpoint is, without opening it."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())
    format: Literal["atlas-checkpoint"] = "atlas-checkpoint"
    format_version: int = Field(FORMAT_VERSION, ge=1)
    kind: Literal["step", "epoch", "best", "interrupt"]
    step: _Count
    epoch: _Count
    loss: _Loss = None
    val_loss: _Loss = None
    perplexity: _Loss = None
    sequences_consumed: _Count
    model: dict[str, Any]
    data_fingerprint: str
    initialized_from: str | None = None
    slim: bool = False
    """Without optimizer state: it can be read, not gone on from."""
    folder: str | None = Field(None, pattern=r"^[^/\\:\x00-\x1f]+$", max_length=255)
    """Of a sharded checkpoint, whose files are in it; several names may share one."""
    files: tuple[FileEntry, ...] = Field(min_length=1, max_length=100_000)
    replaces: Manifest | None = None

    @model_validator(mode="after")
    def _replaces_one(self) -> Manifest:
        """Each candidate may cost a reading of the whole file."""
        if self.replaces is not None and self.replaces.replaces is not None:
            raise ValueError("what it replaces cannot replace something else")
        return self

    def matches(self, path: Path, *, check_hash: bool) -> bool:
        """Whether `path` is what this manifest describes. Of a file its bytes decide, so that both may be renamed."""
        places = [path] if self.folder is None else [path.parent / self.folder / e.name for e in self.files]
        if len(places) != len(self.files):
            return False
        for place, entry in zip(places, self.files, strict=True):
            if not place.is_file() or place.stat().st_size != entry.size:
                return False
        pairs = zip(places, self.files, strict=True)
        return not check_hash or all(sha256_of(place) == entry.sha256 for place, entry in pairs)

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(entry.size for entry in self.files)


def sidecar_of(checkpoint: Path) -> Path:
    return checkpoint.with_suffix(".json")


def shards_of(checkpoint: Path) -> Path | None:
    """The folder of a sharded checkpoint, which is called by the name of its sidecar without `.json`; None for a
    file."""
    if checkpoint.suffix:
        return None
    try:
        manifest = Manifest.model_validate_json(read_limited(sidecar_of(checkpoint), limit=_LARGEST_SIDECAR))
    except (OSError, ValidationError):
        return checkpoint if (checkpoint / STATE_FILE).is_file() else None
    return checkpoint.parent / manifest.folder if manifest.folder else None


def checkpoint_size(checkpoint: Path) -> int:
    """Bytes on the disk, of a file or of all in a folder."""
    shards = shards_of(checkpoint)
    if shards is None:
        return checkpoint.stat().st_size
    return sum(path.stat().st_size for path in shards.iterdir()) if shards.is_dir() else 0


def read_manifest(checkpoint: Path, *, check_hash: bool) -> Manifest | None:
    """The manifest that fits `checkpoint` as it lies on disk, or None if there is none that does.

    Without `check_hash` sizes must agree; with it, every byte. Where a kill left two candidates, only the
    bytes can tell which one it is, so they are read in any case.
    """
    sidecar = sidecar_of(checkpoint)
    try:
        content = read_limited(sidecar, limit=_LARGEST_SIDECAR)
        manifest: Manifest | None = Manifest.model_validate_json(content)
    except (OSError, ValidationError):
        return None
    check_hash = check_hash or (manifest is not None and manifest.replaces is not None)
    while manifest is not None and not manifest.matches(checkpoint, check_hash=check_hash):
        manifest = manifest.replaces
    return manifest


def write_manifest(checkpoint: Path, manifest: Manifest) -> None:
    """Put the sidecar in place, durably."""
    sidecar = sidecar_of(checkpoint)
    temporary = sidecar.with_name(sidecar.name + ".tmp")
    temporary.unlink(missing_ok=True)  # a link that waits there would lead the bytes out of the folder
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(manifest.model_dump_json(indent=2, exclude_none=True) + "\n")
        flush_to_disk(file)
    os.replace(temporary, sidecar)
    flush_folder(sidecar.parent)
