"""Decide how a run begins: fresh, resumed from a checkpoint, or from another run's weights.

`choose_start` first locks the output folder, so that no other run can change the folder. Then it makes the decision
from the user's settings and the contents of the folder. After an error, the function removes the lock, so that a
mistake changes no file. `launch.py` then starts the run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from atlas.config import AtlasConfig
from atlas.config.loader import Layer, overlay, resolve
from atlas.config.user_code import refuse_unasked_code
from atlas.data import ResolvedData
from atlas.errors import AtlasError, DataError
from atlas.files import local_path
from atlas.training.checkpoint.load import left_in_shards, load_checkpoint
from atlas.training.checkpoint.locate import checkpoint_paths, find_checkpoint
from atlas.training.checkpoint.lock import FolderLock, undone_after_error
from atlas.training.checkpoint.manager import CheckpointManager
from atlas.training.checkpoint.manifest import Manifest, read_manifest
from atlas.training.checkpoint.moves import complete_move
from atlas.training.checkpoint.validate import refuse_weights_that_are_not_finite
from atlas.training.devices.world import ALONE, World, has_joined
from atlas.training.output_folder import claim, has_checkpoint, is_run_file, run_files
from atlas.training.run_config import (
    base_key,
    has_other_validation,
    is_complete,
    with_data,
    with_written_length,
)

_DEFAULT_FOLDER = Path(AtlasConfig().checkpoint.output_dir)
_MAY_CHANGE = {"dropout"}
"""Model settings that may differ between a checkpoint and the run that resumes from it."""


class OtherRunError(AtlasError):
    """The output folder contains a run with another model, another optimizer or other data."""


@dataclass
class Request:
    """The options of the command. `explicit` contains only the config keys that the user set. `ask` asks the user a
    yes-or-no question and returns the answer. Without a terminal, `ask` is None."""

    explicit: Layer
    resume: str | None = None
    no_resume: bool = False
    init_from: str | None = None
    ask: Callable[[str], bool] | None = None

    def __post_init__(self) -> None:
        # Only the user's settings are checked. Older versions of Atlas made local folders with names such as `s3:`, and
        # their checkpoints stay readable.
        if folder := self.explicit.get("checkpoint", {}).get("output_dir"):
            local_path("checkpoint.output_dir", str(folder))


@dataclass
class Start:
    """The decision on how a run begins. `mode` is `fresh`, `resume` or `finetune`. `source` is the checkpoint that the
    run starts from, and `contents` is what this checkpoint contains. `set_aside` lists files to move to `previous-N`.
    `notes` are lines for the log. On the first rank, `lock` is the lock of `folder`."""

    mode: str
    config: AtlasConfig
    data: ResolvedData
    folder: Path
    source: Path | None = None
    contents: dict[str, Any] = field(default_factory=dict)
    set_aside: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lock: FolderLock | None = None


class _Named(NamedTuple):
    """The checkpoint that `--resume` or `--init-from` names, and the run that begins with it. `manifest` is None for a
    checkpoint without a sidecar. `resumes` is false for a new run, which then fine-tunes the checkpoint's weights."""

    source: Path
    manifest: Manifest | None
    contents: dict[str, Any]
    config: AtlasConfig
    data: ResolvedData
    resumes: bool
    folder: Path
    notes: list[str]


def choose_start(request: Request, world: World = ALONE) -> Start:
    """Lock the output folder, and return the decision on how the run begins. Besides the lock, nothing is written.

    The first rank decides. The other ranks then read the same checkpoint and the same data.
    """
    start: Start | None = None
    with world.in_step():
        if world.is_first:
            start = _decide(request)
            if not has_joined() and "parallel" not in request.explicit.get("training", {}):
                _continue_alone(start)
    with undone_after_error(start.lock if start else None):
        decision = world.broadcast(start and _decision(start))
        with world.in_step():
            return start or _follow(decision, request, world)


def _continue_alone(start: Start) -> None:
    """Change the config so that a single process can resume a run of several processes."""
    asked = start.config.training.parallel
    if start.source and asked in ("ddp", "fsdp"):
        start.config = start.config.replace("training", parallel="auto", shard_size=None)
        start.notes.append(f"training.parallel: {asked}: is for several processes, and this run has one")


def _decision(start: Start) -> tuple[Any, ...]:
    settings, source = start.config.model_dump(mode="json"), start.source and str(start.source)
    return start.mode, settings, str(start.folder), source, start.data.fingerprint


def _follow(decision: Sequence[Any], request: Request, world: World) -> Start:
    mode, settings, folder, named, fingerprint = decision
    source = named and Path(named)
    contents = load_checkpoint(source, without=left_in_shards(source)) if source else {}
    config, data = with_data(resolve(settings), request.explicit, contents, is_new_run=mode == "finetune")
    if data.fingerprint != fingerprint:
        raise AtlasError(
            f"rank {world.rank}: {data.name}: is not the data that the first rank reads: give every machine the same "
            "data"
        )
    return Start(mode, config, data, Path(folder), source, contents)


def _decide(request: Request) -> Start:
    if num_restarts():  # the old run was moved away at the first start; the folder now holds this run
        request = replace(request, no_resume=False)
    if request.init_from and request.resume:
        raise AtlasError("--init-from starts a new run and --resume continues one: give one of them")
    if request.no_resume and request.resume:
        raise AtlasError("--no-resume and --resume contradict each other: give one of them")
    source = request.init_from or (request.resume if request.resume != "auto" else None)
    named = _read_named(request, find_checkpoint(source)) if source else None
    folder = named.folder if named else Path(resolve(request.explicit).checkpoint.output_dir)
    lock = claim(folder)
    with undone_after_error(lock):
        moved_to = complete_move(folder, may_move=is_run_file)
        start = _from_named_checkpoint(request, named) if named else _from_folder(request, folder)
    start.lock = lock
    if moved_to:
        start.notes.insert(0, f"an interrupted move of an earlier run's files to {moved_to} is complete now")
    return start


def _from_folder(request: Request, folder: Path) -> Start:
    if not request.no_resume and has_checkpoint(folder):
        return _from_occupied_folder(request, folder)
    start = _start_over(request, folder)
    if request.resume:
        start.notes.append(f"{folder}: no checkpoint to resume from; a new run starts")
    if not request.no_resume:
        # A file without a sidecar does not count as a checkpoint. A killed first save left such a file, or the user
        # copied it into the folder.
        start.set_aside = checkpoint_paths(folder)
    return start


def _read_named(request: Request, source: Path) -> _Named:
    """Read the checkpoint `source`, and find the output folder of the run that begins with it."""
    notes: list[str] = []
    manifest = read_manifest(source, check_hash=False)
    contents = load_checkpoint(source, say=notes.append, without=left_in_shards(source))
    refuse_weights_that_are_not_finite(contents, source, "take another checkpoint")
    inherited, explicit = contents["config"], request.explicit
    _refuse_unasked_loss(inherited, explicit, source)
    is_new_run = request.init_from is not None
    config, data = with_data(resolve(inherited, explicit), explicit, contents, is_new_run=is_new_run)
    resumes = not is_new_run and data.fingerprint == contents["data"].get("fingerprint")
    notes += _refuse_other_shape(config, contents, source, is_new_run=not resumes)
    if resumes:
        _refuse_other_optimizer(config, contents, source)
        # A checkpoint without a sidecar was not saved in its folder, so the run does not write to that folder.
        folder = _explicit_folder(explicit) or (source.parent if manifest else _DEFAULT_FOLDER)
    else:
        folder = _finetune_folder(request, config)
    return _Named(source, manifest, contents, config, data, resumes, folder, notes)


def _from_named_checkpoint(request: Request, named: _Named) -> Start:
    source, manifest, contents, config, data, resumes, folder, notes = named
    if read_manifest(source, check_hash=False) != manifest:
        raise AtlasError(
            f"{source}: another run has replaced this checkpoint while it was read: repeat the command"
        )
    if resumes:
        if folder.resolve() != source.parent.resolve() and checkpoint_paths(folder):
            raise AtlasError(
                f"{folder}: holds another run: set --output-dir to a new folder, or use --no-resume without --resume"
            )
        latest = CheckpointManager(folder).load_latest(to_resume=True) if num_restarts() else None
        if latest and latest[1]["step"] > contents["step"]:
            return _continue(request, folder, latest)
        found = CheckpointManager(folder).found()
        newer = [path for manifest, path in found if manifest.step > contents["step"]]
        return Start("resume", config, data, folder, source, contents, newer, notes)
    if request.init_from is None:
        notes.append(
            f"{source}: was trained on other data, so this run fine-tunes the checkpoint's weights with a new schedule"
        )
    latest, set_aside = _earlier_finetuning(request, folder, data, base_key(contents))
    try:
        if latest:
            return _continue(request, folder, latest)
    except OtherRunError:
        if request.ask is None:
            raise
        _confirm_new_run(request, folder)
        set_aside = run_files(folder)
    config = with_written_length(config, request.explicit)
    return Start("finetune", config, data, folder, source, contents, set_aside, [*notes, *data.notes])


def num_restarts() -> int:
    """Return how often torchrun has restarted the run. After a restart, the run resumes from its own latest checkpoint,
    even if the command has `--no-resume` or names a checkpoint."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _from_occupied_folder(request: Request, folder: Path) -> Start:
    notes: list[str] = []
    latest = CheckpointManager(folder, say=notes.append).load_latest(to_resume=True)
    if latest is None:
        raise AtlasError(
            f"{folder}: holds checkpoints, but none of them is intact ({'; '.join(notes) or 'no sidecar fits'}): name "
            "another checkpoint with --resume, or move these checkpoints aside with --no-resume"
        )
    ask = request.ask if request.resume is None else None
    try:
        start = _continue(request, folder, latest)
    except OtherRunError:
        if ask is None:
            raise
        fresh = _start_over(request, folder)  # raises an error before the question if no new run can start
        _confirm_new_run(request, folder)
        return fresh
    start.notes += notes
    step = start.contents["step"]
    if ask and not ask(
        f"{folder} holds this run at step {step}. Resume it? (n: start a new run; this run moves to previous-N)"
    ):
        return _start_over(request, folder)
    return start


def _start_over(request: Request, folder: Path) -> Start:
    """Return the `Start` of a new run in `folder`. `launch.py` later moves the files of an earlier run aside."""
    config, data = with_data(resolve(request.explicit), request.explicit, None)
    return Start("fresh", config, data, folder, set_aside=run_files(folder), notes=list(data.notes))


def _can_start_over(request: Request, folder: Path) -> bool:
    try:
        _start_over(request, folder)
    except AtlasError:
        return False
    return True


def _continue(request: Request, folder: Path, latest: tuple[Path, dict[str, Any]]) -> Start:
    """Return the `Start` that resumes the run in `folder` from the checkpoint `latest`. Raises `OtherRunError` if that
    run has another model, optimizer or dataset."""
    source, contents = latest
    inherited = overlay(contents["config"], {"checkpoint": {"output_dir": str(folder)}})
    _refuse_unasked_loss(inherited, request.explicit, source)
    remedy = "choose another --output-dir, or move the old run aside with --no-resume"
    try:
        config, data = with_data(resolve(inherited, request.explicit), request.explicit, contents)
        _refuse_other_shape(config, contents, source)
        _refuse_other_optimizer(config, contents, source)
    except AtlasError as error:
        if isinstance(error, DataError) and not _can_start_over(request, folder):
            raise DataError(
                f"{error}. Atlas tried to resume the run in {folder}; if its data has another place now, name it with "
                "--train-data"
            ) from None
        raise OtherRunError(
            f"{error}. Atlas tried to resume the run in {folder}. For a new run, {remedy}"
        ) from None
    if data.fingerprint != contents["data"].get("fingerprint"):
        trained_on = contents["data"].get("train_data")
        raise OtherRunError(f"{folder}: holds a run on other data ({trained_on}): {remedy}")
    if is_complete(contents, config) and has_other_validation(contents, data, config):
        raise OtherRunError(
            f"{folder}: holds a complete run, and its validation text has changed since: {remedy}"
        )
    return Start("resume", config, data, folder, source, contents)


def _finetune_folder(request: Request, config: AtlasConfig) -> Path:
    """Return the output folder for fine-tuning: the folder that the user names, otherwise the default folder, or a
    folder in it if it holds a run."""
    asked_folder = _explicit_folder(request.explicit)
    if asked_folder or request.no_resume or not has_checkpoint(_DEFAULT_FOLDER):
        return asked_folder or _DEFAULT_FOLDER
    return _DEFAULT_FOLDER / f"finetune-{Path(config.data.train_data or 'data').stem}"


def _earlier_finetuning(
    request: Request, folder: Path, data: ResolvedData, base: str
) -> tuple[tuple[Path, dict[str, Any]] | None, list[Path]]:
    """Return the checkpoint to resume from, and the files to set aside.

    The checkpoint is None unless the same fine-tuning has already begun in `folder`. Files of another run are set aside
    only with `--no-resume`, or if the user agrees.
    """
    if request.no_resume:
        return None, run_files(folder)
    if not has_checkpoint(folder):
        return None, checkpoint_paths(folder)
    latest = CheckpointManager(folder).load_latest(to_resume=True)
    if latest and latest[1].get("initialized_from"):
        run = latest[1]["data"]
        if run.get("fingerprint") == data.fingerprint and run.get("base", base) == base:
            return latest, []
    _confirm_new_run(request, folder)
    return None, run_files(folder)


def _confirm_new_run(request: Request, folder: Path) -> None:
    """Ask whether to start a new run in the folder of another run. Raise `AtlasError` unless the user agrees."""
    question = (
        f"{folder} holds another run: its model, its data or its initial weights differ. Start a new run? "
        f"The old run moves to {folder / 'previous-N'}"
    )
    if request.ask and request.ask(question):
        return
    unchanged = " and stays as it is" if request.ask else ""
    raise AtlasError(
        f"{folder}: holds another run{unchanged}: choose another --output-dir for the new run, or move the old run "
        "aside with --no-resume"
    )


def _refuse_other_shape(
    config: AtlasConfig, contents: Mapping[str, Any], source: Path, *, is_new_run: bool = False
) -> list[str]:
    """Raise `AtlasError` unless the checkpoint's weights fit the model of `config`. Return notes for the user.

    A new run may have another context length. Only learned positions depend on this length, and a shorter context uses
    the first of these positions. A resumed run must keep its context length, since the checkpoint counts the data that
    the run has read in sequences of this length.
    """
    # Resolve the saved config, since an older checkpoint lacks some settings.
    saved = resolve({"model": contents["config"].get("model", {})})
    old, new = (one.model.model_dump(mode="json") for one in (saved, config))
    differing = [key for key in new if old[key] != new[key] and key not in _MAY_CHANGE]
    changed = {key: f"{key} {old[key]} → {new[key]}" for key in differing}
    context = changed.pop("max_seq_len", None) if is_new_run else None
    length, is_longer = old["max_seq_len"], new["max_seq_len"] > old["max_seq_len"]
    fits = new["position"] != "learned" or not is_longer
    if changed:
        remedy = "leave these settings as they were"
        if fits and list(changed) == ["max_seq_len"]:
            remedy = f"leave it as it was, or start a new run with another context: --init-from {source}"
        raise AtlasError(
            f"{source}: is another model's checkpoint (model: {', '.join(changed.values())}): {remedy}"
        )
    if context and not fits:
        raise AtlasError(
            f"{source}: model: {context}: the model has {length} trained positions and no others: set "
            f"model.max_seq_len to at most {length}, or train a model with position rope"
        )
    untrained = f"; the model has not been trained on distances beyond {length}" if is_longer else ""
    return [f"model: {context}: the new run has another context than {source}{untrained}"] if context else []


def _refuse_other_optimizer(config: AtlasConfig, contents: Mapping[str, Any], source: Path) -> None:
    """Raise `AtlasError` if the checkpoint holds the state of another optimizer."""
    saved_by, wanted = resolve(contents["config"]).training.optimizer, config.training.optimizer
    if saved_by != wanted:
        raise AtlasError(
            f"{source}: holds the state of training.optimizer {saved_by}, which {wanted} cannot use: "
            f"leave the setting as it was, or start a new run from its weights with --init-from {source}"
        )


def _refuse_unasked_loss(inherited: Mapping[str, Any], explicit: Layer, source: Path) -> None:
    """Raise `AtlasError` if a checkpoint names a custom loss and the user does not set `training.loss`. The tokenizer
    that a checkpoint names is never imported."""
    refuse_unasked_code({"training": inherited.get("training", {})}, explicit, source)


def _explicit_folder(explicit: Layer) -> Path | None:
    folder = explicit.get("checkpoint", {}).get("output_dir")
    return None if folder is None else Path(str(folder))
