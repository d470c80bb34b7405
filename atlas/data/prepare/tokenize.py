"""A batch of documents → its tokens. Workers do this work. The tokens depend on the batch alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atlas.data.prepare.cleaning import Cleaning, digest_of
from atlas.data.prepare.dedup import minhash_of
from atlas.data.prepare.split import Part
from atlas.tokenizer import Tokenizer


@dataclass(frozen=True)
class Encoded:
    """The n parts of a batch after cleaning, as columns."""

    tokens: NDArray[Any]
    """The tokens of all parts, one part after the other, with an end-of-text token where a document ends."""
    lengths: NDArray[np.int64]
    """(n,) number of tokens in each part."""
    num_bytes: NDArray[np.int64]
    """(n,) size of each part in UTF-8, in bytes."""
    num_chars: NDArray[np.int64]
    """(n,) number of characters in each part, without leading and trailing white space."""
    digests: bytes
    """16 bytes per part: the digest of the part's text without leading and trailing white space."""
    signatures: list[NDArray[np.uint32]] | None
    """MinHash signature of each part if near-duplicates are left out, else None."""
    changes: dict[str, list[int]] = field(default_factory=dict)
    """Cleaning step → the number of parts that the step changed, and the number of characters that the step removed."""


@dataclass(frozen=True)
class Encoder:
    """Cleans and tokenizes documents. An encoder can be sent to another process."""

    tokenizer: Tokenizer
    cleaning: Cleaning
    dtype: str

    def __call__(self, parts: Sequence[Part]) -> Encoded:
        """Clean and tokenize the parts of a batch."""
        texts, changes = [], dict[str, list[int]]()
        for part in parts:
            text, changed = self.cleaning.clean(part.text, starts_document=part.starts_document)
            for step, shorter in changed.items():
                count = changes.setdefault(step, [0, 0])
                count[0] += 1
                count[1] += shorter
            texts.append(text)
        stripped = [text.strip() for text in texts]
        ids = self.tokenizer.encode_arrays(texts)
        end = np.array([self.tokenizer.eos_id], dtype=self.dtype)
        pieces: list[NDArray[Any]] = []
        for part, tokens in zip(parts, ids, strict=True):
            pieces += (tokens, end) if part.ends_document else (tokens,)
        ends = np.array([part.ends_document for part in parts], dtype=np.int64)
        return Encoded(
            tokens=np.concatenate(pieces).astype(self.dtype) if pieces else end[:0],
            lengths=np.array([len(tokens) for tokens in ids], dtype=np.int64) + ends,
            num_bytes=np.array([len(text.encode()) for text in texts], dtype=np.int64),
            num_chars=np.array([*map(len, stripped)], dtype=np.int64),
            digests=b"".join(digest_of(text.encode()) for text in stripped),
            signatures=[minhash_of(text) for text in texts] if self.cleaning.near_dedup else None,
            changes=changes,
        )
