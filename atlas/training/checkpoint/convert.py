"""A model that was trained elsewhere as a checkpoint of step 0: to write with, and to fine-tune from."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from atlas.config import AtlasConfig
from atlas.errors import CheckpointError
from atlas.model import AtlasLM
from atlas.tokenizer import Tokenizer
from atlas.training.checkpoint.atomic_write import commit, write_tensors
from atlas.training.checkpoint.load import load_checkpoint
from atlas.training.checkpoint.manager import CheckpointManager
from atlas.training.checkpoint.manifest import FORMAT_VERSION, FileEntry, read_manifest, sidecar_of

_UNTRAINED = {
    "step": 0,
    "horizon": 1,
    "sequences_consumed": 0,
    "micro_batch_size": 1,
    "loss": None,
    "val_loss": None,
}
"""Of a run's state, the entries that have no default (`atlas.training.state.TrainState`) and those that are shown."""


def save_imported(
    model: AtlasLM,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    source: str,
    chat_template: str | None = None,
) -> Path:
    """Write `atlas_best.pt` into `folder` and return its path; it holds no optimizer state, so that no run goes on from
    it. Raises `CheckpointError` where it cannot be written."""
    config = AtlasConfig(model=model.config)
    contents = {
        "format_version": FORMAT_VERSION,
        "model_state_dict": dict(model.state_dict()),
        "optimizer_state_dict": {},
        "scaler_state_dict": {},
        **_UNTRAINED,
        "epoch": 0,
        "config": config.model_dump(mode="json"),
        "tokenizer": tokenizer.state(),
        "data": {"chat_template": chat_template},
        "initialized_from": source,
        "machine": {},
    }
    facts = {
        "step": 0,
        "epoch": 0,
        "sequences_consumed": 0,
        "model": config.model.model_dump(mode="json"),
        "data_fingerprint": "",
        "initialized_from": source,
        "slim": True,
    }
    problems: list[str] = []
    written = CheckpointManager(folder, say=problems.append).save(contents, ["best"], facts)
    if not written:
        raise CheckpointError(f"{folder}: {'; '.join(problems) or 'nothing could be written'}")
    return written[0]


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
