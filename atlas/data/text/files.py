"""One file of text on the disk, behind a URL or in an archive, compressed or not.

A `TextFile` only names a file. This process or another process can open the file.
"""

from __future__ import annotations

import io
import os
import posixpath
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from atlas.data.text.archives import DAMAGE, open_member, refuse_bomb
from atlas.data.text.formats.compression import LONGEST_MARK, compression_of, decompressed
from atlas.data.text.formats.sniff import NAMES, SAMPLE_BYTES, Format, Unread, identify
from atlas.errors import DataError
from atlas.files import encodable

COMBINED = "AllCombined.txt"
Advance = Callable[[int], None]

_PART = re.compile(r"wiki_\d+")
_BUFFER = 1 << 20
_ENDING = re.compile(r"(?:\.[a-z][a-z0-9_+-]{0,8})?\.(?:gz|bz2|xz|zst)$|\.[a-z][a-z0-9_+-]{0,8}$")
HTTP = ("http://", "https://")
_FEW_BYTES = 4096
"""Bytes that show what most files are. There may be hundreds of thousands of small files."""
_HTTP_SECONDS = 60
"""A download fails if its server sends nothing for this many seconds."""


def is_url(path: str | Path) -> bool:
    """Return whether a path is a URL."""
    return "://" in str(path)


@dataclass(frozen=True)
class TextFile:
    """One file of text. `root` is the path or URL of the file or, if `member` is set, the path of its archive."""

    root: str
    format: Format
    size: int
    """The size in bytes. A compressed file has its compressed size. A member of an archive has its size after
    extraction."""
    member: str | None = None
    shown: str | None = None
    """The file's name in messages, if this name is not the path."""
    trusted: bool = False

    @property
    def name(self) -> str:
        """The file's name in messages."""
        return self.shown or encodable(f"{self.root}/{self.member}" if self.member else self.root)

    @property
    def place(self) -> PurePosixPath:
        """The file's path inside its archive, or on the disk."""
        return PurePosixPath(
            self.member or (self.root if is_url(self.root) else Path(self.root).resolve().as_posix())
        )

    @property
    def basename(self) -> str:
        """The last part of the file's path."""
        return posixpath.basename(self.member) if self.member else os.path.basename(self.root)

    @property
    def is_part(self) -> bool:
        """Whether the file is text, and named like a part of the Kaggle archive."""
        return self.format == "text" and _PART.fullmatch(self.basename) is not None

    @property
    def is_combined(self) -> bool:
        """Whether the file is text, and named like the combined text of the Kaggle archive."""
        return self.format == "text" and self.basename == COMBINED

    @property
    def kind(self) -> str:
        """The format and the ending of the name, for tables, such as `text (.md)` or `text (.md.gz)`."""
        found = _ENDING.search(self.basename.lower())
        return f"{NAMES[self.format]} ({found[0]})" if found else NAMES[self.format]

    @contextmanager
    def open(self, advance: Advance = lambda _: None) -> Iterator[io.BufferedReader]:
        """Open the unpacked content. `advance` receives the number of bytes of each read, in total `size` bytes.

        Raises `DataError` if the file cannot be read or unpacked. Unless the file is `trusted`, the method also raises
        `DataError` for a possible bomb.
        """
        try:
            with open_member(self.root, self.member) if self.member else open_root(self.root) as raw:
                counted = _observed(raw, advance)
                with decompressed(counted, self.basename) as stream:
                    yield counted if stream is counted else _observed(stream, self.unpack_counter())
        except DAMAGE as error:
            what = "the archive" if self.member else "the file"
            raise DataError(
                f"{self.name}: {what} is damaged ({error!s:.200}); download or pack it again"
            ) from None
        except (OSError, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{self.name}: cannot be read: {reason!s:.200}; check the file") from None

    def identified(self, text_field: str = "text", encoding: str | None = None) -> TextFile | Unread:
        """Return this file with the format that its content shows, or what it is if Atlas does not read it. `encoding`
        is the encoding that the user named."""
        with self.open() as stream:
            beginning = stream.read(_FEW_BYTES)
            if len(beginning) == _FEW_BYTES and not isinstance(identify(beginning, self.basename), Unread):
                beginning += stream.read(SAMPLE_BYTES - _FEW_BYTES)
        if encoding:
            beginning = _decoded(beginning, encoding)
        found = identify(beginning, self.basename, text_field)
        if found in ("parquet", "arrow") and (self.member or self._is_compressed):
            return Unread(f"{NAMES[found]} that is compressed or in an archive", "unpack it")
        return found if isinstance(found, Unread) else replace(self, format=found)

    @property
    def _is_compressed(self) -> bool:
        with open_root(self.root) as raw:
            return compression_of(raw.read(LONGEST_MARK)) is not None

    def unpack_counter(self) -> Advance:
        """Return a function that counts unpacked bytes. The function raises `DataError` if the number suggests a bomb,
        unless the file is `trusted`."""
        unpacked = 0

        def count(more: int) -> None:
            nonlocal unpacked
            unpacked += more
            if not self.trusted:
                refuse_bomb(self.name, self.size, unpacked)

        return count


def _decoded(beginning: bytes, encoding: str) -> bytes:
    """Return the beginning of a text in UTF-8. A text that is not in `encoding` is reported when it is read."""
    try:
        return beginning.decode(encoding, errors="ignore").encode(errors="ignore")
    except UnicodeError:
        return beginning


def open_root(root: str, *, seekable: bool = False) -> IO[bytes]:
    """Open a file on the disk or behind a URL. Unless the stream must be `seekable`, Atlas downloads a file over HTTP
    with one request, since a simple server cannot send parts of a file."""
    if not is_url(root):
        return open(root, "rb", buffering=0)  # the caller has a buffer
    with filesystem_of(root) as (filesystem, path):
        in_one_request = {"block_size": 0} if root.startswith(HTTP) and not seekable else {}
        return cast(IO[bytes], _Remote(root, filesystem.open(path, "rb", **in_one_request)))


@contextmanager
def filesystem_of(url: str) -> Iterator[tuple[Any, str]]:
    """Yield fsspec's filesystem for a URL, and the path in it. Any error within this context becomes a `DataError`."""
    if "::" in url:
        raise DataError(f"{url}: Atlas does not read a URL inside another URL; download the file")
    with _backend_errors(url):
        import fsspec

        options: dict[str, Any] = {}
        if url.startswith(HTTP):
            from aiohttp import ClientTimeout

            # By default, aiohttp ends each download after five minutes.
            options["client_kwargs"] = {"timeout": ClientTimeout(sock_connect=30, sock_read=_HTTP_SECONDS)}
        yield fsspec.core.url_to_fs(url, **options)


@contextmanager
def _backend_errors(url: str) -> Iterator[None]:
    """Turn any error of a backend into a `DataError`: no such scheme, bucket, permission, network or range request."""
    try:
        yield
    except Exception as error:
        reason = str(error).partition(". ")[0] or type(error).__name__
        raise DataError(
            f"{url}: cannot be read ({reason:.200}); check the URL and your access, install the package that the "
            "scheme of the URL needs, or download the file"
        ) from None


class _Remote(io.RawIOBase):
    """A file behind a URL. An error while it is read becomes a `DataError`, as one while it is opened does."""

    def __init__(self, url: str, stream: Any) -> None:
        self._url, self._stream = url, stream

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return int(self._stream.seek(offset, whence))

    def tell(self) -> int:
        return int(self._stream.tell())

    def readinto(self, buffer: Any) -> int:
        with _backend_errors(self._url):
            return int(self._stream.readinto(buffer))

    def close(self) -> None:
        self._stream.close()
        super().close()


def _observed(stream: IO[bytes], on_read: Advance) -> io.BufferedReader:
    """Return a buffered stream. `on_read` receives the size of each read from `stream`."""
    return io.BufferedReader(_Observed(stream, on_read), _BUFFER)


class _Observed(io.RawIOBase):
    def __init__(self, stream: IO[bytes], on_read: Advance) -> None:
        self._stream, self._on_read = stream, on_read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = cast(io.RawIOBase, self._stream).readinto(buffer) or 0
        self._on_read(count)
        return count
