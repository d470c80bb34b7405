"""A prepared dataset: a folder of token shards, and `dataset.json`, which describes them.

    train-00000.npy       tokens, uint16 or uint32, read in pieces and never loaded completely
    train-00000.docs.npy  positions (int64) of the first tokens of the documents that begin in that shard,
                          counted from the first token of the split
    val-00000.npy …       the same files for the validation split, if the dataset has one
    tokenizer.json        the tokenizer, unless it is GPT-2's or custom code
    dataset.json          written last: format version, tokenizer, counts, sha256 of every shard, options

A split consists of its shards, one after the other. A document may continue in the next shard. Each document ends with
the tokenizer's end-of-text id.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from atlas.errors import AtlasError, DataError
from atlas.files import check_regular, flush_to_disk, read_limited, sha256_of, without_wait
from atlas.tokenizer import MAX_FILE_BYTES, STORED_AS_FILE, Tokenizer

FORMAT_VERSION = 2
_READABLE = (1, 2)
MANIFEST = "dataset.json"
MAX_TOKENS = 2**48
_LARGEST_MANIFEST = 64 << 20
_CHECK_TOKENS = 2**24
_CHECKED_WHEN_OPENED = 2**26
"""In a split of at most this many tokens, every id is checked when the dataset is opened. In a larger split, ids are
checked when they are read."""

Split = str
"""`train` or `val`."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ShardRecord(_Strict):
    """A token shard, and the file of its document offsets."""

    file: str = Field(pattern=r"^(train|val)-[0-9]{5,9}\.npy$")
    tokens: int = Field(ge=0, le=MAX_TOKENS)
    sha256: str
    documents: int = Field(ge=0, le=MAX_TOKENS)
    documents_sha256: str
    largest_id: int | None = None
    """The largest token id in the shard. None in a dataset of format version 1."""

    @property
    def documents_file(self) -> str:
        """Name of the file of document offsets."""
        return self.file.removesuffix(".npy") + ".docs.npy"


class SplitRecord(_Strict):
    """The content of a split. `bytes` is the size of the split's text in UTF-8."""

    documents: int = Field(ge=0, le=MAX_TOKENS)
    tokens: int = Field(ge=0, le=MAX_TOKENS)
    bytes: int = Field(ge=0, le=2**56)
    shards: list[ShardRecord]


class StepRecord(_Strict):
    """The effect of a cleaning step. `documents` counts the documents that the step changed or removed. `characters`
    counts the characters that the step removed."""

    documents: int = 0
    characters: int = 0


class Manifest(_Strict):
    """The content of `dataset.json`."""

    format: str = "atlas-dataset"
    version: int
    key: str
    tokenizer: dict[str, Any]
    dtype: str
    splits: dict[Split, SplitRecord]
    options: dict[str, Any]
    source: dict[str, Any]
    notes: list[str]
    cleaning: dict[str, StepRecord] = {}
    """The effect of each cleaning step that was applied, by the name of the step."""

    def write(self, folder: Path) -> None:
        """Write `dataset.json`, and flush it to the disk."""
        with (folder / MANIFEST).open("w", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(self.model_dump(), indent=2, ensure_ascii=False) + "\n")
            flush_to_disk(file)


@dataclass
class TokenStream:
    """The tokens of a split as one array, read from the shards of the split.

    Each read opens the shard, so a stream keeps no file open, and several threads and processes can read it. A memory
    map would save a few microseconds, but would end the process if the shard is cut during a run.
    """

    folder: Path
    record: SplitRecord
    dtype: str
    eos_id: int
    name: str
    """The stream's name in messages: the dataset's folder, or the path of the text that was prepared into a cache."""
    vocab_size: int = 2**32
    """The exclusive upper limit of the token ids. Reading an id at or above this limit raises `DataError`."""
    _ends: list[int] = field(init=False, repr=False)
    _header_bytes: dict[str, int] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._ends = list(itertools.accumulate(shard.tokens for shard in self.record.shards))

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the split."""
        return self.record.tokens

    @property
    def num_bytes(self) -> int:
        """Size of the text in UTF-8, in bytes."""
        return self.record.bytes

    @property
    def num_documents(self) -> int:
        """Number of documents that begin in the split."""
        return self.record.documents

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return tokens `start` to `stop` - 1, in the shards' dtype. Raises `DataError` for an id outside the
        vocabulary, and if a shard cannot be read."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(
                f"tokens {start} to {stop} are not in the split, which has {self.num_tokens} tokens"
            )
        parts = []
        while start < stop:
            number = bisect.bisect_right(self._ends, start)
            shard, end = self.record.shards[number], min(stop, self._ends[number])
            first = start - (self._ends[number] - shard.tokens)
            parts.append(self._read(shard.file, self.dtype, first, end - start))
            start = end
        tokens = parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty(0, self.dtype)])
        self._check_id(int(tokens.max(initial=0)))
        return tokens

    def check_ids(self) -> None:
        """Raise `DataError` if a recorded largest id is outside the vocabulary. In a small split, check every id."""
        self._check_id(max((shard.largest_id or 0 for shard in self.record.shards), default=0))
        if self.num_tokens <= _CHECKED_WHEN_OPENED:
            for start in range(0, self.num_tokens, _CHECK_TOKENS):
                self.read(start, min(start + _CHECK_TOKENS, self.num_tokens))

    def _check_id(self, largest: int) -> None:
        if largest >= self.vocab_size:
            split = self.record.shards[0].file.partition("-")[0]
            found = f"{split} contains token id {largest}, but the tokenizer has {self.vocab_size} tokens"
            raise _unusable(self.folder, found)

    def document_starts(self) -> NDArray[np.int64]:
        """Return the position where each document begins, in tokens from the start of the split. If a document was cut
        between the splits, the second half counts as a document of `val`."""
        return np.concatenate([np.empty(0, np.int64), *map(self.starts_in, self.record.shards)])

    def starts_in(self, shard: ShardRecord) -> NDArray[np.int64]:
        """Return the starts of the documents that begin in a shard."""
        return self._read(shard.documents_file, "<i8", 0, shard.documents)

    @property
    def files(self) -> list[tuple[Path, str]]:
        """The path and the sha256 of each file of the split, as in `dataset.json`."""
        shards, folder = self.record.shards, self.folder
        tokens = [(folder / shard.file, shard.sha256) for shard in shards]
        return tokens + [(folder / shard.documents_file, shard.documents_sha256) for shard in shards]

    def _read(self, name: str, dtype: str, first: int, count: int) -> NDArray[Any]:
        """Return `count` numbers from number `first` on of a `.npy` file with one dimension."""
        values = np.empty(count, dtype)
        path = os.path.join(self.folder, name)  # faster than `pathlib`, which would take half of the time
        try:
            with open(path, "rb", buffering=0, opener=without_wait) as file:
                if name not in self._header_bytes:
                    np.lib.format.read_magic(file)
                    np.lib.format.read_array_header_1_0(file)
                    self._header_bytes[name] = file.tell()
                file.seek(self._header_bytes[name] + first * values.itemsize)
                rest = values.view(np.uint8).data
                while rest and (num_bytes := file.readinto(rest)):
                    rest = rest[num_bytes:]
        except (OSError, ValueError) as error:
            raise _unusable(Path(path), "cannot be read", error) from None
        if rest:
            raise _unusable(Path(path), f"was cut during the run: it has no number {first + count - 1:,}")
        return values


@dataclass(frozen=True)
class PreparedDataset:
    """An opened and checked dataset folder."""

    folder: Path
    manifest: Manifest
    tokenizer_state: dict[str, Any]

    @property
    def tokenizer_fingerprint(self) -> str:
        """sha256 that identifies the tokenizer."""
        return str(self.tokenizer_state["fingerprint"])

    @property
    def fingerprint(self) -> str:
        """sha256 that identifies the training data: the training shards and their tokenizer.

        Validation data is not part of the fingerprint, because a run stays the same run if its validation data changes.
        """
        train = self.manifest.splits["train"]
        identity = [self.tokenizer_fingerprint, *(shard.sha256 for shard in train.shards)]
        return hashlib.sha256("\n".join(identity).encode()).hexdigest()

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of the dataset. Raises `DataError` if the tokenizer is custom code."""
        try:
            return Tokenizer.from_state(self.tokenizer_state)
        except AtlasError as error:
            place, remedy = self.folder, ""
            if self.tokenizer_state["kind"] in STORED_AS_FILE:
                place, remedy = self.folder / "tokenizer.json", "; prepare the dataset again"
            raise DataError(f"{place}: {error}{remedy}") from None

    @property
    def train(self) -> TokenStream:
        """The tokens of the training split, which every dataset has."""
        return self._stream(self.manifest.splits["train"])

    def split(self, name: Split) -> TokenStream | None:
        """Return the tokens of the split `train` or `val`, or None if the dataset does not have this split."""
        return self._stream(self.manifest.splits[name]) if name in self.manifest.splits else None

    def _stream(self, record: SplitRecord) -> TokenStream:
        eos_id, vocab_size = (int(self.tokenizer_state[key]) for key in ("eos_id", "vocab_size"))
        return TokenStream(self.folder, record, self.manifest.dtype, eos_id, str(self.folder), vocab_size)


def is_prepared(folder: str | Path) -> bool:
    """Return whether a folder has a `dataset.json`. The content of this file is not checked."""
    return (Path(folder) / MANIFEST).is_file()


def open_dataset(
    folder: str | Path, *, verify: bool = False, advance: Callable[[int], None] = lambda done: None
) -> PreparedDataset:
    """Open a prepared folder, and check its manifest, file sizes, dtypes, token ids and document starts.

    With `verify`, also compare the sha256 of every shard. `advance` then receives the number of bytes of each read.
    Raises `DataError` with the name of the faulty file.
    """
    folder = Path(folder)
    manifest = read_manifest(folder / MANIFEST)
    state = dict(manifest.tokenizer)
    if state.get("kind") in STORED_AS_FILE:
        try:
            state["json"] = read_limited(folder / "tokenizer.json", limit=MAX_FILE_BYTES).decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            # A dataset of an earlier version lacks the file of another model's tokenizer.
            if state["kind"] == "bpe" or not isinstance(error, FileNotFoundError):
                raise _unusable(folder / "tokenizer.json", "cannot be read", error) from None
    for record in manifest.splits.values():
        for shard in record.shards:
            for name, dtype, count, sha256 in (
                (shard.file, manifest.dtype, shard.tokens, shard.sha256),
                (shard.documents_file, "<i8", shard.documents, shard.documents_sha256),
            ):
                path = folder / name
                _check_file(path, np.dtype(dtype), count)
                if verify and sha256_of(path, advance) != sha256:
                    raise changed(path)
    dataset = PreparedDataset(folder, manifest, state)
    for stream in map(dataset._stream, manifest.splits.values()):
        stream.check_ids()
        _check_document_starts(stream)
    return dataset


def read_manifest(path: Path) -> Manifest:
    """Read and check a `dataset.json`. Raises `DataError` if the file is missing, damaged or of an unknown version."""
    try:
        content = json.loads(read_limited(path, limit=_LARGEST_MANIFEST).decode("utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path.parent}: is not a prepared dataset (no {MANIFEST}); run atlas prepare"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise _unusable(path, "cannot be read", error) from None
    if not isinstance(content, dict) or content.get("format") != "atlas-dataset":
        raise DataError(f"{path}: does not describe an Atlas dataset; prepare it with atlas prepare")
    if content.get("version") not in _READABLE:
        raise DataError(
            f"{path}: format version {content.get('version')!r:.20} is not {FORMAT_VERSION}; "
            "prepare the dataset again, or update Atlas"
        )
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part)[:40] for part in first["loc"])
        raise _unusable(path, f"{place}: {first['msg']}") from None
    if problem := _contradiction(manifest):
        raise _unusable(path, problem)
    return manifest


def changed(path: Path) -> DataError:
    """The error for a file whose bytes differ from those that `dataset.json` describes."""
    return _unusable(path, "its content changed since it was prepared")


def _unusable(path: Path, reason: str, error: Exception | None = None) -> DataError:
    if error:
        reason += f": {getattr(error, 'strerror', None) or str(error) or type(error).__name__:.200}"
    return DataError(f"{path}: {reason}; prepare the dataset again")


def _contradiction(manifest: Manifest) -> str | None:
    """Return the first contradiction in a manifest, as text for the error message, or None."""
    tokenizer = manifest.tokenizer
    vocab_size, eos_id = tokenizer.get("vocab_size"), tokenizer.get("eos_id")
    if type(vocab_size) is not int or type(eos_id) is not int or not 0 <= eos_id < vocab_size <= 2**32:
        return f"tokenizer: vocab_size {vocab_size!r:.40} and eos_id {eos_id!r:.40} do not make a vocabulary"
    if not all(isinstance(tokenizer.get(key), str) for key in ("kind", "name", "fingerprint")):
        return "tokenizer: has no kind, name and fingerprint"
    if manifest.dtype != token_dtype(vocab_size).str:
        return f"dtype: {manifest.dtype!r:.20} does not fit a vocabulary of {vocab_size}"
    if "train" not in manifest.splits or not set(manifest.splits) <= {"train", "val"}:
        return f"splits: {', '.join(sorted(manifest.splits)):.80} are not train and val"
    for name, split in manifest.splits.items():
        if split.tokens != sum(shard.tokens for shard in split.shards):
            return f"splits.{name}: {split.tokens} tokens are not the sum of its shards"
        if split.documents != sum(shard.documents for shard in split.shards):
            return f"splits.{name}: {split.documents} documents are not the sum of its shards"
        if any(not shard.file.startswith(f"{name}-") for shard in split.shards):
            return f"splits.{name}: lists another split's shards"
        if len({shard.file for shard in split.shards}) < len(split.shards):
            return f"splits.{name}: lists a shard twice"
        if split.tokens == 0:
            return f"splits.{name}: holds no tokens"
    return None


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the dtype of the tokens: uint16 if every id fits, else uint32. Both are little-endian on every machine."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def _check_file(path: Path, dtype: np.dtype[Any], count: int) -> None:
    """Raise `DataError` for a file whose header or size differs from the manifest."""
    try:
        size = check_regular(path)
        with path.open("rb") as file:
            if (version := np.lib.format.read_magic(file)) != (1, 0):
                raise ValueError(f".npy version {version}")
            shape, _, found = np.lib.format.read_array_header_1_0(file)
            expected = file.tell() + count * dtype.itemsize
    except FileNotFoundError:
        raise _unusable(path, "missing from the dataset") from None
    except Exception as error:  # any error that NumPy raises for an untrusted header
        raise _unusable(path, "is not a token shard", error) from None
    if (shape, found) != ((count,), dtype):
        stated = f"{MANIFEST} says ({count},) of {dtype}"
        raise _unusable(path, f"is not a token shard: holds {shape} of {found}, {stated}")
    if size != expected:
        raise _unusable(path, f"{size:,} bytes instead of {expected:,}")


def _check_document_starts(stream: TokenStream) -> None:
    """Raise `DataError` if document starts are not in ascending order, or not inside their shard."""
    end = 0
    for shard in stream.record.shards:
        last, end, starts = end - 1, end + shard.tokens, stream.starts_in(shard)
        for place in range(0, len(starts), _CHECK_TOKENS):
            piece = starts[place : place + _CHECK_TOKENS]
            if piece[0] <= last or piece[-1] >= end or not (piece[:-1] < piece[1:]).all():
                path = stream.folder / shard.documents_file
                raise _unusable(path, "its documents do not begin in order")
            last = int(piece[-1])
