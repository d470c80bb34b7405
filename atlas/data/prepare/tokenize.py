"""A batch of documents → its tokens, which is the work of a worker. The tokens depend on that batch alone."""

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
    """(n,) number of tokens."""
    num_bytes: NDArray[np.int64]
    """(n,) bytes of UTF-8."""
    num_chars: NDArray[np.int64]
    """(n,) characters without the white space around the text."""
    digests: bytes
    """16 bytes per part: the digest of its text without the white space around the text."""
    signatures: list[NDArray[np.uint32]] | None
    """MinHash of each part, if near copies are left out."""
    changes: dict[str, list[int]] = field(default_factory=dict)
    """For each cleaning step: the number of parts it changed, and of characters it removed."""


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
