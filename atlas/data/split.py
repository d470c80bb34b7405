"""Which text is trained on and which is held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from atlas.data.text import Piece, last_word_end

FEWEST_DOCUMENTS = 20
"""With fewer documents than this a split by document would be luck."""


@dataclass(frozen=True)
class Part:
    """A piece of a document, and the split it goes to."""

    text: str
    split: str
    starts_document: bool
    ends_document: bool


@dataclass(frozen=True)
class SplitRule:
    """By the hash of each document; or, with `cut_at`, by place: what stands behind that many characters
    is held out."""

    val_fraction: float
    cut_at: int | None = None

    @staticmethod
    def choose(documents: Iterable[Piece], val_fraction: float) -> SplitRule:
        """Reads `documents` until it is clear that there are enough of them."""
        if val_fraction == 0:
            return SplitRule(0.0)
        count = chars = 0
        for piece in documents:
            chars += len(piece.text)
            count += piece.ends_document
            if count == FEWEST_DOCUMENTS:
                return SplitRule(val_fraction)
        return SplitRule(val_fraction, cut_at=chars - int(chars * val_fraction))

    def assign(self, documents: Iterable[Piece]) -> Iterator[Part]:
        """Each piece with its split; a cut at a place between two words divides a piece."""
        if self.cut_at is None:
            return self._by_hash(documents)
        return self._by_place(documents, self.cut_at)

    def _by_hash(self, documents: Iterable[Piece]) -> Iterator[Part]:
        starts, split = True, "train"
        for piece in documents:
            if starts:
                split = "val" if text_fraction(piece.text) < self.val_fraction else "train"
            yield Part(piece.text, split, starts, piece.ends_document)
            starts = piece.ends_document

    def _by_place(self, documents: Iterable[Piece], cut_at: int) -> Iterator[Part]:
        starts, position = True, 0
        for piece in documents:
            head = piece.text[: max(0, cut_at - position)]
            if 0 < len(head) < len(piece.text):
                head = head[: last_word_end(head)]
            tail = piece.text[len(head) :]
            if head:
                yield Part(head, "train", starts, piece.ends_document and not tail)
            if tail:
                first_of_val = bool(head) or position == cut_at
                yield Part(tail, "val", starts or first_of_val, piece.ends_document)
            position += len(piece.text)
            starts = piece.ends_document


def text_fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, evenly spread over texts."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, person=b"atlas-split").digest()
    return int.from_bytes(digest, "big") / 2**64
