"""Find duplicates of earlier documents: exact duplicates by a 16-byte hash, near-duplicates by MinHash.

Each of the two methods keeps a log in the workspace. An interrupted preparation resumes from these logs.
"""

from __future__ import annotations

import errno
import io
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atlas.errors import DataError
from atlas.files import flush_to_disk

DIGEST_BYTES = 16
CACHE_BYTES = 1 << 29
"""Bytes of memory for the digests' index, enough for 17 million documents. SQLite keeps a larger index in its file."""
_LOADED_PER_STEP = 1 << 20

SIMILARITY = 0.8
"""Two documents are near-duplicates if the Jaccard similarity of their word 5-grams is at least this value."""
NUM_PERMUTATIONS = 128
_SHINGLE_WORDS = 5
_SEED, _SCHEME = 1, "affine32"


def fractions(digests: bytes) -> NDArray[np.float64]:
    """Return (n, 2): the two halves of each of n digests, as independent, uniformly distributed numbers from 0 to 1."""
    return np.frombuffer(digests, dtype=">u8").reshape(-1, 2) / 2.0**64


class SeenDigests:
    """A growing set of digests. `log` contains the digests in the order of arrival. An SQLite file beside `log` is the
    index of the digests.

    Only the log survives a kill. The index is never committed, because each commit of an index with random keys would
    rewrite most pages of the index. Raises `OSError` if the disk is full.
    """

    def __init__(self, log: Path, *, count: int = 0, cache_bytes: int = CACHE_BYTES) -> None:
        """Load the first `count` digests of an existing `log`, and remove all later digests from `log`."""
        index = log.with_suffix(".sqlite")
        index.unlink(missing_ok=True)
        with _disk_errors(index):
            self._index = sqlite3.connect(index, isolation_level=None)
            self._index.executescript(
                f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -{cache_bytes >> 10};"
                "CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID; BEGIN"
            )
        self.count, self._log = 0, log
        self._file = log.open("r+b" if count else "wb")
        for start in range(0, count, _LOADED_PER_STEP):
            size = min(count - start, _LOADED_PER_STEP) * DIGEST_BYTES
            self._add(sorted(_split(self._file.read(size))))
        self._file.truncate(count * DIGEST_BYTES)

    def add(self, digests: bytes) -> NDArray[np.bool_]:
        """Add the n digests in `digests`. Returns (n,): True for each digest that was not in the set before."""
        new = self._add(_split(digests))
        self._file.write(np.frombuffer(digests, dtype=f"V{DIGEST_BYTES}")[new].tobytes())
        return new

    def sync(self) -> int:
        """Flush the log to the disk, and return the number of its digests."""
        flush_to_disk(self._file)
        return self.count

    def close(self) -> None:
        """Close the log and the index."""
        self._index.close()
        self._file.close()

    def _add(self, digests: Sequence[bytes]) -> NDArray[np.bool_]:
        insert = "INSERT OR IGNORE INTO seen VALUES (?)"
        with _disk_errors(self._log):
            added = [self._index.execute(insert, (digest,)).rowcount for digest in digests]
        self.count += sum(added)
        return np.array(added, dtype=np.bool_)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:  # "database or disk is full"
        raise OSError(errno.ENOSPC, str(error), str(path)) from None


def _split(digests: bytes) -> list[bytes]:
    return [digests[at : at + DIGEST_BYTES] for at in range(0, len(digests), DIGEST_BYTES)]


def minhash_of(text: str) -> NDArray[np.uint32]:
    """Return (NUM_PERMUTATIONS,): the MinHash signature (Broder 1997) of the set of word 5-grams in a text.

    The signature of a document is the elementwise minimum of the signatures of its pieces.
    """
    from datasketch import MinHash

    words = text.split()
    shingles = {
        " ".join(words[place : place + _SHINGLE_WORDS]).encode()
        for place in range(max(1, len(words) - _SHINGLE_WORDS + 1))
    }
    sketch = MinHash(num_perm=NUM_PERMUTATIONS, seed=_SEED, scheme=_SCHEME)
    sketch.update_batch(sorted(shingles))
    return np.asarray(sketch.hashvalues, dtype=np.uint32)


class SeenSignatures:
    """A growing set of signatures, searched by locality-sensitive hashing. The set uses about 3 KB of memory per
    document."""

    def __init__(self, log: Path, *, count: int = 0) -> None:
        """Load the first `count` signatures of an existing `log`, and remove all later signatures from `log`."""
        from datasketch import MinHashLSH

        self._index = MinHashLSH(threshold=SIMILARITY, num_perm=NUM_PERMUTATIONS)
        self._file = log.open("r+b" if count else "w+b")
        self._row_bytes = NUM_PERMUTATIONS * np.dtype(np.uint32).itemsize
        self.count = 0
        for _ in range(count):
            self._insert(self._read())
        self._file.truncate(count * self._row_bytes)

    def add(self, signature: NDArray[np.uint32]) -> bool:
        """Add a signature, unless its estimated similarity to a known signature is at least `SIMILARITY`. Returns
        whether the signature was added."""
        for key in self._index.query(_lean(signature)):
            self._file.seek(key * self._row_bytes)
            if (self._read() == signature).mean() >= SIMILARITY:
                return False
        self._file.seek(0, io.SEEK_END)
        self._file.write(signature.tobytes())
        self._insert(signature)
        return True

    def sync(self) -> int:
        """Flush the log to the disk, and return the number of its signatures."""
        flush_to_disk(self._file)
        return self.count

    def close(self) -> None:
        """Close the log."""
        self._file.close()

    def _insert(self, signature: NDArray[np.uint32]) -> None:
        self._index.insert(self.count, _lean(signature))
        self.count += 1

    def _read(self) -> NDArray[np.uint32]:
        return np.frombuffer(self._file.read(self._row_bytes), np.uint32)


def _lean(signature: NDArray[np.uint32]) -> Any:
    from datasketch import LeanMinHash

    return LeanMinHash(seed=_SEED, hashvalues=signature.astype(np.uint64), scheme=_SCHEME)


def require_datasketch() -> None:
    """Raise `DataError` if the package that finds near-duplicates is not installed."""
    try:
        import datasketch  # noqa: F401
    except ImportError:
        raise DataError(
            '--near-dedup: needs the package datasketch; pip install "atlas-llm[dedup]", or omit this option'
        ) from None
