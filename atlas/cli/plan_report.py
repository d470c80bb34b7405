"""The contents of `atlas plan`'s report: the estimates for a config, and for every preset, on a machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from atlas.config import AtlasConfig
from atlas.data.sequences.build import training_windows
from atlas.data.sequences.conversations import holds_conversations
from atlas.data.shards import TokenStream, is_prepared, open_dataset
from atlas.errors import AtlasError
from atlas.planning.advice import Advice, advise_on
from atlas.planning.communication import Cluster
from atlas.planning.machine import Machine, choose_machine
from atlas.planning.run import Run, plan_run
from atlas.planning.scaling import Scaling, scale
from atlas.training.memory.estimate import TrainingMemory, estimate_training_memory
from atlas.training.memory.fit import largest_micro_batch, memory_advice
from atlas.training.memory.presets import PresetPlan, assume_vocabulary, largest_that_fits, plan_presets
from atlas.training.run_config import with_vocabulary
from atlas.training.schedule import NO_LIMIT, horizon_steps


@dataclass(frozen=True)
class Summary:
    """The estimates for a config on a machine. `advice` is None without a text. `remedies` is empty if the config
    fits."""

    config: AtlasConfig
    memory: TrainingMemory
    largest_micro_batch: int
    run: Run
    advice: Advice | None
    remedies: list[str]


@dataclass(frozen=True)
class Report:
    """The report of `atlas plan`. `text` is None without --data, `summary` without a config, and `scaling` without
    --gpus."""

    machine: Machine
    text: TokenStream | None
    assumes_vocabulary: bool
    summary: Summary | None
    scaling: Scaling | None
    presets: list[tuple[PresetPlan, Summary]]

    def largest(self, *, for_text: bool = False) -> str | None:
        """Return the name of the largest preset that fits the machine and, with `for_text`, also the text; None if no
        preset fits."""
        enough = [plan for plan, summary in self.presets if summary.advice and summary.advice.fits]
        plans = enough if for_text else [plan for plan, _ in self.presets]
        largest = largest_that_fits(plans)
        return largest.name if largest else None


def make_report(
    wanted: AtlasConfig,
    data: Path | None,
    gpu: str | None,
    memory: str | None,
    cluster: Cluster | None,
    *,
    has_config: bool,
) -> Report:
    """Return the estimates for every preset and, if `has_config`, for the config `wanted`. Raises `AtlasError` for
    unusable data, GPU or memory."""
    text = None if data is None else _open(data)
    if text is not None:
        wanted = with_vocabulary(wanted, text.vocab_size, text.name)
    machine, known = choose_machine(wanted, gpu, memory), assume_vocabulary(wanted)
    summary = None
    if has_config:
        summary = _summarize(known, machine, text, len(training_windows(text, known)) if text else 0)
    scaling = scale(known, machine, cluster) if cluster else None
    plans = plan_presets(
        machine.memory,
        device=machine.device,
        precision=wanted.training.precision,
        vocab_size=text.vocab_size if text else None,
    )
    presets = []
    for preset in plans:
        # Compute the number of windows here, since `training_windows` raises an error for a text that is shorter than
        # the preset's context.
        windows = (text.num_tokens - 1) // preset.config.model.max_seq_len if text else 0
        presets.append((preset, _summarize(preset.config, machine, text, windows)))
    return Report(machine, text, wanted.model.vocab_size is None, summary, scaling, presets)


def _open(data: Path) -> TokenStream:
    """Return the training split of a prepared dataset. Raises `AtlasError` if `data` is not a prepared dataset."""
    if holds_conversations(data):
        raise AtlasError(
            f"--data {data}: holds conversations, which atlas plan does not read; leave --data out"
        )
    if not is_prepared(data):
        raise AtlasError(
            f"--data {data}: is not a prepared dataset; make one with atlas prepare --input, and name the new folder"
        )
    stream = open_dataset(data).split("train")
    assert stream is not None
    return stream


def _summarize(
    config: AtlasConfig, machine: Machine, text: TokenStream | None, sequences_per_epoch: int
) -> Summary:
    """Return the estimates for a config with a known vocabulary size. If `text` is given, the estimates are for a run
    over this text."""
    device, updates = machine.device, config.training.max_steps
    if text and (updates := horizon_steps(config.training, sequences_per_epoch)) == NO_LIMIT:
        updates = None
    memory = estimate_training_memory(config, device=device)
    largest = largest_micro_batch(config, machine.memory, device=device)
    remedies: list[str] = []
    if memory.total > machine.memory:
        remedies = [f"--set training.micro_batch_size={largest}: fits, and gives the same result"]
        if not largest:
            remedies = memory_advice(config, device=device, available=machine.memory)
    run = plan_run(config, machine, updates=updates, sequences_per_epoch=sequences_per_epoch)
    advice = advise_on(config.model, text.num_tokens, name="") if text else None
    return Summary(config, memory, largest, run, advice, remedies)
