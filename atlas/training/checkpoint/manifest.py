"""The sidecar of a checkpoint: a manifest of its files. A run resumes by itself only from files with a sidecar.

`atlas_step_100.pt` is a checkpoint if `atlas_step_100.json` beside it names its size and sha256. A save flushes the
bytes to a temporary file. Next, it puts the sidecar in place (temporary file, fsync, rename). Last, it renames the file
with the bytes. The checkpoint exists from that last rename on. While a name such as `atlas_best` is overwritten, the
sidecar accepts both the old bytes and the new bytes (`replaces`). So a kill at any moment leaves either the old or the
new checkpoint intact, and never a file without a sidecar that describes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from atlas.files import read_limited, replacing, sha256_of

FORMAT_VERSION = 1
STATE_FILE = "state.json"
"""The file of a sharded checkpoint that holds everything but the tensors."""
LARGEST_COUNT = 2**48
"""The largest count of updates or sequences. A run of a million sequences per second reaches this count in nine
years."""
_LARGEST_SIDECAR = 32 << 20  # enough for a checkpoint that thousands of ranks wrote

Count = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
_Loss = Annotated[float | None, AfterValidator(lambda loss: loss if math.isfinite(loss or 0) else None)]
"""NaN and infinity become None, since JSON has neither."""


class FileEntry(BaseModel):
    """One file of a checkpoint: its name without a folder, its size in bytes and its hash."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    name: str = Field(pattern=r"^[^/\\:\x00-\x1f]+$", max_length=255)
    size: int = Field(ge=0, lt=2**63)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """The description of a checkpoint, so that Atlas need not open the checkpoint itself."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())
    format: Literal["atlas-checkpoint"] = "atlas-checkpoint"
    format_version: int = Field(FORMAT_VERSION, ge=1)
    kind: Literal["step", "epoch", "best", "interrupt"]
    step: Count
    epoch: Count
    loss: _Loss = None
    val_loss: _Loss = None
    perplexity: _Loss = None
    sequences_consumed: Count
    model: dict[str, Any]
    data_fingerprint: str
    initialized_from: str | None = None
    slim: bool = False
    """The checkpoint has no optimizer state: it can be loaded, but a run cannot resume from it."""
    folder: str | None = Field(None, pattern=r"^[^/\\:\x00-\x1f]+$", max_length=255)
    """The folder of a sharded checkpoint's files. Several checkpoint names may share one folder."""
    files: tuple[FileEntry, ...] = Field(min_length=1, max_length=100_000)
    replaces: Manifest | None = None

    @model_validator(mode="after")
    def _replaces_one(self) -> Manifest:
        """Refuse a chain of more than two manifests, since checking each one may mean reading the complete file."""
        if self.replaces is not None and self.replaces.replaces is not None:
            raise ValueError("a replaced manifest cannot replace another one")
        return self

    def matches(self, path: Path, *, check_hash: bool, advance: Callable[[int], None]) -> bool:
        """Whether this manifest describes `path`. The name of a single file is not compared, since a user may rename
        the file."""
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
    """The folder of the sharded checkpoint whose sidecar is `checkpoint` + `.json`; None for a checkpoint in one
    file."""
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


def checkpoint_size(checkpoint: Path) -> int:
    """The size in bytes of a checkpoint's file, or of all files in its folder."""
    shards = shards_of(checkpoint)
    if shards is None:
        return checkpoint.stat().st_size
    return sum(path.stat().st_size for path in shards.iterdir()) if shards.is_dir() else 0


def read_manifest(
    checkpoint: Path, *, check_hash: bool, advance: Callable[[int], None] = lambda done: None
) -> Manifest | None:
    """The manifest that describes `checkpoint` as it is on the disk, or None if there is no such manifest.

    Without `check_hash` only the sizes must match. With `check_hash` the sha256 must match too, and after each read
    `advance` is called with its number of bytes. If the sidecar describes both old and new bytes, as after a kill, the
    sha256 is always compared.
    """
    manifest = _parse_sidecar(checkpoint)
    check_hash = check_hash or (manifest is not None and manifest.replaces is not None)
    while manifest is not None and not manifest.matches(checkpoint, check_hash=check_hash, advance=advance):
        manifest = manifest.replaces
    return manifest


def write_manifest(checkpoint: Path, manifest: Manifest) -> None:
    """Write the sidecar atomically and flush it to the disk."""
    with replacing(sidecar_of(checkpoint)) as temporary:
        temporary.write_text(manifest.model_dump_json(indent=2, exclude_none=True) + "\n", encoding="utf-8")
