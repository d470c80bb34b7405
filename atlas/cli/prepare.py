"""`atlas prepare`: text → token shards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atlas.cli.choose_text import ORIGIN
from atlas.cli.terminal import ask_or_none, print_table, printable, say
from atlas.config.loader import describe

if TYPE_CHECKING:
    from atlas.data.prepare.pipeline import Summary
    from atlas.data.shards import Manifest

_SHOWN = 5
"""Number of documents that are printed, so that a user sees what the text became."""
_INPUT_HELP = (
    "Text, JSON, a table (CSV, Parquet, Arrow), HTML, a PDF, an EPUB or a MediaWiki dump, also compressed, an archive, "
    "a folder, a 'pattern*', an fsspec URL, or - for standard input. The content decides, not the ending. The option "
    "may be repeated."
)
_OUTPUT_HELP = (
    "The dataset's folder. Default: data/processed/wikipedia for the Kaggle archive, else data/processed/<name of the "
    "first input>."
)
_TOKENIZER_HELP = "gpt2 (default), a tokenizer.json or the folder with it, or package.module:factory."
_TRAIN_HELP = "Train a byte-level BPE of N tokens on the training documents."
_FIELD_HELP = "The field of a row, or the Parquet column, that contains the text. Default: text."
_SEPARATOR_HELP = (
    "What separates the documents of a text file: a string such as '###' or '\\n\\n\\n', the word line, or re:PATTERN. "
    "Default: <|endoftext|>, or lines that are %, if the text has them."
)
_ENCODING_HELP = "The encoding of all text files, such as cp1252. Default: UTF-8, or what the bytes show."
_ERROR_HELP = (
    "stop: end at the first row or file that cannot be read. skip: leave out any number of them. Default: leave out a "
    "few, and name them in left_out.txt."
)
_INCLUDE_HELP = (
    "Read only files of a folder or archive that match, such as '*.txt'. The option may be repeated."
)
_EXCLUDE_HELP = (
    "Leave out files of a folder or archive that match, such as '*.css'. The option may be repeated."
)
_CLEAN_HELP = (
    "The cleaning steps, separated by commas: nfc, control, whitespace, duplicates; or the word none."
)
_NEAR_HELP = (
    "Also leave out near-duplicates: documents whose word 5-grams have a Jaccard similarity of about 0.8 or more with "
    "an earlier document (MinHash). This option is slow and needs about 3 KB of memory per document."
)
_WORKERS_HELP = (
    "The number of tokenizing processes. Default: one per core. The result is the same for any number."
)
_ENGINE_HELP = (
    "local: tokenize on this machine. ray: tokenize on a Ray cluster, in which each machine needs the input at the "
    "same path."
)
_TRUST_HELP = (
    "Also read an archive that unpacks to more than 1 TB or to more than 200 times its own size, or that contains "
    "more than a million files."
)


def prepare(
    inputs: Annotated[
        list[str] | None,  # a Path would turn s3:// into s3:/
        typer.Option("--input", help=_INPUT_HELP, metavar="PATH"),
    ] = None,
    output: Annotated[str | None, typer.Option(help=_OUTPUT_HELP, metavar="DIR", show_default=False)] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help=_TOKENIZER_HELP, metavar="NAME|FILE", show_default=False)
    ] = None,
    train_tokenizer: Annotated[
        int | None, typer.Option(help=_TRAIN_HELP, metavar="N", show_default=False)
    ] = None,
    val_fraction: Annotated[
        float, typer.Option(help=describe("data.val_fraction"), min=0, max=0.99, metavar="F")
    ] = 0.05,
    text_field: Annotated[
        str | None, typer.Option(help=_FIELD_HELP, metavar="NAME", show_default=False)
    ] = None,
    separator: Annotated[
        str | None, typer.Option(help=_SEPARATOR_HELP, metavar="TEXT", show_default=False)
    ] = None,
    encoding: Annotated[
        str | None, typer.Option(help=_ENCODING_HELP, metavar="NAME", show_default=False)
    ] = None,
    on_error: Annotated[
        str | None, typer.Option(help=_ERROR_HELP, metavar="stop|skip", show_default=False)
    ] = None,
    include: Annotated[list[str] | None, typer.Option(help=_INCLUDE_HELP, metavar="PATTERN")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help=_EXCLUDE_HELP, metavar="PATTERN")] = None,
    clean: Annotated[
        str, typer.Option(help=_CLEAN_HELP, metavar="STEP,…")
    ] = "nfc,control,whitespace,duplicates",
    min_chars: Annotated[
        int, typer.Option(help="Leave out documents with fewer than N characters.", metavar="N")
    ] = 1,
    near_dedup: Annotated[bool, typer.Option("--near-dedup", help=_NEAR_HELP)] = False,
    workers: Annotated[int | None, typer.Option(help=_WORKERS_HELP, metavar="N", show_default=False)] = None,
    engine: Annotated[str, typer.Option(help=_ENGINE_HELP, metavar="local|ray")] = "local",
    trust_archives: Annotated[bool, typer.Option("--trust-archives", help=_TRUST_HELP)] = False,
    show_list: Annotated[
        bool, typer.Option("--list", help="List the data in data/processed and data/raw.")
    ] = False,
) -> None:
    """Turn text into token shards that `atlas train` reads."""
    if show_list:
        return _print_list(Path("data"))

    from atlas.data.prepare.cleaning import Cleaning
    from atlas.data.prepare.pipeline import prepare as make_dataset
    from atlas.data.text.documents import Reading
    from atlas.errors import AtlasError
    from atlas.tokenizer import Tokenizer

    if not inputs:
        raise AtlasError(
            f"--input: is missing; give text, for example data/raw/archive.zip from {ORIGIN}, "
            "or --list to see the existing data"
        )
    summary = make_dataset(
        inputs,
        output,
        Tokenizer.resolve(tokenizer) if tokenizer else None,
        train_tokenizer=train_tokenizer,
        val_fraction=val_fraction,
        reading=Reading(text_field or "text", text_field is not None, separator, encoding, on_error),
        include=include or (),
        exclude=exclude or (),
        cleaning=Cleaning(Cleaning.parse(clean), min_chars, near_dedup),
        workers=workers,
        engine=engine,
        trust_archives=trust_archives,
        ask=ask_or_none(),
    )
    _print_summary(summary)


def _print_summary(summary: Summary) -> None:
    from atlas.cli.dataset_tables import print_documents, print_kinds
    from atlas.data.text.report import counted, megabytes

    manifest, folder = summary.dataset.manifest, summary.dataset.folder
    if summary.unchanged:
        say("unchanged: the same text, tokenizer and options as before; nothing to do")
    say(*map(printable, summary.notes))
    for step, record in manifest.cleaning.items():
        what = "changed" if step in ("nfc", "control", "whitespace") else "left out"
        if record.documents:
            say(
                f"cleaning: {step}: {counted(record.documents, 'document')} {what}, "
                f"{counted(abs(record.characters), 'character')} {'more' if record.characters < 0 else 'fewer'}"
            )
    if "duplicates" in manifest.cleaning:
        kept = sum(split.documents for split in manifest.splits.values())
        say(
            f"cleaning: hashes to find duplicates: {counted(kept, 'document')}, 16 bytes each, {megabytes(16 * kept)}"
        )
    print_kinds(manifest.source, err=True)
    print_documents(summary.dataset, count=_SHOWN, err=True)
    say("")
    typer.echo(f"{folder}: {_tokenizer(manifest)}")
    for name, split in manifest.splits.items():
        typer.echo(
            f"{name:<6}{split.documents:>12,} {'document ' if split.documents == 1 else 'documents'} "
            f"{split.tokens:>16,} tokens {split.bytes:>16,} bytes  {split.bytes / split.tokens:.2f} bytes per token"
        )
    # The larger presets require GPT-2's vocabulary; the nano presets accept any vocabulary.
    larger = " (on a GPU: --config small)" if manifest.tokenizer["name"] == "gpt2" else ""
    say(f"train on this dataset: atlas train --config modern-nano --train-data {folder}{larger}")
    say(f"see for which models this dataset is large enough: atlas info {folder}")


def _print_list(root: Path) -> None:
    from atlas.data.prepare.listing import list_data

    listed = list_data(root)
    if not listed:
        typer.echo(f"nothing in {root / 'processed'} or {root / 'raw'}; the FAQ's archive is at {ORIGIN}")
    rows = [
        (str(path), f"{size / 1e6:,.1f} MB", found if isinstance(found, str) else _contents(found))
        for path, size, found in listed
    ]
    print_table(rows, right={1})


def _contents(manifest: Manifest) -> str:
    splits = (
        f"{name} {split.documents:,} documents {split.tokens:,} tokens"
        for name, split in manifest.splits.items()
    )
    return ", ".join([*splits, _tokenizer(manifest)])


def _tokenizer(manifest: Manifest) -> str:
    return f"tokenizer {manifest.tokenizer['name']} ({manifest.tokenizer['vocab_size']:,} tokens)"
