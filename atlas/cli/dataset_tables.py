"""What `atlas prepare` and `atlas info` both print about a dataset: what it was made from, and some of its texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import typer

from atlas.cli.terminal import print_table, printable
from atlas.data.shards import PreparedDataset
from atlas.errors import AtlasError
from atlas.reporting.dataset_statistics import sample_documents
from atlas.tokenizer import Tokenizer

_MOST_KINDS = 12


def print_kinds(source: Mapping[str, Any], *, err: bool = False) -> None:
    """Print what a dataset was made from: the files, documents and characters of each kind of file, largest first."""
    try:
        rows = [(str(kind), *map(int, counts)) for kind, counts in source["kinds"].items()]
        numbers = np.array([counts for _, *counts in rows], np.int64).reshape(len(rows), 3)
    except (LookupError, AttributeError, TypeError, ValueError, OverflowError):
        return  # made by an earlier version, or by another program
    order = (-numbers[:, 2]).argsort(kind="stable")
    names, numbers = [rows[place][0] for place in order], numbers[order]
    if len(names) > _MOST_KINDS:
        last = _MOST_KINDS - 1
        names, numbers = [*names[:last], "others"], np.vstack([numbers[:last], numbers[last:].sum(0)])
    total = max(1, int(numbers[:, 2].sum()))
    typer.echo("\nread, before cleaning", err=err)
    header = ("kind of file", "files", "documents", "characters", "share")
    table = [
        (name, f"{files:,}", f"{documents:,}", f"{characters:,}", f"{characters / total:.1%}")
        for name, (files, documents, characters) in zip(names, numbers.tolist(), strict=True)
    ]
    print_table([header, *table], right={1, 2, 3, 4}, err=err)


def print_documents(dataset: PreparedDataset, *, count: int, err: bool = False) -> Tokenizer | None:
    """Print the beginnings of `count` random documents of the training split, and return the dataset's tokenizer. If
    the tokenizer cannot be read, print why, and return None."""
    state, stream = dataset.tokenizer_state, dataset.train
    tokenizer, reason = None, f"tokenizer {state['name']} is custom code, which a file does not contain"
    if state.get("kind") != "custom":
        try:
            tokenizer = dataset.tokenizer()
        except AtlasError as error:
            reason = str(error)
    if tokenizer is None:
        typer.echo("\n" + printable(f"texts cannot be shown: {reason}"), err=err)
        return None
    excerpts = sample_documents(stream, tokenizer, count=count)
    what = "1 random document" if len(excerpts) == 1 else f"{len(excerpts)} random documents"
    typer.echo(f"\n{what} of train, each after its number of tokens", err=err)
    print_table(
        [(f"{excerpt.tokens:,}", printable(excerpt.text)) for excerpt in excerpts], right={0}, err=err
    )
    return tokenizer
