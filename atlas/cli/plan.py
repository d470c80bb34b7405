"""`atlas plan`: what a config will take, before any work."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from atlas.config import AtlasConfig
    from atlas.planning import PresetPlan

_NARROWEST = 100  # without a terminal: wide enough for every table


def plan(
    config: Annotated[
        str | None,
        typer.Option(help="Config file, or the name of a preset such as small.", metavar="FILE|NAME"),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any setting of docs/CONFIG.md; may be repeated.", metavar="KEY=VALUE"),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Plan for a GPU of this size instead of this machine.", metavar="8GB"),
    ] = None,
) -> None:
    """Parameters, memory and disk of a config, and which presets fit this machine."""
    import sys

    from rich.console import Console

    from atlas.config.loader import overlay, parse_overrides, read_yaml, resolve
    from atlas.config.presets import find_config
    from atlas.planning import measure_memory, plan_presets
    from atlas.training.runtime import choose_device

    written = read_yaml(find_config(config)) if config else {}
    wanted = resolve(overlay(written, parse_overrides(overrides or [])))
    if memory is None:
        device = choose_device(wanted.device).type
        available, whose = measure_memory(device), f"this machine ({device})"
    else:
        device = "cuda" if wanted.device == "auto" else wanted.device
        available, whose = _gibibytes(memory), f"{memory} ({device})"

    console = Console(width=None if sys.stdout.isatty() else _NARROWEST, highlight=False)
    if config or overrides:
        _print_config(console, wanted, device)
    _print_presets(console, plan_presets(available, device=device), f"{whose}, {_gib(available)}")
    if device == "cpu":
        console.print(
            "On a CPU time is the limit before memory: nano takes minutes, tiny days.", soft_wrap=True
        )


def _gibibytes(text: str) -> int:
    """Bytes of a size as makers of graphics cards write it: 8GB, 8 GiB and 8 are all 8 · 2³⁰."""
    from atlas.errors import AtlasError

    match = re.fullmatch(r"\s*(\d{1,6}(?:\.\d+)?)\s*(?:g|gb|gib)?\s*", text, re.IGNORECASE)
    if match is None:
        raise AtlasError(f"--memory {text}: is not a size; write it as 8GB")
    return int(float(match[1]) * 2**30)


def _print_config(console: Console, wanted: AtlasConfig, device: str) -> None:
    from atlas.planning import (
        assume_vocabulary,
        checkpoint_bytes,
        count_parameters,
        estimate_inference_memory,
        estimate_training_memory,
        output_folder_bytes,
        snapshot_bytes,
    )

    config = assume_vocabulary(wanted)
    training = estimate_training_memory(config, device=device)
    inference = estimate_inference_memory(config.model, device=device)
    disk = {"one checkpoint": checkpoint_bytes(config), "output folder, at most": output_folder_bytes(config)}
    _print_parts(console, "Parameters", _parts(count_parameters(config.model)), "{:,}".format)
    besides = {"besides, in main memory": snapshot_bytes(config)}
    _print_parts(console, f"Memory of training on {device}", _parts(training) | besides, _gib)
    console.print(
        "The last line is the copy that checkpoints are written from while training goes on; where it does not fit, "
        "or with checkpoint.background=false, training waits for the disk.\n",
        soft_wrap=True,
    )
    _print_parts(console, f"Memory of generating on {device}", _parts(inference), _gib)
    _print_parts(console, "Disk", disk, lambda size: f"{size / 1e9:.2f} GB")
    if wanted.model.vocab_size is None:
        console.print(
            f"vocab_size is left out, so the dataset's will be taken; {config.model.vocab_size} is assumed here. "
            "GPT-2's: --set model.vocab_size=50257\n",
            soft_wrap=True,
        )


def _parts(estimate: Any) -> dict[str, int]:
    """The parts of an estimate by name, those of 0 left out, and their sum."""
    named = {name.replace("_", " "): size for name, size in vars(estimate).items() if size}
    return {**named, "total": estimate.total}


def _print_parts(console: Console, title: str, rows: dict[str, int], show: Callable[[int], str]) -> None:
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2))
    table.add_column(no_wrap=True, min_width=24)
    table.add_column(no_wrap=True, justify="right", min_width=14)
    for name, size in rows.items():
        table.add_row(name, show(size))
    console.print(title, table, "", sep="\n")


def _print_presets(console: Console, plans: list[PresetPlan], whose: str) -> None:
    from rich.table import Table

    from atlas.planning import largest_that_fits

    largest = largest_that_fits(plans)
    verdict = f"the largest that fits is {largest.name}" if largest else "none fits"
    table = Table(box=None, padding=(0, 2))
    table.add_column("preset", no_wrap=True)
    for name in ("parameters", "context", "at once", "training memory", "fits"):
        table.add_column(name, no_wrap=True, justify="right")
    for plan in plans:
        model, training = plan.config.model, plan.config.training
        memory, fits = _gib(plan.memory), "yes" if plan.fits else "no"
        table.add_row(
            plan.name, f"{plan.parameters:,}", str(model.max_seq_len), str(training.batch_size), memory, fits
        )
    console.print(f"Presets on {whose}: {verdict}", table, sep="\n", soft_wrap=True)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"
