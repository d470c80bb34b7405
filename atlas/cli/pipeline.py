"""`atlas pipeline`: the whole road in one command, with questions to a person and without them to a script."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from atlas.errors import AtlasError

ARCHIVE = Path("data", "raw", "archive.zip")


def pipeline(
    demo: Annotated[
        bool,
        typer.Option(
            "--demo", help="A small model on this machine's CPU in minutes, from text to a proved GGUF file."
        ),
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            help="Text file or folder. Left out: data/raw/archive.zip; with --demo, Python's own documentation.",
            metavar="PATH",
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(help="Preset or config file; left out, it is asked for.", metavar="FILE|NAME"),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of the run; default checkpoints, with --demo demo.", metavar="DIR"),
    ] = None,
    no_resume: Annotated[
        bool,
        typer.Option("--no-resume", help="Start anew; what the output folder holds moves to previous-N."),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing; take the defaults.")] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any setting of docs/CONFIG.md; may be repeated.", metavar="KEY=VALUE"),
    ] = None,
) -> None:
    """The whole road: text → tokens → model → text → GGUF.

    Without --demo: prepares the archive, shows the presets and which ones fit this machine, asks which one to train
    and whether to resume, and trains. Without a terminal, or with --yes, nothing is asked.
    """
    from atlas.cli.terminal import ask_or_none
    from atlas.config.loader import parse_overrides

    layer = parse_overrides(overrides or [])
    if demo:
        from atlas.cli.demo import demo_road

        folder = output_dir or Path("demo" if data is None else f"demo-{Path(data).stem}")
        demo_road(data, folder, layer, no_resume=no_resume)
        return

    from atlas.cli.train import train_to_the_end
    from atlas.config.loader import nested, overlay, read_yaml
    from atlas.config.presets import find_config
    from atlas.inference.samples import sample_texts
    from atlas.training.launch import start_run
    from atlas.training.start import Request, choose_start

    ask = None if yes else ask_or_none()
    written = read_yaml(find_config(config)) if config else None
    dataset = _prepare(data)
    if written is None:
        written = read_yaml(find_config(_choose_preset(ask)))
    explicit = overlay(written, nested("data.train_data", str(dataset)))
    if output_dir:
        explicit = overlay(explicit, nested("checkpoint.output_dir", str(output_dir)))
    request = Request(overlay(explicit, layer), no_resume=no_resume, ask=ask)
    trainer = start_run(choose_start(request), sampler=sample_texts)
    train_to_the_end(trainer)
    best = trainer.checkpoints.folder / "atlas_best.pt"
    typer.echo(f'write with it: atlas generate --checkpoint {best} --prompt "…"', err=True)
    typer.echo(f"take it to llama.cpp: atlas export --checkpoint {best} --output atlas_model.gguf", err=True)


def _prepare(data: str | None) -> Path:
    """The prepared folder of the text, made if need be."""
    from atlas.cli.prepare import ARCHIVE as ORIGIN
    from atlas.data import prepare
    from atlas.data.shards import is_prepared

    if data is None and not ARCHIVE.exists():
        raise AtlasError(
            f"{ARCHIVE}: is not there; download it from {ORIGIN} and put it there, or give your own text with "
            "--data PATH, or see the whole road first with --demo"
        )
    source = Path(data) if data else ARCHIVE
    if is_prepared(source):
        return source
    typer.echo(f"preparing {source}", err=True)
    summary = prepare([source])
    for note in summary.notes:
        typer.echo(note, err=True)
    return summary.dataset.folder


def _choose_preset(ask: Callable[[str], bool] | None) -> str:
    """Show the presets and what they take here; the one that is asked for, or the default."""
    from atlas.config.presets import preset_names
    from atlas.planning import largest_that_fits, measure_memory, plan_presets
    from atlas.training.runtime import choose_device

    device = choose_device("auto").type
    available = measure_memory(device)
    plans = plan_presets(available, device=device)
    typer.echo(f"\nthis machine: {device}, {available / 1e9:.1f} GB of memory free\n", err=True)
    typer.echo(f"{'preset':<9}{'parameters':>12}{'context':>9}{'memory':>10}", err=True)
    for plan in plans:
        fits = "" if plan.fits else "  does not fit"
        typer.echo(
            f"{plan.name:<9}{plan.parameters:>12,}{plan.config.model.max_seq_len:>9}{plan.memory / 1e9:>7.1f} GB{fits}",
            err=True,
        )
    largest = largest_that_fits(plans)
    if largest is None:
        raise AtlasError(
            f"{available / 1e9:.1f} GB of memory: too little for any preset; close other programs"
        )
    # A CPU has the memory for large models but not the speed: beyond tiny they take weeks.
    default = largest.name if device == "cuda" else min("tiny", largest.name, key=preset_names().index)
    if ask is None:
        typer.echo(f"training {default}; another one with --config", err=True)
        return default
    return str(typer.prompt("\nWhich one to train", default=default, err=True))
