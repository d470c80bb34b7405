"""The sidecar of a checkpoint: a manifest of its files, and the point at which the checkpoint exists.

`atlas_step_100.pt` is a checkpoint from the moment `atlas_step_100.json` lies beside it and names its size
and sha256. The sidecar is written last, by temp file, fsync and rename. While a name such as `atlas_best`
is overwritten, its sidecar accepts both the old bytes and the new ones (`replaces`), so that a kill at any
moment leaves one of the two, whole.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

FORMAT_VERSION = 1
_CHUNK = 1 << 20
_LARGEST_SIDECAR = 1 << 20


class FileEntry(BaseModel):
    """One file of a checkpoint, named relative to its folder."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    name: str = Field(pattern=r"^[^/\\\x00]+$")
    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """What a checkpoint is, without opening it."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())
    format: Literal["atlas-checkpoint"] = "atlas-checkpoint"
    format_version: int = Field(FORMAT_VERSION, ge=1)
    kind: Literal["step", "epoch", "best", "interrupt"]
    step: int = Field(ge=0)
    epoch: int = Field(ge=0)
    loss: float | None = None
    val_loss: float | None = None
    perplexity: float | None = None
    sequences_consumed: int = Field(ge=0)
    model: dict[str, Any]
    data_fingerprint: str
    initialized_from: str | None = None
    files: tuple[FileEntry, ...] = Field(min_length=1)
    replaces: Manifest | None = None

    def matches(self, folder: Path, *, check_hash: bool) -> bool:
        """Whether the files in `folder` are the ones this manifest names."""
        for entry in self.files:
            path = folder / entry.name
            if not path.is_file() or path.stat().st_size != entry.size:
                return False
            if check_hash and sha256_of(path) != entry.sha256:
                return False
        return True


def sidecar_of(checkpoint: Path) -> Path:
    return checkpoint.with_suffix(".json")


def read_manifest(checkpoint: Path, *, check_hash: bool) -> Manifest | None:
    """The manifest that fits `checkpoint` as it lies on disk, or None if there is none that does.

    Without `check_hash` sizes must agree; with it, every byte. Where a kill left two candidates, only the
    bytes can tell which one it is, so they are read in any case.
    """
    sidecar = sidecar_of(checkpoint)
    try:
        if sidecar.stat().st_size > _LARGEST_SIDECAR:
            return None
        manifest: Manifest | None = Manifest.model_validate_json(sidecar.read_bytes())
    except (OSError, ValidationError):
        return None
    check_hash = check_hash or (manifest is not None and manifest.replaces is not None)
    while manifest is not None and not manifest.matches(checkpoint.parent, check_hash=check_hash):
        manifest = manifest.replaces
    return manifest


def write_manifest(checkpoint: Path, manifest: Manifest) -> None:
    """Put the sidecar in place, durably."""
    sidecar = sidecar_of(checkpoint)
    temporary = sidecar.with_name(sidecar.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(manifest.model_dump_json(indent=2, exclude_none=True) + "\n")
        flush_to_disk(file)
    os.replace(temporary, sidecar)
    flush_folder(sidecar.parent)


def flush_to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Make a rename durable. Windows has no such call and needs none."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
