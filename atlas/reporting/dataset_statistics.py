"""Statistics of a prepared dataset: document lengths, sample documents, and the text that the tokenizer compresses
worst.

No function here reads all tokens of a large dataset. Lengths come from the document offsets, and texts from a few
short reads.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atlas.data.shards import TokenStream
from atlas.tokenizer import Tokenizer
from atlas.tokenizer.byte_level import ByteLevelTokenizer

MOST_DOCUMENTS = 2**26
"""The approximate largest number of documents that Atlas measures in a split. In a split with more documents, Atlas
measures evenly spread shards."""
STRETCH_TOKENS = 64
SAMPLE_TOKENS = 2**24
"""The approximate largest number of tokens in a split that Atlas searches for the worst stretches. In a split with more
tokens, Atlas searches evenly spread blocks."""

_OFFSETS_PER_STEP = 2**22
_BLOCK_TOKENS = 2**18
# The minimum distance between two worst stretches. Otherwise one table of numbers could fill the list of worst
# stretches.
_APART_TOKENS = 1024
_MOST_BYTES_OF_A_CHARACTER = 4


@dataclass(frozen=True, eq=False)
class Lengths:
    """A histogram of document lengths: `counts[i]` documents have `values[i]` tokens, end-of-text token included.
    `values` are ascending."""

    values: NDArray[np.int64]
    counts: NDArray[np.int64]

    @property
    def documents(self) -> int:
        """Number of measured documents."""
        return int(self.counts.sum())

    @property
    def longest(self) -> int:
        """Number of tokens in the longest document."""
        return int(self.values[-1])

    @property
    def median(self) -> float:
        """Median length in tokens. For an even number of documents, the mean of the two middle lengths."""
        middle = [(self.documents - 1) // 2, self.documents // 2]
        return float(self.values[np.searchsorted(self.counts.cumsum(), middle, side="right")].mean())


@dataclass(frozen=True)
class Excerpt:
    """The beginning of a document as the model reads it, and the number of tokens in the document."""

    text: str
    tokens: int


@dataclass(frozen=True)
class Stretch:
    """A stretch of `STRETCH_TOKENS` tokens in one document. `start` is the index of the stretch's first token in the
    split."""

    start: int
    text: str
    bytes_per_token: float


def measure_lengths(stream: TokenStream, *, most: int = MOST_DOCUMENTS) -> Lengths:
    """Return the document lengths of a split. If the split has more than `most` documents, measure only evenly spread
    shards with about `most` documents.

    A count for each length needs little memory, since a split of N tokens has at most √(2N) different lengths.
    """
    counter: Counter[int] = Counter()
    for lengths in _lengths(stream, every=max(1, -(-stream.num_documents // most))):
        values, counts = np.unique(lengths, return_counts=True)
        counter.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    table = np.array(sorted(counter.items()), np.int64).reshape(-1, 2)
    return Lengths(table[:, 0], table[:, 1])


def sample_documents(
    stream: TokenStream, tokenizer: Tokenizer, *, count: int = 10, characters: int = 100, seed: int = 0
) -> list[Excerpt]:
    """Return the beginnings of `count` random documents, in the order of the data."""
    numbers = random.Random(seed).sample(range(stream.num_documents), min(count, stream.num_documents))
    excerpts = []
    for number in sorted(numbers):
        start, end = _document_start(stream, number), _document_start(stream, number + 1)
        # These tokens contain at least `characters` characters: a token has at least one byte, and a character has at
        # most four bytes.
        read_to = min(end, start + _MOST_BYTES_OF_A_CHARACTER * characters)
        text = tokenizer.decode(stream.read(start, read_to).tolist())
        is_complete = read_to == end and len(text) <= characters
        excerpts.append(Excerpt(text if is_complete else text[:characters] + "…", end - start))
    return excerpts


def worst_stretches(stream: TokenStream, tokenizer: ByteLevelTokenizer, *, count: int = 3) -> list[Stretch]:
    """Return the `count` stretches with the fewest bytes per token, worst first, at least `_APART_TOKENS` tokens apart.

    The search covers all tokens of the split. If the split has more than `SAMPLE_TOKENS` tokens, the search covers
    about `SAMPLE_TOKENS` tokens in evenly spread blocks. The result has fewer than `count` stretches if few documents
    are long enough.
    """
    sizes = np.array([len(token) for token in tokenizer.token_strings()], np.int64)  # one character per byte
    across_documents = STRETCH_TOKENS * int(sizes.max()) + 1
    sizes[tokenizer.eos_id] = across_documents
    candidates = []
    for start, ids in _blocks(stream):
        totals = np.concatenate([[0], sizes[ids].cumsum()])
        in_stretch = totals[STRETCH_TOKENS:] - totals[:-STRETCH_TOKENS]
        for _ in range(count if len(in_stretch) else 0):
            place = int(in_stretch.argmin())
            candidates.append((int(in_stretch[place]), start + place))
            in_stretch[max(0, place - _APART_TOKENS) : place + _APART_TOKENS] = across_documents
    worst: list[Stretch] = []
    for size, start in sorted(candidates):
        apart = all(abs(start - other.start) >= _APART_TOKENS for other in worst)
        if size < across_documents and apart and len(worst) < count:
            text = tokenizer.decode(stream.read(start, start + STRETCH_TOKENS).tolist())
            worst.append(Stretch(start, text, size / STRETCH_TOKENS))
    return worst


def _blocks(stream: TokenStream) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yield (start, token ids) of evenly spread blocks of a split. The blocks of a small split cover the full split. A
    block then overlaps the next block by one stretch, so that the search misses no stretch between two blocks."""
    blocks = min(SAMPLE_TOKENS, stream.num_tokens) // _BLOCK_TOKENS + 1
    for block in range(blocks):
        start = block * stream.num_tokens // blocks
        stop = min(start + _BLOCK_TOKENS + STRETCH_TOKENS, stream.num_tokens)
        yield start, stream.read(start, stop)


def _lengths(stream: TokenStream, *, every: int) -> Iterator[NDArray[np.int64]]:
    """Yield the lengths of the documents that begin in every `every`-th shard, as arrays of bounded size."""
    shards = (stream.starts_in(shard) for shard in stream.record.shards if shard.documents)
    end = np.array([stream.num_tokens])
    pairs = itertools.pairwise(itertools.chain(shards, [end]))
    for starts, following in itertools.islice(pairs, 0, None, every):
        for place in range(0, len(starts), _OFFSETS_PER_STEP):
            piece = starts[place : place + _OFFSETS_PER_STEP + 1]
            is_last = place + _OFFSETS_PER_STEP >= len(starts)
            yield np.diff(piece, append=following[:1]) if is_last else np.diff(piece)


def _document_start(stream: TokenStream, number: int) -> int:
    """Return the index of the first token of document `number` in the split. If there is no such document, return the
    number of tokens in the split."""
    for shard in stream.record.shards:
        if number < shard.documents:
            return int(stream.starts_in(shard)[number])
        number -= shard.documents
    return stream.num_tokens
