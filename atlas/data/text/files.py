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
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, cast

from atlas.data.text.archives import DAMAGE, open_member, refuse_bomb
from atlas.data.text.formats.compression import ENDINGS as COMPRESSED
from atlas.data.text.formats.compression import decompressed
from atlas.errors import DataError
from atlas.files import encodable

COMBINED = "AllCombined.txt"
Advance = Callable[[int], None]
Format = Literal["text", "rows", "json", "parquet"]
"""`rows` is one JSON object per line. `json` is JSON over several lines."""

FORMATS: dict[str, Format] = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "rows",
    ".json": "rows",
    ".parquet": "parquet",
}
ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", *(f".tar{ending}" for ending in COMPRESSED))
ENDINGS = (*FORMATS, *COMPRESSED, ".zip", ".tar", ".tgz", ".tbz2", ".txz")
_PART = re.compile(r"wiki_\d+")
_BUFFER = 1 << 20
HTTP = ("http://", "https://")
_HTTP_SECONDS = 60
"""A download fails if its server sends nothing for this many seconds."""


def is_url(path: str | Path) -> bool:
    """Return whether a path is a URL."""
    return "://" in str(path)


def format_of(name: str) -> Format | None:
    """Return the format of a file with this name, or None if Atlas does not read such files.

    A `.json` file may hold something other than rows: see `is_json`.
    """
    *compressed, inner = _split_compression(name)
    suffix = posixpath.splitext(inner)[1]
    if not suffix and (compressed or _PART.fullmatch(posixpath.basename(inner))):
        return "text"
    format = FORMATS.get(suffix)
    return None if compressed and format == "parquet" else format


def ending_of(name: str) -> str:
    """Return the ending of a name together with the compression ending, such as `.pdf.gz`. Returns an empty string for
    a name without an ending."""
    *compressed, inner = _split_compression(name)
    return posixpath.splitext(inner)[1] + "".join(compressed)


def is_json(name: str) -> bool:
    """Return whether a name ends with `.json`, compressed or not. Only the file's content shows whether the file holds
    rows."""
    return _split_compression(name)[-1].endswith(".json")


def _split_compression(name: str) -> list[str]:
    """Separate the compression ending: `A.PDF.gz` → [`.gz`, `a.pdf`], `a.pdf` → [`a.pdf`]."""
    stem, suffix = posixpath.splitext(name.lower())
    return [suffix, stem] if suffix in COMPRESSED else [stem + suffix]


def is_archive(name: str) -> bool:
    """Return whether a name has the ending of an archive."""
    return name.lower().endswith(ARCHIVES)


@dataclass(frozen=True)
class TextFile:
    """One file of text. `root` is the path or URL of the file or, if `member` is set, the path of its archive."""

    root: str
    format: Format | None
    """The format of the content, or None if Atlas does not read the file."""
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
        """Whether the file is named like a part of the Kaggle archive."""
        return _PART.fullmatch(self.basename) is not None

    @property
    def is_combined(self) -> bool:
        """Whether the file is named like the combined text of the Kaggle archive."""
        return self.basename == COMBINED

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
