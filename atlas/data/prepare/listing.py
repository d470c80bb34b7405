"""The data in `data/`: prepared datasets under `processed`, text to prepare under `raw`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from atlas.data.shards import MANIFEST, Manifest, is_prepared, read_manifest
from atlas.data.text.sources import is_text_or_archive
from atlas.errors import AtlasError


@dataclass(frozen=True)
class Listed:
    """A dataset, or text, which has no manifest. `problem` is why a dataset cannot be used."""

    path: Path
    num_bytes: int
    manifest: Manifest | None = None
    problem: str | None = None


def list_data(root: Path) -> list[Listed]:
    """Everything below `root` (a `data` folder) that can be trained on or prepared, datasets first."""
    folders = sorted(folder for folder in _entries(root / "processed") if folder.is_dir())
    datasets = [_dataset(folder) for folder in folders if is_prepared(folder)]
    texts = [
        Listed(path, path.stat().st_size)
        for place in (root / "raw", *(folder for folder in folders if not is_prepared(folder)))
        for path in sorted(place.rglob("*"))
        if path.is_file() and is_text_or_archive(path)
    ]
    return datasets + texts


def _entries(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if not entry.name.startswith(".")] if folder.is_dir() else []


def _dataset(folder: Path) -> Listed:
    size = sum(file.stat().st_size for file in folder.iterdir())
    try:
        return Listed(folder, size, read_manifest(folder / MANIFEST))
    except AtlasError as error:
        return Listed(folder, size, problem=str(error))
