"""What `atlas plan` reports: a config on a machine, and the presets beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from atlas.config import AtlasConfig
from atlas.config.loader import overlay, parse_overrides, read_yaml, resolve
from atlas.config.presets import find_config
from atlas.data.sequences.build import training_windows
from atlas.data.sequences.conversations import holds_conversations
from atlas.data.shards import TokenStream, is_prepared, open_dataset
from atlas.errors import AtlasError
from atlas.planning.communication import Cluster, cluster_of
from atlas.planning.machine import Machine, choose_machine
from atlas.planning.scaling import Scaling, scale
from atlas.planning.summary import Summary, summarize
from atlas.training.memory.presets import PresetPlan, assume_vocabulary, largest_that_fits, plan_presets
from atlas.training.run_config import with_vocabulary
from atlas.training.schedule import NO_LIMIT, horizon_steps


@dataclass(frozen=True)
class Report:
    """`text`, `summary` and `scaling` are None where none was named."""

    machine: Machine
    text: TokenStream | None
    assumes_vocabulary: bool
    summary: Summary | None
    scaling: Scaling | None
    presets: list[tuple[PresetPlan, Summary]]

    @property
    def largest_that_fits(self) -> str | None:
        """The preset."""
        return _name(largest_that_fits([preset for preset, _ in self.presets]))

    @property
    def largest_for_text(self) -> str | None:
        """The largest preset that fits the machine and for which the text is enough."""
        enough = [preset for preset, summary in self.presets if summary.advice and summary.advice.fits]
        return _name(largest_that_fits(enough))


def _name(preset: PresetPlan | None) -> str | None:
    return preset.name if preset else None


def choose_cluster(
    gpus: int | None, nodes: int | None, interconnect: str | None, *, has_config: bool
) -> Cluster | None:
    """Return the cluster of the options, None without `--gpus`. Raises `AtlasError`."""
    if gpus is None:
        for flag, value in (("--nodes", nodes), ("--interconnect", interconnect)):
            if value is not None:
                raise AtlasError(f"{flag} {value}: is for several GPUs; say how many each node has, --gpus 8")
        return None
    if not has_config:
        raise AtlasError(f"--gpus {gpus}: is for one config; name it, --config small")
    return cluster_of(gpus, 1 if nodes is None else nodes, interconnect)


def make_report(
    config: str | None,
    overrides: Sequence[str],
    data: Path | None,
    gpu: str | None,
    memory: str | None,
    cluster: Cluster | None,
) -> Report:
    """Plan the config of these options, if there is one, and every preset. Raises `AtlasError`."""
    written = read_yaml(find_config(config)) if config else {}
    wanted = resolve(overlay(written, parse_overrides(overrides)))
    text = None if data is None else _open(data)
    if text is not None:
        wanted = with_vocabulary(wanted, text.vocab_size, text.name)
    machine, known = choose_machine(wanted, gpu, memory), assume_vocabulary(wanted)
    presets = plan_presets(
        machine.memory, device=machine.device, vocab_size=text.vocab_size if text else None
    )
    return Report(
        machine=machine,
        text=text,
        assumes_vocabulary=wanted.model.vocab_size is None,
        summary=_summarize(known, machine, text) if config or overrides else None,
        scaling=scale(known, machine, cluster) if cluster else None,
        presets=[(preset, _summarize_preset(preset.config, machine, text)) for preset in presets],
    )


def _open(data: Path) -> TokenStream:
    """The training part of a prepared dataset."""
    if holds_conversations(data):
        raise AtlasError(
            f"--data {data}: holds conversations, which atlas plan does not read; leave --data out"
        )
    if not is_prepared(data):
        raise AtlasError(
            f"--data {data}: is not a prepared dataset; make one with atlas prepare --input, and name its folder"
        )
    stream = open_dataset(data).split("train")
    assert stream is not None
    return stream


def _summarize(config: AtlasConfig, machine: Machine, text: TokenStream | None) -> Summary:
    if text is None:
        return summarize(config, machine, updates=config.training.max_steps)
    per_epoch = len(training_windows(text, config))
    updates = horizon_steps(config.training, per_epoch)
    return summarize(
        config,
        machine,
        updates=None if updates == NO_LIMIT else updates,
        sequences_per_epoch=per_epoch,
        text_tokens=text.num_tokens,
    )


def _summarize_preset(config: AtlasConfig, machine: Machine, text: TokenStream | None) -> Summary:
    """Without opening the text, which may be shorter than the preset's context."""
    tokens = text.num_tokens if text else None
    windows = (tokens - 1) // config.model.max_seq_len if tokens else 0
    updates = config.training.max_steps
    return summarize(
        config, machine, updates=updates, sequences_per_epoch=windows or None, text_tokens=tokens
    )
