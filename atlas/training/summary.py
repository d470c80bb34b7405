"""The log entries that a run writes before its first update."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from atlas.config import AtlasConfig
from atlas.config.loader import resolve
from atlas.config.model import FLEX_HEAD_SIZE
from atlas.data import SequenceDataset
from atlas.data.sequences.conversations import ChatDataset
from atlas.data.sequences.loader import share_of_update
from atlas.data.sequences.mixture import MixtureDataset
from atlas.data.sequences.packing import PackedDataset
from atlas.model.cost import lora_parameters
from atlas.model.documents import has_flex_attention
from atlas.training.checkpoint.manifest import BASE_FILE
from atlas.training.devices.device import cpu_only_build_with_nvidia_driver, describe_machine
from atlas.training.memory.estimate import base_bytes, checkpoint_bytes, output_folder_bytes
from atlas.training.resume import Start, num_restarts
from atlas.training.run import Run
from atlas.training.state import TrainState

_ENOUGH_CHAT_UPDATES = 100
"""The number of updates below which a run on conversations gets a warning. In measurements, a model learned 50 or 60
short conversations in 100 to 250 updates, but not in 30 or 60 updates (docs/TRAINING.md)."""


def log_summary(start: Start, run: Run, differences: list[str]) -> None:
    """Log the checkpoint that the run starts from, the settings and size of the run, and warnings."""
    config, state, say = run.config, run.state, run.log.say
    if cpu_only_build_with_nvidia_driver():
        say(
            "warning: an NVIDIA driver is installed, but this PyTorch is a CPU-only build: install the CUDA build "
            "(README)"
        )
    if restarts := num_restarts():
        say(f"torchrun restarted the run ({restarts} times so far): a process failed, see above")
    if start.mode == "resume":
        of_all = f" of {state.horizon}" if state.is_planned else ""
        say(f"resuming {start.source} at step {state.step}{of_all}")
        for line in [*_changes(start.contents["config"], config), *differences]:
            say(line)
    elif start.mode == "finetune":
        say(f"fine-tuning from the weights of {start.source}: step 0, fresh schedule, new optimizer state")
    _warn_of_short_run(start, run)
    say(as_yaml(config).rstrip())
    data, model = run.data.train, run.model
    if config.lora.rank:
        say(f"lora: {lora_parameters(config):,} trainable parameters; the model's own parameters are frozen")
    say(
        f"model: {model.num_parameters():,} parameters; data: {data.num_tokens:,} tokens, "
        f"{len(data):,} sequences of {config.model.max_seq_len}; run: {_length_in_words(config, state, len(data))} on "
        f"{run.runtime.device.type} in {run.runtime.precision}"
        f"{', compiled' if run.runtime.compiles else ''}"
    )
    if (world := run.world).size > 1:
        share = share_of_update(config.training.sequences_per_update, world.size)
        say(f"{world.size} processes, {run.runtime.parallel}: each computes {share} sequences of an update")
    for part in data.parts if isinstance(data, MixtureDataset) else [data]:
        _log_packing(part, say)
    if isinstance(data, MixtureDataset):
        _log_mixture(data, run)
    if config.data.document_mask and has_flex_attention(run.runtime.device):
        _log_dense_attention(config, say)
    if config.model.train_only:
        say(f"model: Atlas can train and run this model, but cannot export it ({config.model.train_only})")
    if config.training.optimizer == "adamw8bit":
        say(
            "training.optimizer: adamw8bit compiles its step in the first update, which takes half a minute or more"
        )
    if run.data.val is None:
        say("no validation data: the best checkpoint is selected by training loss")
    one, total, base = checkpoint_bytes(config), output_folder_bytes(config), base_bytes(config)
    shared = f" beside {base / 1e9:.2f} GB of frozen weights in {BASE_FILE}" if base else ""
    free = shutil.disk_usage(start.folder).free
    say(
        f"checkpoints: {(one - base) / 1e9:.2f} GB each{shared}, up to {total / 1e9:.1f} GB in {start.folder} "
        f"({free / 1e9:.1f} GB free); log: {run.log.log_path}"
    )
    if free < total:
        say(
            "warning: the disk is too small for all these checkpoints: free some space, or lower keep_checkpoints"
        )


def _log_dense_attention(config: AtlasConfig, say: Callable[[str], None]) -> None:
    """Log why this model cannot use the sparse attention kernel of this device."""
    size = config.model.head_size
    if config.model.dropout:
        reason, remedy = "does not support dropout", "model.dropout 0 is faster"
    elif size < FLEX_HEAD_SIZE:
        reason = f"needs a head size of at least {FLEX_HEAD_SIZE}, and this model has {size}"
        remedy = "fewer model.num_heads (in a new run) are faster"
    else:
        return
    say(
        f"data.document_mask: attention computes all T × T weights, since the sparse kernel {reason}; {remedy}"
    )


def _warn_of_short_run(start: Start, run: Run) -> None:
    horizon, warmup_steps = run.state.horizon, run.config.training.warmup_steps
    if start.data.has_conversations and horizon < _ENOUGH_CHAT_UPDATES:
        run.log.say(
            f"warning: {horizon} updates are too few to learn answers, about {_ENOUGH_CHAT_UPDATES} are needed: "
            "give more --epochs or a smaller --batch-size"
        )
    elif warmup_steps >= horizon:
        run.log.say(
            f"warning: warmup_steps {warmup_steps} is not shorter than the run ({horizon} updates): the learning rate "
            "never reaches its peak; lower training.warmup_steps"
        )


def record_start(start: Start, run: Run) -> None:
    """Write to `metrics.jsonl` that the run starts or resumes, and on which machine."""
    facts = {"source": str(start.source)} if start.source else {}
    run.log.event(
        "resumed" if start.mode == "resume" else "start",
        run.state.step,
        **facts,
        time=time.strftime("%Y-%m-%d %H:%M:%S"),
        parameters=run.model.num_parameters(),
        data=run.data.identity["train_data"],
        data_tokens=run.data.train.num_tokens,
        horizon=run.num_updates,
        processes=run.world.size,
        parallel=run.runtime.parallel,
        machine=describe_machine(run.runtime),
    )


def _log_packing(part: SequenceDataset | ChatDataset, say: Callable[[str], None]) -> None:
    if isinstance(part, PackedDataset):
        say(
            f"best-fit packing: {part.stream.name}: {part.padding:.2%} of positions are padding, every token is in "
            "a window"
        )
    if isinstance(part, ChatDataset):
        say(
            f"{part.stream.name}: {part.num_conversations:,} complete conversations packed into {len(part):,} sequences"
        )
        if part.num_cut or part.num_left_out:
            say(
                f"{part.stream.name}: longer than {part.max_seq_len} tokens: {part.num_cut:,} conversations lose their "
                f"end, {part.num_left_out:,} more are left out: their first answer would start beyond this length"
            )


def _log_mixture(data: MixtureDataset, run: Run) -> None:
    """Log the share of each part of the mixture, and how often the run will read this part."""
    num_sequences = run.state.horizon * run.config.training.sequences_per_update
    for part, weight in zip(data.parts, data.weights, strict=True):
        passes = f", {num_sequences * weight / len(part):.2f} passes over it" if run.state.is_planned else ""
        run.log.say(f"mixture: {part.stream.name}: {weight:.2%} of the sequences{passes}")


def _length_in_words(config: AtlasConfig, state: TrainState, sequences: int) -> str:
    per_update = config.training.sequences_per_update
    if not state.is_planned:
        return f"updates of {per_update} sequences for {config.training.max_hours:g} h"
    epochs = state.horizon * per_update / sequences
    return f"{state.horizon:,} updates of {per_update} sequences ({epochs:.2f} epochs)"


def _changes(old: Mapping[str, Any], config: AtlasConfig) -> list[str]:
    """Return a line for each setting that differs from the checkpoint's config. If an older checkpoint lacks a setting,
    the function compares the default of this setting."""
    before, new = resolve(old).model_dump(mode="json"), config.model_dump(mode="json")
    pairs = []
    for key, value in new.items():
        if isinstance(value, dict):
            pairs += [(f"{key}.{leaf}", before[key][leaf], entry) for leaf, entry in value.items()]
        else:
            pairs.append((key, before[key], value))
    return [f"changed since the checkpoint: {key} {was} → {now}" for key, was, now in pairs if was != now]


def as_yaml(config: AtlasConfig) -> str:
    """The settings that are not None, as YAML."""
    settings = config.model_dump(mode="json", exclude_none=True)
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
