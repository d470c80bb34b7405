"""Build the run that `resume.py` has chosen: load the data and the model, and log the settings."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from atlas.config import AtlasConfig
from atlas.config.loader import resolve
from atlas.data import training_sequences, validation_sequences
from atlas.data.sequences.loader import share_of_update
from atlas.data.sequences.verify import DatasetVerifier
from atlas.errors import AtlasError
from atlas.files import explain_failed_write, replacing
from atlas.machine import measure_memory
from atlas.model import AtlasLM, add_lora, build_model
from atlas.model.cost import count_parameters
from atlas.tokenizer.chat import CHAT_FORMAT, CHAT_TEMPLATE
from atlas.training.checkpoint.async_saver import BackgroundSaver
from atlas.training.checkpoint.base import find_base, refuse_other_base, write_base
from atlas.training.checkpoint.load import context_of, left_in_shards, load_weights
from atlas.training.checkpoint.lock import undone_after_error
from atlas.training.checkpoint.manager import SPARE_BYTES, CheckpointManager
from atlas.training.checkpoint.manifest import BASE_FILE, read_manifest
from atlas.training.checkpoint.moves import move_aside
from atlas.training.checkpoint.validate import check_optimizer_state
from atlas.training.devices.compile import choose_compile, compile_blocks
from atlas.training.devices.device import Runtime, as_computed, restore_machine, setup_runtime
from atlas.training.devices.gpu_temperature import open_sensor
from atlas.training.devices.memory import remembered_micro_batch
from atlas.training.devices.world import ALONE, World
from atlas.training.logs.run_log import RunLog
from atlas.training.logs.trackers import open_trackers, refuse_missing_trackers
from atlas.training.loss import load_loss
from atlas.training.memory.estimate import (
    checkpoint_bytes,
    four_checkpoints_bytes,
    memory_of_a_step,
    snapshot_bytes,
)
from atlas.training.memory.parallel import choose_parallel
from atlas.training.micro_batch import fit_micro_batch, is_short_of_memory
from atlas.training.optimizers.build import build_optimizer
from atlas.training.recovery import restore_optimizer
from atlas.training.resume import Start, num_restarts
from atlas.training.run import Learner, Run, RunData, Sampler
from atlas.training.run_config import base_key
from atlas.training.schedule import horizon_steps, length_of
from atlas.training.state import TrainState
from atlas.training.summary import as_yaml, log_summary, record_start

_GATHERED_PART = 0.5
"""The fraction of the free main memory that a checkpoint may use if one rank gathers it. Atlas saves a larger
checkpoint as shards."""
_FP32, _TOKEN = 4, 2 * 8  # bytes of an fp32 number; bytes of an input token and its target (int64)


def start_run(
    start: Start, world: World = ALONE, *, sampler: Sampler | None = None, may_exceed_batch_size: bool = False
) -> Run:
    """Build and return the run. All checks come first. If a check fails, no file in the output folder changes.

    `sampler` generates `tracking.samples` texts at each evaluation. Without a sampler, the run logs no samples.
    `may_exceed_batch_size` allows micro-batches larger than `training.batch_size`. The caller allows this if the user
    did not set `training.batch_size`.
    """
    if start.lock and start.lock.is_released:
        raise AtlasError(f"{start.folder}: this start has failed before: call choose_start again")
    with undone_after_error(start.lock):
        return _start_run(start, world, sampler, may_exceed_batch_size)


def _start_run(start: Start, world: World, sampler: Sampler | None, may_exceed_batch_size: bool) -> Run:
    config = start.config
    resumes = start.mode == "resume"
    with world.in_step():
        refuse_missing_trackers(config.tracking)
        _refuse_retention(config)
        _refuse_too_large(config)
        if config.lora.rank and config.checkpoint.format != "sharded":
            refuse_other_base(start.folder)
        share_of_update(config.training.sequences_per_update, world.size)
        saved_by = start.contents.get("machine", {}) if resumes else {}
        runtime = setup_runtime(config, world, saved=saved_by if _keeps_precision(start) else {})
    # Processors differ between machines: if one rank has only fp32, all ranks compute in it.
    if world.any(runtime.precision == "fp32"):
        runtime = replace(runtime, precision="fp32")
    with world.in_step():
        parallel = choose_parallel(as_computed(config, runtime), world, runtime.device)
        compiles = choose_compile(config, runtime.device, say=start.notes.append)
        runtime = replace(runtime, parallel=parallel, compiles=compiles)
        sensor = open_sensor(runtime.device, config.guard, say=start.notes.append)
        train_data = training_sequences(start.data, config)
        val_data = validation_sequences(start.data, config)
        files = [*train_data.files, *(val_data.files if val_data else ())]
        verifier = DatasetVerifier(files if world.local_rank == 0 else [])  # once per machine
        data = RunData(start.data.tokenizer, train_data, val_data, _identity(start), verifier)
        model = _build(start, config)
        _refuse_other_optimizer_state(start, model)
        custom_loss = load_loss(config.training.loss) if config.training.loss else None
    # Free memory differs between GPUs: if one rank must shard the model, all ranks shard it.
    if world.any(runtime.parallel == "fsdp"):
        runtime = replace(runtime, parallel="fsdp")
    state = _resumed_state(start, data, runtime) if resumes else None
    config, log, checkpoints = _open_folder(start, world, verifier)
    differences = restore_machine(saved_by, runtime, asked=config.training.precision)
    state = state or _fresh_state(config, len(train_data), runtime, log, may_exceed=may_exceed_batch_size)
    keeps_little = runtime.compiles and is_short_of_memory(config, runtime, state.micro_batch_size)
    learner = Learner(model, config, runtime, custom_loss)
    saver = _open_saver(checkpoints, as_computed(config, runtime), runtime, log)
    origin = start.contents.get("initialized_from") if resumes else str(start.source or "") or None
    run = Run(learner, data, state, log, saver, origin, sampler, sensor)
    if resumes:
        restore_optimizer(learner, start.contents, start.source)
    if not run.is_complete:
        # A killed run may have logged steps after its last save. Remove these records. A new run removes all records.
        log.rewind(state.step if resumes else -1)
        log_summary(start, run, differences)
        record_start(start, run)
        if config.lora.rank and not saver.is_sharded:
            _keep_base(run, start)
    if runtime.compiles:
        compile_blocks(model, keeps_little=keeps_little)
    start.contents.clear()  # the model has its own copy of the weights
    return run


def _keeps_precision(start: Start) -> bool:
    """Whether the run resumes without another `training.precision` than before."""
    before = start.contents.get("config", {}).get("training", {}).get("precision", "auto")
    return start.mode == "resume" and before == start.config.training.precision


def _open_folder(
    start: Start, world: World, verifier: DatasetVerifier
) -> tuple[AtlasConfig, RunLog, CheckpointManager]:
    """Prepare the output folder. Return three objects: the config with this folder as `output_dir`, the log, and the
    checkpoint manager."""
    with world.in_step():  # the other ranks write their logs to the folder, which now exists
        if world.is_first and start.set_aside:
            target = move_aside(start.folder, start.set_aside)
            start.notes.append(
                f"{len(os.listdir(target)):,} files of the run in this folder moved to {target}"
            )
        log = RunLog(start.folder, rank=world.rank)
        for note in start.notes:
            log.say(note)
    config = start.config.replace("checkpoint", output_dir=str(start.folder))
    retention = config.checkpoint.model_dump(include={"keep_checkpoints", "max_total", "slim_old"})
    confirm = partial(verifier.confirm, log.say)
    checkpoints = CheckpointManager(
        start.folder,
        say=log.say,
        lock=start.lock,
        is_untouched=log.is_untouched,
        confirm=confirm,
        **retention,
    )
    if world.is_first:
        log.trackers = open_trackers(config, start.folder, log.say)
        checkpoints.clean()
        path = start.folder / "config.yaml"
        with explain_failed_write(path, "free some space, or choose another --output-dir"):
            log.log_path.touch()  # shows that the next file is a run's
            with replacing(path) as temporary:
                temporary.write_text(as_yaml(config), encoding="utf-8")
    return config, log, checkpoints


def _keep_base(run: Run, start: Start) -> None:
    """Write the frozen weights of a LoRA run once, so that its checkpoints need not have them. Every rank must call
    this function."""
    proven = None
    if start.source and start.source.parent.resolve() == start.folder.resolve():
        manifest = read_manifest(start.source, check_hash=False)
        proven = manifest.base if manifest else None
    contents = run.contents()
    with run.world.in_step():
        if not run.world.is_first:
            return
        base = find_base(start.folder, contents, proven=proven)
        if base is None and (start.folder / BASE_FILE).exists():  # another run's, or damaged
            moved_to = move_aside(start.folder, [start.folder / BASE_FILE])
            run.log.say(f"{BASE_FILE} did not have the weights of this run's base, and moved to {moved_to}")
        run.checkpoints.base = base or write_base(start.folder, contents)


def _identity(start: Start) -> dict[str, Any]:
    """Return a description of the run's data. Every checkpoint of the run stores this description. `base` identifies
    the checkpoint that the run fine-tunes, `context` is the base model's if it is longer, `imported_from` is the
    folder that its first weights came from, and `sampling` has the settings with which that model generates text."""
    data, old = start.data, start.contents.get("data", {})
    base = {"finetune": base_key(start.contents), "resume": old.get("base")}.get(start.mode)
    identity: dict[str, Any] = {
        "fingerprint": data.fingerprint,
        "val_fingerprint": data.val_fingerprint,
        "train_data": data.name,
        "chat_form": CHAT_FORMAT if data.tokenizer.chat_template == CHAT_TEMPLATE else None,
    }
    if base is not None:
        identity["base"] = base
    if (context := _longest_context(start)) is not None:
        identity["context"] = context
    return identity | {key: old[key] for key in ("imported_from", "sampling") if old.get(key)}


def _longest_context(start: Start) -> int | None:
    """Return the context of the model that a run with RoPE fine-tunes, if it is longer than the run's."""
    if not start.contents or start.config.model.position != "rope":
        return None
    context = context_of(start.contents)
    return context if context > start.config.model.max_seq_len else None


def _build(start: Start, config: AtlasConfig) -> AtlasLM:
    """Return the model on the CPU, with the weights that the run begins with."""
    model = build_model(config.model, seed=None if start.contents else config.seed)
    resumes = start.mode == "resume"
    if resumes:
        saved = resolve(start.contents["config"]).lora
        if saved != config.lora:
            raise AtlasError(
                f"{start.source}: was trained with lora.rank {saved.rank}, alpha {saved.alpha:g}, targets "
                f"{', '.join(saved.targets)}: leave these settings as they were, or start a new run with --init-from"
            )
    elif config.lora.rank and not start.contents:
        raise AtlasError(
            f"lora.rank: {config.lora.rank}: LoRA needs a trained model: name its checkpoint with --init-from, or set "
            "lora.rank to 0"
        )
    if resumes and config.lora.rank:
        add_lora(model, config.lora)
    if start.contents:
        weights = start.contents["model_state_dict"]
        if (positions := weights.get("position_embedding.weight")) is not None:
            # A new run with a shorter context uses the first learned positions.
            weights["position_embedding.weight"] = positions[: config.model.max_seq_len]
        load_weights(model, start.contents, start.source)
    if config.lora.rank and not resumes:
        add_lora(model, config.lora, seed=config.seed)
    return model


def _fresh_state(
    config: AtlasConfig, sequences_per_epoch: int, runtime: Runtime, log: RunLog, *, may_exceed: bool
) -> TrainState:
    micro_batch = config.training.sequences_at_once
    if config.training.micro_batch_size == "auto":
        if runtime.parallel == "fsdp":  # a trial in a separate process would need the full model
            micro_batch = min(micro_batch, remembered_micro_batch(config, runtime) or micro_batch)
        elif runtime.world.is_first:
            micro_batch = fit_micro_batch(config, runtime, say=log.say, may_exceed=may_exceed)
        micro_batch = runtime.world.all_min(micro_batch)
    horizon = horizon_steps(config.training, sequences_per_epoch)
    is_planned = config.training.max_hours is None
    return TrainState(horizon, micro_batch, _eval_batch(config, micro_batch), is_planned)


def _eval_batch(config: AtlasConfig, micro_batch: int) -> int:
    asked = config.training.eval_batch_size
    return micro_batch if asked == "auto" else asked


def _resumed_state(start: Start, data: RunData, runtime: Runtime) -> TrainState:
    """Return the training state in the checkpoint. The horizon and the batch sizes change only if the user has changed
    the settings for them."""
    state = TrainState.of(start.contents)
    old, new = resolve(start.contents["config"]).training, start.config.training
    if any(path.name == "atlas_best.pt" for path in start.set_aside):
        state.best_loss = math.inf  # a later save overwrote the atlas_best.pt that had this loss
    if length_of(old) != length_of(new):
        horizon = horizon_steps(
            new, len(data.train), step=state.step, sequences_consumed=state.sequences_consumed
        )
        if horizon != state.horizon and state.step < horizon:
            start.notes.append(f"the schedule's horizon changes from step {state.horizon} to step {horizon}")
        state.horizon = horizon
        state.is_planned = new.max_hours is None
    if (old.micro_batch_size, old.batch_size) != (new.micro_batch_size, new.batch_size):
        state.micro_batch_size = new.sequences_at_once
    if (old.eval_batch_size, old.micro_batch_size) != (new.eval_batch_size, new.micro_batch_size):
        state.eval_batch_size = _eval_batch(start.config, state.micro_batch_size)
    owes_evaluation = data.val is not None and state.owes_evaluation(new.eval_interval)
    if state.step >= state.horizon and not owes_evaluation:
        start.set_aside.clear()  # nothing is left to do, so newer checkpoints may stay
    # After a restart by torchrun, use the lower micro-batch size that a rank stored when it ran out of memory.
    fewer = remembered_micro_batch(start.config, runtime) if num_restarts() else None
    size = state.micro_batch_size
    state.micro_batch_size = runtime.world.all_min(min(size, fewer or size))
    return state


def _open_saver(
    checkpoints: CheckpointManager, config: AtlasConfig, runtime: Runtime, log: RunLog
) -> BackgroundSaver:
    """Return the saver of the run's checkpoints. Either every rank writes its own shards, or the first rank writes one
    file."""
    world = runtime.world
    in_background = world.broadcast(world.is_first and _saves_in_background(config, runtime, log))
    if not world.broadcast(_saves_shards(config, runtime)):
        return BackgroundSaver(checkpoints, in_background=in_background, log=log)
    from atlas.training.checkpoint.shard_saver import ShardSaver  # slow to import

    return ShardSaver(checkpoints, world, in_background=in_background, log=log)


def _saves_shards(config: AtlasConfig, runtime: Runtime) -> bool:
    asked = config.checkpoint.format
    if asked != "auto":
        return asked == "sharded"
    return runtime.parallel == "fsdp" and checkpoint_bytes(config) > _GATHERED_PART * measure_memory("cpu")


def _saves_in_background(config: AtlasConfig, runtime: Runtime, log: RunLog) -> bool:
    """Whether to save in the background. This needs `checkpoint.background`, and main memory for a copy of the
    checkpoint in addition to the memory of a step."""
    if not config.checkpoint.background:
        return False
    copy, free = snapshot_bytes(config, device=runtime.device.type), measure_memory("cpu")
    step = 0 if runtime.device.type == "cuda" else memory_of_a_step(config, device=runtime.device.type)
    if copy + step <= free:
        return True
    log.say(
        f"training waits while a checkpoint is written: a copy of the checkpoint ({copy / 1e9:.2f} GB) and the "
        f"{step / 1e9:.2f} GB that a step needs do not fit into the {free / 1e9:.2f} GB of free memory"
    )
    return False


def _refuse_other_optimizer_state(start: Start, model: AtlasLM) -> None:
    optimizer = build_optimizer(model, start.config.training)  # raises an error if torchao is missing
    if start.mode != "resume" or left_in_shards(start.source or Path()):
        return  # shards are checked when they are read
    try:
        saved = start.contents.get("optimizer_state_dict")
        if not saved:
            raise ValueError("the checkpoint has none, as after checkpoint.slim_old")
        check_optimizer_state(optimizer, saved)
    except ValueError as error:
        raise AtlasError(
            f"{start.source}: its optimizer state does not fit ({error}): use another checkpoint, or start a new run "
            f"from the weights of this checkpoint: --init-from {start.source}"
        ) from None


def _refuse_too_large(config: AtlasConfig) -> None:
    """Raise `AtlasError` if the weights, or the tokens of an update, need more main memory than is free. A smaller
    micro-batch would not help."""
    weights = _FP32 * count_parameters(config.model).total
    sequences, length = config.training.sequences_per_update, config.model.max_seq_len
    batch, free = sequences * length * _TOKEN, measure_memory("cpu")
    if weights > free:
        raise AtlasError(
            f"model: {weights // _FP32:,} parameters need {weights / 1e9:,.1f} GB, but only {free / 1e9:.1f} GB of "
            "memory are free: atlas plan shows which presets fit"
        )
    if batch > free:
        raise AtlasError(
            f"training: an update of batch_size × gradient_accumulation_steps = {sequences:,} sequences needs "
            f"{batch / 1e9:,.1f} GB for its tokens alone, but only {free / 1e9:.1f} GB of memory are free: lower "
            "batch_size or gradient_accumulation_steps"
        )


def _refuse_retention(config: AtlasConfig) -> None:
    """Raise `AtlasError` if `checkpoint.max_total` is too small for four checkpoints, or if `slim_old` is set for
    sharded checkpoints.

    Four checkpoints exist while Atlas replaces the best one and the newest one.
    """
    if config.checkpoint.slim_old and config.checkpoint.format == "sharded":
        raise AtlasError(
            "checkpoint.slim_old: true: is only for checkpoints in one file: remove slim_old, or set "
            "checkpoint.format=single"
        )
    one, most = checkpoint_bytes(config), config.checkpoint.max_total
    least = four_checkpoints_bytes(config) + SPARE_BYTES
    if most is not None and most < least:
        raise AtlasError(
            f"checkpoint.max_total: {most / 1e6:,.1f} MB: a complete checkpoint needs {one / 1e6:,.1f} MB, and four "
            "must fit (the best, the newest, and a new one in place of each): set at least "
            f"{math.ceil(least / 1e6):,}MB, or remove max_total"
        )
