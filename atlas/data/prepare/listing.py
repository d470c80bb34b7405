"""The data in `data/`: prepared datasets under `processed`, text to prepare under `raw`."""

from __future__ import annotations

from pathlib import Path

from atlas.data.shards import MANIFEST, Manifest, is_prepared, read_manifest
from atlas.data.text.search import is_text_or_archive
from atlas.errors import AtlasError


def list_data(root: Path) -> list[tuple[Path, int, Manifest | str]]:
    """Return all datasets and texts below `root` (a `data` folder), datasets first.

    Each entry holds a path, its size in bytes, and a description. The description is the manifest of a dataset, the
    reason why the dataset cannot be used, or the word `text`.
    """
    folders = [entry for entry in sorted((root / "processed").glob("[!.]*")) if entry.is_dir()]
    listed = [_dataset(folder) for folder in folders if is_prepared(folder)]
    for place in (root / "raw", *(folder for folder in folders if not is_prepared(folder))):
        for path in sorted(place.rglob("*")):
            if path.is_file() and is_text_or_archive(path):
                listed.append((path, path.stat().st_size, "text"))
    return listed


def _dataset(folder: Path) -> tuple[Path, int, Manifest | str]:
    size = sum(file.stat().st_size for file in folder.iterdir())
    try:
        return folder, size, read_manifest(folder / MANIFEST)
    except AtlasError as error:
        return folder, size, str(error)
