"""`atlas info`: describe a file or folder on one screen."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from atlas.config.loader import describe
from atlas.errors import AtlasError
from atlas.files import local_path

Facts = Iterable[tuple[str, Any]]


def info(
    path: Annotated[
        str,
        typer.Argument(
            help="A checkpoint, an output folder, a prepared dataset, a file, folder or 'pattern*' of conversations, a "
            "tokenizer.json, a GGUF or config file, or the name of a preset."
        ),
    ],
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Check every byte of a checkpoint, a folder of checkpoints or a dataset against the saved "
            "checksums. In checkpoints, also find non-finite numbers.",
        ),
    ] = False,
    consolidate: Annotated[
        str | None,
        typer.Option(
            help="Convert a sharded checkpoint to one .pt file.",
            metavar="FILE.pt",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="For conversations: gpt2 (default), a tokenizer.json or the folder with it.",
            metavar="NAME|FILE",
        ),
    ] = None,
    chat_format: Annotated[
        str | None,
        typer.Option(help="For conversations: " + describe("data.chat_format"), metavar="NAME"),
    ] = None,
    on_error: Annotated[
        str | None,
        typer.Option(help="For conversations: " + describe("data.on_error"), metavar="stop|skip"),
    ] = None,
    plot: Annotated[
        str | None,
        typer.Option(
            help="Draw the document lengths of a dataset as a PNG image. Needs matplotlib: "
            'pip install "atlas-llm\\[plot]".',
            metavar="FILE.png",
        ),
    ] = None,
) -> None:
    """Describe a checkpoint, dataset, tokenizer, GGUF or config file, or show what a model learns of conversations."""
    from atlas.cli import info_checkpoint
    from atlas.cli.terminal import print_facts
    from atlas.config.presets import preset_names

    file = Path(path)
    is_checkpoint = info_checkpoint.is_checkpoint(file)
    if consolidate:
        if not is_checkpoint:
            raise AtlasError(
                f"--consolidate: converts a sharded checkpoint; {path} is not a checkpoint: omit --consolidate"
            )
        return info_checkpoint.consolidate(file, local_path("--consolidate", consolidate))
    is_pattern = bool(glob.glob(path, recursive=True))
    if not (file.exists() or is_pattern or is_checkpoint or path in preset_names()):
        raise AtlasError(f"{path}: no such file or folder, and no preset ({', '.join(preset_names())})")
    if (file / "dataset.json").exists():
        from atlas.cli.info_dataset import show_dataset

        return show_dataset(file, verify=verify, plot=local_path("--plot", plot) if plot else None)
    if plot:
        raise AtlasError(
            f"--plot: draws the document lengths of a prepared dataset; {path} is not a dataset: omit --plot"
        )
    if not is_checkpoint and _is_of_conversations(file, chat_format):
        from atlas.cli.info_conversations import show_conversations

        return show_conversations(file, tokenizer, chat_format, on_error)
    options = {"--tokenizer": tokenizer, "--chat-format": chat_format, "--on-error": on_error}
    if given := next((option for option, value in options.items() if value), None):
        raise AtlasError(f"{given}: is for conversations; {path} has none: omit {given}")
    if is_checkpoint:
        facts: Facts = info_checkpoint.checkpoint_facts(file, verify=verify)
    elif file.is_dir():
        return info_checkpoint.print_folder(file, verify=verify)
    elif verify:
        raise AtlasError(f"--verify: reads checkpoints and datasets; {path} is neither: omit --verify")
    elif file.suffix == ".gguf":
        facts = _gguf(file)
    elif file.suffix == ".json":
        facts = _tokenizer(file)
    elif file.suffix in (".yaml", ".yml") or path in preset_names():
        facts = _config(path)
    else:
        raise AtlasError(
            f"{path}: is not a .pt, .gguf, .json or .yaml file, and not a folder that Atlas made; "
            f"to prepare text: atlas prepare --input {path}"
        )
    print_facts(facts)


def _is_of_conversations(path: Path, chat_format: str | None) -> bool:
    from atlas.data.sequences.conversations import holds_conversations
    from atlas.data.text.selection import AmbiguousRowsError

    if path.suffix in (".gguf", ".yaml", ".yml") or (path.is_dir() and any(path.glob("*.pt"))):
        return False
    try:
        return holds_conversations(path, chat_format)
    except AmbiguousRowsError:
        raise
    except AtlasError:
        return False  # another kind of file


def _tokenizer(path: Path) -> Facts:
    from atlas.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(path)
    yield "tokenizer", f"{path}: {tokenizer.name}"
    yield "vocabulary", f"{tokenizer.vocab_size:,} tokens, end of text is {tokenizer.eos_id}"
    yield "fingerprint", tokenizer.fingerprint


def _gguf(path: Path) -> Facts:
    """Yield the facts of a GGUF file. The file may come from another program."""
    from collections import Counter

    from atlas.export.gguf import open_gguf

    with open_gguf(path) as reader:
        fields = {name: field.contents() for name, field in reader.fields.items() if len(field.data) == 1}
        vocabulary = reader.fields.get("tokenizer.ggml.tokens")
        types = Counter(tensor.tensor_type.name.lower() for tensor in reader.tensors)
    yield "GGUF file", f"{path} ({path.stat().st_size / 1e6:,.1f} MB)"
    architecture = fields.get("general.architecture")
    for label, key in (
        ("name", "general.name"),
        ("architecture", "general.architecture"),
        ("layers", f"{architecture}.block_count"),
        ("width", f"{architecture}.embedding_length"),
        ("heads", f"{architecture}.attention.head_count"),
        ("context", f"{architecture}.context_length"),
        ("tokenizer", "tokenizer.ggml.model"),
        ("pre-tokenizer", "tokenizer.ggml.pre"),
    ):
        yield label, fields.get(key)
    yield "vocabulary", f"{len(vocabulary.data):,} tokens" if vocabulary else None
    yield "tensors", ", ".join(f"{count} {name}" for name, count in types.items())


def _config(name: str) -> Facts:
    from atlas.cli.info_checkpoint import model_facts
    from atlas.config.loader import read_yaml, resolve
    from atlas.config.presets import find_config

    path = find_config(name)
    config = resolve(read_yaml(path))
    yield "config", path
    if config.model.vocab_size:
        yield from model_facts(config.model)
    for section, values in config.model_dump(mode="json", exclude_none=True).items():
        if isinstance(values, dict):
            yield section, ", ".join(f"{key} {value}" for key, value in values.items())
        else:
            yield section, values
