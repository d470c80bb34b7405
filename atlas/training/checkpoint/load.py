"""Read a checkpoint. Atlas refuses a damaged checkpoint, and runs no code from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atlas.config import LoraConfig
from atlas.config.loader import resolve
from atlas.errors import CheckpointError
from atlas.model import has_lora, merged
from atlas.training.checkpoint.base import is_intact, with_base
from atlas.training.checkpoint.locate import find_checkpoint, list_checkpoints
from atlas.training.checkpoint.manifest import (
    Manifest,
    checkpoint_size,
    read_manifest,
    shards_of,
    sidecar_of,
    written_later,
)
from atlas.training.checkpoint.validate import check_zip, read_plain, refuse_first_version

_ANOTHER = "take another checkpoint"


def load_checkpoint(
    path: str | Path,
    *,
    say: Callable[[str], None] = lambda line: None,
    remedy: str = _ANOTHER,
    without: Collection[str] = (),
) -> dict[str, Any]:
    """Check a checkpoint's bytes with `compare_bytes` and return its contents, with all tensors on the CPU.

    The result omits the keys in `without`, which then need no memory. For example, only training needs the optimizer's
    state. With AdamW, this state is two thirds of a checkpoint. `say` gets a note if the checkpoint has no sidecar, for
    example after a download.

    Raises `CheckpointError`. If the checkpoint is damaged, the message ends with `remedy`. The default remedy also
    names an intact checkpoint in the same folder, if there is one.
    """
    path = find_checkpoint(path)
    try:
        how, manifest = compare_bytes(path, remedy=remedy)
        contents = read_contents(path, remedy=remedy, without=without)
    except CheckpointError as error:
        if not str(error).endswith(_ANOTHER):
            raise
        raise CheckpointError(f"{error}{_alternatives(path)}") from None  # reads every byte of a candidate
    if manifest is None:
        say(f"{path}: has no sidecar: {how}")
    return contents


def compare_bytes(
    path: Path, *, remedy: str, advance: Callable[[int], None] = lambda done: None
) -> tuple[str, Manifest | None]:
    """Compare a checkpoint's bytes with the sha256 in its sidecar. Without a sidecar, compare the bytes of a single
    file with the CRC-32 checksums in that file; the bytes of shards are not compared.

    Return a phrase that says how the bytes were compared, and the manifest (None without a sidecar). After each read,
    `advance` is called with the number of bytes read. Raises `CheckpointError` if the bytes differ.
    """
    sidecar, shards = sidecar_of(path), shards_of(path)
    if not sidecar.exists():
        if shards is None:
            check_zip(path, remedy=remedy)
        advance(checkpoint_size(path))
        how = "the checksums inside the file match" if shards is None else "its bytes were not compared"
        return f"{how} (no {sidecar.name} beside it)", None
    if manifest := read_manifest(path, check_hash=True, advance=advance):
        return "sha256 as saved", manifest
    if later := written_later(sidecar):
        raise CheckpointError(f"{sidecar}: {later}")
    refuse_first_version(path)
    described = "these files" if shards else f"a file of {checkpoint_size(path):,} bytes"
    reason = f"{sidecar.name} does not describe {described}"
    if read_manifest(path, check_hash=False):
        reason = f"damaged: sha256 differs from {sidecar.name}"
    raise CheckpointError(f"{path}: is not the file that was saved ({reason}): {remedy}")


def left_in_shards(path: Path) -> tuple[str, ...]:
    """The keys that a run does not read at first when it resumes from `path`. In a sharded checkpoint, the only such
    key is the optimizer's state. Each rank reads its own part of that state after the rank has built its optimizer."""
    return ("optimizer_state_dict",) if shards_of(path) else ()


def saved_optimizer(
    contents: Mapping[str, Any], source: Path | None, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """The optimizer's state in `contents`. If `left_in_shards` left this state out, read this rank's part of it from
    `source`."""
    shards = shards_of(source) if source else None
    if "optimizer_state_dict" in contents or shards is None:
        return dict(contents.get("optimizer_state_dict") or {})
    from atlas.training.checkpoint.shard_format import read_optimizer  # slow to import

    return read_optimizer(shards, optimizer)


def read_contents(path: Path, *, remedy: str, without: Collection[str] = ()) -> dict[str, Any]:
    """The contents of a checkpoint in one file or in shards, with the weights of a LoRA run's base. This function
    compares only the sha256 of that base. Raises `CheckpointError`."""
    shards = shards_of(path)
    if shards is None:
        return with_base(read_plain(path, remedy=remedy, without=without), path, remedy=remedy)
    from atlas.training.checkpoint.shard_format import read_shards  # slow to import

    return read_shards(shards, remedy=remedy, without=without)


def context_of(contents: Mapping[str, Any]) -> int:
    """Return the context of a checkpoint's model. A model with RoPE that was fine-tuned with a shorter context has the
    context of its base."""
    own = resolve({"model": contents["config"].get("model", {})}).model
    base = contents["data"].get("context")
    return max(own.max_seq_len, base) if own.position == "rope" and type(base) is int else own.max_seq_len


def load_weights(model: nn.Module, contents: Mapping[str, Any], path: Path | None) -> None:
    """Load a checkpoint's weights into `model`. If only the checkpoint has low-rank updates (LoRA), merge them into the
    weights first.

    The weights are copied into the model's memory. But a model on the meta device has no memory yet: its weights become
    the checkpoint's own tensors, which are converted to fp32 if necessary. Raises `CheckpointError` if a name or a
    shape differs.
    """
    weights = contents["model_state_dict"]
    lora = LoraConfig(**contents["config"].get("lora", {}))
    if lora.rank and not has_lora(model):
        weights = merged(weights, lora)
    is_meta = any(parameter.is_meta for parameter in model.parameters())
    if is_meta:
        weights = {name: tensor.float().contiguous() for name, tensor in weights.items()}
    try:
        model.load_state_dict(weights, assign=is_meta)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{path}: its weights do not fit its config: {reason}") from None


def _alternatives(path: Path) -> str:
    for manifest, other in list_checkpoints(path.parent):
        if other.name == path.name or manifest.slim or not read_manifest(other, check_hash=True):
            continue
        if manifest.base is None or is_intact(other.with_name(manifest.base.name), manifest.base):
            return f", such as {other.name}"
    return ""
