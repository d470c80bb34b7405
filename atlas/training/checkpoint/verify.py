"""Verify that every byte of a checkpoint is as saved, that no weight is missing, and that all numbers are finite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from atlas.config.loader import resolve
from atlas.errors import AtlasError, CheckpointError
from atlas.model import AtlasLM
from atlas.training.checkpoint.atomic_write import named_tensors
from atlas.training.checkpoint.load import compare_bytes, load_weights, read_contents
from atlas.training.checkpoint.locate import list_checkpoints
from atlas.training.checkpoint.manifest import checkpoint_size


@dataclass(frozen=True)
class Verdict:
    """The result of verifying one checkpoint. `line` states the result to the user."""

    line: str
    broken: bool = False
    """Whether no run can resume from the checkpoint: it is damaged, or its weights are not finite."""
    problem: bool = True
    """Whether the checkpoint is broken, or has numbers that are not finite although its bytes are as saved."""


def verify_checkpoint(path: Path, *, advance: Callable[[int], None] = lambda done: None) -> Verdict:
    """Verify a checkpoint: compare its bytes, check its contents, and look for numbers that are not finite.

    Every byte is compared with the sha256 in the sidecar. Without a sidecar, the bytes of a single file are compared
    with the checksums inside that file. After each read of this comparison, `advance` is called with the number of
    bytes read. Verifying a checkpoint needs as much memory as resuming a run from it.
    """
    size = checkpoint_size(path)
    try:
        compared_by, manifest = compare_bytes(path, remedy="", advance=advance)
        contents = read_contents(path, remedy="")
        config = resolve(contents["config"]).model
        if config.vocab_size is None:
            raise CheckpointError("its config has no model.vocab_size")
        with torch.device("meta"):
            model = AtlasLM(config)
        load_weights(model, contents, path)
    except AtlasError as error:
        return Verdict(str(error).removeprefix(f"{path}: ").rstrip(":; "), broken=True)
    if manifest and manifest.step != contents["step"]:
        return Verdict(f"holds step {contents['step']}, its sidecar says {manifest.step}", broken=True)
    tensors = dict(named_tensors(contents))
    bad = {name: count for name, tensor in tensors.items() if (count := int((~tensor.isfinite()).sum()))}
    if bad:
        name, count = next(iter(bad.items()))
        more = f" and of {len(bad) - 1} more tensors" if len(bad) > 1 else ""
        place = name.replace("/", ".") + more
        broken = any(name.startswith("model_state_dict") for name in bad)
        return Verdict(
            f"its bytes are as saved, but {count:,} numbers of {place} are not finite", broken=broken
        )
    return Verdict(
        f"intact: {size:,} bytes, {compared_by}; {len(tensors):,} tensors, all finite", problem=False
    )


def intact_alternative(path: Path) -> Path | None:
    """The latest other checkpoint in the same folder that has no problem, or None."""
    others = (other for _, other in list_checkpoints(path.parent) if other != path)
    return next((other for other in others if not verify_checkpoint(other).problem), None)
