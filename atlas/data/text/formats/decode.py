"""Bytes → text → documents, as streams of a few megabytes.

Text that is not UTF-8 is decoded in the encoding that its bytes show, if they show one. Atlas cuts a long document into
pieces, each time where a word ends and a blank begins. No split of `byte_level.SPLITS` joins text across such a cut, so
the tokens of the pieces are the tokens of the document. Where a million characters have no such place, as in DNA, a cut
can change the tokens beside it.
"""

from __future__ import annotations

import codecs
import io
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from atlas.data.text.formats.encodings import guess_encodings
from atlas.errors import DataError

PIECE_CHARS = 1 << 20
_CHUNK_BYTES = 1 << 20
_UP_TO_LAST_WORD_END = re.compile(r"(?s).*(?:\S(?= )|[^\W_](?=\n))")
_BINARY_BYTES = 8000
_BINARY = {
    b"PK\x03\x04": "a zip archive or an Office document",
    b"%PDF": "a PDF",
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"\x89PNG": "a picture",
    b"PAR1": "Parquet",
}
_SURROGATE = re.compile("[\ud800-\udfff]")
_MOST_REPLACED = 0.001
"""Text in which a larger share of the bytes cannot be decoded is in another encoding, or damaged."""
_MARKS = (  # the marks of UTF-32 begin with those of UTF-16
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_JAPANESE = (b"\x1b$B", b"\x1b$@")
"""The sequences with which Japanese begins in ISO-2022-JP, whose bytes are all ASCII."""


class Piece(NamedTuple):
    """A complete document, or one part of a document of more than `PIECE_CHARS` characters."""

    text: str
    ends_document: bool = True


class Decoding(NamedTuple):
    """How to decode a file, and what receives the findings."""

    name: str
    """The file's name in messages."""
    encoding: str | None
    """The encoding that the user named, or None."""
    on_undecodable: Callable[[int], None]
    """Receives the numbers of bytes that were replaced by U+FFFD."""
    on_encoding: Callable[[str], None]
    """Receives the encoding if it is not UTF-8, and the user did not name it."""


def read_text(stream: io.BufferedIOBase, how: Decoding) -> Iterator[str]:
    """Yield the decoded text in chunks, with their line ends. Each byte that cannot be decoded becomes U+FFFD.

    Raises `DataError` if the encoding is uncertain, or too many bytes cannot be decoded.
    """
    first, failure = _beginning(stream)
    codec = _named_codec(how.encoding, first) if how.encoding else _codec_of(first, how)
    # No text has a zero byte, except in UTF-16 and UTF-32. Git has the same rule.
    if b"\0" in first[:_BINARY_BYTES] and codec in _UTF8:
        shown = next((what for mark, what in _BINARY.items() if first.startswith(mark)), "a binary file")
        raise DataError(f"{how.name}: is {shown}, not text; leave it out, or save it as UTF-8 text")
    rest = iter(lambda: stream.read1(_CHUNK_BYTES), b"") if failure is None else iter(())
    decoder = codecs.getincrementaldecoder(codec)("surrogateescape" if codec in _UTF8 else "replace")
    read = replaced = 0
    for chunk in itertools.chain([first], rest, [b""]):
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeError as error:  # UTF-16 and UTF-32 without a mark of the byte order
            raise DataError(
                f"{how.name}: cannot be decoded as {codec} ({error!s:.100}); name another encoding, such as utf-16-le"
            ) from None
        read += len(chunk)
        if codec in _UTF8:
            text, count = _without_surrogates(text)
        else:
            count = text.count("\ufffd")
        if count:
            replaced += count
            how.on_undecodable(count)
            _refuse_too_many(replaced, max(read, _CHUNK_BYTES), how, codec)
        yield text
    if failure is not None:
        raise failure
    _refuse_too_many(replaced, read, how, codec)


def _beginning(stream: io.BufferedIOBase) -> tuple[bytes, Exception | None]:
    """Return the first bytes, as many as are necessary to recognise an encoding, and the error that ended them. The
    text before an error is of use."""
    first = b""
    try:
        while len(first) < _CHUNK_BYTES and (more := stream.read1(_CHUNK_BYTES - len(first))):
            first += more
    except Exception as error:
        return first, error
    return first, None


_UTF8 = ("utf-8", "utf-8-sig")


def _named_codec(encoding: str, first: bytes) -> str:
    """Return the codec for an encoding that the user named. A Unicode mark at the beginning is no part of the text."""
    codec, marked = codecs.lookup(encoding).name, codec_of_mark(first)
    is_of_same_kind = marked is not None and marked.removesuffix("-sig").startswith(codec[:6])
    return marked if marked and is_of_same_kind else codec


def _refuse_too_many(replaced: int, read: int, how: Decoding, codec: str) -> None:
    if replaced > 1 and replaced > _MOST_REPLACED * read:
        name = "UTF-8" if codec in _UTF8 else codec
        raise DataError(
            f"{how.name}: {replaced:,} of {read:,} bytes are not {name}; name its encoding with --encoding, or save it "
            "as UTF-8"
        )


def lines_of(chunks: Iterable[str], longest: int) -> Iterator[str]:
    """Yield the lines of a text with their ends. A line ends with a newline character only. A line with more than
    `longest` characters comes in parts, of which the first has more than `longest` characters."""
    rest = ""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split("\n")
        for line in lines:
            yield line + "\n"
        if len(rest) > longest:
            yield rest
            rest = ""
    if rest:
        yield rest


def codec_of_mark(beginning: bytes) -> str | None:
    """Return the encoding that a Unicode mark at the beginning of a text shows, or None."""
    return next((codec for mark, codec in _MARKS if beginning.startswith(mark)), None)


def _codec_of(first: bytes, how: Decoding) -> str:
    if codec := codec_of_mark(first):
        return codec
    if b"\0" in first[:_BINARY_BYTES]:
        return "utf-8"
    if any(mark in first for mark in _JAPANESE):
        how.on_encoding("iso2022_jp")
        return "iso2022_jp"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(first)
        return "utf-8"
    except UnicodeDecodeError:
        bad = _without_surrogates(first.decode("utf-8", errors="surrogateescape"))[1]
    if bad <= 1 or bad <= _MOST_REPLACED * len(first):
        return "utf-8"
    likely, is_certain = guess_encodings(first)
    if not likely:
        raise DataError(
            f"{how.name}: is neither UTF-8 nor in an encoding that Atlas recognises; name its encoding with "
            "--encoding, or leave the file out"
        )
    if not is_certain:
        raise DataError(
            f"{how.name}: is not UTF-8; its encoding can be {' or '.join(likely[:2])}; name it with --encoding"
        )
    how.on_encoding(likely[0])
    return likely[0]


def _without_surrogates(text: str) -> tuple[str, int]:
    """Replace each lone surrogate by U+FFFD. Returns the text and the number of replacements."""
    try:
        text.encode()  # encoding is ten times as fast as a search
    except UnicodeEncodeError:
        return _SURROGATE.subn("\ufffd", text)
    return text, 0


def replace_undecodable(text: str, on_undecodable: Callable[[int], None]) -> str:
    """Replace each lone surrogate by U+FFFD. A lone surrogate stands for a byte that was not UTF-8. `on_undecodable`
    receives the number of replacements."""
    text, count = _without_surrogates(text)
    if count:
        on_undecodable(count)
    return text


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
