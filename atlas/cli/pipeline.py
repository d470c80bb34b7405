"""`atlas pipeline`: from text to a model in one command. On a terminal, the command asks questions; in a script, it
uses defaults."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atlas.cli.terminal import say
from atlas.cli.train import NoResume, Overrides, train_to_the_end
from atlas.config.loader import Layer, nested, overlay, parse_overrides, read_yaml
from atlas.config.presets import find_config, leaves_batch_size_open, preset_names
from atlas.config.user_code import refuse_unasked_code
from atlas.errors import AtlasError
from atlas.files import local_path

if TYPE_CHECKING:
    from atlas.data.shards import PreparedDataset


def pipeline(
    demo: Annotated[
        bool,
        typer.Option(
            "--demo",
            help="Train a small model on this machine's CPU in minutes, from text to a verified GGUF file.",
        ),
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            help="Text file, folder or archive. Default: data/raw/archive.zip if it exists, else Atlas asks; with "
            "--demo, Python's own documentation.",
            metavar="PATH",
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(help="Preset or config file. Default: Atlas asks.", metavar="FILE|NAME"),
    ] = None,
    output_dir: Annotated[
        str | None,
        typer.Option(help="Folder of the run. Default: checkpoints, or demo with --demo.", metavar="DIR"),
    ] = None,
    no_resume: NoResume = False,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing and use the defaults.")] = False,
    overrides: Overrides = None,
) -> None:
    """Run all steps from text to a model in one command. With --demo, also generate text and write a GGUF file.

    Without --demo, the command shows the memory and time of each preset on this machine and asks for a preset. Then the
    command prepares your text for the preset and trains the model. Without a terminal, or with --yes, the command asks
    nothing.
    """
    from atlas.cli.choose_text import NoTextError, ask_person, choose_text
    from atlas.cli.terminal import ask_or_none

    layer = parse_overrides(overrides or [])
    folder = None if output_dir is None else local_path("--output-dir", output_dir)
    confirm = None if yes else ask_or_none()
    ask = ask_person if confirm else None
    if data is not None or not demo:
        try:
            data = choose_text(data, command="atlas pipeline", ask=ask)
        except NoTextError as error:
            raise AtlasError(str(error)) from None
    if demo or data is None:
        from atlas.cli.demo import run_demo

        folder = folder or Path("demo" if data is None else f"demo-{Path(data).stem}")
        return run_demo(data, folder, layer, no_resume=no_resume)
    from atlas.cli.choose_preset import print_next_commands
    from atlas.training.resume import Request

    explicit = _settings(data, config, layer, ask)
    if folder:
        explicit = overlay(explicit, nested("checkpoint.output_dir", str(folder)))
    request = Request(explicit, no_resume=no_resume, ask=confirm)
    run = train_to_the_end(request, may_exceed_batch_size=leaves_batch_size_open(config, layer))
    print_next_commands(run.checkpoints.folder / "atlas_best.pt")


def _settings(data: str, config: str | None, overrides: Layer, ask: Callable[[str], str] | None) -> Layer:
    """Return the settings of the run. If needed, prepare the text with the vocabulary of these settings."""
    from atlas.cli.choose_preset import VOCABULARY, choose_preset
    from atlas.data.sequences.conversations import holds_conversations
    from atlas.data.shards import is_prepared, open_dataset
    from atlas.data.text.sources import Sources

    if {"train_data", "mixture"} & overrides.get("data", {}).keys():
        raise AtlasError(
            "--set data: the pipeline trains on one text: name the text with --data, or use atlas train"
        )
    if holds_conversations(data):
        raise AtlasError(
            f"--data {data}: contains conversations, which are for fine-tuning: train a model on text first, then run "
            f"atlas train --init-from CHECKPOINT --train-data {data}"
        )
    prepared = open_dataset(data) if is_prepared(data) else None
    if prepared is None:
        Sources([data])  # raises an error for an unreadable text before Atlas asks a question
    vocab_size = prepared.manifest.tokenizer["vocab_size"] if prepared else None
    device = str(overrides.get("device", "auto"))
    preset = config or choose_preset(ask, vocab_size=vocab_size, device=device)
    from_file = read_yaml(find_config(preset))
    refuse_unasked_code(from_file, overrides, preset)
    written = overlay(from_file, overrides)
    stated = written.get("model", {}).get("vocab_size")
    tokenizer = written.get("data", {}).get("tokenizer")
    if prepared is None:
        prepared = _prepare(data, tokenizer, train_tokenizer=None if stated or tokenizer else VOCABULARY)
    elif preset.lower() in preset_names() and "vocab_size" not in overrides.get("model", {}):
        written = overlay(written, nested("model.vocab_size", vocab_size))
    return overlay(written, nested("data.train_data", str(prepared.folder)))


def _prepare(text: str, tokenizer: str | None, *, train_tokenizer: int | None) -> PreparedDataset:
    """Prepare a text, if needed, and return its dataset. A dataset with a trained vocabulary has its own folder, so
    that both this dataset and a dataset with GPT-2's vocabulary can exist."""
    from atlas.data import prepare
    from atlas.data.prepare.pipeline import default_output
    from atlas.data.text.sources import Sources
    from atlas.tokenizer import Tokenizer

    folder = None
    if train_tokenizer:
        folder = default_output(Sources([text]))
        folder = folder.with_name(f"{folder.name}-vocab{train_tokenizer}")
    say(f"preparing {text}")
    named = Tokenizer.resolve(tokenizer) if tokenizer else None
    summary = prepare([text], folder, named, train_tokenizer=train_tokenizer)
    say(*summary.notes)
    return summary.dataset
