"""Save an imported model as a checkpoint of step 0, for generation and fine-tuning."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from atlas.config import AtlasConfig
from atlas.errors import ExportError
from atlas.files import explain_failed_write
from atlas.model import AtlasLM
from atlas.tokenizer import Tokenizer
from atlas.training.checkpoint.lock import FolderLock
from atlas.training.checkpoint.manager import CheckpointManager
from atlas.training.checkpoint.manifest import FORMAT_VERSION
from atlas.training.checkpoint.validate import are_finite
from atlas.training.state import TrainState


def save_imported(
    model: AtlasLM,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    source: str,
    sampling: Mapping[str, Any] | None = None,
) -> Path:
    """Write the checkpoint `atlas_best.pt` into `folder`. Return the path of the checkpoint. The checkpoint has no
    optimizer state, so no run can resume from it. The checkpoint records `source` as the origin of the weights, and
    `sampling`, the settings of the model's generation_config.json, for exports. Raises `ExportError` if the checkpoint
    cannot be written."""
    if not are_finite(model.state_dict().values()):
        raise ExportError(f"{source}: holds weights that are not finite; download or convert the model again")
    state = TrainState(horizon=1, micro_batch_size=1, eval_batch_size=1)
    contents: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "model_state_dict": dict(model.state_dict()),
        "optimizer_state_dict": {},
        "scaler_state_dict": {},
        **dataclasses.asdict(state),
        "epoch": 0,
        "config": AtlasConfig(model=model.config).model_dump(mode="json"),
        "tokenizer": tokenizer.state(),
        "data": {"imported_from": source, **({"sampling": json.dumps(sampling)} if sampling else {})},
        "initialized_from": source,
        "machine": {},
    }
    problems: list[str] = []
    folder = Path(folder)
    with explain_failed_write(folder, "choose another --output-dir", kind=ExportError):
        lock = FolderLock(folder)
    try:
        if (folder / "atlas_best.pt").exists():  # another import was faster
            raise ExportError(f"{folder}: is not empty; choose another --output-dir")
        written = CheckpointManager(folder, lock=lock, say=problems.append).save(contents, ["best"])
    finally:
        with suppress(OSError):
            (folder / "atlas.lock").unlink()  # also that of a killed import
        lock.undo()
    if not written:
        raise ExportError(f"{folder}: {'; '.join(problems) or 'nothing could be written'}")
    return written[0]
