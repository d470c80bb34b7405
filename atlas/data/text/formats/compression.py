"""Decompression of gzip, Zstandard, bzip2 and xz streams with limited memory."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import sys
import zlib
from typing import IO, Any, cast

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

GZIP, ZSTD, XZ = b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\x00"
BLOCK, END = b"1AY&SY", b"\x17rE8P\x90"
"""What follows bzip2's `BZh` and its level: a text can begin with these four letters."""
BZIP2 = [b"BZh%d" % level + mark for level in range(1, 10) for mark in (BLOCK, END)]
MARKS = {GZIP: ".gz", ZSTD: ".zst", XZ: ".xz"} | dict.fromkeys(BZIP2, ".bz2")
LONGEST_MARK = max(map(len, MARKS))
"""The first bytes of a compressed file → the usual ending of its name."""
ENDINGS = (".gz", ".zst", ".bz2", ".xz")
ERRORS = (gzip.BadGzipFile, zlib.error, zstd.ZstdError, lzma.LZMAError)
"""Exceptions for damaged streams, in addition to `EOFError` and `OSError`."""

_MOST_WINDOW_BITS = 27
"""A Zstandard stream may need a window of at most 128 MiB."""
_XZ_MEMORY = 192 << 20
"""An xz stream may need this many bytes of memory. `xz -9` needs 65 MiB."""
_CHUNK = 1 << 16


def compression_of(beginning: bytes) -> str | None:
    """Return the usual ending for the compression of a file that has this beginning, or None."""
    return next((ending for mark, ending in MARKS.items() if beginning.startswith(mark)), None)


def decompressed(stream: io.BufferedReader, name: str) -> IO[bytes]:
    """Return a stream of the decompressed content of `stream`, or `stream` itself if its first bytes are not those of a
    compressed file: a browser may decompress a download and keep its name.

    Raises `EOFError` if the name has the ending of a compressed file, and the content ends within the first bytes.
    """
    beginning = stream.peek(LONGEST_MARK)[:LONGEST_MARK]
    if name.lower().endswith((*ENDINGS, ".tgz", ".tbz2", ".txz")) and any(
        len(beginning) < len(mark) and mark.startswith(beginning) for mark in MARKS
    ):
        raise EOFError("compressed file ended before its first bytes are complete")
    match compression_of(beginning):
        case ".gz":
            return cast(IO[bytes], gzip.GzipFile(fileobj=stream))
        case ".zst":
            options = {int(zstd.DecompressionParameter.window_log_max): _MOST_WINDOW_BITS}
            return cast(IO[bytes], zstd.ZstdFile(stream, options=options))
        case ".bz2":
            return bz2.BZ2File(stream)
        case ".xz":
            return cast(IO[bytes], io.BufferedReader(_Xz(stream)))
    return stream


class _Xz(io.RawIOBase):
    """The content of an xz file. `lzma.LZMAFile` cannot limit its memory."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._decompressor: Any = None
        self._unused = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._decompressor is None or self._decompressor.eof:
                # A file can contain several streams, with padding between them.
                beginning = (self._unused or self._stream.read(_CHUNK)).lstrip(b"\0")
                if not beginning:
                    return 0
                self._unused = b""
                self._decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
            elif self._decompressor.needs_input:
                beginning = self._stream.read(_CHUNK)
                if not beginning:
                    raise EOFError("compressed file ended before the end-of-stream marker")
            else:
                beginning = b""
            content = self._decompressor.decompress(beginning, len(buffer))
            if self._decompressor.eof:
                self._unused = self._decompressor.unused_data
            if content:
                buffer[: len(content)] = content
                return len(content)
