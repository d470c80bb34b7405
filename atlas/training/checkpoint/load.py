"""Read a checkpoint: no damaged one is believed, and no code in it is run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atlas.config import LoraConfig
from atlas.errors import CheckpointError
from atlas.model import has_lora, merged
from atlas.training.checkpoint.locate import find_checkpoint, list_checkpoints
from atlas.training.checkpoint.manifest import read_manifest, shards_of, sidecar_of
from atlas.training.checkpoint.validate import check_zip, read_plain, refuse_first_version


def load_checkpoint(
    path: str | Path,
    *,
    say: Callable[[str], None] = lambda line: None,
    remedy: str | None = None,
    without: Collection[str] = (),
) -> dict[str, Any]:
    """Read a checkpoint onto the CPU: bytes checked against its sidecar, or, where there is none (a renamed
    or downloaded file), against the zip's own CRCs, which is said. No code in it is ever run.

    What the keys `without` name is left out and takes no memory: with AdamW two thirds of a checkpoint
    are the optimizer's, which only training needs.

    Raises `CheckpointError`, which ends with `remedy`, by default with another checkpoint to take.
    """
    path = find_checkpoint(path)
    has_sidecar = sidecar_of(path).exists()
    remedy = remedy or f"take another checkpoint{_alternatives(path)}"
    shards = shards_of(path)
    if not has_sidecar and shards is None:
        check_zip(path, remedy=remedy)
    elif has_sidecar and read_manifest(path, check_hash=True) is None:
        refuse_first_version(path)
        raise CheckpointError(
            f"{path}: is not the file that was saved (size or sha256 differ from {sidecar_of(path).name}): {remedy}"
        )
    contents = read_contents(path, remedy=remedy, without=without)
    if not has_sidecar:
        instead = (
            "checked by the checksums inside the file instead"
            if shards is None
            else "its bytes are not checked"
        )
        say(f"{path}: no sidecar beside it; {instead}")
    return contents


def left_in_shards(path: Path) -> tuple[str, ...]:
    """What a run that resumes from `path` does not read at first: of a sharded checkpoint the optimizer's state, of
    which each rank takes its own part when it has an optimizer."""
    return ("optimizer_state_dict",) if shards_of(path) else ()


def saved_optimizer(
    contents: Mapping[str, Any], source: Path | None, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """The optimizer's state: from `contents`, or where it was left in the shards of `source`, each rank's own part."""
    shards = shards_of(source) if source else None
    if "optimizer_state_dict" in contents or shards is None:
        return dict(contents.get("optimizer_state_dict") or {})
    from atlas.training.checkpoint.shard_format import read_optimizer  # it takes PyTorch half a second

    return read_optimizer(shards, optimizer)


def read_contents(path: Path, *, remedy: str, without: Collection[str] = ()) -> dict[str, Any]:
    """The contents of a checkpoint, a file or in shards; its sidecar is not looked at. Raises `CheckpointError`."""
    shards = shards_of(path)
    if shards is None:
        return read_plain(path, remedy=remedy, without=without)
    from atlas.training.checkpoint.shard_format import read_shards  # it takes PyTorch half a second

    return read_shards(shards, remedy=remedy, without=without)


def load_weights(model: nn.Module, contents: Mapping[str, Any], path: Path | None) -> None:
    """Put a checkpoint's weights into `model`, its low-rank updates added to them unless the model has such updates
    itself. Raises `CheckpointError` if they are another shape's.

    They are copied; a model on the meta device, which has no memory yet, takes the tensors themselves (in
    fp32), so that they are in memory once.
    """
    weights = contents["model_state_dict"]
    lora = LoraConfig(**contents["config"].get("lora", {}))
    if lora.rank and not has_lora(model):
        weights = merged(weights, lora)
    is_hollow = any(parameter.is_meta for parameter in model.parameters())
    if is_hollow:
        weights = {name: tensor.float().contiguous() for name, tensor in weights.items()}
    try:
        model.load_state_dict(weights, assign=is_hollow)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{path}: its weights do not fit its config: {reason}") from None


def _alternatives(path: Path) -> str:
    for manifest, other in list_checkpoints(path.parent):
        if other.name != path.name and not manifest.slim and read_manifest(other, check_hash=True):
            return f", such as {other.name}"
    return ""
