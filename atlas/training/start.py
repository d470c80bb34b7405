"""How a run begins: fresh, going on from a checkpoint, or from another run's weights.

`choose_start` decides from what the user wrote and what lies in the output folder, and touches nothing;
`start_run` builds the trainer that decision calls for. Refusals come before anything is written.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from atlas.config import AtlasConfig
from atlas.config.loader import Layer, overlay, resolve
from atlas.data import ResolvedData, SequenceDataset, resolve_data
from atlas.errors import AtlasError
from atlas.model import AtlasLM, build_model
from atlas.tokenizer import Tokenizer
from atlas.training.checkpoint import CheckpointManager, find_checkpoint, load_checkpoint, tensor_bytes
from atlas.training.manifest import Manifest, read_manifest
from atlas.training.metrics import RunLog
from atlas.training.runtime import cpu_only_build_with_nvidia_driver, restore_machine, setup_runtime
from atlas.training.schedule import horizon_steps
from atlas.training.trainer import Trainer, TrainState

# A model setting that may change between a checkpoint and the run that goes on from it.
_MAY_CHANGE = {"dropout"}


@dataclass
class Request:
    """What the user asked for. `explicit` holds the keys they wrote; `ask` is None without a terminal."""

    explicit: Layer
    resume: str | None = None
    no_resume: bool = False
    init_from: str | None = None
    ask: Callable[[str], bool] | None = None


@dataclass
class Start:
    """The decision: `mode` is fresh, resume or finetune; `source` the checkpoint it rests on."""

    mode: str
    config: AtlasConfig
    data: ResolvedData
    folder: Path
    source: Path | None = None
    contents: dict[str, Any] = field(default_factory=dict)
    set_aside: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def choose_start(request: Request) -> Start:
    """Decide how the run begins. Reads the output folder and checkpoints, writes nothing."""
    if request.init_from and request.resume:
        raise AtlasError("--init-from starts a new run and --resume goes on with one: give one of them")
    if request.no_resume and request.resume:
        raise AtlasError("--no-resume and --resume contradict each other: give one of them")
    source = request.init_from or (request.resume if request.resume != "auto" else None)
    if source:
        return _from_named_checkpoint(request, find_checkpoint(source))
    config = resolve(request.explicit)
    folder = Path(config.checkpoint.output_dir)
    if request.no_resume or not _checkpoint_files(folder):
        start = Start("fresh", *_with_data(config, request.explicit, None), folder)
        if request.resume:
            start.notes.append(f"{folder}: no checkpoint to go on from; a new run starts")
        start.set_aside = _run_files(folder) if request.no_resume else []
        return start
    return _from_occupied_folder(request, folder)


def _from_named_checkpoint(request: Request, source: Path) -> Start:
    notes: list[str] = []
    contents = load_checkpoint(source, say=notes.append)
    inherited = dict(contents["config"])
    _refuse_unasked_code(inherited, request.explicit)
    config, data = _with_data(resolve(inherited, request.explicit), request.explicit, contents)
    _refuse_other_shape(config, contents, source)
    same_data = data.fingerprint == contents["data"].get("fingerprint")
    if same_data and not request.init_from:
        wished = _explicit_folder(request.explicit)
        owned = read_manifest(source, check_hash=False) is not None
        folder = wished or (source.parent if owned else Path(config.checkpoint.output_dir))
        if folder.resolve() != source.parent.resolve() and _checkpoint_files(folder):
            raise AtlasError(f"{folder}: holds another run; give --output-dir a new folder, or --no-resume without --resume")
        newer = [path for manifest, path in CheckpointManager(folder).found() if manifest.step > contents["step"]]
        return Start("resume", config, data, folder, source, contents, newer, notes)
    if not request.init_from:
        notes.append(f"{source}: was trained on other data: this is fine-tuning, from its weights, with a fresh schedule")
    folder, latest = _finetune_folder(request, config, data)
    if latest:
        return _continue(request, folder, latest)
    return Start("finetune", config, data, folder, source, contents, [], notes)


def _from_occupied_folder(request: Request, folder: Path) -> Start:
    notes: list[str] = []
    latest = CheckpointManager(folder, say=notes.append).latest()
    if latest is None:
        raise AtlasError(
            f"{folder}: holds checkpoints, none of them whole ({'; '.join(notes) or 'no sidecar fits'}): name one with "
            "--resume, or set them aside with --no-resume"
        )
    start = _continue(request, folder, latest, notes)
    question = f"{folder} holds a run at step {start.contents['step']}. Resume it?"
    if request.resume is None and request.ask is not None and not request.ask(question):
        fresh = resolve(request.explicit)
        return Start("fresh", *_with_data(fresh, request.explicit, None), folder, set_aside=_run_files(folder))
    return start


def _continue(
    request: Request, folder: Path, latest: tuple[Manifest, Path], notes: list[str] | None = None
) -> Start:
    """Go on with the run that a folder holds, if it is the same model's and data's."""
    manifest, source = latest
    contents = load_checkpoint(source)
    inherited = overlay(contents["config"], {"checkpoint": {"output_dir": str(folder)}})
    _refuse_unasked_code(inherited, request.explicit)
    remedy = "choose another --output-dir, or set it aside with --no-resume"
    try:
        config, data = _with_data(resolve(inherited, request.explicit), request.explicit, contents)
        _refuse_other_shape(config, contents, source)
    except AtlasError as error:
        raise AtlasError(f"{folder}: holds a run that these settings cannot go on with: {error}; {remedy}") from None
    if data.fingerprint != manifest.data_fingerprint:
        trained_on = contents["data"].get("train_data")
        raise AtlasError(f"{folder}: holds a run on other data ({trained_on}): {remedy}")
    return Start("resume", config, data, folder, source, contents, [], notes or [])


def _finetune_folder(
    request: Request, config: AtlasConfig, data: ResolvedData
) -> tuple[Path, tuple[Manifest, Path] | None]:
    """Where fine-tuning writes: never over another run. With the checkpoint to go on from, if it had begun."""
    wished = _explicit_folder(request.explicit)
    folder = wished or Path(AtlasConfig().checkpoint.output_dir)
    if request.no_resume or not _checkpoint_files(folder, own_names_only=True):
        return folder, None
    if wished is None:
        folder = folder / f"finetune-{Path(config.data.train_data or 'data').stem}"
        if not _checkpoint_files(folder):
            return folder, None
    latest = CheckpointManager(folder).latest()
    if latest and latest[0].data_fingerprint == data.fingerprint and latest[0].initialized_from:
        return folder, latest
    raise AtlasError(f"{folder}: holds another run: choose another --output-dir, or set it aside with --no-resume")


def _with_data(
    config: AtlasConfig, explicit: Layer, contents: Mapping[str, Any] | None
) -> tuple[AtlasConfig, ResolvedData]:
    """The config with its vocabulary resolved, and the data it names."""
    if config.data.train_data is None:
        raise AtlasError(
            "no training data: give --train-data a prepared folder (atlas prepare makes one) or plain text"
        )
    wished = explicit.get("data", {}).get("tokenizer")
    tokenizer: Tokenizer | None = None
    if wished is not None:
        tokenizer = Tokenizer.resolve(wished)
    elif contents is not None:
        tokenizer = Tokenizer.from_state(contents["tokenizer"])
    data = resolve_data(
        config.data.train_data, config.data.val_data, tokenizer=tokenizer, val_fraction=config.data.val_fraction
    )
    if contents is not None and data.tokenizer.fingerprint != contents["tokenizer"].get("fingerprint"):
        raise AtlasError(
            f"{config.data.train_data}: was made with the tokenizer {data.tokenizer.name} "
            f"({data.tokenizer.fingerprint[:12]}), the checkpoint with {contents['tokenizer'].get('name')} "
            f"({str(contents['tokenizer'].get('fingerprint'))[:12]}): prepare the text with the checkpoint's"
        )
    stated, actual = config.model.vocab_size, data.tokenizer.vocab_size
    if stated is not None and stated != actual:
        raise AtlasError(
            f"model.vocab_size: {stated}: the tokenizer of {config.data.train_data} has {actual}; leave vocab_size out"
        )
    model = config.model.model_copy(update={"vocab_size": actual})
    return config.model_copy(update={"model": model}), data


def _refuse_other_shape(config: AtlasConfig, contents: Mapping[str, Any], source: Path) -> None:
    old, new = contents["config"].get("model", {}), config.model.model_dump(mode="json")
    changed = [f"{key} {old.get(key)} → {new[key]}" for key in new if old.get(key) != new[key] and key not in _MAY_CHANGE]
    if changed:
        raise AtlasError(f"{source}: is another model's checkpoint (model: {', '.join(changed)})")


def _refuse_unasked_code(inherited: Mapping[str, Any], explicit: Layer) -> None:
    """A checkpoint may come from a stranger: the code that it names is only imported if the user names it too."""
    loss = inherited.get("training", {}).get("loss")
    if loss and "loss" not in explicit.get("training", {}):
        raise AtlasError(f"the checkpoint was trained with the loss {loss}; confirm it with --set training.loss={loss}")


def _explicit_folder(explicit: Layer) -> Path | None:
    folder = explicit.get("checkpoint", {}).get("output_dir")
    return None if folder is None else Path(str(folder))


def _checkpoint_files(folder: Path, *, own_names_only: bool = False) -> list[Path]:
    """Checkpoint files of a run in `folder`; with `own_names_only`, those that have a sidecar."""
    files = sorted(folder.glob("atlas_*.pt")) if folder.is_dir() else []
    return [path for path in files if path.with_suffix(".json").exists()] if own_names_only else files


def _run_files(folder: Path) -> list[Path]:
    """Everything that belongs to the run in `folder`."""
    if not folder.is_dir():
        return []
    own = {"metrics.jsonl", "metrics.lost.jsonl", "training.log", "config.yaml"}
    return sorted(path for path in folder.iterdir() if path.name in own or path.name.startswith("atlas_"))


def start_run(start: Start) -> Trainer:
    """Build the trainer; from here on files are written."""
    config, folder = start.config, start.folder
    runtime = setup_runtime(config)
    train_data = SequenceDataset(start.data.train, config.model.max_seq_len)
    val_data = SequenceDataset(start.data.val, config.model.max_seq_len, pad_last=True) if start.data.val else None
    _claim(folder)
    _move_aside(folder, start.set_aside, start.notes)
    log = RunLog(folder)
    for note in start.notes:
        log.say(note)
    config = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"output_dir": str(folder)})})
    (folder / "config.yaml").write_text(_as_yaml(config), encoding="utf-8")
    checkpoints = CheckpointManager(folder, keep_checkpoints=config.checkpoint.keep_checkpoints, say=log.say)
    checkpoints.clean()

    resumes = start.mode == "resume"
    differences = restore_machine(start.contents.get("machine", {}), runtime) if resumes else []
    state = _resumed_state(start, len(train_data), log) if resumes else _fresh_state(config, len(train_data))
    model = build_model(config.model, seed=None if start.contents else config.seed)
    if start.contents:
        _load_weights(model, start.contents, start.source)
    trainer = Trainer(
        config,
        model,
        start.data.tokenizer,
        train_data,
        val_data,
        data_identity={"fingerprint": start.data.fingerprint, "train_data": str(Path(config.data.train_data or "").resolve())},
        runtime=runtime,
        state=state,
        checkpoints=checkpoints,
        log=log,
        initialized_from=start.contents.get("initialized_from") if resumes else str(start.source or "") or None,
    )
    if resumes:
        trainer.restore(start.contents)
        log.rewind(state.step)
    _announce(start, trainer, differences)
    start.contents.clear()  # the loaded copy is not needed beside the model
    return trainer


def _fresh_state(config: AtlasConfig, sequences_per_epoch: int) -> TrainState:
    return TrainState(horizon_steps(config.training, sequences_per_epoch), _micro_batch(config))


def _micro_batch(config: AtlasConfig) -> int:
    asked = config.training.micro_batch_size
    return config.training.batch_size if asked == "auto" else min(asked, config.training.sequences_per_update)


def _resumed_state(start: Start, sequences_per_epoch: int, log: RunLog) -> TrainState:
    """The checkpoint's state; the horizon and micro-batch move only if the settings behind them did."""
    state = TrainState.of(start.contents)
    old = resolve(start.contents["config"]).training
    new = start.config.training
    if start.set_aside:
        state.best_loss = float("inf")  # the best of the part that was set aside is not this branch's
    if (old.max_steps, old.epochs, old.sequences_per_update) != (new.max_steps, new.epochs, new.sequences_per_update):
        horizon = horizon_steps(
            new, sequences_per_epoch, step=state.step, sequences_consumed=state.sequences_consumed
        )
        if horizon != state.horizon:
            log.say(f"the schedule's horizon changes from step {state.horizon} to step {horizon}")
        state.horizon = horizon
    if (old.micro_batch_size, old.batch_size) != (new.micro_batch_size, new.batch_size):
        state.micro_batch_size = _micro_batch(start.config)
    return state


def _load_weights(model: AtlasLM, contents: Mapping[str, Any], source: Path | None) -> None:
    try:
        model.load_state_dict(contents["model_state_dict"])
    except RuntimeError as error:
        raise AtlasError(f"{source}: its weights do not fit its config: {str(error).splitlines()[-1].strip()}") from None


def _claim(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / "atlas_probe.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise AtlasError(f"{folder}: cannot be written ({error.strerror}): choose another --output-dir") from None


def _move_aside(folder: Path, files: list[Path], notes: list[str]) -> None:
    """Move checkpoints (and what else is named) to `previous-N`, each with its sidecar."""
    if not files:
        return
    number = 1
    while (folder / f"previous-{number}").exists():
        number += 1
    target = folder / f"previous-{number}"
    target.mkdir()
    for path in files:
        for part in {path, path.with_suffix(".json")} if path.suffix == ".pt" else {path}:
            if part.exists():
                shutil.move(part, target / part.name)
    notes.append(f"{len(files)} files of an earlier run moved to {target}")


def _announce(start: Start, trainer: Trainer, differences: list[str]) -> None:
    config, state, say = trainer.config, trainer.state, trainer.log.say
    if cpu_only_build_with_nvidia_driver():
        say("warning: an NVIDIA driver is here, but this PyTorch is a CPU-only build: install the CUDA build (README)")
    if start.mode == "resume":
        say(f"resuming {start.source} at step {state.step} of {state.horizon}")
        for line in [*_changes(start.contents["config"], config), *differences]:
            say(line)
    elif start.mode == "finetune":
        say(f"fine-tuning from the weights of {start.source}: step 0, fresh schedule, new optimizer state")
    if config.training.warmup_steps >= state.horizon:
        say(
            f"warning: warmup_steps {config.training.warmup_steps} is not shorter than the run ({state.horizon} updates): "
            "the learning rate never reaches its peak; lower training.warmup_steps"
        )
    say(_as_yaml(config).rstrip())
    data, model = trainer.train_data, trainer.model
    say(
        f"model: {model.num_parameters():,} parameters; data: {data.stream.num_tokens:,} tokens, {len(data):,} sequences "
        f"of {config.model.max_seq_len}; run: {state.horizon:,} updates of {config.training.sequences_per_update} "
        f"sequences ({state.horizon * config.training.sequences_per_update / len(data):.2f} epochs) on "
        f"{trainer.runtime.device.type} in {trainer.runtime.precision}"
    )
    if trainer.val_data is None:
        say("no validation data: the best checkpoint is judged by training loss")
    one = 3 * tensor_bytes(model.state_dict())
    total = one * (2 * config.checkpoint.keep_checkpoints + 2)
    free = shutil.disk_usage(start.folder).free
    say(
        f"checkpoints: {one / 1e9:.2f} GB each, up to {total / 1e9:.1f} GB in {start.folder} ({free / 1e9:.1f} GB free); "
        f"log: {trainer.log.log_path}"
    )


def _changes(old: Mapping[str, Any], config: AtlasConfig) -> list[str]:
    """What differs from the checkpoint's config, a line each."""
    new = config.model_dump(mode="json")
    pairs = []
    for key, value in new.items():
        if isinstance(value, dict):
            pairs += [(f"{key}.{leaf}", old.get(key, {}).get(leaf), entry) for leaf, entry in value.items()]
        else:
            pairs.append((key, old.get(key), value))
    return [f"changed since the checkpoint: {key} {before} → {after}" for key, before, after in pairs if before != after]


def _as_yaml(config: AtlasConfig) -> str:
    return yaml.safe_dump(config.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)
