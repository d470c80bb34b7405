"""Best-fit packing: whole documents put together into windows, instead of windows cut out of a stream.

Ding et al. 2024, "Fewer Truncations Improve Language Modeling" (arXiv:2404.10830). A document longer than a window
is cut into windows, each beginning with the last token of the one before, so that every token of it is predicted
once; what remains of it, and each shorter document, is a piece. Pieces are packed by best-fit decreasing, shard by
shard. Which pieces lie in which window is a plan in the user's cache folder, made once and read by memory map.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atlas.data.sequences.dataset import IGNORE_INDEX, SequenceDataset, documents_of
from atlas.data.shards import TokenStream
from atlas.files import cache_folder

_VERSION = 1
_FILES: dict[str, np.dtype[Any]] = {
    "starts": np.dtype("<i8"),
    "lengths": np.dtype("<i4"),
    "ends": np.dtype("<i8"),
}
Array = NDArray[Any]


class PackedDataset(SequenceDataset):
    """`dataset[w]` as of `SequenceDataset`, from whole documents. A window that is not full is padded with end of text
    in the inputs and `IGNORE_INDEX` in the targets; so is the target where a cut document's last piece begins, since
    that token was predicted in its place.

    `padding` is the part of all positions that is padding.
    """

    def __init__(self, stream: TokenStream, max_seq_len: int, *, with_documents: bool = False) -> None:
        super().__init__(stream, max_seq_len, pad_last=True, with_documents=with_documents)
        self._plan = _plan_folder(stream, max_seq_len)
        facts = json.loads((self._plan / "plan.json").read_text(encoding="utf-8"))
        self._num_windows = facts["windows"]
        self.padding = 1 - facts["tokens"] / (facts["windows"] * (max_seq_len + 1))
        self._maps: dict[str, Array] = {}

    def __getitem__(self, window: int) -> tuple[Tensor, ...]:
        if not 0 <= window < self._num_windows:
            raise IndexError(f"window {window} of {self._num_windows}")
        row = np.full(self.max_seq_len + 1, self.stream.eos_id, np.int64)
        targets = np.full(self.max_seq_len + 1, IGNORE_INDEX, np.int64)
        at = 0
        for start, length in self._pieces(window):
            row[at : at + length] = self.stream.read(start, start + length)
            targets[at : at + length] = row[at : at + length]
            if start and self.stream.read(start - 1, start)[0] != self.stream.eos_id:
                targets[at] = IGNORE_INDEX
            at += length
        inputs, shifted = torch.from_numpy(row[:-1]), torch.from_numpy(targets[1:])
        if self.with_documents:
            return inputs, shifted, documents_of(inputs, self.stream.eos_id)
        return inputs, shifted

    def _pieces(self, window: int) -> list[tuple[int, int]]:
        """(start, length) of each piece of the stream that lies in the window."""
        if not self._maps:
            self._maps = {
                name: np.memmap(self._plan / name, dtype=dtype, mode="r") for name, dtype in _FILES.items()
            }
        first, last = (int(self._maps["ends"][w]) if w >= 0 else 0 for w in (window - 1, window))
        starts, lengths = self._maps["starts"][first:last], self._maps["lengths"][first:last]
        return list(zip(starts.tolist(), lengths.tolist(), strict=True))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}


def pieces_of(starts: Array, ends: Array, max_seq_len: int) -> tuple[Array, Array]:
    """Documents from `starts` to `ends` → the starts and lengths of their pieces, each up to `max_seq_len` + 1 long."""
    predicted = ends - starts - 1
    whole, rest = np.divmod(predicted, max_seq_len)
    first_of = np.cumsum(whole) - whole
    number = np.arange(int(whole.sum())) - np.repeat(first_of, whole)
    cut_starts = np.repeat(starts, whole) + number * max_seq_len
    has_rest = (rest > 0) | (predicted == 0)
    rest_starts = (starts + whole * max_seq_len)[has_rest]
    lengths = np.concatenate([np.full(len(cut_starts), max_seq_len + 1), rest[has_rest] + 1])
    return np.concatenate([cut_starts, rest_starts]), lengths


def best_fit_decreasing(lengths: Array, capacity: int) -> Array:
    """The bin of each piece: the longest first, each into the fullest bin that still takes it (Johnson 1973).

    Pieces of one length are placed together: a bin that took one is the tightest for the next, until it takes no
    more, so that a bin with room c takes c // length at once.
    """
    bin_of = np.empty(len(lengths), np.int64)
    order = np.argsort(-lengths, kind="stable")
    kinds, counts = np.unique(lengths, return_counts=True)
    rooms: list[int] = []  # ascending, those that some bin has
    bins_with: dict[int, Array] = {}
    num_bins = placed = 0

    def add(room: int, bins: Array) -> None:
        if room and len(bins):
            if room not in bins_with:
                bisect.insort(rooms, room)
            bins_with[room] = np.concatenate([bins_with.get(room, bins[:0]), bins])

    for length, count in zip(kinds[::-1].tolist(), counts[::-1].tolist(), strict=True):
        end = placed + count
        while placed < end:
            tightest = bisect.bisect_left(rooms, length)
            opens = tightest == len(rooms)
            room = capacity if opens else rooms[tightest]
            each = room // length
            wanted = -(-(end - placed) // each)
            if opens:
                bins = np.arange(num_bins, num_bins + wanted)
                num_bins += wanted
            else:
                rooms.pop(tightest)
                bins = bins_with.pop(room)
            bins, untouched = bins[:wanted], bins[wanted:]
            filled = np.repeat(bins, each)[: end - placed]
            bin_of[order[placed : placed + len(filled)]] = filled
            placed += len(filled)
            add(room, untouched)
            in_last = len(filled) - each * (len(bins) - 1)
            add(room - each * length, bins[:-1])
            add(room - in_last * length, bins[-1:])
    return bin_of


def _documents_by_shard(stream: TokenStream) -> Iterator[tuple[Array, Array]]:
    """Starts and ends of the documents, a shard at a time; the last one of a shard comes with the next."""
    begun = np.zeros(1, np.int64)
    for shard in stream.record.shards:
        starts = np.load(stream.folder / shard.documents_file, allow_pickle=False)
        starts = np.concatenate([begun, starts[starts > begun[0]]])
        yield starts[:-1], starts[1:]
        begun = starts[-1:]
    yield begun, np.array([stream.num_tokens])


def _plan_folder(stream: TokenStream, max_seq_len: int) -> Path:
    """The folder of the plan, made if it is not there. It appears whole, by a rename."""
    shards = [f"{shard.sha256} {shard.documents_sha256}" for shard in stream.record.shards]
    key = hashlib.sha256("\n".join([str(_VERSION), str(max_seq_len), *shards]).encode()).hexdigest()
    folder = cache_folder() / "packing" / key[:32]
    if (folder / "plan.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write_plan(making, stream, max_seq_len)
        os.replace(making, folder)
    except OSError:
        if not (folder / "plan.json").is_file():  # else another process made it meanwhile
            raise
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return folder


def _write_plan(folder: Path, stream: TokenStream, max_seq_len: int) -> None:
    segments = windows = tokens = 0
    for documents in _documents_by_shard(stream):
        starts, lengths = pieces_of(*documents, max_seq_len)
        bin_of = best_fit_decreasing(lengths, max_seq_len + 1)
        by_bin = np.argsort(bin_of, kind="stable")
        ends = segments + np.cumsum(np.bincount(bin_of)) if len(bin_of) else bin_of
        columns = {"starts": starts[by_bin], "lengths": lengths[by_bin], "ends": ends}
        for name, dtype in _FILES.items():
            with (folder / name).open("ab") as file:
                file.write(columns[name].astype(dtype).tobytes())
        segments, windows, tokens = segments + len(starts), windows + len(ends), tokens + int(lengths.sum())
    facts = {"windows": windows, "tokens": tokens}
    (folder / "plan.json").write_text(json.dumps(facts), encoding="utf-8")
