"""`atlas info` for checkpoints: contents, integrity, and the checkpoint from which a run in the folder resumes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from atlas.cli.terminal import print_table, say
from atlas.config import ModelConfig
from atlas.config.loader import resolve
from atlas.errors import AtlasError
from atlas.inference.load import NOT_NEEDED
from atlas.model.cost import count_parameters
from atlas.progress import byte_progress
from atlas.training.checkpoint import convert
from atlas.training.checkpoint.load import read_contents
from atlas.training.checkpoint.locate import find_checkpoint, kind_of, list_checkpoints
from atlas.training.checkpoint.manifest import Manifest, checkpoint_size, read_manifest, shards_of, sidecar_of
from atlas.training.checkpoint.validate import holds_first_version, is_base, refuse_first_version
from atlas.training.checkpoint.verify import intact_alternative, verify_checkpoint


def is_checkpoint(file: Path) -> bool:
    """Whether `file` names a checkpoint. As in `find_checkpoint`, the name may have no suffix."""
    if file.suffix == ".pt":
        return True
    if file.suffix == ".json":
        return file.with_suffix(".pt").exists() or shards_of(file.with_suffix("")) is not None
    return shards_of(file) is not None or (not file.exists() and file.with_suffix(".pt").is_file())


def checkpoint_facts(path: Path, *, verify: bool) -> Iterator[tuple[str, Any]]:
    """Yield the contents and the state of a checkpoint. With `verify`, the state results from a check of every byte."""
    path = find_checkpoint(path)
    sidecar, shards, is_described = sidecar_of(path), shards_of(path), read_manifest(path, check_hash=False)
    if not is_described:
        refuse_first_version(path)
    if verify or (sidecar.exists() and not is_described):
        state = _verified(path)
    elif sidecar.exists():
        state = "size as saved; --verify compares every byte"
    elif shards:
        state = f"no {sidecar.name} beside the checkpoint, so Atlas cannot check the bytes"
    elif is_base(path):
        state = "the frozen weights of a LoRA run; --verify compares the checksums inside the file"
    else:
        state = f"no {sidecar.name} beside the checkpoint; --verify compares the checksums inside the file"
    contents = read_contents(
        path, remedy="atlas info --verify finds a checkpoint to use instead", without=NOT_NEEDED
    )
    config = resolve(contents["config"])
    if config.model.vocab_size is None:
        raise AtlasError(
            f"{path}: its config has no model.vocab_size; use a checkpoint that atlas train wrote"
        )
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
    yield from model_facts(config.model)
    if lora := config.lora.rank:
        base = is_described.base if is_described else None
        where = f"; the frozen weights are in {base.name}" if base else ""
        yield "LoRA", f"rank {lora}, on {', '.join(config.lora.targets)}{where}"
    yield "tokenizer", f"{tokenizer.get('name')}, {config.model.vocab_size:,} tokens"
    yield "trained on", contents["data"].get("train_data")
    yield "started from", contents.get("initialized_from")
    yield "machine", ", ".join(f"{key} {value}" for key, value in machine.items())


def model_facts(config: ModelConfig) -> Iterator[tuple[str, Any]]:
    """Yield the size and shape of a model."""
    yield "parameters", f"{count_parameters(config).total:,}"
    shape = f"{config.num_layers} layers × {config.hidden_size} × {config.num_heads} heads"
    yield "model", f"{shape}, context {config.max_seq_len}, vocabulary {config.vocab_size:,}"
    yield "architecture", config.gguf_architecture or f"for Atlas only: {config.train_only}"


def _rounded(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"


def _verified(path: Path) -> str:
    """Check every byte of a checkpoint and return the verdict. For a damaged checkpoint, raise `AtlasError` with the
    problem and the checkpoint to use instead."""
    with byte_progress(checkpoint_size(path), "reading") as advance:
        verdict = verify_checkpoint(path, advance=advance)
    if not verdict.problem:
        return verdict.line
    instead = intact_alternative(path)
    remedy = (
        f"use {instead} instead, which is intact"
        if instead
        else "no other checkpoint in the folder is intact"
    )
    raise AtlasError(f"{path}: {verdict.line}: {remedy}")


def print_folder(folder: Path, *, verify: bool) -> None:
    """Print a row for each checkpoint, the latest step first, and then the checkpoint that --resume auto uses."""
    manifests = {path: manifest for manifest, path in list_checkpoints(folder)}
    files = [*manifests, *sorted(path for path in folder.glob("*.pt") if path not in manifests)]
    if not files:
        raise AtlasError(
            f"{folder}: is neither a prepared dataset nor a folder with checkpoints; "
            "to list prepared datasets: atlas prepare --list; "
            f"to prepare text in this folder: atlas prepare --input {folder}"
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
        raise AtlasError(
            f"{folder}: none of its checkpoints is intact: use a copy of a checkpoint from elsewhere, or train again"
        )
    resumable = [path for path, manifest in manifests.items() if path not in broken and not manifest.slim]
    takes = f"takes {resumable[0].name}" if resumable else "finds no checkpoint to resume from"
    typer.echo(f"--resume auto {takes}" + ("" if verify else "; --verify compares every byte"))
    if unsound := [path.name for path, verdict in verdicts.items() if verdict.problem]:
        raise AtlasError(
            f"{folder}: {len(unsound)} of {len(files)} checkpoints are unsound ({', '.join(unsound)}): see the table; "
            "use an intact checkpoint to generate, export and resume"
        )


def _seen(path: Path, manifest: Manifest | None) -> str:
    """Return the state of a checkpoint, as known without reading its contents."""
    if manifest is None:
        if holds_first_version(path):
            return "of Atlas 1.x: convert it with atlas import"
        if is_base(path):
            return "the frozen weights of a LoRA run, which its checkpoints share"
        has_sidecar = sidecar_of(path).exists()
        return f"not the file that {sidecar_of(path).name} describes" if has_sidecar else "no sidecar"
    return "size as saved" + (", no optimizer state" if manifest.slim else "")


def consolidate(path: Path, target: Path) -> None:
    """Convert the sharded checkpoint at `path` to one file."""
    source = find_checkpoint(path)
    size = convert.consolidate(source, target, say=say)
    typer.echo(f"{target}: {size / 1e6:,.1f} MB, with all contents of {source}")
