"""`atlas info`: describe a file or folder on one screen."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atlas.errors import AtlasError

if TYPE_CHECKING:
    from atlas.training.checkpoint.manifest import Manifest

Facts = Iterable[tuple[str, Any]]


def info(
    path: Annotated[
        str,
        typer.Argument(
            help="A checkpoint, an output folder, a prepared dataset, a tokenizer.json, a GGUF or config file, "
            "or the name of a preset."
        ),
    ],
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Read every byte of a checkpoint, a folder of checkpoints or a dataset: compare it with the saved "
            "checksums, and look for numbers that are not finite.",
        ),
    ] = False,
    consolidate: Annotated[
        Path | None,
        typer.Option(
            help="Convert a sharded checkpoint to one file, for every command that takes a .pt.",
            metavar="FILE.pt",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw the document lengths of a dataset as a PNG picture. Needs matplotlib: "
            'pip install "atlas-llm[plot]".',
            metavar="FILE.png",
        ),
    ] = None,
) -> None:
    """Describe a checkpoint, dataset, tokenizer, GGUF or config file."""
    from atlas.cli.terminal import print_facts
    from atlas.config.presets import preset_names

    file = Path(path)
    is_checkpoint = _is_checkpoint(file)
    if consolidate:
        if not is_checkpoint:
            raise AtlasError(
                f"--consolidate: converts a sharded checkpoint to one file; {path} is none: leave it out"
            )
        return _consolidate(file, consolidate)
    if not file.exists() and not is_checkpoint and path not in preset_names():
        raise AtlasError(f"{path}: no such file or folder, and no preset ({', '.join(preset_names())})")
    if (file / "dataset.json").exists():
        from atlas.cli.info_dataset import show_dataset

        return show_dataset(file, verify=verify, plot=plot)
    if plot:
        raise AtlasError(
            f"--plot: draws the document lengths of a prepared dataset; {path} is none: leave it out"
        )
    if is_checkpoint:
        facts = _checkpoint(file, verify)
    elif file.is_dir():
        return _output_folder(file, verify)
    elif verify:
        raise AtlasError(f"--verify: reads checkpoints and datasets; {path} is neither: leave it out")
    elif file.suffix == ".gguf":
        facts = _gguf(file)
    elif file.suffix == ".json":
        facts = _tokenizer(file)
    elif file.suffix in (".yaml", ".yml") or path in preset_names():
        facts = _config(path)
    else:
        raise AtlasError(
            f"{path}: is none of .pt, .gguf, .json, .yaml, or a folder that Atlas made; "
            f"if it is text: atlas prepare --input {path}"
        )
    print_facts(facts)


def _checkpoint(path: Path, verify: bool) -> Facts:
    from atlas.config.loader import resolve
    from atlas.inference.load import NOT_NEEDED
    from atlas.training.checkpoint.load import read_contents
    from atlas.training.checkpoint.locate import find_checkpoint, kind_of
    from atlas.training.checkpoint.manifest import checkpoint_size, read_manifest, shards_of, sidecar_of
    from atlas.training.checkpoint.validate import refuse_first_version

    path = find_checkpoint(path)
    sidecar, shards, is_described = sidecar_of(path), shards_of(path), read_manifest(path, check_hash=False)
    if not is_described:
        refuse_first_version(path)
    if verify or (sidecar.exists() and not is_described):
        state = _verified(path)
    elif sidecar.exists():
        state = "size as saved; --verify compares every byte"
    elif shards:
        state = f"no {sidecar.name} beside it, so that its bytes cannot be compared"
    else:
        state = f"no {sidecar.name} beside it; --verify reads the checksums inside the file"
    contents = read_contents(path, remedy="atlas info --verify finds one to use instead", without=NOT_NEEDED)
    config = resolve(contents["config"])
    if config.model.vocab_size is None:
        raise AtlasError(f"{path}: its config has no model.vocab_size; take one that atlas train wrote")
    tokenizer, machine = contents["tokenizer"], contents.get("machine", {})
    in_shards = f" in {len(list(shards.iterdir()))} files of {shards.name}" if shards else ""
    yield "checkpoint", f"{path} ({checkpoint_size(path) / 1e6:,.1f} MB{in_shards})"
    yield "state", state
    yield "kind", kind_of(path) or "renamed"
    yield "step", f"{contents['step']:,} of {contents['horizon']:,}"
    yield "epoch", contents.get("epoch")
    yield "sequences", f"{contents['sequences_consumed']:,} consumed"
    yield "training loss", _rounded(contents.get("loss"))
    yield "validation loss", _rounded(contents.get("val_loss"))
    best = contents.get("best_loss")
    yield "best loss", _rounded(best) if math.isfinite(best or 0) else None
    yield from _model(config.model)
    yield "tokenizer", f"{tokenizer.get('name')}, {config.model.vocab_size:,} tokens"
    yield "trained on", contents["data"].get("train_data")
    yield "started from", contents.get("initialized_from")
    yield "machine", ", ".join(f"{key} {value}" for key, value in machine.items())


def _is_checkpoint(file: Path) -> bool:
    """Whether the name is that of a checkpoint; `find_checkpoint` also accepts names without a suffix."""
    from atlas.training.checkpoint.manifest import shards_of

    if file.suffix == ".pt":
        return True
    if file.suffix == ".json":
        return file.with_suffix(".pt").exists() or shards_of(file.with_suffix("")) is not None
    return shards_of(file) is not None or (not file.exists() and file.with_suffix(".pt").is_file())


def _consolidate(path: Path, target: Path) -> None:
    from atlas.progress import notify
    from atlas.training.checkpoint.convert import consolidate
    from atlas.training.checkpoint.locate import find_checkpoint

    source = find_checkpoint(path)
    size = consolidate(source, target, say=notify)
    typer.echo(f"{target}: {size / 1e6:,.1f} MB, all that {source} holds")


def _model(config: Any) -> Facts:
    from atlas.model.cost import count_parameters

    yield "parameters", f"{count_parameters(config).total:,}"
    shape = f"{config.num_layers} layers × {config.hidden_size} × {config.num_heads} heads"
    yield "model", f"{shape}, context {config.max_seq_len}, vocabulary {config.vocab_size:,}"
    yield "architecture", config.gguf_architecture or f"for Atlas only: {config.train_only}"


def _rounded(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"


def _verified(path: Path) -> str:
    """The verdict on an intact file. Raises `AtlasError` with the problem, and the file to use instead."""
    from atlas.progress import byte_progress
    from atlas.training.checkpoint.manifest import checkpoint_size
    from atlas.training.checkpoint.verify import intact_alternative, verify_checkpoint

    with byte_progress(checkpoint_size(path), "reading") as advance:
        verdict = verify_checkpoint(path, advance=advance)
    if not verdict.problem:
        return verdict.line
    instead = intact_alternative(path)
    remedy = (
        f"take {instead} instead, which is intact" if instead else "no other checkpoint beside it is intact"
    )
    raise AtlasError(f"{path}: {verdict.line}: {remedy}")


def _output_folder(folder: Path, verify: bool) -> None:
    """Print a row for each checkpoint, the latest step first, and the one that --resume auto uses."""
    from atlas.cli.terminal import print_table
    from atlas.progress import byte_progress
    from atlas.training.checkpoint.locate import list_checkpoints
    from atlas.training.checkpoint.manifest import checkpoint_size
    from atlas.training.checkpoint.verify import verify_checkpoint

    manifests = {path: manifest for manifest, path in list_checkpoints(folder)}
    files = [*manifests, *sorted(path for path in folder.glob("*.pt") if path not in manifests)]
    if not files:
        raise AtlasError(
            f"{folder}: is neither a prepared dataset nor a folder with checkpoints; "
            f"what is prepared: atlas prepare --list; if it holds text: atlas prepare --input {folder}"
        )
    with byte_progress(sum(map(checkpoint_size, files)), "reading") as advance:
        verdicts = {path: verify_checkpoint(path, advance=advance) for path in files if verify}
    rows = [("name", "step", "kind", "loss", "validation", "size", "state")]
    for path in files:
        manifest, size = manifests.get(path), f"{checkpoint_size(path) / 1e6:,.1f} MB"
        facts = ("", "", "", "")
        if manifest:
            losses = _rounded(manifest.loss), _rounded(manifest.val_loss)
            facts = (f"{manifest.step:,}", manifest.kind, *losses)
        rows.append((path.name, *facts, size, verdicts[path].line if verify else _seen(path, manifest)))
    print_table(rows, right={1, 3, 4, 5})
    broken = {path for path, verdict in verdicts.items() if verdict.broken}
    if broken == set(files):
        raise AtlasError(f"{folder}: none of its checkpoints is intact: take a copy of one, or train again")
    resumable = [path for path, manifest in manifests.items() if path not in broken and not manifest.slim]
    takes = f"takes {resumable[0].name}" if resumable else "finds none to resume from"
    typer.echo(f"--resume auto {takes}" + ("" if verify else "; --verify compares every byte"))
    if unsound := [path.name for path, verdict in verdicts.items() if verdict.problem]:
        raise AtlasError(
            f"{folder}: {len(unsound)} of {len(files)} checkpoints are unsound ({', '.join(unsound)}): see the table; "
            "generate, export and resume from another"
        )


def _seen(path: Path, manifest: Manifest | None) -> str:
    """The state of a checkpoint as far as it is known without reading the file."""
    from atlas.training.checkpoint.manifest import sidecar_of
    from atlas.training.checkpoint.validate import holds_first_version

    if manifest is None:
        if holds_first_version(path):
            return "of the first Atlas (1.x): atlas import"
        has_sidecar = sidecar_of(path).exists()
        return f"not the file that {sidecar_of(path).name} describes" if has_sidecar else "no sidecar"
    return "size as saved" + (", no optimizer state" if manifest.slim else "")


def _tokenizer(path: Path) -> Facts:
    from atlas.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(path)
    yield "tokenizer", f"{path}: {tokenizer.name}"
    yield "vocabulary", f"{tokenizer.vocab_size:,} tokens, end of text is {tokenizer.eos_id}"
    yield "fingerprint", tokenizer.fingerprint


def _gguf(path: Path) -> Facts:
    """Describe any GGUF file, also one that Atlas did not write."""
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
