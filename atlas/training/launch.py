"""Carry out the decision of `start.py`: claim the folder, build the trainer, say what will happen."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from atlas.config import AtlasConfig, TrainingConfig
from atlas.config.loader import resolve
from atlas.data import SequenceDataset, training_sequences, validation_sequences
from atlas.data.conversations import ChatDataset
from atlas.data.mixture import MixtureDataset
from atlas.data.packing import PackedDataset
from atlas.errors import AtlasError
from atlas.model import AtlasLM, add_lora, build_model
from atlas.model.documents import has_flex_attention
from atlas.planning import (
    checkpoint_bytes,
    count_parameters,
    lora_parameters,
    measure_memory,
    memory_of_a_step,
    output_folder_bytes,
    snapshot_bytes,
)
from atlas.tokenizer.chat import CHAT_FORM
from atlas.training.checkpoint import CheckpointManager, load_weights
from atlas.training.compilation import choose_compile, compile_blocks
from atlas.training.heat import open_sensor
from atlas.training.lock import FolderLock
from atlas.training.loss import load_loss
from atlas.training.metrics import RunLog
from atlas.training.micro_batch import fit_micro_batch
from atlas.training.optimizer import build_optimizer
from atlas.training.retention import move_aside
from atlas.training.runtime import (
    Runtime,
    cpu_only_build_with_nvidia_driver,
    restore_machine,
    setup_runtime,
)
from atlas.training.schedule import horizon_steps
from atlas.training.start import Start, refuse_links
from atlas.training.state import TrainState
from atlas.training.trainer import Trainer
from atlas.training.untrusted import check_optimizer_state

_FP32, _TOKEN = 4, 2 * 8  # bytes of a number; of an input and its target


def start_run(start: Start) -> Trainer:
    """Build the trainer. What can be refused is refused first; files are written from `_claim` on."""
    config, folder = start.config, start.folder
    refuse_links(folder)
    _refuse_small_total(config)
    _refuse_too_large(config)
    runtime = setup_runtime(config)
    runtime = replace(runtime, compiles=choose_compile(config, runtime.device, say=start.notes.append))
    sensor = open_sensor(runtime.device, config.guard, say=start.notes.append)
    train_data = training_sequences(start.data, config)
    val_data = validation_sequences(start.data, config)
    model = _build(start, config)
    _refuse_other_optimizer(start, model)
    custom_loss = load_loss(config.training.loss) if config.training.loss else None
    lock = _claim(folder)
    _set_aside(start)
    log = _open_log(start)
    config = config.model_copy(
        update={"checkpoint": config.checkpoint.model_copy(update={"output_dir": str(folder)})}
    )
    checkpoints = CheckpointManager.of(config.checkpoint, folder, say=log.say)
    checkpoints.clean()
    _keep_config(folder, config)

    resumes = start.mode == "resume"
    differences = restore_machine(start.contents.get("machine", {}), runtime) if resumes else []
    if resumes:
        state = _resumed_state(start, len(train_data), log)
    else:
        state = _fresh_state(config, len(train_data), runtime, log)
    trainer = Trainer(
        config,
        model,
        start.data.tokenizer,
        train_data,
        val_data,
        data_identity={
            "fingerprint": start.data.fingerprint,
            "train_data": start.data.name,
            "chat_form": CHAT_FORM if start.data.has_conversations else None,
        },
        runtime=runtime,
        state=state,
        checkpoints=checkpoints,
        log=log,
        custom_loss=custom_loss,
        initialized_from=start.contents.get("initialized_from")
        if resumes
        else str(start.source or "") or None,
        saves_in_background=_saves_in_background(config, runtime, log),
        sensor=sensor,
        lock=lock,
    )
    if resumes:
        trainer.restore(start.contents)
    log.rewind(state.step if resumes else -1)  # a run that was killed before its first save left lines, too
    if not trainer.is_complete:
        _announce(start, trainer, differences)
    if runtime.compiles:
        compile_blocks(trainer.model)
    start.contents.clear()  # the loaded copy is not needed beside the model
    return trainer


def _build(start: Start, config: AtlasConfig) -> AtlasLM:
    """The model with the weights that the run begins with, on the CPU."""
    model = build_model(config.model, seed=None if start.contents else config.seed)
    if start.mode == "resume":
        saved = resolve(start.contents["config"]).lora
        if saved != config.lora:
            raise AtlasError(
                f"{start.source}: was trained with lora.rank {saved.rank}, alpha {saved.alpha:g}, targets "
                f"{', '.join(saved.targets)}: leave these as they were, or start a new run from it with --init-from"
            )
        if config.lora.rank:
            add_lora(model, config.lora)
        load_weights(model, start.contents, start.source)
        return model
    if start.contents:
        load_weights(model, start.contents, start.source)
    elif config.lora.rank:
        raise AtlasError(
            f"lora.rank: {config.lora.rank}: updates beside weights that rest need a trained model: name it with "
            "--init-from, or set lora.rank to 0"
        )
    if config.lora.rank:
        add_lora(model, config.lora, seed=config.seed)
    return model


def _fresh_state(config: AtlasConfig, sequences_per_epoch: int, runtime: Runtime, log: RunLog) -> TrainState:
    micro_batch = config.training.sequences_at_once
    if config.training.micro_batch_size == "auto":
        micro_batch = fit_micro_batch(config, runtime, say=log.say)
    return TrainState(
        horizon_steps(config.training, sequences_per_epoch),
        micro_batch,
        _eval_batch(config, micro_batch),
        is_planned=config.training.max_hours is None,
    )


def _eval_batch(config: AtlasConfig, micro_batch: int) -> int:
    asked = config.training.eval_batch_size
    return micro_batch if asked == "auto" else asked


def _resumed_state(start: Start, sequences_per_epoch: int, log: RunLog) -> TrainState:
    """The checkpoint's state; the horizon and micro-batch move only if the settings behind them did."""
    state = TrainState.of(start.contents)
    old = resolve(start.contents["config"]).training
    new = start.config.training
    if any(path.name == "atlas_best.pt" for path in start.set_aside):
        state.best_loss = math.inf  # the best before that one was overwritten by it
    if _length(old) != _length(new):
        horizon = horizon_steps(
            new, sequences_per_epoch, step=state.step, sequences_consumed=state.sequences_consumed
        )
        if horizon != state.horizon:
            log.say(f"the schedule's horizon changes from step {state.horizon} to step {horizon}")
        state.horizon = horizon
        state.is_planned = new.max_hours is None
    if (old.micro_batch_size, old.batch_size) != (new.micro_batch_size, new.batch_size):
        state.micro_batch_size = new.sequences_at_once
    if (old.eval_batch_size, old.micro_batch_size) != (new.eval_batch_size, new.micro_batch_size):
        state.eval_batch_size = _eval_batch(start.config, state.micro_batch_size)
    return state


def _length(training: TrainingConfig) -> tuple[object, ...]:
    """What decides where the schedule ends."""
    return training.max_steps, training.epochs, training.sequences_per_update, training.max_hours


def _saves_in_background(config: AtlasConfig, runtime: Runtime, log: RunLog) -> bool:
    """Whether the copy that is saved from fits into memory beside all that a step will take."""
    if not config.checkpoint.background:
        return False
    copy, free = snapshot_bytes(config), measure_memory("cpu")
    step = 0 if runtime.device.type == "cuda" else memory_of_a_step(config, device=runtime.device.type)
    if copy + step <= free:
        return True
    log.say(
        f"checkpoints are written while training waits: a copy of {copy / 1e9:.2f} GB beside the {step / 1e9:.2f} GB "
        f"that a step takes does not fit into the {free / 1e9:.2f} GB of memory that are free"
    )
    return False


def _open_log(start: Start) -> RunLog:
    log = RunLog(start.folder)
    for note in start.notes:
        log.say(note)
    return log


def _set_aside(start: Start) -> None:
    if start.set_aside:
        target = move_aside(start.folder, start.set_aside)
        start.notes.append(f"{len(start.set_aside)} files of an earlier run moved to {target}")


def _refuse_other_optimizer(start: Start, model: AtlasLM) -> None:
    wanted = start.config.training.optimizer
    saved_by = resolve(start.contents["config"]).training.optimizer if start.mode == "resume" else wanted
    if saved_by != wanted:
        raise AtlasError(
            f"{start.source}: holds the state of training.optimizer {saved_by}, of which {wanted} can make nothing: "
            f"leave the setting as it was, or start a new run from its weights with --init-from {start.source}"
        )
    optimizer = build_optimizer(model, start.config.training)  # or it is refused, if it cannot be had here
    if start.mode != "resume":
        return
    try:
        saved = start.contents.get("optimizer_state_dict")
        if not saved:
            raise ValueError("there is none, as after checkpoint.slim_old")
        check_optimizer_state(optimizer, saved)
    except ValueError as error:
        raise AtlasError(
            f"{start.source}: its optimizer state does not fit ({error}): take another checkpoint, or start a new run "
            "from its weights with --init-from"
        ) from None


def _refuse_too_large(config: AtlasConfig) -> None:
    """What cannot be in memory whatever runs at once: the weights, and the sequences of an update."""
    weights = _FP32 * count_parameters(config.model).total
    sequences, length = config.training.sequences_per_update, config.model.max_seq_len
    batch, free = sequences * length * _TOKEN, measure_memory("cpu")
    if weights > free:
        raise AtlasError(
            f"model: {weights // _FP32:,} parameters take {weights / 1e9:,.1f} GB, {free / 1e9:.1f} GB of memory are "
            "free: atlas plan shows which presets fit"
        )
    if batch > free:
        raise AtlasError(
            f"training: an update of batch_size × gradient_accumulation_steps = {sequences:,} sequences takes "
            f"{batch / 1e9:,.1f} GB for its tokens alone, {free / 1e9:.1f} GB of memory are free: lower one of them"
        )


def _refuse_small_total(config: AtlasConfig) -> None:
    """`checkpoint.max_total` must hold the best and the newest, and both while they are replaced."""
    one, most = checkpoint_bytes(config), config.checkpoint.max_total
    if most is not None and most < 4 * one:
        raise AtlasError(
            f"checkpoint.max_total: {most / 1e6:,.1f} MB: one checkpoint takes {one / 1e6:,.1f} MB, and four must fit "
            f"(the best, the newest, and both being replaced): give at least {math.ceil(4 * one / 1e6):,}MB, or "
            "leave it out"
        )


def _keep_config(folder: Path, config: AtlasConfig) -> None:
    try:
        (folder / "config.yaml").write_text(_as_yaml(config), encoding="utf-8")
    except OSError as error:
        raise AtlasError(
            f"{folder}: config.yaml cannot be written ({error.strerror}): free some space, or choose another "
            "--output-dir"
        ) from None


def _claim(folder: Path) -> FolderLock:
    """Make the folder, and be the only run that writes to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return FolderLock(folder)
    except OSError as error:
        raise AtlasError(
            f"{folder}: cannot be written ({error.strerror}): choose another --output-dir"
        ) from None


def _announce(start: Start, trainer: Trainer, differences: list[str]) -> None:
    config, state, say = trainer.config, trainer.state, trainer.log.say
    if cpu_only_build_with_nvidia_driver():
        say(
            "warning: an NVIDIA driver is here, but this PyTorch is a CPU-only build: install the CUDA build (README)"
        )
    if start.mode == "resume":
        of_all = f" of {state.horizon}" if state.is_planned else ""
        say(f"resuming {start.source} at step {state.step}{of_all}")
        for line in [*_changes(start.contents["config"], config), *differences]:
            say(line)
    elif start.mode == "finetune":
        say(f"fine-tuning from the weights of {start.source}: step 0, fresh schedule, new optimizer state")
    if config.training.warmup_steps >= state.horizon:
        say(
            f"warning: warmup_steps {config.training.warmup_steps} is not shorter than the run "
            f"({state.horizon} updates): the learning rate never reaches its peak; lower training.warmup_steps"
        )
    say(_as_yaml(config).rstrip())
    data, model = trainer.train_data, trainer.model
    if config.lora.rank:
        say(f"lora: {lora_parameters(config):,} numbers beside the model's learn, its own rest")
    say(
        f"model: {model.num_parameters():,} parameters; data: {data.num_tokens:,} tokens, "
        f"{len(data):,} sequences of {config.model.max_seq_len}; run: {_length_in_words(config, state, len(data))} on "
        f"{trainer.runtime.device.type} in {trainer.runtime.precision}"
        f"{', compiled' if trainer.runtime.compiles else ''}"
    )
    for part in data.parts if isinstance(data, MixtureDataset) else [data]:
        _announce_packing(part, say)
    if isinstance(data, MixtureDataset):
        _announce_mixture(data, trainer)
    if config.data.document_mask and config.model.dropout and has_flex_attention(trainer.runtime.device):
        say(
            "data.document_mask: attention computes all T × T weights, since its sparse kernel has no dropout; "
            "model.dropout 0 is faster"
        )
    if config.model.train_only:
        say(f"model: for Atlas only, it cannot be exported: {config.model.train_only}")
    if config.training.optimizer == "adamw8bit":
        say(
            "training.optimizer: adamw8bit compiles its step in the first update: half a minute or more, once"
        )
    if trainer.val_data is None:
        say("no validation data: the best checkpoint is judged by training loss")
    one, total = checkpoint_bytes(config), output_folder_bytes(config)
    free = shutil.disk_usage(start.folder).free
    say(
        f"checkpoints: {one / 1e9:.2f} GB each, up to {total / 1e9:.1f} GB in {start.folder} "
        f"({free / 1e9:.1f} GB free); log: {trainer.log.log_path}"
    )
    if free < total:
        say(
            "warning: the disk will be full before all of these are kept: free some, or lower keep_checkpoints"
        )


def _announce_packing(part: SequenceDataset | ChatDataset, say: Callable[[str], None]) -> None:
    if isinstance(part, PackedDataset):
        say(
            f"best-fit packing: {part.stream.name}: {part.padding:.2%} of positions are padding, every token is in "
            "a window"
        )
    if isinstance(part, ChatDataset):
        say(
            f"{part.stream.name}: {part.num_conversations:,} conversations packed whole into {len(part):,} sequences"
        )
        if part.num_cut or part.num_left_out:
            say(
                f"{part.stream.name}: longer than {part.max_seq_len} tokens: {part.num_cut:,} conversations lose their "
                f"end, {part.num_left_out:,} more are left out, since their first answer would begin beyond it"
            )


def _announce_mixture(data: MixtureDataset, trainer: Trainer) -> None:
    """How often the run will read each part."""
    run = trainer.state.horizon * trainer.config.training.sequences_per_update
    for part, weight in zip(data.parts, data.weights, strict=True):
        passes = f", {run * weight / len(part):.2f} passes over it" if trainer.state.is_planned else ""
        trainer.log.say(f"mixture: {part.stream.name}: {weight:.2%} of the sequences{passes}")


def _length_in_words(config: AtlasConfig, state: TrainState, sequences: int) -> str:
    per_update = config.training.sequences_per_update
    if not state.is_planned:
        return f"updates of {per_update} sequences for {config.training.max_hours:g} h"
    epochs = state.horizon * per_update / sequences
    return f"{state.horizon:,} updates of {per_update} sequences ({epochs:.2f} epochs)"


def _changes(old: Mapping[str, Any], config: AtlasConfig) -> list[str]:
    """What differs from the checkpoint's config, a line each. What an older one does not name has its default."""
    before, new = resolve(old).model_dump(mode="json"), config.model_dump(mode="json")
    pairs = []
    for key, value in new.items():
        if isinstance(value, dict):
            pairs += [(f"{key}.{leaf}", before[key][leaf], entry) for leaf, entry in value.items()]
        else:
            pairs.append((key, before[key], value))
    return [
        f"changed since the checkpoint: {key} {before} → {after}"
        for key, before, after in pairs
        if before != after
    ]


def _as_yaml(config: AtlasConfig) -> str:
    return yaml.safe_dump(
        config.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True
    )
