"""Writing a checkpoint: the bytes once, hashed as they go, then committed under each of its names."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from atlas.training.manifest import (
    Manifest,
    flush_folder,
    flush_to_disk,
    read_manifest,
    write_manifest,
)


def tensor_bytes(value: Any) -> int:
    """The bytes of all tensors in nested dicts and lists."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(value))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors(entry)


def commit(staged: Path, path: Path, manifest: Manifest) -> None:
    """Give the staged bytes their name. The order of these lines is what survives a kill."""
    if old := read_manifest(path, check_hash=False):
        write_manifest(
            path, manifest.model_copy(update={"replaces": old.model_copy(update={"replaces": None})})
        )
    os.replace(staged, path)
    flush_folder(path.parent)
    write_manifest(path, manifest)


class _HashingWriter:
    """A file that knows the sha256 and size of what went through it, so that nothing is read twice."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self.size += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def write_tensors(path: Path, contents: Mapping[str, Any]) -> tuple[int, str]:
    with open(path, "wb") as file:
        writer = _HashingWriter(file)
        torch.save(dict(contents), writer)  # type: ignore[arg-type]
        flush_to_disk(file)
    return writer.size, writer.sha256


def copy_file(source: Path, target: Path) -> None:
    """Each name gets bytes of its own: a hard link would be faster, and one bad block would then take the
    best model along with the latest."""
    with open(source, "rb") as reading, open(target, "wb") as writing:
        shutil.copyfileobj(reading, writing, 1 << 20)
        flush_to_disk(writing)
