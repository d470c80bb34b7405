"""Writes the shards that `atlas.data.shards` reads.

A split is one long list of tokens. The writer only extends or truncates this list, and cuts it into shards of equal
length. So the counts of tokens, documents and bytes are enough to resume the work of a killed process.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from atlas.data.shards import ShardRecord, Split, SplitRecord
from atlas.files import flush_to_disk, sha256_of


class Extent(NamedTuple):
    """The numbers of tokens, documents and bytes in a split."""

    tokens: int = 0
    documents: int = 0
    bytes: int = 0


class SplitWriter:
    """Writes one split to `folder` in constant memory, as shards of `shard_tokens` tokens.

    Each call opens the files that it needs, so no file stays open between two batches.

    `work` is the folder of a temporary file, `<split>.starts`, with the positions where documents begin. `state` is the
    return value of an earlier `sync`. The writer resumes from `state`, and removes all tokens that were written later.
    """

    def __init__(
        self,
        folder: Path,
        work: Path,
        split: Split,
        dtype: np.dtype[Any],
        shard_tokens: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        state = state or {"extent": (), "shards": []}
        self.shards = [ShardRecord(**shard) for shard in state["shards"]]
        """The finished shards, which are never truncated."""
        self._folder, self._split, self._dtype, self._shard_tokens = folder, split, dtype, shard_tokens
        self._starts = work / f"{split}.starts"
        self._starts.touch()
        self.extent = Extent(*state["extent"])
        self.truncate(self.extent)

    def append(self, tokens: NDArray[Any], starts: NDArray[np.int64], num_bytes: int) -> None:
        """Append the tokens of `num_bytes` bytes of text. `starts` are the positions in `tokens` where a document
        begins."""
        end = self.extent.tokens
        with self._starts.open("ab") as file:
            file.write((starts + end).astype("<i8").tobytes())
        tokens = tokens.astype(self._dtype)
        while len(tokens):
            shard, at = divmod(end, self._shard_tokens)
            now = tokens[: self._shard_tokens - at]
            with self._path(shard).open("ab") as file:
                file.write((b"" if at else self._header(0)) + now.tobytes())
            end += len(now)
            tokens = tokens[len(now) :]
        self.extent = Extent(end, self.extent.documents + len(starts), self.extent.bytes + num_bytes)

    def truncate(self, extent: Extent) -> None:
        """Remove all tokens that were appended after the split had this `extent`."""
        self.extent = extent
        os.truncate(self._starts, 8 * extent.documents)
        shard, rest = divmod(extent.tokens, self._shard_tokens)
        if rest:
            os.truncate(self._path(shard), len(self._header(0)) + rest * self._dtype.itemsize)
            shard += 1
        while (stale := self._path(shard)).exists():
            stale.unlink()
            stale.with_suffix(".docs.npy").unlink(missing_ok=True)
            shard += 1

    def finish_full_shards(self) -> bool:
        """Finish the full shards. A finished shard can no longer be truncated. Returns whether the method finished a
        shard."""
        before = len(self.shards)
        while (len(self.shards) + 1) * self._shard_tokens <= self.extent.tokens:
            self._finish(self._shard_tokens)
        return len(self.shards) > before

    def sync(self) -> dict[str, Any]:
        """Flush everything to the disk. Returns the state from which a `SplitWriter` resumes."""
        shards = range(len(self.shards), -(-self.extent.tokens // self._shard_tokens))
        for path in (self._starts, *map(self._path, shards)):
            with path.open("r+b") as file:
                flush_to_disk(file)
        return {"extent": self.extent, "shards": [shard.model_dump() for shard in self.shards]}

    def finish(self) -> SplitRecord | None:
        """Finish the last shard. Returns the record of the split, or None for an empty split, which has no shards."""
        self.finish_full_shards()
        if rest := self.extent.tokens % self._shard_tokens:
            self._finish(rest)
        return SplitRecord(**self.extent._asdict(), shards=self.shards) if self.extent.tokens else None

    def _path(self, shard: int) -> Path:
        return self._folder / f"{self._split}-{shard:05d}.npy"

    def _header(self, tokens: int) -> bytes:
        # NumPy leaves space in the header for a larger count, so the count can be set at the end.
        header = io.BytesIO()
        description = {"descr": self._dtype.str, "fortran_order": False, "shape": (tokens,)}
        np.lib.format.write_array_header_1_0(header, description)
        return header.getvalue()

    def _finish(self, tokens: int) -> None:
        shard = len(self.shards)
        path = self._path(shard)
        with path.open("r+b") as file:
            file.write(self._header(tokens))
            flush_to_disk(file)
        documents = path.with_suffix(".docs.npy")
        done = sum(finished.documents for finished in self.shards)
        starts = np.fromfile(self._starts, dtype="<i8", offset=8 * done)
        starts = starts[: np.searchsorted(starts, shard * self._shard_tokens + tokens)]
        # Write through memory: if NumPy itself writes to a full disk, the error does not give the reason.
        content = io.BytesIO()
        np.save(content, starts, allow_pickle=False)
        documents.write_bytes(content.getvalue())
        self.shards.append(
            ShardRecord(
                file=path.name,
                tokens=tokens,
                sha256=sha256_of(path),
                documents=len(starts),
                documents_sha256=sha256_of(documents),
                largest_id=int(np.load(path, mmap_mode="r", allow_pickle=False).max()),
            )
        )
