"""Best-fit packing: windows are filled with complete documents, instead of being cut out of a stream.

Ding et al. 2024, "Fewer Truncations Improve Language Modeling" (arXiv:2404.10830). A document longer than a window is
cut into windows. Each of these windows begins with the last token of the previous window, so every token is predicted
once. The rest of such a document becomes a piece, and each shorter document is a piece, too. Pieces are packed by
best-fit decreasing, shard by shard. The plan, which lists the pieces of each window, is stored in the user's cache
folder. The plan is made once and read by memory map.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atlas.data.sequences.dataset import IGNORE_INDEX, SequenceDataset
from atlas.data.shards import TokenStream
from atlas.files import cache_folder, check_regular, read_limited, sha256_of

_VERSION = 2
_LARGEST_FACTS = 1000  # bytes
_FILES = {"starts": "<i8", "lengths": "<i4", "ends": "<i8"}
Array = NDArray[Any]


class Packing(NamedTuple):
    """The starts and lengths of all pieces in the order of the windows; window w has the pieces from `ends[w - 1]` to
    `ends[w]` - 1."""

    starts: Array
    lengths: Array
    ends: Array

    def pieces(self, window: int) -> list[tuple[int, int]]:
        """Return (start, length) of each piece in the window, in tokens."""
        here = slice(self.ends[window - 1] if window else 0, self.ends[window])
        return list(zip(self.starts[here].tolist(), self.lengths[here].tolist(), strict=True))


class PackedDataset(SequenceDataset):
    """Windows as in `SequenceDataset`, but filled with complete documents.

    A window that is not full is padded with end of text in the inputs and `IGNORE_INDEX` in the targets. The target
    where the rest of a cut document begins is also ignored, because an earlier window predicts that token. `padding` is
    the fraction of all positions that is padding.
    """

    def __init__(self, stream: TokenStream, max_seq_len: int, *, with_documents: bool = False) -> None:
        super().__init__(stream, max_seq_len, pad_last=True, with_documents=with_documents)
        self._plan, facts = _plan_of(stream, max_seq_len)
        self._num_windows = facts["windows"]
        self._plan_hashes: dict[str, str] = facts["sha256"]
        self.padding = 1 - facts["tokens"] / (facts["windows"] * (max_seq_len + 1))

    def _read(self, window: int) -> tuple[Tensor, Tensor]:
        row = np.full(self.max_seq_len + 1, self.stream.eos_id, np.int64)
        targets = np.full(self.max_seq_len + 1, IGNORE_INDEX, np.int64)
        at = 0
        for start, length in self._packing.pieces(window):
            row[at : at + length] = self.stream.read(start, start + length)
            targets[at : at + length] = row[at : at + length]
            if start and self.stream.read(start - 1, start)[0] != self.stream.eos_id:
                targets[at] = IGNORE_INDEX
            at += length
        return torch.from_numpy(row[:-1]), torch.from_numpy(targets[1:])

    @property
    def files(self) -> list[tuple[Path, str]]:
        """The path and the sha256 of each file that the windows are read from, with the files of the plan."""
        return super().files + [(self._plan / name, sha256) for name, sha256 in self._plan_hashes.items()]

    @cached_property
    def _packing(self) -> Packing:
        return Packing(*(np.memmap(self._plan / name, dtype, mode="r") for name, dtype in _FILES.items()))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_packing"}


def pieces_of(starts: Array, ends: Array, max_seq_len: int) -> tuple[Array, Array]:
    """Cut the documents from `starts` to `ends` into pieces of at most `max_seq_len` + 1 tokens. Return the starts and
    lengths of the pieces."""
    predicted = ends - starts - 1
    full, rest = np.divmod(predicted, max_seq_len)
    first_of = np.cumsum(full) - full
    number = np.arange(int(full.sum())) - np.repeat(first_of, full)
    cut_starts = np.repeat(starts, full) + number * max_seq_len
    has_rest = (rest > 0) | (predicted == 0)
    rest_starts = (starts + full * max_seq_len)[has_rest]
    lengths = np.concatenate([np.full(len(cut_starts), max_seq_len + 1), rest[has_rest] + 1])
    return np.concatenate([cut_starts, rest_starts]), lengths


def best_fit_decreasing(lengths: Array, capacity: int) -> Array:
    """Return the bin of each piece. The longest pieces come first; each goes into the fullest bin with enough
    space (Johnson 1973).

    Pieces of the same length are placed together. A bin that has received a piece is the fullest bin for the next
    piece, until no more fit. So a bin with free space c receives c // length pieces.
    """
    bin_of = np.empty(len(lengths), np.int64)
    order = np.argsort(-lengths, kind="stable")
    kinds, counts = np.unique(lengths, return_counts=True)
    spaces: list[int] = []  # the distinct free spaces of the bins, in ascending order
    bins_with: dict[int, Array] = {}
    num_bins = placed = 0

    def add(space: int, bins: Array) -> None:
        if space and len(bins):
            if space not in bins_with:
                bisect.insort(spaces, space)
            bins_with[space] = np.concatenate([bins_with.get(space, bins[:0]), bins])

    for length, count in zip(kinds[::-1].tolist(), counts[::-1].tolist(), strict=True):
        end = placed + count
        while placed < end:
            tightest = bisect.bisect_left(spaces, length)
            opens = tightest == len(spaces)
            space = capacity if opens else spaces[tightest]
            each = space // length
            wanted = -(-(end - placed) // each)
            if opens:
                bins = np.arange(num_bins, num_bins + wanted)
                num_bins += wanted
            else:
                bins = bins_with.pop(spaces.pop(tightest))
            bins, untouched = bins[:wanted], bins[wanted:]
            filled = np.repeat(bins, each)[: end - placed]
            bin_of[order[placed : placed + len(filled)]] = filled
            placed += len(filled)
            add(space, untouched)
            in_last = len(filled) - each * (len(bins) - 1)
            add(space - each * length, bins[:-1])
            add(space - in_last * length, bins[-1:])
    return bin_of


def pack(starts: Array, lengths: Array, capacity: int) -> Packing:
    """Pack pieces into windows of `capacity` tokens."""
    window_of = best_fit_decreasing(lengths, capacity)
    by_window = np.argsort(window_of, kind="stable")
    return Packing(starts[by_window], lengths[by_window], np.cumsum(np.bincount(window_of)))


def _documents_by_shard(stream: TokenStream) -> Iterator[tuple[Array, Array]]:
    """Yield the starts and ends of the documents, shard by shard. The last document of a shard comes with the next
    shard."""
    begun = np.zeros(1, np.int64)
    for shard in stream.record.shards:
        starts = stream.starts_in(shard)
        starts = np.concatenate([begun, starts[starts > begun[0]]])
        yield starts[:-1], starts[1:]
        begun = starts[-1:]
    yield begun, np.array([stream.num_tokens])


def _plan_of(stream: TokenStream, max_seq_len: int) -> tuple[Path, dict[str, Any]]:
    """Return the folder of the plan and the facts in its `plan.json`. Make the plan if it does not exist or is damaged.
    The folder is renamed when it is complete."""
    shards = [f"{shard.sha256} {shard.documents_sha256}" for shard in stream.record.shards]
    key = hashlib.sha256("\n".join([str(_VERSION), str(max_seq_len), *shards]).encode()).hexdigest()
    folder = cache_folder() / "packing" / key[:32]
    if facts := _facts_of(folder):
        return folder, facts
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as temporary:
        try:
            _write_plan(Path(temporary), stream, max_seq_len)
            if not _facts_of(folder):
                if folder.is_dir() and not folder.is_symlink():
                    shutil.rmtree(folder)
                else:
                    folder.unlink(missing_ok=True)
            os.replace(temporary, folder)
        except OSError:
            if not _facts_of(folder):  # otherwise another process has made the plan
                raise
    facts = _facts_of(folder)
    assert facts is not None
    return folder, facts


def _facts_of(folder: Path) -> dict[str, Any] | None:
    """Return the content of `plan.json`, or None if the plan in `folder` is not complete."""
    try:
        facts = json.loads(read_limited(folder / "plan.json", limit=_LARGEST_FACTS))
        sizes = {
            name: check_regular(folder / name) // np.dtype(dtype).itemsize for name, dtype in _FILES.items()
        }
        is_complete = (
            sizes["starts"] == sizes["lengths"]
            and sizes["ends"] == facts["windows"]
            and facts["tokens"] > 0
            and facts["sha256"].keys() == _FILES.keys()
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return facts if is_complete else None


def _write_plan(folder: Path, stream: TokenStream, max_seq_len: int) -> None:
    segments = windows = tokens = 0
    for documents in _documents_by_shard(stream):
        starts, lengths, ends = pack(*pieces_of(*documents, max_seq_len), max_seq_len + 1)
        for (name, dtype), column in zip(_FILES.items(), (starts, lengths, segments + ends), strict=True):
            with (folder / name).open("ab") as file:
                file.write(column.astype(dtype).tobytes())
        segments, windows, tokens = segments + len(starts), windows + len(ends), tokens + int(lengths.sum())
    hashes = {name: sha256_of(folder / name) for name in _FILES}
    facts = {"windows": windows, "tokens": tokens, "sha256": hashes}
    (folder / "plan.json").write_text(json.dumps(facts), encoding="utf-8")
