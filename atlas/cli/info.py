"""`atlas info`: what a file or folder is, in one screen."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from atlas.errors import AtlasError

Facts = Iterable[tuple[str, Any]]


def info(
    path: Annotated[
        str,
        typer.Argument(
            help="A checkpoint, an output folder, a prepared dataset, a tokenizer.json, a GGUF or config file, "
            "or the name of a preset."
        ),
    ],
) -> None:
    """Say what a checkpoint, dataset, tokenizer, GGUF or config file is."""
    from atlas.cli.terminal import printable
    from atlas.config.presets import preset_names

    file = Path(path)
    if not file.exists() and file.suffix != ".pt" and path not in preset_names():
        raise AtlasError(f"{path}: no such file or folder, and no preset ({', '.join(preset_names())})")
    if file.is_dir():
        facts = _dataset(file) if (file / "dataset.json").exists() else _output_folder(file)
    elif file.suffix == ".pt" or (file.suffix == ".json" and file.with_suffix(".pt").exists()):
        file = file.with_suffix(".pt")
        facts = _checkpoint(file)
    elif file.suffix == ".gguf":
        facts = _gguf(file)
    elif file.suffix == ".json":
        facts = _tokenizer(file)
    elif file.suffix in (".yaml", ".yml") or path in preset_names():
        facts = _config(path)
    else:
        raise AtlasError(f"{path}: is none of .pt, .gguf, .json, .yaml, or a folder that Atlas made")
    rows = [(name, str(value)) for name, value in facts if value not in (None, "")]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        typer.echo(f"{name:<{width}}  {printable(value)}")


def _checkpoint(path: Path) -> Facts:
    from atlas.config.loader import resolve
    from atlas.training.checkpoint import find_checkpoint, kind_of, load_checkpoint

    path = find_checkpoint(path)
    notes: list[str] = []
    contents = load_checkpoint(path, say=notes.append)
    config = resolve(contents["config"])
    if config.model.vocab_size is None:
        raise AtlasError(f"{path}: its config has no model.vocab_size; take one that atlas train wrote")
    tokenizer, machine = contents["tokenizer"], contents.get("machine", {})
    yield "checkpoint", f"{path} ({path.stat().st_size / 1e6:,.1f} MB), whole: every byte checked"
    yield "", notes[0] if notes else None
    yield "kind", kind_of(path) or "renamed"
    yield "step", f"{contents['step']:,} of {contents['horizon']:,}"
    yield "epoch", contents.get("epoch")
    yield "sequences", f"{contents['sequences_consumed']:,} consumed"
    yield "training loss", _rounded(contents.get("loss"))
    yield "validation loss", _rounded(contents.get("val_loss"))
    best = contents.get("best_loss")
    yield "best loss", _rounded(best) if best is not None and math.isfinite(best) else None
    yield from _model(config.model)
    yield "tokenizer", f"{tokenizer.get('name')}, {config.model.vocab_size:,} tokens"
    yield "trained on", contents["data"].get("train_data")
    yield "started from", contents.get("initialized_from")
    yield "machine", ", ".join(f"{key} {value}" for key, value in machine.items())


def _model(config: Any) -> Facts:
    from atlas.planning import count_parameters

    yield "parameters", f"{count_parameters(config).total:,}"
    yield (
        "model",
        f"{config.num_layers} layers × {config.hidden_size} × {config.num_heads} heads, context {config.max_seq_len}, "
        f"vocabulary {config.vocab_size:,}",
    )


def _rounded(loss: float | None) -> str | None:
    return None if loss is None else f"{loss:.4f}"


def _output_folder(folder: Path) -> Facts:
    from atlas.training.checkpoint import CheckpointManager

    found = CheckpointManager(folder).found()
    if not found:
        raise AtlasError(f"{folder}: is neither a prepared dataset nor a folder with checkpoints")
    yield "output folder", folder
    for manifest, path in found:
        losses = f"loss {_rounded(manifest.loss)}" if manifest.loss is not None else ""
        if manifest.val_loss is not None:
            losses += f", validation {_rounded(manifest.val_loss)}"
        size = sum(entry.size for entry in manifest.files)
        yield path.name, f"step {manifest.step:,}, epoch {manifest.epoch}, {losses}, {size / 1e6:,.1f} MB"


def _dataset(folder: Path) -> Facts:
    from atlas.data import open_dataset

    dataset = open_dataset(folder, verify=True)
    yield "dataset", f"{folder}, whole: every byte checked"
    state = dataset.tokenizer_state
    yield "tokenizer", f"{state['name']}, {state['vocab_size']:,} tokens"
    for name in ("train", "val"):
        if stream := dataset.split(name):
            yield (
                name,
                f"{stream.num_documents:,} documents, {stream.num_tokens:,} tokens, {stream.num_bytes:,} bytes, "
                f"{stream.num_bytes / stream.num_tokens:.2f} bytes per token",
            )
    for note in dataset.manifest.notes:
        yield "note", note
    yield "fingerprint", dataset.fingerprint


def _tokenizer(path: Path) -> Facts:
    from atlas.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(path)
    yield "tokenizer", f"{path}: {tokenizer.name}"
    yield "vocabulary", f"{tokenizer.vocab_size:,} tokens, end of text is {tokenizer.eos_id}"
    yield "fingerprint", tokenizer.fingerprint


def _gguf(path: Path) -> Facts:
    """Any GGUF file, also one that Atlas did not write."""
    from collections import Counter

    import gguf

    from atlas.export.gguf_header import check_header

    try:
        check_header(path)
        reader = gguf.GGUFReader(path)
        small = {name: field for name, field in reader.fields.items() if len(field.data) == 1}
        fields = {name: field.contents() for name, field in small.items()}
        vocabulary = reader.fields.get("tokenizer.ggml.tokens")
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[-1].strip()
        raise AtlasError(
            f"{path}: is not a whole GGUF file: {reason:.200}; download or export it again"
        ) from None
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
    types = Counter(tensor.tensor_type.name.lower() for tensor in reader.tensors)
    yield "tensors", ", ".join(f"{count} {name}" for name, count in types.items())


def _config(name: str) -> Facts:
    from atlas.config.loader import read_yaml, resolve
    from atlas.config.presets import find_config

    path = find_config(name)
    config = resolve(read_yaml(path))
    yield "config", path
    if config.model.vocab_size:
        yield from _model(config.model)
    for section, values in config.model_dump(mode="json", exclude_none=True).items():
        if isinstance(values, dict):
            yield section, ", ".join(f"{key} {value}" for key, value in values.items())
        else:
            yield section, values
