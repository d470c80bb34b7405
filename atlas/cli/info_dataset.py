"""`atlas info DATASET`: contents of a prepared dataset, suitable model sizes, and sample documents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

from atlas.cli.dataset_tables import print_documents, print_kinds
from atlas.cli.terminal import figure, print_facts, print_table, printable
from atlas.data.shards import PreparedDataset, TokenStream, open_dataset
from atlas.errors import AtlasError
from atlas.planning.advice import GOOD_PASSES, TOKENS_PER_PARAMETER, advise
from atlas.progress import byte_progress
from atlas.reporting.dataset_figure import draw_lengths
from atlas.reporting.dataset_statistics import (
    SAMPLE_TOKENS,
    STRETCH_TOKENS,
    Lengths,
    measure_lengths,
    worst_stretches,
)
from atlas.reporting.targets import check_png
from atlas.tokenizer.byte_level import ByteLevelTokenizer
from atlas.training.memory.presets import ASSUMED_VOCABULARY


def show_dataset(folder: Path, *, verify: bool, plot: Path | None) -> None:
    """Print one screen about the dataset. If `plot` is given, write a PNG of the document lengths to `plot`."""
    if plot:
        check_png("--plot", plot)
    total = sum(file.stat().st_size for file in folder.glob("*.npy"))
    with byte_progress(total if verify else 0, "reading") as advance:
        dataset = open_dataset(folder, verify=verify, advance=advance)
    intact = f"intact: {total:,} bytes, sha256 as saved"
    state = intact if verify else "sizes as saved; --verify compares every byte"
    splits = {name: stream for name in ("train", "val") if (stream := dataset.split(name))}
    lengths = {name: measure_lengths(stream) for name, stream in splits.items() if stream.num_documents}
    print_facts([("dataset", folder), ("state", state), *_facts(dataset, splits, lengths)])
    vocab_size = int(dataset.tokenizer_state["vocab_size"])
    print_kinds(dataset.manifest.source)
    _print_advice(splits["train"].num_tokens, vocab_size)
    _print_texts(dataset, splits["train"])
    if plot and lengths:
        _draw(plot, folder, lengths, vocab_size)
    elif plot:
        raise AtlasError(f"--plot: {folder}: no document begins in it, so there are no lengths to draw")


def _facts(
    dataset: PreparedDataset, splits: Mapping[str, TokenStream], lengths: Mapping[str, Lengths]
) -> Iterator[tuple[str, Any]]:
    state = dataset.tokenizer_state
    yield "tokenizer", f"{state['name']}, {state['vocab_size']:,} tokens"
    for name, stream in splits.items():
        counts = (
            f"{stream.num_documents:,} documents, {stream.num_tokens:,} tokens, {stream.num_bytes:,} bytes"
        )
        yield name, f"{counts}, {stream.num_bytes / stream.num_tokens:.2f} bytes per token"
    for name, split in lengths.items():
        measured = split.documents
        sampled = f"; {measured:,} documents measured" if measured < splits[name].num_documents else ""
        middle = f"median {split.median:,.10g} tokens, longest {split.longest:,}"
        yield f"{name} lengths", f"{middle}, end of text included{sampled}"
    yield from cleaning_facts(dataset.manifest.model_dump(include={"cleaning"})["cleaning"])
    for note in dataset.manifest.notes:
        yield "note", note
    yield "fingerprint", dataset.fingerprint


def cleaning_facts(cleaning: Mapping[str, Mapping[str, int]]) -> Iterator[tuple[str, str]]:
    """Yield a row for each cleaning step that removed text, and one row that names all other steps."""
    for step, removed in cleaning.items():
        if any(removed.values()):
            counts = ", ".join(f"{count:,} {what}" for what, count in removed.items() if count)
            yield "removed", f"{step}: {counts}"
    if idle := [step for step, removed in cleaning.items() if not any(removed.values())]:
        yield "removed", f"nothing by {', '.join(idle)}"


def _print_advice(num_tokens: int, vocab_size: int) -> None:
    advice = advise(num_tokens, vocab_size=vocab_size)
    fitting = max((row for row in advice if row.fits), key=lambda row: row.parameters, default=None)
    best = f"the largest preset that fits is {fitting.preset}" if fitting else "every preset is too large"
    typer.echo(f"\nmodel size for this text: {best}")
    header = ("preset", "parameters", "tokens per parameter", f"passes to {TOKENS_PER_PARAMETER}", "")
    rows = [
        (row.preset, f"{row.parameters:,}", figure(row.tokens_per_parameter), figure(row.passes), row.verdict)
        for row in advice
    ]
    print_table([header, *rows], right={1, 2, 3})
    typer.echo(
        f"{TOKENS_PER_PARAMETER} tokens per parameter make the best use of the training time "
        "(Hoffmann et al. 2022, arXiv:2203.15556); "
        f"each pass over a text beyond about {GOOD_PASSES} helps less (Muennighoff et al. 2023, arXiv:2305.16264)"
    )
    if fitting:
        return
    smallest, own = advice[0], advise(num_tokens, vocab_size=ASSUMED_VOCABULARY)[0]
    wanted = TOKENS_PER_PARAMETER * smallest.parameters // GOOD_PASSES
    remedy = (
        f"what to do: {smallest.preset} needs about {wanted:,} tokens, so add text; or train this preset anyway and "
        "use atlas_best.pt, which is saved before the model memorizes the text"
    )
    if own.parameters < smallest.parameters / 2:
        remedy += (
            f"; or prepare the text with its own vocabulary (--train-tokenizer {ASSUMED_VOCABULARY}), with which "
            f"{own.preset} has {own.parameters:,} parameters"
        )
    typer.echo(remedy)


def _print_texts(dataset: PreparedDataset, stream: TokenStream) -> None:
    """Print ten random documents of the training split, and the stretches that the tokenizer compresses worst."""
    tokenizer = print_documents(dataset, count=10)
    if isinstance(tokenizer, ByteLevelTokenizer):
        searched = f", in {SAMPLE_TOKENS:,} tokens that are evenly spread over the split"
        of_all = searched if stream.num_tokens > SAMPLE_TOKENS else ""
        typer.echo(f"\nworst compressed stretches of {STRETCH_TOKENS} tokens, by bytes per token{of_all}")
        stretches = worst_stretches(stream, tokenizer)
        rows = [(f"{stretch.bytes_per_token:.2f}", printable(stretch.text)) for stretch in stretches]
        print_table(rows or [("none: every document is shorter",)])


def _draw(path: Path, folder: Path, lengths: Mapping[str, Lengths], vocab_size: int) -> None:
    contexts: dict[int, list[str]] = {}
    for row in advise(1, vocab_size=vocab_size):
        contexts.setdefault(row.max_seq_len, []).append(row.preset)
    names = {tokens: ", ".join(presets) for tokens, presets in contexts.items()}
    draw_lengths(path, lengths, title=f"Document lengths in {folder}", contexts=names)
    typer.echo(f"\ndocument lengths: {path}")
