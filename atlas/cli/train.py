"""`atlas train`: start a run, or go on with the one in the output folder."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atlas.cli.terminal import INTERRUPTED
from atlas.config.loader import Layer, describe, nested, overlay, parse_overrides, read_yaml

if TYPE_CHECKING:
    from atlas.training.run import Run


_SHOWN_OPERATIONS = 12


def _option(flag: str, key: str, metavar: str = "N") -> Any:
    return typer.Option(flag, help=describe(key), metavar=metavar, show_default=False)


def train(
    config: Annotated[
        str | None,
        typer.Option(help="Config file, or the name of a preset such as small.", metavar="FILE|NAME"),
    ] = None,
    train_data: Annotated[str | None, _option("--train-data", "data.train_data", "PATH")] = None,
    val_data: Annotated[str | None, _option("--val-data", "data.val_data", "PATH")] = None,
    tokenizer: Annotated[str | None, _option("--tokenizer", "data.tokenizer", "NAME|FILE")] = None,
    output_dir: Annotated[str | None, _option("--output-dir", "checkpoint.output_dir", "DIR")] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            help="Go on from a checkpoint, or from the latest whole one (auto). "
            "On other data: fine-tune from its weights.",
            metavar="PATH|auto",
        ),
    ] = None,
    no_resume: Annotated[
        bool,
        typer.Option("--no-resume", help="Start anew; what the output folder holds moves to previous-N."),
    ] = False,
    init_from: Annotated[
        str | None, typer.Option(help="Fine-tune: a new run that starts from these weights.", metavar="PATH")
    ] = None,
    max_steps: Annotated[str | None, _option("--max-steps", "training.max_steps")] = None,
    epochs: Annotated[str | None, _option("--epochs", "training.epochs")] = None,
    max_hours: Annotated[str | None, _option("--max-hours", "training.max_hours", "H")] = None,
    learning_rate: Annotated[str | None, _option("--learning-rate", "training.learning_rate", "X")] = None,
    batch_size: Annotated[str | None, _option("--batch-size", "training.batch_size")] = None,
    save_interval: Annotated[str | None, _option("--save-interval", "checkpoint.save_interval")] = None,
    eval_interval: Annotated[str | None, _option("--eval-interval", "training.eval_interval")] = None,
    device: Annotated[str | None, _option("--device", "device", "auto|cpu|cuda|cuda:N|mps")] = None,
    seed: Annotated[str | None, _option("--seed", "seed")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any setting of docs/CONFIG.md; may be repeated.", metavar="KEY=VALUE"),
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(
            help="Of several processes (torchrun): seconds that they wait for one another before the run ends.",
            min=1,
            metavar="SECONDS",
        ),
    ] = 600,
    overfit_batch: Annotated[
        bool,
        typer.Option(
            "--overfit-batch",
            help="Train on one batch only and say whether its loss goes to zero: the first check when "
            "the loss does not fall. Saves nothing.",
        ),
    ] = False,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            help="Take a few updates, record the last one, print where its time went, and write it as a Chrome trace "
            "to profile.json in the output folder. Saves nothing else.",
        ),
    ] = False,
) -> None:
    """Train a model, or go on with one.

    Ctrl-C saves a checkpoint and exits with 130. Precedence: flag, --set, config file, checkpoint, default.
    """
    flags = {
        "data.train_data": train_data,
        "data.val_data": val_data,
        "data.tokenizer": tokenizer,
        "checkpoint.output_dir": output_dir,
        "training.max_steps": max_steps,
        "training.epochs": epochs,
        "training.max_hours": max_hours,
        "training.learning_rate": learning_rate,
        "training.batch_size": batch_size,
        "checkpoint.save_interval": save_interval,
        "training.eval_interval": eval_interval,
        "device": device,
        "seed": seed,
    }

    def written() -> Layer:
        return _explicit_layer(config, overrides or [], flags)

    if overfit_batch:
        from atlas.training.diagnostics import overfit_one_batch

        overfit_one_batch(written(), say=lambda line: typer.echo(line, err=True))
        return
    if profile:
        return _print_profile(written())
    # A mistake is told before PyTorch is loaded, which takes seconds; of several processes by the first alone.
    explicit = None if "RANK" in os.environ else written()

    from atlas.cli.terminal import ask_or_none
    from atlas.config.presets import leaves_batch_size_open
    from atlas.inference.samples import sample_texts
    from atlas.training.devices.world import join_world, together
    from atlas.training.launch import start_run
    from atlas.training.resume import Request, choose_start

    world = join_world(timeout)
    with together(world):
        with world.in_step():
            explicit = explicit or written()
        start = choose_start(Request(explicit, resume, no_resume, init_from, ask_or_none()), world)
        is_open = leaves_batch_size_open(config, _explicit_layer(None, overrides or [], flags))
        train_to_the_end(start_run(start, world, sampler=sample_texts, may_exceed_batch_size=is_open))


def _explicit_layer(config: str | None, overrides: list[str], flags: dict[str, str | None]) -> Layer:
    """What the user wrote: config file < --set < flags."""
    from atlas.config.presets import find_config

    layer = read_yaml(find_config(config)) if config else {}
    layer = overlay(layer, parse_overrides(overrides))
    for key, value in flags.items():
        if value is not None:
            layer = overlay(layer, nested(key, value))
    return layer


def _print_profile(explicit: Layer) -> None:
    from atlas.cli.terminal import print_table
    from atlas.training.diagnostics import profile_update

    profile = profile_update(explicit, say=lambda line: typer.echo(line, err=True))
    typer.echo(
        f"an update: {profile.tokens:,} tokens in {profile.seconds:.3g} s, {profile.tokens / profile.seconds:,.0f} "
        "tokens/s; recorded:"
    )
    recorded = sum(seconds for _, _, seconds in profile.operations)
    rows = [
        (name, f"{calls:,}", f"{1e3 * seconds:,.1f} ms", f"{seconds / recorded:.1%}")
        for name, calls, seconds in profile.operations[:_SHOWN_OPERATIONS]
    ]
    print_table([("operation", "calls", "time of its own", "share"), *rows], right={1, 2, 3})
    typer.echo(f"{profile.trace}: open it in https://ui.perfetto.dev or chrome://tracing")


def train_to_the_end(run: Run) -> None:
    """Train, and say how it ended; exit with 130 if it was interrupted."""
    from atlas.cli.terminal import own_command
    from atlas.errors import AtlasError
    from atlas.training import train as training_loop

    state, folder = run.state, run.checkpoints.folder
    if run.is_complete:
        run.log.say(
            f"nothing to do: the run is complete at step {state.step}; --set training.max_steps=N with a larger N "
            "continues it"
        )
        return
    result = training_loop.train(run)
    names = ", ".join(path.name for path in result.saved)
    if not result.saved and run.world.is_first:
        raise AtlasError(
            f"{result.outcome} at step {result.step}, but this step could not be saved (see above); --resume auto "
            "takes the newest one that was"
        )
    loss = "" if result.loss is None else f", loss {result.loss:.4f}"
    validation = "" if result.val_loss is None else f", validation loss {result.val_loss:.4f}"
    saved = f"; saved {names} in {folder}" if names else ""
    run.log.say(f"{result.outcome} at step {result.step}{loss}{validation}{saved}")
    if result.outcome == "interrupted":
        if run.world.is_first:
            several = run.world.local_size
            launcher = (
                f"torchrun --nproc-per-node={several} -m atlas" if run.world.size > 1 else own_command()
            )
            run.log.say(f"resume with: {launcher} train --resume {result.saved[0]}")
        raise typer.Exit(INTERRUPTED)
