"""A dataset folder that appears whole or not at all, and never in place of something else."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from atlas.data.shards import is_prepared
from atlas.errors import AtlasError

_OWN_FILES = re.compile(r"dataset\.json|tokenizer\.json|(train|val)-\d{5,}(\.docs)?\.npy")


def refuse_foreign(output: Path) -> None:
    """Raises `AtlasError` unless `output` is free, empty, or an older dataset and nothing besides."""
    if output.is_dir():
        foreign = sorted(file.name for file in output.iterdir() if not _OWN_FILES.fullmatch(file.name))
        if foreign:
            raise AtlasError(
                f"{output}: holds other files ({foreign[0]}); choose another folder with --output"
            )
        if any(output.iterdir()) and not is_prepared(output):
            raise AtlasError(
                f"{output}: is not empty and no prepared dataset; choose another folder with --output"
            )
    in_the_way = next((place for place in (output, *output.parents) if place.is_file()), None)
    if in_the_way:
        raise AtlasError(f"{in_the_way}: is a file; choose a folder with --output")


@contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """A new folder beside `output`, which takes its place at the end; gone if anything goes wrong."""
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(output)
    made = output.with_name(f".{output.name}.preparing-{os.getpid()}")
    made.mkdir()
    try:
        yield made
        refuse_foreign(output)
        if output.exists():
            replaced = output.with_name(f".{output.name}.replaced-{os.getpid()}")
            output.rename(replaced)
            made.rename(output)
            shutil.rmtree(replaced)
        else:
            made.rename(output)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _remove_abandoned(output: Path) -> None:
    """What processes that were killed left behind."""
    for folder in output.parent.glob(f".{output.name}.*-*"):
        match = re.fullmatch(r"\.(preparing|replaced)-(\d+)", folder.name.removeprefix(f".{output.name}"))
        if match and not psutil.pid_exists(int(match[2])):
            shutil.rmtree(folder, ignore_errors=True)
