"""Bytes → text → documents, as streams of a few megabytes.

Atlas cuts a long document into pieces, each time where a word ends and a blank begins. GPT-2's pre-tokenizer never
joins text across such a cut, so the tokens of the pieces are the tokens of the document.
"""

from __future__ import annotations

import codecs
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, NamedTuple

from atlas.errors import DataError

PIECE_CHARS = 1 << 20
_CHUNK_BYTES = 1 << 20
_UP_TO_LAST_WORD_END = re.compile(r"(?s).*\S(?=[ \n])")
_BINARY_BYTES = 8000
_BINARY = {
    codecs.BOM_UTF32_LE: "UTF-32 text",
    codecs.BOM_UTF32_BE: "UTF-32 text",
    b"PK\x03\x04": "a zip archive or an Office document",
    b"%PDF": "a PDF",
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"\x89PNG": "a picture",
    b"PAR1": "Parquet",
}
_SURROGATE = re.compile("[\ud800-\udfff]")


class Piece(NamedTuple):
    """A complete document, or one part of a document of more than `PIECE_CHARS` characters."""

    text: str
    ends_document: bool = True


def replace_undecodable(text: str, on_undecodable: Callable[[int], None]) -> str:
    """Replace each lone surrogate by U+FFFD. A lone surrogate stands for a byte that was not UTF-8. `on_undecodable`
    receives the number of replacements."""
    try:
        text.encode()  # encoding is ten times as fast as a search
    except UnicodeEncodeError:
        text, count = _SURROGATE.subn("\ufffd", text)
        on_undecodable(count)
    return text


def read_text(stream: BinaryIO, name: str, *, on_undecodable: Callable[[int], None]) -> Iterator[str]:
    """Decode UTF-8, with or without a byte-order mark, or UTF-16 with such a mark. Yields chunks, with their line ends.

    Raises `DataError` if the beginning of the file is binary.
    """
    first = b""
    while len(first) < _BINARY_BYTES and (more := stream.read(_CHUNK_BYTES)):
        first += more
    utf16 = is_utf16(first)
    if b"\0" in first[:_BINARY_BYTES] and not utf16:  # no text has a zero byte (git has the same rule)
        shown = next((what for mark, what in _BINARY.items() if first.startswith(mark)), "a binary file")
        raise DataError(f"{name}: is {shown}, not text; leave it out, or save it as UTF-8 text")
    codec, errors = ("utf-16", "replace") if utf16 else ("utf-8", "surrogateescape")
    decoder, first = codecs.getincrementaldecoder(codec)(errors), first.removeprefix(codecs.BOM_UTF8)
    for chunk in itertools.chain([first], iter(lambda: stream.read(_CHUNK_BYTES), b"")):
        text = decoder.decode(chunk)
        if utf16 and (count := text.count("\ufffd")):
            on_undecodable(count)
        yield replace_undecodable(text, on_undecodable)
    yield replace_undecodable(decoder.decode(b"", final=True), on_undecodable)


def is_utf16(beginning: bytes) -> bool:
    """Return whether a text begins with a UTF-16 byte-order mark. A UTF-32 mark that begins with the same two bytes
    does not count."""
    marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return beginning.startswith(marks) and not beginning.startswith(codecs.BOM_UTF32_LE)


def as_document(chunks: Iterable[str], *, is_open: bool = False) -> Iterator[Piece]:
    """Yield all `chunks` as the pieces of one document or, with `is_open`, as the remaining pieces of a document. White
    space alone is not a document."""
    rest, started = "", is_open
    for chunk in chunks:
        rest += chunk
        while len(rest) > PIECE_CHARS:
            end = last_word_end(rest[:PIECE_CHARS])
            yield Piece(rest[:end], ends_document=False)
            rest, started = rest[end:], True
    if started or (rest and not rest.isspace()):
        yield Piece(rest)


def last_word_end(text: str) -> int:
    """Return the last position where a cut of `text` changes no token, or else the length of `text`."""
    found = _UP_TO_LAST_WORD_END.match(text)
    return found.end() if found else len(text)
