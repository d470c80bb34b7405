"""Documents that were met before: exactly, by 16 bytes each, and nearly, by MinHash.

Both remember in files beside the shards as well, so that a killed preparation goes on with what it knew.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atlas.errors import DataError
from atlas.files import flush_to_disk

DIGEST_BYTES = 16
MEMORY_LIMIT = 1 << 29
"""Bytes of digests in memory, those of 33 million documents; what is beyond lies in sorted files."""

SIMILARITY = 0.8
"""Jaccard similarity of two documents' shingles from which on the second is dropped."""
NUM_PERMUTATIONS = 128
_SHINGLE_WORDS = 5
_SEED, _SCHEME = 1, "affine32"

Digests = NDArray[np.uint64]
"""(n, 2): the halves of n digests."""


def as_digests(content: bytes) -> Digests:
    return np.frombuffer(content, dtype=">u8").reshape(-1, 2).astype(np.uint64)


def fractions(digests: Digests) -> NDArray[np.float64]:
    """Each half as a number from 0 to 1; both are evenly spread, and one says nothing of the other."""
    return digests / 2.0**64


class SeenTexts:
    """A set of digests that grows: sorted runs, of which equally long ones are merged (a log-structured merge
    tree, O'Neil et al. 1996). `log` is the file that holds them in the order in which they came.
    """

    def __init__(self, log: Path, *, count: int = 0, memory_limit: int = MEMORY_LIMIT) -> None:
        """`count` digests of an older `log` are known from the start; what lies behind them is cut off."""
        self._memory_limit = memory_limit
        self._runs: list[Digests] = []
        """In memory, the longest first."""
        self._spilled: list[Digests] = []
        """Memory-mapped, each as long as `memory_limit` allows."""
        self._file = log.open("r+b" if count else "wb")
        self._folder = log.parent
        for stale in self._folder.glob("seen-*.npy"):
            stale.unlink()
        self.count = 0
        step = max(1, memory_limit // (4 * DIGEST_BYTES))
        for start in range(0, count, step):
            content = self._file.read(min(step, count - start) * DIGEST_BYTES)
            self._remember(as_digests(content))
        self._file.truncate(count * DIGEST_BYTES)
        self._file.seek(count * DIGEST_BYTES)

    def first_met(self, content: bytes) -> NDArray[np.bool_]:
        """Of the digests that `content` holds one after the other, which are met for the first time; they are
        remembered."""
        digests = as_digests(content)
        order = np.lexsort((digests[:, 1], digests[:, 0]))
        ordered = digests[order]
        again = np.zeros(len(digests), dtype=bool)
        again[1:] = (ordered[1:] == ordered[:-1]).all(axis=1)
        for run in (*self._runs, *self._spilled):
            again |= _among(ordered, run)
        first = np.empty(len(digests), dtype=bool)
        first[order] = ~again
        self._file.write(np.frombuffer(content, dtype=f"V{DIGEST_BYTES}")[first].tobytes())
        self._remember(ordered[~again])
        return first

    def sync(self) -> int:
        """Bring the log to the disk; how many digests it holds."""
        flush_to_disk(self._file)
        return self.count

    def close(self) -> None:
        self._file.close()

    @property
    def memory_bytes(self) -> int:
        return sum(run.nbytes for run in self._runs)

    def _remember(self, digests: Digests) -> None:
        if not len(digests):
            return
        self.count += len(digests)
        self._runs.append(_sorted(digests))
        while len(self._runs) > 1 and 2 * len(self._runs[-1]) > len(self._runs[-2]):
            self._runs[-2:] = [_sorted(np.concatenate(self._runs[-2:]))]
        if self.memory_bytes > self._memory_limit:
            path = self._folder / f"seen-{len(self._spilled)}.npy"
            np.save(path, _sorted(np.concatenate(self._runs)), allow_pickle=False)
            self._runs = []
            self._spilled.append(np.load(path, mmap_mode="r", allow_pickle=False))


def _sorted(digests: Digests) -> Digests:
    """By their first halves."""
    return digests[np.argsort(digests[:, 0], kind="stable")]


def _among(wanted: Digests, run: Digests) -> NDArray[np.bool_]:
    """Which of `wanted` stand in a sorted `run`."""
    found = np.zeros(len(wanted), dtype=bool)
    place = np.searchsorted(run[:, 0], wanted[:, 0])
    rest = np.arange(len(wanted))
    while len(rest := rest[place[rest] < len(run)]):  # as a rule once: two texts seldom share 64 bits
        met = run[place[rest]]
        found[rest] = (met == wanted[rest]).all(axis=1)
        rest = rest[(met[:, 0] == wanted[rest, 0]) & ~found[rest]]
        place[rest] += 1
    return found


def minhash_of(text: str) -> NDArray[np.uint32]:
    """(NUM_PERMUTATIONS,): the MinHash signature (Broder 1997) of a text's runs of five words. The signature of
    a document is the minimum of its pieces'."""
    from datasketch import MinHash

    words = text.split()
    shingles = {
        " ".join(words[place : place + _SHINGLE_WORDS]).encode()
        for place in range(max(1, len(words) - _SHINGLE_WORDS + 1))
    }
    sketch = MinHash(num_perm=NUM_PERMUTATIONS, seed=_SEED, scheme=_SCHEME)
    sketch.update_batch(sorted(shingles))
    return np.asarray(sketch.hashvalues, dtype=np.uint32)


class SimilarTexts:
    """The signatures met so far, searched by locality-sensitive hashing: about 3 KB of memory a document."""

    def __init__(self, log: Path, *, count: int = 0) -> None:
        """`count` signatures of an older `log` are known from the start."""
        from datasketch import MinHashLSH

        self._index = MinHashLSH(threshold=SIMILARITY, num_perm=NUM_PERMUTATIONS)
        self._file = log.open("r+b" if count else "w+b")
        self._row_bytes = NUM_PERMUTATIONS * np.dtype(np.uint32).itemsize
        self._log, self.count = log, 0
        for _ in range(count):
            self._insert(np.frombuffer(self._file.read(self._row_bytes), np.uint32))
        self._file.truncate(count * self._row_bytes)

    def first_met(self, signature: NDArray[np.uint32]) -> bool:
        """Whether none that is known is as similar as `SIMILARITY`; then it is remembered."""
        if any(self._similarity(key, signature) >= SIMILARITY for key in self._index.query(_lean(signature))):
            return False
        self._file.seek(0, io.SEEK_END)
        self._file.write(signature.tobytes())
        self._insert(signature)
        return True

    def sync(self) -> int:
        flush_to_disk(self._file)
        return self.count

    def close(self) -> None:
        self._file.close()

    def _insert(self, signature: NDArray[np.uint32]) -> None:
        self._index.insert(self.count, _lean(signature))
        self.count += 1

    def _similarity(self, key: int, signature: NDArray[np.uint32]) -> float:
        self._file.seek(key * self._row_bytes)
        known = np.frombuffer(self._file.read(self._row_bytes), np.uint32)
        return float((known == signature).mean())


def _lean(signature: Sequence[int] | NDArray[np.uint32]) -> Any:
    from datasketch import LeanMinHash

    return LeanMinHash(seed=_SEED, hashvalues=np.asarray(signature, dtype=np.uint64), scheme=_SCHEME)


def require_datasketch() -> None:
    """Raises `DataError` where near-duplicates cannot be found."""
    try:
        import datasketch  # noqa: F401
    except ImportError:
        raise DataError(
            '--near-dedup: needs the package datasketch; pip install "atlas-llm[dedup]", or leave it out'
        ) from None
