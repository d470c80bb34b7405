"""`atlas plan`: estimate the memory, disk space, tokens and time that a config needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atlas.cli.train import Config, Overrides
from atlas.config.loader import parse_overrides, read_yaml, resolve
from atlas.config.presets import find_config
from atlas.errors import AtlasError


def plan(
    config: Config = None,
    data: Annotated[Path | None, typer.Option(help="Prepared dataset to train on.", metavar="FOLDER")] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help='Plan for this card instead of this machine, such as "RTX 3060".', metavar="NAME"),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Plan for a GPU with this memory instead of this machine.", metavar="8GB"),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            help="Plan a run on N GPUs in each node, as with torchrun's --nproc-per-node.", metavar="N"
        ),
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(help="With --gpus: the number of nodes (machines). Default: 1.", metavar="M")
    ] = None,
    interconnect: Annotated[
        str | None,
        typer.Option(
            help="With --gpus: the link inside a node, and the link between nodes. Each is a name (pcie4, nvlink4, "
            "ethernet-10g, infiniband-400, …) or the GB/s in one direction for each GPU.",
            metavar="NAME|GB/s[,…]",
        ),
    ] = None,
    overrides: Overrides = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, in bytes, seconds, FLOPs and kWh.")
    ] = False,
) -> None:
    """Estimate the memory, disk space, tokens and time that a config needs. List which presets fit the machine or card
    and, with --data, the text."""
    from atlas.cli.plan_output import print_json, print_report
    from atlas.cli.plan_report import make_report
    from atlas.planning.communication import cluster_of

    has_config = bool(config or overrides)
    for flag, value in (("--nodes", nodes), ("--interconnect", interconnect)):
        if gpus is None and value is not None:
            raise AtlasError(f"{flag} {value}: needs the number of GPUs in each node, such as --gpus 8")
    if gpus is not None and not has_config:
        raise AtlasError(f"--gpus {gpus}: needs a config, such as --config small")
    cluster = None if gpus is None else cluster_of(gpus, 1 if nodes is None else nodes, interconnect)
    # The plan imports no code, so the config may name any.
    wanted = resolve(read_yaml(find_config(config)) if config else {}, parse_overrides(overrides or []))
    report = make_report(wanted, data, gpu, memory, cluster, has_config=has_config)
    (print_json if as_json else print_report)(report)
