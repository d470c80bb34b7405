"""A checkpoint read to its last byte: whether it is what was saved, and whether it holds what one should."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from atlas.config.loader import resolve
from atlas.errors import AtlasError, CheckpointError
from atlas.files import sha256_of
from atlas.model import AtlasLM
from atlas.training.checkpoint.atomic_write import named_tensors
from atlas.training.checkpoint.load import load_weights, read_contents
from atlas.training.checkpoint.manager import CheckpointManager
from atlas.training.checkpoint.manifest import Manifest, checkpoint_size, read_manifest, shards_of, sidecar_of
from atlas.training.checkpoint.validate import check_zip, refuse_first_version


@dataclass(frozen=True)
class Verdict:
    """What was found in a file. `broken` and `not_finite` say what is wrong, or are empty."""

    size: int
    broken: str = ""
    not_finite: str = ""
    compared_by: str = ""
    tensors: int = 0

    @property
    def problem(self) -> str:
        return self.broken or self.not_finite

    def __str__(self) -> str:
        if self.problem:
            return self.problem
        return f"whole: {self.size:,} bytes, {self.compared_by}; {self.tensors:,} tensors, all finite"


def verify_checkpoint(path: Path, *, advance: Callable[[int], None] = lambda done: None) -> Verdict:
    """Compare every byte with the sidecar's sha256, or with the checksums inside the file where there is no
    sidecar, then read the contents and look for numbers that are not finite. `advance` is told the bytes read.

    Takes as much memory as resuming.
    """
    size = checkpoint_size(path)
    try:
        compared_by, manifest = _compare(path, advance)
        contents = read_contents(path, remedy="")
        config = resolve(contents["config"]).model
        if config.vocab_size is None:
            raise CheckpointError("its config has no model.vocab_size")
        with torch.device("meta"):
            model = AtlasLM(config)
        load_weights(model, contents, path)
    except AtlasError as error:
        return Verdict(size, broken=str(error).removeprefix(f"{path}: ").rstrip(":; "))
    if manifest and manifest.step != contents["step"]:
        return Verdict(size, broken=f"holds step {contents['step']}, its sidecar says {manifest.step}")
    tensors = dict(named_tensors(contents))
    strange = {name: count for name, tensor in tensors.items() if (count := int((~tensor.isfinite()).sum()))}
    not_finite = ""
    if strange:
        name, count = next(iter(strange.items()))
        more = f" and of {len(strange) - 1} more tensors" if len(strange) > 1 else ""
        not_finite = f"its bytes are as saved, but {count:,} numbers of {name}{more} are not finite"
    return Verdict(size, not_finite=not_finite, compared_by=compared_by, tensors=len(tensors))


def whole_alternative(path: Path) -> Path | None:
    """The latest other checkpoint of the same folder whose every byte is as it was saved."""
    for _, other in CheckpointManager(path.parent).found():
        if other != path and not verify_checkpoint(other).problem:
            return other
    return None


def _compare(path: Path, advance: Callable[[int], None]) -> tuple[str, Manifest | None]:
    """How the bytes were compared, and the sidecar that fits. Raises `CheckpointError` if they differ."""
    sidecar, shards = sidecar_of(path), shards_of(path)
    if not sidecar.exists():
        if shards is None:
            check_zip(path, remedy="")
        advance(checkpoint_size(path))
        how = "checksums inside the file as saved" if shards is None else "its bytes not compared"
        return f"{how} (no {sidecar.name} beside it)", None
    if shards is not None and read_manifest(path, check_hash=False) is None:
        raise CheckpointError(f"its files are not those that {sidecar.name} describes")
    places = [path] if shards is None else sorted(shards.iterdir())
    digests = {place.name: sha256_of(place, advance) for place in places}
    manifest = read_manifest(path, check_hash=False)
    if manifest is None:
        refuse_first_version(path)
        raise CheckpointError(
            f"is {checkpoint_size(path):,} bytes, not the file that {sidecar.name} describes"
        )
    names = [path.name] if shards is None else [entry.name for entry in manifest.files]
    if [digests[name] for name in names] != [entry.sha256 for entry in manifest.files]:
        raise CheckpointError(
            f"damaged: its bytes are not those that were saved (sha256 differs from {sidecar.name})"
        )
    return "sha256 as saved", manifest
