"""One file of text, wherever it lies: on the disk, behind a URL, in an archive, compressed.

A `TextFile` is only a name; whoever opens it, in this process or another, finds the bytes by itself.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import re
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO, Literal, cast

from atlas.data.text.archives import MAX_RATIO, RATIO_FREE_BYTES, open_member, open_zstd
from atlas.errors import DataError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

COMBINED = "AllCombined.txt"
Advance = Callable[[int], None]
Format = Literal["text", "rows", "parquet"]

FORMATS: dict[str, Format] = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "rows",
    ".json": "rows",
    ".parquet": "parquet",
}
COMPRESSED = (".gz", ".zst")
ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.zst")
ENDINGS = (*FORMATS, *COMPRESSED, ".zip", ".tar", ".tgz")
_PART = re.compile(r"wiki_\d+")
_BUFFER = 1 << 20


def printable(name: str) -> str:
    """A file's name may have bytes that are not UTF-8, as lone surrogates, which can neither be printed nor saved."""
    return name.encode("utf-8", "backslashreplace").decode()


def is_url(path: str | Path) -> bool:
    return "://" in str(path)


def format_of(name: str) -> Format | None:
    """Return what a file of that name holds, None for what Atlas does not read. A `.json` file may hold something
    else: see `is_json`."""
    *compressed, inner = _split_compression(name)
    path = PurePosixPath(inner)
    if not path.suffix and (compressed or _PART.fullmatch(path.name)):
        return "text"
    format = FORMATS.get(path.suffix)
    return None if compressed and format == "parquet" else format


def ending_of(name: str) -> str:
    """Return a name's ending with that of its compression, such as `.pdf.gz`; an empty string where it has none."""
    *compressed, inner = _split_compression(name)
    return PurePosixPath(inner).suffix + "".join(compressed)


def is_json(name: str) -> bool:
    """Return whether a name ends with `.json`, compressed or not: only a look inside shows whether it holds rows."""
    return _split_compression(name)[-1].endswith(".json")


def _split_compression(name: str) -> list[str]:
    """`A.PDF.gz` → [`.gz`, `a.pdf`], `a.pdf` → [`a.pdf`]."""
    name = name.lower()
    suffix = PurePosixPath(name).suffix
    return [suffix, name.removesuffix(suffix)] if suffix in COMPRESSED else [name]


def is_archive(name: str) -> bool:
    return name.lower().endswith(ARCHIVES)


@dataclass(frozen=True)
class TextFile:
    """One file of text. `root` is a path or URL; with `member`, that of its archive."""

    root: str
    format: Format
    size: int
    """Bytes that reading it takes: compressed ones, but for what an archive itself compresses."""
    member: str | None = None
    shown: str | None = None
    """What the user calls it, if not by its path."""
    trusted: bool = False

    @property
    def name(self) -> str:
        return self.shown or printable(f"{self.root}/{self.member}" if self.member else self.root)

    @property
    def place(self) -> PurePosixPath:
        """Where it lies: inside its archive, or on the disk."""
        return PurePosixPath(
            self.member or (self.root if is_url(self.root) else Path(self.root).resolve().as_posix())
        )

    @property
    def basename(self) -> str:
        return PurePosixPath(self.member or Path(self.root).as_posix()).name

    @property
    def is_part(self) -> bool:
        return _PART.fullmatch(self.basename) is not None

    @property
    def is_combined(self) -> bool:
        return self.basename == COMBINED

    @contextmanager
    def open(self, advance: Advance = lambda _: None) -> Iterator[BinaryIO]:
        """Its bytes, unpacked; `advance` is told how many of `size` more were read.

        Raises `DataError` for what cannot be read or unpacked, and unless it is `trusted`, for a bomb.
        """
        try:
            with open_member(self.root, self.member) if self.member else open_root(self.root) as raw:
                counted = _buffered(_Counted(raw, advance))
                suffix = PurePosixPath(self.basename.lower()).suffix
                if suffix not in COMPRESSED:
                    yield counted
                    return
                with _unpacked(counted, suffix) as stream:
                    yield _buffered(_Limited(stream, self.name, self.size, trusted=self.trusted))
        except (
            zipfile.BadZipFile,
            tarfile.TarError,
            gzip.BadGzipFile,
            zstd.ZstdError,
            lzma.LZMAError,
        ) as error:
            raise self._damaged(error) from None
        except (zlib.error, EOFError, UnicodeDecodeError) as error:
            raise self._damaged(error) from None
        except (OSError, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{self.name}: cannot be read: {reason!s:.200}; check the file") from None

    def _damaged(self, error: Exception) -> DataError:
        what = "the archive" if self.member else "the file"
        return DataError(f"{self.name}: {what} is damaged ({error!s:.200}); download or pack it again")


def open_root(root: str) -> IO[bytes]:
    """A file on the disk or behind a URL."""
    if not is_url(root):
        return Path(root).open("rb")
    filesystem, path = filesystem_of(root)
    try:
        return cast(IO[bytes], filesystem.open(path, "rb"))
    except Exception as error:  # whatever a backend raises
        raise DataError(f"{root}: cannot be opened ({error!s:.200}); check the URL and your access") from None


def filesystem_of(url: str) -> tuple[Any, str]:
    """fsspec's filesystem for a URL, and the path in it. Raises `DataError` without fsspec or its backend."""
    if "::" in url:
        raise DataError(f"{url}: a URL inside another cannot be read; download it")
    try:
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(
            f"{url}: cannot be opened ({error!s:.200}); install what that scheme needs, or download it"
        ) from None
    return filesystem, path


def bomb(name: str, packed: int) -> DataError:
    return DataError(
        f"{name}: {packed:,} bytes that unpack to more than {MAX_RATIO} times as many may be a bomb; if you know "
        "where it comes from, give atlas prepare --trust-archives"
    )


def looks_like_rows(path: Path) -> bool:
    """Whether a file begins with a JSON object in its first line."""
    with path.open("rb") as file, suppress(ValueError, RecursionError):
        return isinstance(json.loads(file.readline(_BUFFER).decode("utf-8-sig")), dict)
    return False


def _unpacked(stream: BinaryIO, suffix: str) -> IO[bytes]:
    if suffix == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=stream))
    return open_zstd(stream)


def _buffered(raw: io.RawIOBase) -> BinaryIO:
    return io.BufferedReader(raw, _BUFFER)


class _Counted(io.RawIOBase):
    """Tells how many bytes more were read."""

    def __init__(self, stream: IO[bytes], advance: Advance) -> None:
        self._stream, self._advance = stream, advance

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._stream.read(len(buffer))
        buffer[: len(content)] = content
        self._advance(len(content))
        return len(content)


class _Limited(io.RawIOBase):
    """Gives no more bytes than a text of so many compressed ones can have."""

    def __init__(self, stream: IO[bytes], name: str, packed: int, *, trusted: bool) -> None:
        self._stream, self._name, self._packed = stream, name, packed
        self._left = sys.maxsize if trusted else max(RATIO_FREE_BYTES, MAX_RATIO * packed)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._stream.read(len(buffer))
        buffer[: len(content)] = content
        self._left -= len(content)
        if self._left < 0:
            raise bomb(self._name, self._packed)
        return len(content)
