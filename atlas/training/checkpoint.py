"""Checkpoints: written so that no kill loses one, read so that no broken one is believed.

A checkpoint is a `.pt` file (a zip of tensors and plain values, never pickled code) and its sidecar, see
`manifest.py`. Contents, all plain: `format_version`, `model_state_dict`, `optimizer_state_dict`,
`scaler_state_dict`, `step`, `epoch`, `loss`, `val_loss`, `sequences_consumed`, `horizon`,
`micro_batch_size`, `best_loss`, `evaluations_since_best`, `config`, `tokenizer`, `data`, `machine`.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atlas.config import CheckpointConfig, LoraConfig
from atlas.errors import AtlasError
from atlas.files import flush_folder
from atlas.model import has_lora, merged
from atlas.training.manifest import FileEntry, Manifest, read_manifest, shards_of, sidecar_of, write_manifest
from atlas.training.retention import RESUMABLE, find_room, remove, remove_folder, slim, surplus
from atlas.training.untrusted import check_zip, holds_first_version, read_plain, refuse_first_version
from atlas.training.writing import Abandoned, Pace, at_once, commit, copy_file, tensor_bytes, write_tensors

_NAME = re.compile(r"atlas_(?:(step)_\d+|(interrupt)_step_\d+|(epoch)_\d+_step_\d+|(best))(?:\.pt)?")
_SPARE_BYTES = 8 << 20


def checkpoint_name(kind: str, *, step: int, epoch: int) -> str:
    """The file name the FAQ gives each kind."""
    return {
        "step": f"atlas_step_{step}.pt",
        "epoch": f"atlas_epoch_{epoch}_step_{step}.pt",
        "best": "atlas_best.pt",
        "interrupt": f"atlas_interrupt_step_{step}.pt",
    }[kind]


def kind_of(path: Path) -> str | None:
    match = _NAME.fullmatch(path.name)
    return match[match.lastindex or 0] if match else None


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
        """The contents of `path`, on the CPU, after its bytes were checked. Raises `AtlasError`."""
        return load_checkpoint(path, say=self.say)

    def found(self) -> list[tuple[Manifest, Path]]:
        """The checkpoints whose sidecars fit by size, the latest step first; of one step, the fullest kind."""
        order = {"step": 0, "epoch": 1, "interrupt": 2, "best": 3}
        sharded = (path.with_suffix("") for path in self.folder.glob("atlas_*.json"))
        paths = [*self.folder.glob("atlas_*.pt"), *(path for path in sharded if shards_of(path))]
        pairs = [
            (manifest, path)
            for path in paths
            if kind_of(path) and (manifest := read_manifest(path, check_hash=False))
        ]
        return sorted(pairs, key=lambda pair: (-pair[0].step, order[pair[0].kind], pair[1].name))

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


def find_checkpoint(path: str | Path) -> Path:
    """The file a user means: `best_model.pt` is also understood as `atlas_best.pt`, the real name first. Or the name of
    a sharded checkpoint, which is that of its sidecar. `.pt` may be left out, and `.json` stand in its place."""
    path = Path(path)
    if path.suffix == ".json" and path.with_suffix(".pt").is_file():
        path = path.with_suffix(".pt")
    if path.is_file() and path.suffix != ".json":
        return path
    if path.name == "best_model.pt":
        if path.with_name("atlas_best.pt").is_file():
            return path.with_name("atlas_best.pt")
        path = path.with_name("atlas_best.pt") if shards_of(path.with_name("atlas_best")) else path
    name = path.with_suffix("") if path.suffix in (".pt", ".json") else path
    if shards_of(name):
        return name
    if not path.suffix and path.with_suffix(".pt").is_file():
        return path.with_suffix(".pt")
    if path.is_dir():
        raise AtlasError(f"{path}: is a folder; name a checkpoint in it, such as {path / 'atlas_best.pt'}")
    beside = sorted(p.name for p in path.parent.glob("*.pt"))
    below = sorted(map(str, path.parent.glob("*/atlas_best.pt")))
    hint = "train a model first (atlas train)"
    if beside or below:
        hint = f"there are {', '.join(beside[:5])}" if beside else f"there is {' and '.join(below[:3])}"
    raise AtlasError(f"{path}: no such checkpoint; {hint}")


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

    Raises `AtlasError`, which ends with `remedy`, by default with another checkpoint to take.
    """
    path = find_checkpoint(path)
    has_sidecar = sidecar_of(path).exists()
    remedy = remedy or f"take another checkpoint{_alternatives(path)}"
    shards = shards_of(path)
    if not has_sidecar and shards is None:
        check_zip(path, remedy=remedy)
    elif has_sidecar and read_manifest(path, check_hash=True) is None:
        refuse_first_version(path)
        raise AtlasError(
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
    """What a run that goes on from `path` does not read at first: of a sharded checkpoint the optimizer's state, of
    which each rank takes its own part when it has an optimizer."""
    return ("optimizer_state_dict",) if shards_of(path) else ()


def saved_optimizer(
    contents: Mapping[str, Any], source: Path | None, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """The optimizer's state: from `contents`, or where it was left in the shards of `source`, each rank's own part."""
    shards = shards_of(source) if source else None
    if "optimizer_state_dict" in contents or shards is None:
        return dict(contents.get("optimizer_state_dict") or {})
    from atlas.training.sharded import read_optimizer  # it takes PyTorch half a second

    return read_optimizer(shards, optimizer)


def read_contents(path: Path, *, remedy: str, without: Collection[str] = ()) -> dict[str, Any]:
    """The contents of a checkpoint, a file or in shards; its sidecar is not looked at. Raises `AtlasError`."""
    shards = shards_of(path)
    if shards is None:
        return read_plain(path, remedy=remedy, without=without)
    from atlas.training.sharded import read_shards  # it takes PyTorch half a second

    return read_shards(shards, remedy=remedy, without=without)


def load_weights(model: nn.Module, contents: Mapping[str, Any], path: Path | None) -> None:
    """Put a checkpoint's weights into `model`, its low-rank updates added to them unless the model has such updates
    itself. Raises `AtlasError` if they are another shape's.

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
        raise AtlasError(f"{path}: its weights do not fit its config: {reason}") from None


def _alternatives(path: Path) -> str:
    for manifest, other in CheckpointManager(path.parent).found():
        if other.name != path.name and not manifest.slim and read_manifest(other, check_hash=True):
            return f", such as {other.name}"
    return ""
