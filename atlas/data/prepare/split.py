"""Split the text into training text and held-out validation text."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from atlas.data.prepare.cleaning import Cleaning
from atlas.data.prepare.dedup import fractions
from atlas.data.text.formats.decode import Piece, last_word_end

FEWEST_DOCUMENTS = 100
"""With fewer documents, Atlas holds out passages, since the sizes of a split by hash would depend on chance."""
_FEWEST_HELD_OUT, _MOST_COUNTED = 5, 10_000
"""A split by hash needs so many documents that it holds out about `_FEWEST_HELD_OUT`. Atlas counts at most
`_MOST_COUNTED`."""
_SHORTEST_PASSAGE = 200
_WORD_END, _LONGEST_WORD = re.compile(r"\S(?= )|[^\W_](?=\n)"), 100


class Part(NamedTuple):
    """A piece of a document. `split` is None if the document's hash decides the split."""

    text: str
    split: str | None
    starts_document: bool
    ends_document: bool


@dataclass(frozen=True)
class SplitRule:
    """The rule of the split. Without `cuts`, the hash of each document decides. With `cuts`, the end of each document
    is held out, or of some documents if they are short. No document is held out completely.

    With `cuts`, duplicates and short documents are left out first. Otherwise a cut could divide such a document.
    """

    val_fraction: float
    cuts: tuple[int | None, ...] | None = None
    """For each document, the number of characters before the passage that is held out, or None without a passage."""
    copies: tuple[int, ...] = ()
    """Numbers of the documents that repeat an earlier document."""
    copied_chars: int = 0
    short: tuple[int, ...] = ()
    """Numbers of the documents with fewer characters than `Cleaning.min_chars`."""
    short_chars: int = 0

    @staticmethod
    def choose(documents: Iterable[Piece], val_fraction: float, cleaning: Cleaning) -> SplitRule:
        """Choose the rule. Reads at most as many documents as a split by hash needs."""
        if val_fraction == 0:
            return SplitRule(0.0)
        seen: set[bytes] = set()
        copies: list[int] = []
        short: list[int] = []
        lengths: list[int] = []
        needed = min(max(FEWEST_DOCUMENTS, int(_FEWEST_HELD_OUT / val_fraction)), _MOST_COUNTED)
        count = chars = cleaned = copied_chars = short_chars = 0
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
            lengths.append(0)
            if cleaned < max(1, cleaning.min_chars):
                short.append(count)
                short_chars += cleaned
            elif "duplicates" in cleaning.steps and digest.digest() in seen:
                copies.append(count)
                copied_chars += chars
            else:
                seen.add(digest.digest())
                lengths[-1] = chars
            count, chars, cleaned, digest = count + 1, 0, 0, hashlib.blake2b(digest_size=16)
            if count == needed:
                return SplitRule(val_fraction)
        return SplitRule(
            val_fraction, _cuts(lengths, val_fraction), tuple(copies), copied_chars, tuple(short), short_chars
        )

    def parts(self, pieces: Iterable[Piece]) -> Iterator[Part]:
        """Yield each piece as a part. A piece at a cut becomes two parts."""
        if self.cuts is not None:
            yield from self._cut(pieces, self.cuts)
            return
        starts = True
        for piece in pieces:
            yield Part(piece.text, None, starts, piece.ends_document)
            starts = piece.ends_document

    def holds_out(self, digests: bytes) -> NDArray[np.bool_]:
        """Return (n,): True for each of n digests whose document is for validation. The decision depends on a
        document's text alone. So other documents do not change the decision, and duplicates have the same decision."""
        return fractions(digests)[:, 0] < self.val_fraction

    def _cut(self, pieces: Iterable[Piece], cuts: Sequence[int | None]) -> Iterator[Part]:
        number = position = 0  # of the document, and in it
        starts = {"train": True, "val": True}
        for piece in pieces:
            here, at, cut = number, position, cuts[number] if number < len(cuts) else None
            number, position = (number + 1, 0) if piece.ends_document else (number, at + len(piece.text))
            if here in self.copies or here in self.short:
                continue
            end = len(piece.text) if cut is None else _near_word_end(piece.text, max(0, cut - at))
            head, tail = piece.text[:end], piece.text[end:]
            if head:
                ends = (
                    bool(tail) and len(cuts) > 1
                )  # a single document has nothing behind it to be separated from
                yield Part(head, "train", starts["train"], (piece.ends_document and not tail) or ends)
                starts["train"] = False
            if tail:
                yield Part(tail, "val", starts["val"], piece.ends_document)
                starts["val"] = False
            if piece.ends_document:
                starts = {"train": True, "val": True}


def _near_word_end(text: str, cut: int) -> int:
    """Return the last word end before `cut`, or else the first one soon after it, or else `cut` itself."""
    if not 0 < cut < len(text):
        return min(cut, len(text))
    start = max(0, cut - _LONGEST_WORD)
    before = start + last_word_end(text[start:cut])
    if before < cut:
        return before
    after = _WORD_END.search(text, cut - 1, cut + _LONGEST_WORD)
    return after.end() if after else cut


def _cuts(lengths: Sequence[int], fraction: float) -> tuple[int | None, ...]:
    """Return where the held-out passage of each document begins, for documents of these lengths in characters.

    A passage is the end of its document, at most half of it. A document too short for a passage of `_SHORTEST_PASSAGE`
    characters leaves its share to a later one. What no later document can give, the longest ones give.
    """
    owed = int(sum(lengths) * fraction)
    shortest = owed // max(1, owed // _SHORTEST_PASSAGE)
    passages = []
    read = held_out = 0
    for length in lengths:
        read += length
        passage = min(int(read * fraction) - held_out, length // 2)
        passages.append(passage if passage >= min(shortest, length // 2) else 0)
        held_out += passages[-1]
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        more = min(owed - held_out, lengths[place] // 2 - passages[place])
        passages[place] += more
        held_out += more
    return tuple(
        length - passage if passage else None for length, passage in zip(lengths, passages, strict=True)
    )
