"""A dataset folder that appears whole or not at all, and never in place of something else; the cache folder."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import platformdirs

from atlas.data.progress import say
from atlas.data.shards import MANIFEST, is_prepared
from atlas.errors import AtlasError
from atlas.files import flush_folder, flush_to_disk, try_to_lock

_OWN_FILES = re.compile(r"dataset\.json|tokenizer\.json|(train|val)-\d{5,}(\.docs)?\.npy")


def cache_folder() -> Path:
    """The user's cache of Atlas, or the folder that `ATLAS_CACHE_DIR` names."""
    return Path(os.environ.get("ATLAS_CACHE_DIR") or platformdirs.user_cache_dir("atlas", appauthor=False))


def refuse_foreign(output: Path) -> None:
    """Raises `AtlasError` unless `output` is free, empty, or an older dataset and nothing besides."""
    names = sorted(os.listdir(output)) if output.is_dir() else []
    foreign = [name for name in names if not _OWN_FILES.fullmatch(name)]
    if foreign:
        raise AtlasError(f"{output}: holds other files ({foreign[0]}); choose another folder with --output")
    if names and MANIFEST not in names:
        raise AtlasError(
            f"{output}: is not empty and no prepared dataset; choose another folder with --output"
        )
    in_the_way = next((place for place in (output, *output.parents) if place.is_file()), None)
    if in_the_way:
        raise AtlasError(f"{in_the_way}: is a file; choose a folder with --output")


@contextmanager
def alone(output: Path) -> Iterator[None]:
    """Waits until no other process prepares `output`, and keeps others waiting until it is left.

    The lock dies with its process. Its file is removed, and so are the folders above `output` that were
    made for it, unless `output` is there in the end.
    """
    output = output.absolute()
    made = [folder for folder in output.parents if not folder.exists()]
    path = output.with_name(f".{output.name}.lock")
    lock, said = None, False
    try:
        while (lock := try_to_lock(path)) is None:
            if not said:
                say(f"{output}: another process prepares it; waiting for that to end")
                said = True
            time.sleep(0.1)
        yield
    finally:
        with suppress(OSError):
            if lock and os.name == "nt":  # where an open file cannot be removed
                lock.close()
            if lock:
                path.unlink()
                lock.close()
            for folder in made:
                folder.rmdir()


@contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """A new folder beside `output`, which takes its place at the end; gone if anything goes wrong.

    Only who is `alone` with `output` may call this.
    """
    output = output.absolute()
    clean_up(output)
    made, replaced = (
        output.with_name(f".{output.name}.{role}-{secrets.token_hex(4)}")
        for role in ("preparing", "replaced")
    )
    try:
        made.mkdir()
        yield made
        _flush(made)
        refuse_foreign(output)
        if output.exists():
            output.rename(replaced)
        made.rename(output)
    finally:
        if replaced.exists() and not output.exists():
            replaced.rename(output)
        shutil.rmtree(made, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def clean_up(output: Path) -> None:
    """Remove what a killed process left; put back what it had only just moved out of the way."""
    own_name = re.compile(rf"\.{re.escape(output.name)}\.(preparing|replaced)-[0-9a-f]+")
    for folder in output.parent.iterdir():
        match = own_name.fullmatch(folder.name)
        if match and match[1] == "replaced" and is_prepared(folder) and not output.exists():
            folder.rename(output)
        elif match:
            shutil.rmtree(folder, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Bring every file to the disk, so that the folder's new name means all of it after a power cut too."""
    for path in folder.iterdir():
        with path.open("rb+") as file:
            flush_to_disk(file)
    flush_folder(folder)
