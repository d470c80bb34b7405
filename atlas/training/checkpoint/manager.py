"""Checkpoints: written so that no kill loses one, read so that no broken one is believed.

A checkpoint is a `.pt` file (a zip of tensors and plain values, never pickled code) and its sidecar, see
`manifest.py`. Contents, all plain: `format_version`, `model_state_dict`, `optimizer_state_dict`,
`scaler_state_dict`, `step`, `epoch`, `loss`, `val_loss`, `sequences_consumed`, `horizon`,
`micro_batch_size`, `best_loss`, `evaluations_since_best`, `config`, `tokenizer`, `data`, `machine`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from atlas.config import CheckpointConfig
from atlas.errors import AtlasError
from atlas.files import flush_folder
from atlas.training.checkpoint.atomic_write import (
    Abandoned,
    Pace,
    at_once,
    commit,
    copy_file,
    tensor_bytes,
    write_tensors,
)
from atlas.training.checkpoint.load import left_in_shards, load_checkpoint
from atlas.training.checkpoint.locate import checkpoint_name, kind_of, list_checkpoints
from atlas.training.checkpoint.manifest import (
    FileEntry,
    Manifest,
    shards_of,
    sidecar_of,
    write_manifest,
)
from atlas.training.checkpoint.retention import RESUMABLE, find_room, remove, remove_folder, slim, surplus
from atlas.training.checkpoint.validate import (
    holds_first_version,
)

_SPARE_BYTES = 8 << 20


class CheckpointManager:
    """The checkpoints of one output folder.

    Nothing is touched on construction, so that a manager may be made only to read. `say` receives the
    lines a user should see.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep_checkpoints: int = 5,
        max_total: int | None = None,
        slim_old: bool = False,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.folder = Path(folder)
        self.keep_checkpoints = keep_checkpoints
        self.max_total = max_total
        self.slim_old = slim_old
        self.say = say
        self._said_no_room = False

    @classmethod
    def of(cls, config: CheckpointConfig, folder: Path, *, say: Callable[[str], None]) -> CheckpointManager:
        """The manager of a run with these settings."""
        return cls(
            folder,
            keep_checkpoints=config.keep_checkpoints,
            max_total=config.max_total,
            slim_old=config.slim_old,
            say=say,
        )

    # Reading

    def load_checkpoint(self, path: str | Path) -> dict[str, Any]:
        """The contents of `path`, on the CPU, after its bytes were checked. Raises `CheckpointError`."""
        return load_checkpoint(path, say=self.say)

    def found(self) -> list[tuple[Manifest, Path]]:
        """The checkpoints of the folder, see `list_checkpoints`."""
        return list_checkpoints(self.folder)

    def load_latest(
        self, *, before: int | None = None, to_resume: bool = False
    ) -> tuple[Path, dict[str, Any]] | None:
        """The latest checkpoint that can be gone on from, and its contents; of a step before `before`, if given. To
        resume from shards, without what each rank will read for itself (`left_in_shards`).

        Those that are broken are named and passed over: by their bytes, by their contents, or because they hold no
        optimizer state any more.
        """
        found = self.found()
        for path in sorted(self.folder.glob("atlas_*.pt")):
            if kind_of(path) and sidecar_of(path).exists() and all(path != fits for _, fits in found):
                reason = "is not the file that its sidecar describes"
                if holds_first_version(path):
                    reason = "is of the first Atlas (1.x), which atlas import converts"
                self.say(f"{path}: {reason}: passed over")
        for manifest, path in found:
            if before is not None and manifest.step >= before:
                continue
            if manifest.slim:
                self.say(f"{path}: holds no optimizer state (checkpoint.slim_old): passed over")
                continue
            try:
                without = left_in_shards(path) if to_resume else ()
                contents = load_checkpoint(path, remedy="passed over", without=without)
                if contents["step"] == manifest.step:
                    return path, contents
                self.say(f"{path}: holds step {contents['step']}, not {manifest.step}: passed over")
            except AtlasError as error:
                self.say(str(error))
        return None

    # Writing

    def save(
        self,
        contents: Mapping[str, Any],
        kinds: list[str],
        manifest: dict[str, Any],
        *,
        pace: Pace = at_once,
    ) -> list[Path]:
        """Write `contents` once and commit it under the name of each kind; the paths written.

        Too little disk is said in one line and nothing is written: training goes on, the checkpoints that
        are there stay. `manifest` holds the sidecar's fields but for kind and files.
        """
        written: list[Path] = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._make_room(tensor_bytes(contents) * len(kinds) + _SPARE_BYTES, manifest["step"]):
                self._write(contents, kinds, manifest, written, pace)
        except OSError as error:
            self.say(f"no checkpoint saved: {error.strerror or error}; the ones that are there stay")
        except Abandoned:
            pass
        with suppress(OSError):
            self.clean()
        return written

    def _write(
        self,
        contents: Mapping[str, Any],
        kinds: list[str],
        manifest: dict[str, Any],
        written: list[Path],
        pace: Pace,
    ) -> None:
        temporary = self.folder / "atlas_writing.tmp"
        size, sha256 = write_tensors(temporary, contents, pace=pace)
        for kind in kinds:
            path = self._path(kind, manifest)
            staged = path.with_name(path.name + ".tmp")
            entry = FileEntry(name=path.name, size=size, sha256=sha256)
            try:
                if kind == kinds[-1]:
                    os.replace(temporary, staged)
                else:
                    copy_file(temporary, staged, pace=pace)
                commit(staged, path, Manifest(kind=kind, files=(entry,), **manifest))
                written.append(path)
            except OSError as error:  # the other names may fare better
                self.say(f"{path.name}: not saved: {error.strerror or error}; what was there stays")
        self._remove_surplus(kinds)
        if self.slim_old:
            for path in surplus(self.found(), "step", RESUMABLE):
                slim(path)

    def begin_shards(self, staged: Path, needed: int, step: int) -> bool:
        """Whether there is room for a sharded checkpoint of `needed` bytes, which the ranks may write to `staged`."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.clean()
            if not self._make_room(needed + _SPARE_BYTES, step):
                return False
            staged.mkdir()
        except OSError as error:
            self.say(f"no checkpoint saved: {error.strerror or error}; the ones that are there stay")
            return False
        return True

    def commit_shards(
        self,
        staged: Path,
        kinds: list[str],
        manifest: dict[str, Any],
        files: tuple[FileEntry, ...],
    ) -> list[Path]:
        """Give the folder that the ranks wrote a name, and each kind a sidecar that names it; what they are called.

        The bytes are there before a sidecar is, and a sidecar is replaced at once: a kill leaves the old or the new.
        """
        written: list[Path] = []
        previous = {shards_of(self._path(kind, manifest).with_suffix("")) for kind in kinds}
        folder = self._free_folder(manifest["step"])
        os.replace(staged, folder)
        flush_folder(self.folder)
        for kind in kinds:
            path = self._path(kind, manifest).with_suffix("")
            write_manifest(path, Manifest(kind=kind, folder=folder.name, files=files, **manifest))
            written.append(path)
        named = {shards_of(path) for _, path in self.found()}
        for old in previous - named - {None, folder}:
            remove_folder(old)  # type: ignore[arg-type]
        self._remove_surplus(kinds)
        return written

    def _free_folder(self, step: int) -> Path:
        """`atlas_step_100`; where a sidecar names that, since a step is saved again, `atlas_step_100-2`, and so on."""
        named, number = {shards_of(path) for _, path in self.found()}, 1
        folder = self.folder / f"atlas_step_{step}"
        while folder in named:
            number += 1
            folder = self.folder / f"atlas_step_{step}-{number}"
        remove_folder(folder)  # what a kill left before its sidecar
        return folder

    def _path(self, kind: str, manifest: Mapping[str, Any]) -> Path:
        return self.folder / checkpoint_name(kind, step=manifest["step"], epoch=manifest["epoch"])

    def _remove_surplus(self, kinds: list[str]) -> None:
        for kind in kinds:
            for path in surplus(self.found(), kind, self.keep_checkpoints):
                remove(path)

    def _make_room(self, needed: int, step: int) -> bool:
        """Whether `needed` bytes are there now, older checkpoints having gone if that is what it took."""
        found = self.found()
        room = find_room(self.folder, found, needed, max_total=self.max_total)
        if not room.is_enough:
            if not self._said_no_room:
                newest = f"; the newest is {found[0][1].name}" if found else ""
                self.say(
                    f"step {step}: no checkpoint saved: it needs {needed / 1e9:.2f} GB, "
                    f"{max(0, room.free) / 1e9:.2f} GB are {room.limit} ({self.folder}). Training goes on{newest}. "
                    "This is said once; free some space"
                )
            self._said_no_room = True
            return False
        for path in room.victims:
            self.say(f"{path.name}: removed to make room for step {step}")
            remove(path)
        self._said_no_room = False
        return True

    def clean(self) -> None:
        """Remove what a broken save left behind; only the run that owns the folder may call this."""
        for leftover in self.folder.glob("atlas_*.tmp"):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)
