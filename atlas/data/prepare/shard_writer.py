"""Writes the shards that `atlas.data.shards` reads.

A split is one long list of tokens that is only appended to, or cut back to where it was; the shards are equal
lengths of it. So what a killed process wrote is gone on with by its lengths alone.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from atlas.data.shards import ShardRecord, Split, SplitRecord
from atlas.files import flush_to_disk, sha256_of


class Extent(NamedTuple):
    """How much a split holds."""

    tokens: int = 0
    documents: int = 0
    num_bytes: int = 0


class SplitWriter:
    """One split, in shards of `shard_tokens` tokens in `folder`; memory stays flat.

    `work` is a folder for what is needed until the end: `<split>.starts`, where each document begins.
    """

    def __init__(
        self,
        folder: Path,
        work: Path,
        split: Split,
        dtype: np.dtype[Any],
        shard_tokens: int,
        *,
        extent: Extent = Extent(),  # noqa: B008, a tuple
        shards: list[ShardRecord] | None = None,
    ) -> None:
        """With `extent` and `shards` it goes on with what is there, and cuts off what lies behind them."""
        self.extent = extent
        self.shards = list(shards or [])
        """Those that are finished. Nothing in them is cut back any more."""
        self._folder, self._split, self._dtype, self._shard_tokens = folder, split, dtype, shard_tokens
        self._header_bytes = len(self._header(0))
        self._file: IO[bytes] | None = None
        self._shard = 0
        """The one that `_file` is."""
        starts = work / f"{split}.starts"
        self._starts = starts.open("r+b" if starts.exists() else "w+b")
        self._cut()

    def append(self, tokens: NDArray[Any], starts: NDArray[np.int64], num_bytes: int) -> None:
        """Tokens that stand for `num_bytes` bytes of text; a document begins at each of `starts`, places in them."""
        held = self.extent.tokens
        self._starts.write((starts + held).astype("<i8").tobytes())
        content = memoryview(tokens.astype(self._dtype).tobytes())
        size = self._dtype.itemsize
        while content:
            room = (self._shard_tokens - held % self._shard_tokens) * size
            file = self._open(held // self._shard_tokens)
            file.write(content[:room])
            held += min(room, len(content)) // size
            content = content[room:]
        documents, all_bytes = self.extent.documents + len(starts), self.extent.num_bytes + num_bytes
        self.extent = Extent(held, documents, all_bytes)

    def cut_back(self, extent: Extent) -> None:
        """Forget what was appended since `extent`."""
        if extent != self.extent:
            self.extent = extent
            self._cut()

    def finish_full_shards(self) -> bool:
        """Finish the shards that are full, so that nothing before them can be cut back; whether there was one."""
        before = len(self.shards)
        while (len(self.shards) + 1) * self._shard_tokens <= self.extent.tokens:
            self._finish(self._shard_tokens)
        return len(self.shards) > before

    def sync(self) -> None:
        """Bring all that was appended to the disk."""
        for file in (self._starts, self._file):
            if file is not None:
                flush_to_disk(file)

    def finish(self) -> SplitRecord | None:
        """Finish the last shard; None, and no file, if nothing was written."""
        self.finish_full_shards()
        if rest := self.extent.tokens % self._shard_tokens:
            self._finish(rest)
        self.close()
        tokens, documents, num_bytes = self.extent
        if not tokens:
            return None
        return SplitRecord(documents=documents, tokens=tokens, bytes=num_bytes, shards=self.shards)

    def close(self) -> None:
        """Close the files; a disk that is full keeps what it has."""
        for file in (self._starts, self._file):
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()
        self._file = None

    def _path(self, shard: int) -> Path:
        return self._folder / f"{self._split}-{shard:05d}.npy"

    def _header(self, tokens: int) -> bytes:
        # NumPy leaves room in the header for the count to grow, so that it can be set at the end.
        header = io.BytesIO()
        description = {"descr": self._dtype.str, "fortran_order": False, "shape": (tokens,)}
        np.lib.format.write_array_header_1_0(header, description)
        return header.getvalue()

    def _open(self, shard: int) -> IO[bytes]:
        if self._file is not None and self._shard != shard:
            flush_to_disk(self._file)
            self._file.close()
            self._file = None
        if self._file is None:
            path = self._path(shard)
            self._file, self._shard = path.open("r+b" if path.exists() else "w+b"), shard
            if not self._file.seek(0, io.SEEK_END):
                self._file.write(self._header(0))
        return self._file

    def _cut(self) -> None:
        """Make the files as long as `extent` says."""
        self._starts.truncate(8 * self.extent.documents)
        self._starts.seek(0, io.SEEK_END)
        if self._file is not None:
            self._file.close()
            self._file = None
        shard, rest = divmod(self.extent.tokens, self._shard_tokens)
        if rest:
            file = self._open(shard)
            file.truncate(self._header_bytes + rest * self._dtype.itemsize)
            file.seek(0, io.SEEK_END)
        stale = shard + bool(rest)
        while self._path(stale).exists():
            self._path(stale).unlink()
            self._path(stale).with_suffix(".docs.npy").unlink(missing_ok=True)
            stale += 1

    def _finish(self, tokens: int) -> None:
        shard = len(self.shards)
        path = self._path(shard)
        file = self._open(shard)
        file.seek(0)
        file.write(self._header(tokens))
        file.seek(0, io.SEEK_END)
        flush_to_disk(file)
        documents = path.with_suffix(".docs.npy")
        starts = self._starts_before(shard * self._shard_tokens + tokens)
        # By way of memory: what NumPy writes to a full disk itself ends in an error without its reason.
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

    def _starts_before(self, end: int) -> NDArray[np.int64]:
        """Those that are in no shard yet, up to `end`."""
        done = sum(shard.documents for shard in self.shards)
        self._starts.seek(8 * done)
        starts = np.frombuffer(self._starts.read(8 * (self.extent.documents - done)), dtype="<i8")
        self._starts.seek(0, io.SEEK_END)
        return starts[: np.searchsorted(starts, end)]
