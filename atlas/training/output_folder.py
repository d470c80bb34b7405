"""The output folder of a run: lock the folder, and list the files that a run writes to it."""

from __future__ import annotations

import re
from pathlib import Path

from atlas.errors import AtlasError
from atlas.files import explain_failed_write
from atlas.training.checkpoint.locate import checkpoint_paths, is_checkpoint_file
from atlas.training.checkpoint.lock import FolderLock
from atlas.training.checkpoint.manifest import BASE_FILE, shards_of, sidecar_of, written_later
from atlas.training.checkpoint.moves import JOURNAL
from atlas.training.checkpoint.validate import is_base

_OWN_FOLDERS = {"tensorboard", "wandb"}
_OWN_FILES = {
    BASE_FILE,
    "training.log",
    "config.yaml",
    "atlas.lock",
    "metrics.jsonl",
    "metrics.lost.jsonl",
    JOURNAL,
}
_OWN_NAMES = {*_OWN_FILES, *_OWN_FOLDERS}
_OWN_PREFIXES = ("metrics.jsonl", "metrics.lost.jsonl", "training.rank-")
_OF_CHECKPOINT = re.compile(r"atlas_.*\.(pt|json|tmp)|atlas_step_[0-9]+(-[0-9]+)?")
"""The names of the files and folders that a run writes to its output folder. An `atlas_` alone does not make a name a
run's: `atlas_model` and `atlas_model.gguf` are exports."""


def claim(folder: Path) -> FolderLock:
    """Lock the output folder, so that no other run changes the folder after the decision on how this run begins."""
    _refuse_strange_files(folder)
    _refuse_foreign_config(folder)
    with explain_failed_write(folder, "choose another --output-dir"):
        return FolderLock(folder)


def has_checkpoint(folder: Path) -> bool:
    """Whether `folder` has a checkpoint with a sidecar."""
    return any(sidecar_of(path).exists() for path in checkpoint_paths(folder))


def _refuse_strange_files(folder: Path) -> None:
    """Raise `AtlasError` if one of a run's files in the folder is a link, a pipe, a socket or a device, if a log is a
    folder, or if a later version of Atlas wrote the checkpoints.

    With links, a folder from a stranger could make the run write to files outside the folder. The run could wait
    forever for the other end of a pipe.
    """
    for path in _own_files(folder):
        if path.is_symlink():
            raise AtlasError(
                f"{path}: is a link, and a run would write to its target: remove it, or choose another --output-dir"
            )
        may_be_folder = path.name not in _OWN_FILES
        # Another run may still use the folder and remove a temporary file at this moment.
        if path.exists() and not path.is_file() and not (path.is_dir() and may_be_folder):
            raise AtlasError(f"{path}: is not a regular file: remove it, or choose another --output-dir")
        if path.suffix == ".json" and (reason := written_later(path)):
            raise AtlasError(f"{path}: {reason}, or choose another --output-dir")


def _refuse_foreign_config(folder: Path) -> None:
    """Raise `AtlasError` if the folder has a `config.yaml` that no run has written, since a run replaces this file."""
    path = folder / "config.yaml"
    if path.exists() and not (folder / "training.log").exists() and not checkpoint_paths(folder):
        raise AtlasError(
            f"{path}: was not written by a run, and a run would replace it: rename it, or choose another --output-dir"
        )


def _own_files(folder: Path) -> list[Path]:
    """Return the run's files. A file `base.pt` that no run wrote is the user's."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in paths if is_run_file(path.name) and (path.name != BASE_FILE or is_base(path))]


def is_run_file(name: str) -> bool:
    """Return whether a run writes a file or folder of this name to its output folder."""
    return name in _OWN_NAMES or name.startswith(_OWN_PREFIXES) or _OF_CHECKPOINT.fullmatch(name) is not None


def run_files(folder: Path) -> list[Path]:
    """Return all files of the run in `folder`, except its lock and the temporary files of a killed save.

    A user may have renamed a checkpoint. A file such as `atlas_notes.json` is not a run's, unless it describes a
    checkpoint.
    """
    return [
        path
        for path in _own_files(folder)
        if path.name != "atlas.lock"
        and path.suffix != ".tmp"
        and (path.suffix != ".json" or is_checkpoint_file(path.name) or _describes_checkpoint(path))
    ]


def _describes_checkpoint(sidecar: Path) -> bool:
    checkpoint = sidecar.with_suffix("")
    return sidecar.with_suffix(".pt").exists() or shards_of(checkpoint) is not None
