"""Bytes → text → documents, all as streams: nothing here holds more than a few megabytes.

A document is handed on in pieces. They are cut where a word ends and a blank begins: GPT-2's split never
joins across such a place, so that the pieces' tokens are the document's tokens.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from atlas.errors import AtlasError

PIECE_CHARS = 1 << 20
_CHUNK_BYTES = 1 << 20
_WORD_END = re.compile(r"\S(?=[ \n])")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Piece:
    """A document, or a part of one that is longer than `PIECE_CHARS` characters."""

    text: str
    ends_document: bool = True


def replace_undecodable(text: str, on_undecodable: Callable[[int], None]) -> str:
    """`text` with lone surrogates, the mark of bytes that were not UTF-8, as U+FFFD; their number is told."""
    if text.isascii():
        return text
    text, count = _SURROGATE.subn("\ufffd", text)
    if count:
        on_undecodable(count)
    return text


def read_text(
    stream: BinaryIO, name: str, *, advance: Callable[[int], None], on_undecodable: Callable[[int], None]
) -> Iterator[str]:
    """UTF-8, with or without a byte-order mark, as chunks of text; line ends stay as they are."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
    first = True
    while chunk := stream.read(_CHUNK_BYTES):
        if first and chunk.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise AtlasError(f"{name}: is UTF-16 text; save it as UTF-8")
        advance(len(chunk))
        text = replace_undecodable(decoder.decode(chunk), on_undecodable)
        yield text.removeprefix("\ufeff") if first else text
        first = first and not text
    yield replace_undecodable(decoder.decode(b"", final=True), on_undecodable)


def as_document(chunks: Iterable[str]) -> Iterator[Piece]:
    """All of `chunks` as one document. One of nothing but blanks is none."""
    rest, started = "", False
    for chunk in chunks:
        rest += chunk
        while len(rest) > PIECE_CHARS:
            end = last_word_end(rest[:PIECE_CHARS])
            yield Piece(rest[:end], ends_document=False)
            rest, started = rest[end:], True
    if started or (rest and not rest.isspace()):
        yield Piece(rest)


def last_word_end(text: str) -> int:
    """The last place in `text` where it may be cut without changing a token; its end, if there is none."""
    for window in (1 << 12, len(text)):
        start = max(0, len(text) - window)
        ends = [match.end() for match in _WORD_END.finditer(text, start)]
        if ends:
            return ends[-1]
    return len(text)
