"""Split the text into training text and held-out validation text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from atlas.data.prepare.cleaning import Cleaning
from atlas.data.prepare.dedup import fractions
from atlas.data.text.formats.decode import Piece, last_word_end

FEWEST_DOCUMENTS = 20
"""With fewer documents, Atlas cuts the text by position, since the sizes of a split by hash would depend on chance."""


class Part(NamedTuple):
    """A piece of a document. `split` is None if the document's hash decides the split."""

    text: str
    split: str | None
    starts_document: bool
    ends_document: bool


@dataclass(frozen=True)
class SplitRule:
    """The rule of the split. Without `cut_at`, the hash of each document decides. With `cut_at`, all text after that
    many characters is held out.

    With `cut_at`, duplicates and short documents are left out first. Otherwise the cut could divide such a document.
    """

    val_fraction: float
    cut_at: int | None = None
    copies: tuple[int, ...] = ()
    """Numbers of the documents that repeat an earlier document."""
    copied_chars: int = 0
    short: tuple[int, ...] = ()
    """Numbers of the documents with fewer characters than `Cleaning.min_chars`."""
    short_chars: int = 0

    @staticmethod
    def choose(documents: Iterable[Piece], val_fraction: float, cleaning: Cleaning) -> SplitRule:
        """Choose the rule. Reads at most the first `FEWEST_DOCUMENTS` documents."""
        if val_fraction == 0:
            return SplitRule(0.0)
        seen: set[bytes] = set()
        copies: list[int] = []
        short: list[int] = []
        count = chars = cleaned = total = copied_chars = short_chars = 0
        starts, blanks, digest = True, "", hashlib.blake2b(digest_size=16)
        for piece in documents:
            text, _ = cleaning.clean(piece.text, starts_document=starts)
            cleaned += len(text)
            text = text.lstrip() if starts else blanks + text
            starts = piece.ends_document
            body = text.rstrip()
            blanks = text[len(body) :]  # white space counts only if more text follows
            digest.update(body.encode())
            chars += len(piece.text)
            if not piece.ends_document:
                continue
            if cleaned < max(1, cleaning.min_chars):
                short.append(count)
                short_chars += cleaned
            elif "duplicates" in cleaning.steps and digest.digest() in seen:
                copies.append(count)
                copied_chars += chars
            else:
                seen.add(digest.digest())
                total += chars
            count, chars, cleaned, digest = count + 1, 0, 0, hashlib.blake2b(digest_size=16)
            if count == FEWEST_DOCUMENTS:
                return SplitRule(val_fraction)
        cut_at = total - int(total * val_fraction)
        return SplitRule(val_fraction, cut_at, tuple(copies), copied_chars, tuple(short), short_chars)

    def parts(self, pieces: Iterable[Piece]) -> Iterator[Part]:
        """Yield each piece as a part. If the rule has a cut, the piece at the cut becomes two parts."""
        if self.cut_at is not None:
            yield from self._cut(pieces, self.cut_at)
            return
        starts = True
        for piece in pieces:
            yield Part(piece.text, None, starts, piece.ends_document)
            starts = piece.ends_document

    def holds_out(self, digests: bytes) -> NDArray[np.bool_]:
        """Return (n,): True for each of n digests whose document is for validation. The decision depends on a
        document's text alone. So other documents do not change the decision, and duplicates have the same decision."""
        return fractions(digests)[:, 0] < self.val_fraction

    def _cut(self, pieces: Iterable[Piece], cut_at: int) -> Iterator[Part]:
        starts, position, number = True, 0, 0
        for piece in pieces:
            is_left_out = number in self.copies or number in self.short
            number += piece.ends_document
            if is_left_out:
                continue
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
