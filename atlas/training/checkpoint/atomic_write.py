"""Write a checkpoint to a temporary file, hash the bytes while writing, and rename the file to its final name."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from atlas.files import flush_folder, flush_to_disk
from atlas.training.checkpoint.manifest import FileEntry, Manifest, read_manifest, write_manifest
from atlas.training.devices.parallel import map_tensors

_PIECE = 4 << 20

Pace = Callable[[float], None]
"""A function that a save calls after every few megabytes. Its argument is the seconds that the save took to write these
megabytes. The function may sleep, so that training gets the cores. It may also raise `Abandoned` to end the save."""


class Abandoned(Exception):
    """A save ended before it was complete."""


def no_pause(seconds: float) -> None:
    """Do nothing, so that the save writes as fast as possible."""


def tensor_bytes(value: Any) -> int:
    """The total size, in bytes, of all tensors in nested dicts and lists."""
    return sum(tensor.numel() * tensor.element_size() for _, tensor in named_tensors(value))


def named_tensors(value: Any) -> list[tuple[str, torch.Tensor]]:
    """(name, tensor) for every tensor in nested dicts and lists. `map_tensors` defines the names."""
    found: list[tuple[str, torch.Tensor]] = []
    map_tensors(value, lambda name, tensor: found.append((name, tensor)))
    return found


def replace_checkpoint(path: Path, contents: Mapping[str, Any], manifest: Manifest | None) -> int:
    """Write `contents` to the file `path`. If there is a `manifest`, write it to the sidecar with the file's new size
    and sha256. Return the size of the file in bytes. Raises `OSError`."""
    staged = path.with_name(path.name + ".tmp")
    try:
        size, sha256 = write_tensors(staged, contents)
        if manifest:
            entry = FileEntry(name=path.name, size=size, sha256=sha256)
            commit(staged, path, manifest.model_copy(update={"folder": None, "files": (entry,)}))
        else:
            os.replace(staged, path)
    except OSError:
        staged.unlink(missing_ok=True)
        raise
    return size


def commit(staged: Path, path: Path, manifest: Manifest) -> None:
    """Rename the file `staged` to `path`, and write the sidecar of `path`.

    If `path` exists, a kill between any two steps leaves either the old checkpoint or the new one intact. For this, the
    sidecar accepts both the old bytes and the new bytes until the rename is complete.
    """
    old = read_manifest(path, check_hash=False)
    write_manifest(
        path, manifest.model_copy(update={"replaces": old and old.model_copy(update={"replaces": None})})
    )
    os.replace(staged, path)
    flush_folder(path.parent)
    if old:
        write_manifest(path, manifest)


class _HashingWriter:
    """A writer that computes the sha256 and the size of the bytes while it writes them. So Atlas need not read the file
    again."""

    def __init__(self, file: IO[bytes], pace: Pace) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self._pace = pace
        self.size = 0
        self.error: OSError | Abandoned | None = None

    def write(self, data: memoryview) -> int:
        try:
            for start in range(0, len(data), _PIECE):
                piece, begin = data[start : start + _PIECE], time.perf_counter()
                self.digest.update(piece)
                self._file.write(piece)
                self.size += len(piece)
                self._pace(time.perf_counter() - begin)
        except (OSError, Abandoned) as error:  # torch.save raises a RuntimeError without the reason instead
            self.error = error
            raise
        return len(data)

    def flush(self) -> None:
        self._file.flush()


def write_tensors(path: Path, contents: Mapping[str, Any], *, pace: Pace = no_pause) -> tuple[int, str]:
    """Write `contents` to the file `path` and flush the file to the disk. Return the file's size in bytes and its
    sha256.

    Raises `OSError`, or `Abandoned` if `pace` raises `Abandoned`.
    """
    with open(path, "wb") as file:
        writer = _HashingWriter(file, pace)
        try:
            torch.save(dict(contents), writer)  # type: ignore[arg-type]
        except Exception:
            if writer.error is None:
                raise
        if writer.error is not None:
            raise writer.error
        flush_to_disk(file)
    return writer.size, writer.digest.hexdigest()


def copy_file(source: Path, target: Path, *, pace: Pace = no_pause) -> None:
    """Copy the bytes of a file and flush the copy to the disk.

    A hard link would be faster, but both names would then share the same blocks of the disk. One bad block would
    destroy both the best and the latest checkpoint.
    """
    with open(source, "rb") as reading, open(target, "wb") as writing:
        begin = time.perf_counter()
        while piece := reading.read(_PIECE):
            writing.write(piece)
            pace(time.perf_counter() - begin)
            begin = time.perf_counter()
        flush_to_disk(writing)
