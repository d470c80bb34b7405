"""`atlas train`: start a run, or resume the run in the output folder."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atlas.cli.terminal import ask_or_none, own_command, print_table, say
from atlas.config.loader import Layer, describe, nested, overlay, parse_overrides, read_yaml
from atlas.config.user_code import refuse_unasked_code
from atlas.errors import INTERRUPTED, AtlasError
from atlas.streams import continue_without_output

if TYPE_CHECKING:
    from atlas.training.devices.world import World
    from atlas.training.resume import Request
    from atlas.training.run import Run

_SHOWN_OPERATIONS = 12
_ASKED = 20  # conversations
_FLAGS: dict[str, str] = {}
"""Parameter of `train` → the key of the setting that the parameter sets."""

Config = Annotated[
    str | None,
    typer.Option(help="Config file, or the name of a preset such as small.", metavar="FILE|NAME"),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="A setting of docs/CONFIG.md. The option may be repeated.",
        metavar="KEY=VALUE",
    ),
]
NoResume = Annotated[
    bool,
    typer.Option("--no-resume", help="Start a new run; the files in the output folder move to previous-N."),
]


def _setting(key: str, metavar: str = "N") -> Any:
    """Return the typer option for the setting `key`, and record the setting in `_FLAGS`. The option has the name of the
    key's last part."""
    _FLAGS[key.rpartition(".")[2]] = key
    return typer.Option(help=describe(key), metavar=metavar, show_default=False)


def train(
    config: Config = None,
    train_data: Annotated[str | None, _setting("data.train_data", "PATH")] = None,
    val_data: Annotated[str | None, _setting("data.val_data", "PATH")] = None,
    tokenizer: Annotated[str | None, _setting("data.tokenizer", "NAME|FILE")] = None,
    chat_format: Annotated[str | None, _setting("data.chat_format", "NAME")] = None,
    on_error: Annotated[str | None, _setting("data.on_error", "stop|skip")] = None,
    output_dir: Annotated[str | None, _setting("checkpoint.output_dir", "DIR")] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            help="Resume from the checkpoint PATH, or from the latest intact checkpoint (auto). "
            "If PATH was trained on other data, fine-tune from the weights of PATH.",
            metavar="PATH|auto",
        ),
    ] = None,
    no_resume: NoResume = False,
    init_from: Annotated[
        str | None,
        typer.Option(help="Fine-tune: start a new run from the weights of this checkpoint.", metavar="PATH"),
    ] = None,
    max_steps: Annotated[str | None, _setting("training.max_steps")] = None,
    epochs: Annotated[str | None, _setting("training.epochs")] = None,
    max_hours: Annotated[str | None, _setting("training.max_hours", "H")] = None,
    learning_rate: Annotated[str | None, _setting("training.learning_rate", "X")] = None,
    batch_size: Annotated[str | None, _setting("training.batch_size")] = None,
    save_interval: Annotated[str | None, _setting("checkpoint.save_interval")] = None,
    eval_interval: Annotated[str | None, _setting("training.eval_interval")] = None,
    device: Annotated[str | None, _setting("device", "auto|cpu|cuda|cuda:N|mps")] = None,
    seed: Annotated[str | None, _setting("seed")] = None,
    overrides: Overrides = None,
    timeout: Annotated[
        float,
        typer.Option(
            help="With torchrun: seconds for which processes wait for each other before the run ends.",
            min=1,
            metavar="SECONDS",
        ),
    ] = 600,
    overfit_batch: Annotated[
        bool,
        typer.Option(
            "--overfit-batch",
            help="Train on a single batch and report whether the loss falls to zero. Use this check first if a "
            "run's loss does not fall. Saves nothing.",
        ),
    ] = False,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            help="Run a few updates and profile the last update. Print its longest operations and write "
            "profile.json, a Chrome trace, to the output folder. Save nothing else.",
        ),
    ] = False,
) -> None:
    """Train a model, or resume a run.

    Ctrl-C saves a checkpoint and exits with code 130. Precedence of settings: flag, --set, config file, checkpoint,
    default.
    """
    given = locals()
    flags = {key: given[name] for name, key in _FLAGS.items() if given[name] is not None}
    if overfit_batch:
        from atlas.training.diagnostics import overfit_one_batch

        overfit_one_batch(explicit_layer(config, overrides, flags), say=say)
        return
    if profile:
        return _print_profile(explicit_layer(config, overrides, flags))
    # Report a mistake in the settings before loading PyTorch, which takes seconds. With several processes, the settings
    # are read later, so that only the first process reports a mistake.
    explicit = None if "RANK" in os.environ else explicit_layer(config, overrides, flags)

    from atlas.config.presets import leaves_batch_size_open
    from atlas.training.devices.world import join_world, together
    from atlas.training.resume import Request

    world = join_world(timeout)
    with together(world):
        with world.in_step():
            explicit = explicit or explicit_layer(config, overrides, flags)
            request = Request(explicit, resume, no_resume, init_from, ask_or_none())
        is_open = leaves_batch_size_open(config, explicit_layer(None, overrides, flags))
        train_to_the_end(request, world, may_exceed_batch_size=is_open)


def explicit_layer(config: str | None, overrides: list[str] | None, flags: dict[str, str]) -> Layer:
    """Return the settings that the user gave. Flags take precedence over --set, and --set over the config file. Raises
    `ConfigError` if only the file names code."""
    from atlas.config.presets import find_config

    asked = parse_overrides(overrides or [])
    for key, value in flags.items():
        asked = overlay(asked, nested(key, value))
    from_file = read_yaml(find_config(config)) if config else {}
    refuse_unasked_code(from_file, asked, config)
    return overlay(from_file, asked)


def _print_profile(explicit: Layer) -> None:
    from atlas.training.diagnostics import profile_update

    profile = profile_update(explicit, say=say)
    rate = profile.tokens / profile.seconds
    typer.echo(
        f"an update: {profile.tokens:,} tokens in {profile.seconds:.3g} s, {rate:,.0f} tokens/s; recorded:"
    )
    recorded = sum(seconds for _, _, seconds in profile.operations)
    rows = [("operation", "calls", "own time", "share")]
    for name, calls, seconds in profile.operations[:_SHOWN_OPERATIONS]:
        rows.append((name, f"{calls:,}", f"{1e3 * seconds:,.1f} ms", f"{seconds / recorded:.1%}"))
    print_table(rows, right={1, 2, 3})
    typer.echo(f"{profile.trace}: open it in https://ui.perfetto.dev or chrome://tracing")


def _report_answers(run: Run) -> None:
    """After training on conversations, log how well the model has learnt their answers."""
    import torch

    from atlas.data.sequences.conversations import ChatDataset
    from atlas.inference.recall import describe_recall, recall_answers

    state, data = run.state, run.data.train
    is_whole = run.world.is_first and run.runtime.parallel != "fsdp"
    if not isinstance(data, ChatDataset) or not is_whole or state.first_loss is None or state.loss is None:
        return
    run.log.say(
        f"loss of the answers: {state.first_loss:.4f} in the first update, {state.loss:.4f} in the last one"
    )
    run.model.eval()
    with torch.compiler.set_stance("force_eager" if run.runtime.compiles else "default"):
        answers = recall_answers(run.model, run.data.tokenizer, data.stream.some_answers(_ASKED))
    if answers:
        for line in describe_recall(answers, total=len(data.stream.ends)):
            run.log.say(line)


def train_to_the_end(
    request: Request, world: World | None = None, *, may_exceed_batch_size: bool = False
) -> Run:
    """Start or resume the requested run, train it to its end, and report the outcome. Exit with code 130 if the run was
    interrupted."""
    from atlas.inference.text import sample_texts
    from atlas.training.devices.world import ALONE
    from atlas.training.launch import start_run
    from atlas.training.resume import choose_start
    from atlas.training.train import train as train_run

    continue_without_output()
    world = world or ALONE
    start = choose_start(request, world)
    run = start_run(start, world, sampler=sample_texts, may_exceed_batch_size=may_exceed_batch_size)
    if run.is_complete:
        run.log.say(
            f"nothing to do: the run is complete at step {run.state.step}; --set training.max_steps=N with a larger N "
            "continues the run, --init-from starts a new run from its weights"
        )
        return run
    result = train_run(run)
    if not result.saved and world.is_first:
        raise AtlasError(
            f"{result.outcome} at step {result.step}, but this step could not be saved (see above); --resume auto "
            "uses the newest saved checkpoint, or starts over if there is none"
        )
    losses = {"loss": result.loss, "validation loss": result.val_loss}
    figures = "".join(f", {name} {value:.4f}" for name, value in losses.items() if value is not None)
    names = ", ".join(path.name for path in result.saved)
    saved = f"; saved {names} in {run.checkpoints.folder}" if names else ""
    run.log.say(f"{result.outcome} at step {result.step}{figures}{saved}")
    if result.outcome != "interrupted":
        _report_answers(run)
    if result.outcome == "interrupted":
        if world.is_first:
            torchrun = f"torchrun --nproc-per-node={world.local_size} -m atlas"
            launcher = torchrun if world.size > 1 else own_command()
            run.log.say(f"resume with: {launcher} train --resume {result.saved[0]}")
        raise typer.Exit(INTERRUPTED)
    return run
