"""Writes the shards that `atlas.data.shards` reads."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atlas.data.shards import ShardRecord, Split, SplitRecord
from atlas.files import sha256_of


class SplitWriter:
    """Writes one split as it comes, into shards of `shard_tokens` tokens; memory stays flat."""

    def __init__(self, folder: Path, split: Split, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self._folder, self._split, self._dtype, self._shard_tokens = folder, split, dtype, shard_tokens
        self._shards: list[ShardRecord] = []
        self._tokens = self._bytes = 0
        self._open_shard()

    def write(self, ids: NDArray[Any], num_bytes: int, *, starts_document: bool) -> None:
        """Append tokens that stand for `num_bytes` bytes of text."""
        if starts_document:
            if self._shard_tokens == self._in_shard:
                self._next_shard()
            self._starts.append(self._tokens)
        self._bytes += num_bytes
        while len(ids):
            if self._shard_tokens == self._in_shard:
                self._next_shard()
            part = ids[: self._shard_tokens - self._in_shard]
            self._file.write(part.astype(self._dtype).tobytes())
            self._in_shard += len(part)
            self._tokens += len(part)
            ids = ids[len(part) :]

    def close(self) -> SplitRecord | None:
        """Finish the last shard; None, and no file, if nothing was written."""
        if self._tokens == 0:
            self._file.close()
            self._path.unlink()
            return None
        self._close_shard()
        documents = sum(shard.documents for shard in self._shards)
        return SplitRecord(documents=documents, tokens=self._tokens, bytes=self._bytes, shards=self._shards)

    def abandon(self) -> None:
        """Close the file; what did not reach a full disk before does not matter any more."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _next_shard(self) -> None:
        self._close_shard()
        self._open_shard()

    def _open_shard(self) -> None:
        self._path = self._folder / f"{self._split}-{len(self._shards):05d}.npy"
        self._file = self._path.open("wb")
        self._in_shard = 0
        self._starts: list[int] = []
        self._write_header()

    def _write_header(self) -> None:
        # NumPy leaves room in the header for the count to grow, so that it can be set at the end.
        self._file.seek(0)
        description = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._in_shard,)}
        np.lib.format.write_array_header_1_0(self._file, description)

    def _close_shard(self) -> None:
        self._write_header()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        documents = self._path.with_suffix(".docs.npy")
        # By way of memory: what NumPy writes to a full disk itself ends in an error without its reason.
        content = io.BytesIO()
        np.save(content, np.array(self._starts, dtype="<i8"), allow_pickle=False)
        documents.write_bytes(content.getvalue())
        self._shards.append(
            ShardRecord(
                file=self._path.name,
                tokens=self._in_shard,
                sha256=sha256_of(self._path),
                documents=len(self._starts),
                documents_sha256=sha256_of(documents),
            )
        )
