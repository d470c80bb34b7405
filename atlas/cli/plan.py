"""`atlas plan`: what a config will take, before any work."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from atlas.cli.plan_output import Report
    from atlas.config import AtlasConfig
    from atlas.data import TokenStream
    from atlas.planning.communication import Cluster
    from atlas.planning.run import Machine
    from atlas.planning.summary import Summary


def plan(
    config: Annotated[
        str | None,
        typer.Option(help="Config file, or the name of a preset such as small.", metavar="FILE|NAME"),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Prepared dataset that it is to be trained on.", metavar="FOLDER"),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help='Plan for this card instead of this machine: "RTX 3060".', metavar="NAME"),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Plan for a GPU of this size instead of this machine.", metavar="8GB"),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            help="Plan for one run on so many GPUs in each node, as torchrun's --nproc-per-node.", metavar="N"
        ),
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option(help="With --gpus: the number of nodes (machines), 1 if left out.", metavar="M"),
    ] = None,
    interconnect: Annotated[
        str | None,
        typer.Option(
            help="With --gpus: the link inside a node and the one between nodes, by name (pcie4, nvlink4, "
            "ethernet-10g, infiniband-400, …) or in GB/s in one direction for each GPU.",
            metavar="NAME|GB/s[,…]",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any setting of docs/CONFIG.md; may be repeated.", metavar="KEY=VALUE"),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object: bytes, seconds, FLOPs, kWh.")
    ] = False,
) -> None:
    """Memory, disk, tokens and time of a config, and which presets fit: this machine, a card, a text."""
    from atlas.cli.plan_output import print_json, print_report
    from atlas.config.loader import overlay, parse_overrides, read_yaml, resolve
    from atlas.config.presets import find_config

    cluster = _cluster(gpus, nodes, interconnect, is_asked=bool(config or overrides))
    written = read_yaml(find_config(config)) if config else {}
    wanted = resolve(overlay(written, parse_overrides(overrides or [])))
    text = None if data is None else _open(data)
    report = _report(wanted, text, gpu, memory, cluster, is_asked=bool(config or overrides))
    if as_json:
        print_json(report)
    else:
        print_report(report)


def _cluster(
    gpus: int | None, nodes: int | None, interconnect: str | None, *, is_asked: bool
) -> Cluster | None:
    """None without `--gpus`."""
    from atlas.errors import AtlasError
    from atlas.planning.communication import cluster_of

    if gpus is None:
        for flag, value in (("--nodes", nodes), ("--interconnect", interconnect)):
            if value is not None:
                raise AtlasError(f"{flag} {value}: is for several GPUs; say how many each node has, --gpus 8")
        return None
    if not is_asked:
        raise AtlasError(f"--gpus {gpus}: is for one config; name it, --config small")
    return cluster_of(gpus, 1 if nodes is None else nodes, interconnect)


def _report(
    wanted: AtlasConfig,
    text: TokenStream | None,
    gpu: str | None,
    memory: str | None,
    cluster: Cluster | None,
    *,
    is_asked: bool,
) -> Report:
    """`is_asked`: the config is one that somebody wrote, and to be planned besides the presets."""
    from atlas.cli.plan_output import Report
    from atlas.planning.scaling import scale
    from atlas.training.memory.presets import assume_vocabulary, plan_presets
    from atlas.training.run_config import with_vocabulary

    if text is not None:
        wanted = with_vocabulary(wanted, text.vocab_size, text.name)
    machine = _choose_machine(wanted, gpu, memory)
    vocab_size = text.vocab_size if text else None
    presets = plan_presets(machine.memory, device=machine.device, vocab_size=vocab_size)
    return Report(
        machine=machine,
        text=text,
        assumes_vocabulary=wanted.model.vocab_size is None,
        summary=_summarize(assume_vocabulary(wanted), machine, text) if is_asked else None,
        scaling=scale(assume_vocabulary(wanted), machine, cluster) if cluster else None,
        presets=presets,
        preset_summaries=[_summarize_preset(preset.config, machine, text) for preset in presets],
    )


def _summarize(config: AtlasConfig, machine: Machine, text: TokenStream | None) -> Summary:
    from atlas.data.sequences.build import training_windows
    from atlas.planning.summary import summarize
    from atlas.training.schedule import NO_LIMIT, horizon_steps

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
    """Without a look at the text, which may be shorter than the preset's context."""
    from atlas.planning.summary import summarize

    tokens = text.num_tokens if text else None
    windows = (tokens - 1) // config.model.max_seq_len if tokens else 0
    updates = config.training.max_steps
    return summarize(
        config, machine, updates=updates, sequences_per_epoch=windows or None, text_tokens=tokens
    )


def _open(data: Path) -> TokenStream:
    """What a prepared dataset trains on."""
    from atlas.data.sequences.conversations import holds_conversations
    from atlas.data.shards import is_prepared, open_dataset
    from atlas.errors import AtlasError

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


def _choose_machine(wanted: AtlasConfig, gpu: str | None, memory: str | None) -> Machine:
    from atlas.planning.cards import find_card
    from atlas.planning.run import Machine, machine_with

    size = None if memory is None else _gibibytes(memory)
    if gpu is not None:
        return machine_with(find_card(gpu), precision=wanted.training.precision, memory=size)
    if size is not None:
        device = "cuda" if wanted.device == "auto" else wanted.device.partition(":")[0]
        return Machine(f"{memory} ({device})", device, size)
    return this_machine(wanted)


def this_machine(wanted: AtlasConfig) -> Machine:
    """This machine as a config would use it, its speed measured in about a second."""
    import torch

    from atlas.machine import measure_copy, measure_matrix_products, measure_memory
    from atlas.planning.cards import card_named
    from atlas.planning.run import Machine
    from atlas.planning.speed import Speed, card_speed
    from atlas.training.devices.device import setup_runtime

    # How several processes share a model is planned, not set up.
    alone = wanted.training.model_copy(update={"parallel": "auto"})
    runtime = setup_runtime(wanted.model_copy(update={"training": alone}))
    device = runtime.device.type
    card = card_named(torch.cuda.get_device_name()) if device == "cuda" else None
    memory = measure_memory(device)
    rate = measure_matrix_products(runtime.device, runtime.dtype)
    bandwidth = measure_copy(runtime.device) if device == "cuda" else None
    speed = None
    if bandwidth is not None and runtime.dtype != torch.float32:
        speed = card_speed(card, products=rate, bandwidth=bandwidth) if card else Speed(rate, bandwidth)
    return Machine(
        name=f"this machine ({device})",
        device=device,
        memory=memory,
        flops_per_second=rate,
        rate_is=f"measured here in {runtime.precision}",
        bytes_per_second=bandwidth,
        watts=card.watts if card else None,
        speed=speed,
    )


def _gibibytes(text: str) -> int:
    """Bytes of a size as makers of graphics cards write it: 8GB, 8 GiB and 8 are all 8 · 2³⁰."""
    from atlas.errors import AtlasError

    match = re.fullmatch(r"\s*(\d{1,6}(?:\.\d+)?)\s*(?:g|gb|gib)?\s*", text, re.IGNORECASE)
    if match is None:
        raise AtlasError(f"--memory {text}: is not a size; write it as 8GB")
    return int(float(match[1]) * 2**30)
