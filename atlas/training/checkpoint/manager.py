"""Save, load and remove the checkpoints of a run.

If the process is killed at any moment, the last checkpoint stays intact. Atlas never loads a damaged checkpoint.

A checkpoint is a `.pt` file and its sidecar, see `manifest.py`. The file is a zip of tensors and plain values. Loading
the file runs no code. The keys in the file are: `format_version`, `model_state_dict`, `optimizer_state_dict`,
`scaler_state_dict`, `step`, `epoch`, `loss`, `val_loss`, `sequences_consumed`, `horizon`, `micro_batch_size`,
`best_loss`, `evaluations_since_best`, `config`, `tokenizer`, `data`, `machine`. With LoRA, all checkpoints except
`atlas_best.pt` share the frozen weights, see `base.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from atlas.errors import AtlasError
from atlas.files import flush_folder, remove_leftover
from atlas.training.checkpoint.atomic_write import (
    Abandoned,
    Pace,
    commit,
    copy_file,
    no_pause,
    tensor_bytes,
    write_tensors,
)
from atlas.training.checkpoint.base import without_base
from atlas.training.checkpoint.load import left_in_shards, load_checkpoint
from atlas.training.checkpoint.locate import checkpoint_name, is_temporary, kind_of, list_checkpoints
from atlas.training.checkpoint.lock import FolderLock
from atlas.training.checkpoint.manifest import (
    FileEntry,
    Manifest,
    shards_of,
    sidecar_of,
    write_manifest,
    written_later,
)
from atlas.training.checkpoint.retention import (
    RESUMABLE,
    drop_optimizer_state,
    find_space,
    has_only_shards,
    remove,
    remove_folder,
    surplus,
)
from atlas.training.checkpoint.validate import holds_first_version, refuse_weights_that_are_not_finite
from atlas.training.logs.run_log import perplexity

SPARE_BYTES = 8 << 20
"""The space that must stay free, besides the space for the tensors of a checkpoint."""


class CheckpointManager:
    """The checkpoints of one output folder.

    The constructor changes no file, so a manager can also be used only to read checkpoints. `say` is called with each
    line for the user. `lock` is the run's lock on the folder. Each save raises `CheckpointError` if another run has
    taken the folder. `is_untouched` returns whether the folder shows no trace of another run, for the case that the
    lock was removed. `confirm` is called before a checkpoint gets its name, and raises `AtlasError` if the run must not
    commit the checkpoint.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep_checkpoints: int = 5,
        max_total: int | None = None,
        slim_old: bool = False,
        lock: FolderLock | None = None,
        is_untouched: Callable[[], bool] = lambda: True,
        confirm: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.folder = Path(folder)
        self.keep_checkpoints = keep_checkpoints
        self.max_total = max_total
        self.slim_old = slim_old
        self.lock = lock
        self.is_untouched = is_untouched
        self.confirm = confirm
        self.say = say
        self.base: FileEntry | None = None
        """The file with the frozen weights of a LoRA run, or None if every checkpoint is complete."""
        self._reported_no_space = False

    # Reading

    def load_checkpoint(self, path: str | Path) -> dict[str, Any]:
        """Check the bytes of the checkpoint `path` and return its contents, with all tensors on the CPU. Raises
        `CheckpointError`."""
        return load_checkpoint(path, say=self.say)

    def found(self) -> list[tuple[Manifest, Path]]:
        """The checkpoints of the folder, see `list_checkpoints`."""
        return list_checkpoints(self.folder)

    def load_latest(
        self, *, before: int | None = None, to_resume: bool = False
    ) -> tuple[Path, dict[str, Any]] | None:
        """The path and the contents of the latest checkpoint from which a run can resume, or None.

        With `before`, only checkpoints of steps before this step count. With `to_resume`, the contents omit the keys
        that each rank reads later (see `left_in_shards`).

        This method skips checkpoints that are damaged or have no optimizer state, and reports each skip.
        """
        found = self.found()
        later = {sidecar: written_later(sidecar) for sidecar in sorted(self.folder.glob("atlas_*.json"))}
        for sidecar, reason in later.items():
            if reason:
                self.say(f"{sidecar}: {reason}: skipped")
        for path in sorted(self.folder.glob("atlas_*.pt")):
            if (
                kind_of(path)
                and later.get(sidecar_of(path), "") is None
                and all(path != fits for _, fits in found)
            ):
                reason = "it is not the file that its sidecar describes"
                if holds_first_version(path):
                    reason = f"it is a checkpoint of Atlas 1.x; convert it with atlas import {path}"
                self.say(f"{path}: skipped, because {reason}")
        for manifest, path in found:
            if before is not None and manifest.step >= before:
                continue
            if manifest.slim:
                self.say(f"{path}: holds no optimizer state (checkpoint.slim_old removed it): skipped")
                continue
            try:
                without = left_in_shards(path) if to_resume else ()
                contents = load_checkpoint(path, remedy="skipped", without=without)
                refuse_weights_that_are_not_finite(contents, path, "skipped")
                if contents["step"] == manifest.step:
                    return path, contents
                self.say(f"{path}: holds step {contents['step']}, its sidecar says {manifest.step}: skipped")
            except AtlasError as error:
                self.say(str(error))
        return None

    # Writing

    def save(self, contents: Mapping[str, Any], kinds: list[str], *, pace: Pace = no_pause) -> list[Path]:
        """Write `contents` as a checkpoint of each kind in `kinds`. Return the paths of the checkpoints.

        If the checkpoint does not fit on the disk or into `checkpoint.max_total`, this method writes nothing, and the
        existing checkpoints stay. The method reports the lack of space once and raises no error, so that training
        continues.
        """
        written: list[Path] = []
        self.check_lock()
        versions = self._versions(contents, kinds)
        try:
            needed = sum(tensor_bytes(version) * len(names) for version, names in versions)
            if not self._make_space(needed, contents["step"]):
                return written
            for version, names in versions:
                written.extend(self._write(version, names, pace))
            self._remove_surplus(kinds)
            for path in surplus(self.found(), "step", RESUMABLE) if self.slim_old else ():
                drop_optimizer_state(path)
        except OSError as error:
            self.say(f"no checkpoint saved: {error.strerror or error}; the existing checkpoints stay")
        except Abandoned:
            pass
        finally:
            if self.lock is None or self.lock.is_held:  # otherwise these are the files of another run
                with suppress(OSError):
                    self.clean()
        return written

    def _versions(
        self, contents: Mapping[str, Any], kinds: list[str]
    ) -> list[tuple[Mapping[str, Any], list[str]]]:
        """Return the contents to write for some of the `kinds`, and these kinds. Only `best` is complete if there is a
        base."""
        if self.base is None:
            return [(contents, kinds)]
        shared = [kind for kind in kinds if kind != "best"]
        versions: list[tuple[Mapping[str, Any], list[str]]] = []
        if shared:
            versions.append((without_base(contents, self.base), shared))
        return [*versions, (contents, ["best"])] if "best" in kinds else versions

    def _write(self, contents: Mapping[str, Any], kinds: list[str], pace: Pace) -> Iterator[Path]:
        """Write one file, and commit it under the name of each kind. Yield the paths. Raises `OSError`, or
        `Abandoned` if `pace` raises it."""
        temporary = self.folder / "atlas_writing.tmp"
        size, sha256 = write_tensors(temporary, contents, pace=pace)
        self.confirm()
        for kind in kinds:
            path = self.folder / checkpoint_name(kind, contents)
            staged = path.with_name(path.name + ".tmp")
            entry = FileEntry(name=path.name, size=size, sha256=sha256)
            self.check_lock()
            try:
                if kind == kinds[-1]:
                    os.replace(temporary, staged)
                else:
                    copy_file(temporary, staged, pace=pace)
                commit(staged, path, _describe(contents, kind, (entry,)))
                yield path
            except OSError as error:  # a save under another name may still succeed
                self.say(
                    f"{path.name}: not saved: {error.strerror or error}; an existing file of this name is unchanged"
                )

    def check_lock(self) -> None:
        """Raise `CheckpointError` if another run has taken the folder."""
        if self.lock and self.lock.check(self.is_untouched):
            self.say(
                f"{self.folder}: atlas.lock was removed, perhaps with the folder; the run continues here, with a new "
                "lock"
            )

    def begin_shards(self, staged: Path, needed: int, step: int) -> bool:
        """Create the folder `staged` if there is enough space for a sharded checkpoint of `needed` bytes. Return
        whether the folder was created."""
        self.check_lock()
        try:
            self.clean()
            if self._make_space(needed, step):
                staged.mkdir()
                return True
        except OSError as error:
            self.say(f"no checkpoint saved: {error.strerror or error}; the existing checkpoints stay")
        return False

    def commit_shards(
        self, staged: Path, kinds: list[str], contents: Mapping[str, Any], files: tuple[FileEntry, ...]
    ) -> list[Path]:
        """Rename the folder `staged`, to which the ranks wrote their shards. For each kind, write a sidecar that names
        the folder. Return the paths of the checkpoints.

        The folder is complete before a sidecar names it, and each sidecar replaces its predecessor atomically. So a
        kill leaves either the old checkpoint or the new one intact.
        """
        paths = {kind: self.folder / checkpoint_name(kind, contents).removesuffix(".pt") for kind in kinds}
        self.confirm()
        self.check_lock()
        previous = {shards_of(path) for path in paths.values()}
        folder = self._free_folder(contents["step"])
        os.replace(staged, folder)
        flush_folder(self.folder)
        for kind, path in paths.items():
            write_manifest(path, _describe(contents, kind, files, folder.name))
        named = {shards_of(path) for _, path in self.found()}
        for old in previous - named - {None, folder}:
            remove_folder(old)  # type: ignore[arg-type]
        self._remove_surplus(kinds)
        return [*paths.values()]

    def _free_folder(self, step: int) -> Path:
        """The path of a new folder for shards: `atlas_step_100`, or `atlas_step_100-2` and so on if a sidecar names the
        first folder, or it contains other files."""
        named, number = {shards_of(path) for _, path in self.found()}, 1
        folder = self.folder / f"atlas_step_{step}"
        while True:
            if folder not in named:
                remove_folder(folder)  # a kill may have left a folder without a sidecar
                if not os.path.lexists(folder):
                    return folder
            number += 1
            folder = self.folder / f"atlas_step_{step}-{number}"

    def _remove_surplus(self, kinds: list[str]) -> None:
        for kind in kinds:
            for path in surplus(self.found(), kind, self.keep_checkpoints):
                remove(path)

    def _make_space(self, needed: int, step: int) -> bool:
        """Create the output folder if it does not exist, and remove older checkpoints if necessary. Return whether
        there is space for tensors of `needed` bytes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        found, needed = self.found(), needed + SPARE_BYTES
        shared = self.base.size if self.base else 0
        most = None if self.max_total is None else self.max_total - shared
        space = find_space(self.folder, found, needed, max_total=most)
        if space.free < needed:
            if not self._reported_no_space:
                newest = f"; the newest checkpoint is {found[0][1].name}" if found else ""
                self.say(
                    f"step {step}: no checkpoint saved: it needs {needed / 1e9:.2f} GB, "
                    f"{max(0, space.free) / 1e9:.2f} GB are {space.limit} ({self.folder}). Training continues{newest}. "
                    "This is reported once. Free some space, or raise checkpoint.max_total if it is set"
                )
            self._reported_no_space = True
            return False
        for path in space.victims:
            self.say(f"{path.name}: removed to make room for step {step}")
            remove(path)
        self._reported_no_space = False
        return True

    def clean(self) -> None:
        """Remove the temporary files and folders of an interrupted save. Only the run that holds the folder's lock may
        call this method."""
        for leftover in self.folder.glob("atlas_*.tmp"):
            if is_temporary(leftover.name) and (not leftover.is_dir() or has_only_shards(leftover)):
                remove_leftover(leftover)


def _describe(
    contents: Mapping[str, Any], kind: str, files: tuple[FileEntry, ...], folder: str | None = None
) -> Manifest:
    """The manifest of a checkpoint. Most fields are entries of `contents` with the same names; the others are computed
    here."""
    loss = contents.get("loss")
    fields = {
        "model": contents["config"].get("model", {}),
        "data_fingerprint": contents["data"].get("fingerprint", ""),
        "perplexity": None if loss is None else perplexity(loss),
        "slim": not contents["optimizer_state_dict"],
    }
    return Manifest.model_validate({**contents, **fields, "kind": kind, "files": files, "folder": folder})
