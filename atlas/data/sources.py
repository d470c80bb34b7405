"""Paths → a stream of documents: `.txt`, `.md`, `.jsonl`, zips of them, folders, the Kaggle archive.

Nothing is extracted to disk and no file is held in memory. The Kaggle archive has its text twice, in
`AllCombined.txt` and in parts (`1of2/wiki_00` …); where the first is there, the parts are left out.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from atlas.data.archives import files_in, is_file, open_archive
from atlas.data.articles import ArticleReport, split_articles
from atlas.data.text import Piece, as_document, read_text, replace_undecodable
from atlas.errors import AtlasError
from atlas.files import sha256_of

COMBINED = "AllCombined.txt"
_PART = re.compile(r"wiki_\d+")
_DIGITS = re.compile(r"([0-9]+)")
SUFFIXES = (".txt", ".md", ".jsonl", ".zip")
_KINDS = "a .txt, .md, .jsonl or .zip file, or a folder of them"
_LONGEST_ROW = 64 << 20
_NAMES_SHOWN = 8

Advance = Callable[[int], None]


@dataclass(frozen=True)
class TextFile:
    """One file of text: on disk, or the member of a zip."""

    path: Path
    archive: zipfile.ZipFile | None = None
    member: zipfile.ZipInfo | None = None

    @property
    def name(self) -> str:
        return f"{self.path}/{self.member.filename}" if self.member else str(self.path)

    @property
    def place(self) -> PurePosixPath:
        """Where it lies: inside its zip, or on the disk."""
        return PurePosixPath(self.member.filename if self.member else self.path.resolve().as_posix())

    @property
    def size(self) -> int:
        return self.member.file_size if self.member else self.path.stat().st_size

    @property
    def basename(self) -> str:
        return PurePosixPath(self.member.filename).name if self.member else self.path.name

    @property
    def is_part(self) -> bool:
        return _PART.fullmatch(self.basename) is not None

    @property
    def is_combined(self) -> bool:
        return self.basename == COMBINED

    @property
    def is_rows(self) -> bool:
        return self.basename.lower().endswith(".jsonl")

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        try:
            if self.archive and self.member:
                with self.archive.open(self.member) as member:
                    yield member  # type: ignore[misc]
            else:
                with self.path.open("rb") as file:
                    yield file
        except (zipfile.BadZipFile, zlib.error, EOFError, UnicodeDecodeError) as error:
            raise AtlasError(
                f"{self.name}: the archive is damaged ({error!s:.200}); download it again"
            ) from None
        except (OSError, NotImplementedError) as error:
            raise AtlasError(f"{self.name}: cannot be read: {error}") from None


@dataclass
class SourceReport:
    """What was met on the way through the sources."""

    undecodable: Counter[str] = field(default_factory=Counter)
    """Replaced bytes by file."""
    articles: ArticleReport | None = None


class Sources:
    """The text that some paths hold, as documents in a fixed order.

    Raises `AtlasError` for a path that is missing, of a kind Atlas does not read, or without any text.
    """

    def __init__(
        self, paths: Sequence[str | Path], *, text_field: str = "text", trust_archives: bool = False
    ) -> None:
        self.paths = [Path(path) for path in paths]
        self.text_field = text_field
        self._trust_archives = trust_archives
        self.ignored: list[str] = []
        """Files that are of no kind Atlas reads."""
        self.left_out: list[str] = []
        """Parts whose text also stands in `AllCombined.txt`."""
        self.links_out: list[str] = []
        """Links in a folder to what lies outside it. The folder may be a stranger's, the files at home private."""
        self._roots: dict[Path, str] = {}
        files = [file for path in self.paths for file in self._files_of(path)]
        self.files = self._without_doubled(files)
        if not self.files:
            raise AtlasError(f"{self.names}: nothing to read{self._links_note}; give {_KINDS}")

    @property
    def _links_note(self) -> str:
        if not self.links_out:
            return ""
        return (
            f" ({len(self.links_out)} links lead out of it, such as {self.links_out[0]}: name what they mean)"
        )

    @property
    def names(self) -> str:
        return ", ".join(str(path) for path in self.paths)

    @property
    def is_kaggle(self) -> bool:
        """Whether this is the archive that the documentation starts from."""
        return any(file.is_part or file.is_combined for file in self.files)

    @cached_property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @cached_property
    def content_key(self) -> str:
        """sha256 of what is read: names below the given paths, sizes, content."""
        digest = hashlib.sha256(self.text_field.encode())
        for path, name in self._roots.items():
            digest.update(json.dumps([name, path.stat().st_size, sha256_of(path)]).encode())
        return digest.hexdigest()

    def documents(
        self, report: SourceReport | None = None, advance: Advance = lambda _: None
    ) -> Iterator[Piece]:
        """Every document, in pieces. `report` is filled on the way; `advance` is told the bytes read."""
        report = report or SourceReport()
        for group in self._groups():
            if group[0].is_part or group[0].is_combined:
                report.articles = report.articles or ArticleReport()
                yield from split_articles(self._text(group, report, advance), report.articles)
            elif group[0].is_rows:
                yield from self._rows(group[0], report, advance)
            else:
                yield from as_document(self._text(group, report, advance))

    def description(self, report: SourceReport) -> dict[str, Any]:
        """What a dataset keeps about where it came from."""
        return {
            "paths": [str(path) for path in self.paths],
            "files": len(self.files),
            "left_out": self.left_out,
            "undecodable_bytes": dict(report.undecodable),
            "article_rule": report.articles.rule if report.articles else None,
        }

    def notes(self, report: SourceReport) -> list[str]:
        """What the user should know about what was read, one line each."""
        notes = []
        if self.left_out:
            notes.append(
                f"{COMBINED} is used; {len(self.left_out)} parts that hold the same text are left out "
                f"({self.left_out[0]} …)"
            )
        if self.ignored:
            notes.append(f"{len(self.ignored)} files of other kinds are ignored ({self.ignored[0]} …)")
        if self.links_out:
            notes.append(
                f"{len(self.links_out)} links that lead out of their folder are left out ({self.links_out[0]} …): "
                "name what they point to with --input"
            )
        for name, count in report.undecodable.items():
            notes.append(f"{name}: {count:,} bytes are not UTF-8 and were replaced by U+FFFD")
        if report.articles:
            notes.append(f"{report.articles.articles:,} articles, told apart by {report.articles.rule}")
            notes += [f"boundary: {boundary}" for boundary in report.articles.boundaries]
            if report.articles.warning:
                notes.append(f"warning: {report.articles.warning}")
        return notes

    def _groups(self) -> Iterator[list[TextFile]]:
        """Files that are read as one text: the parts of an archive, since an article may run over."""
        group: list[TextFile] = []
        for file in self.files:
            if group and not (file.is_part and group[-1].is_part and _archive(file) == _archive(group[-1])):
                yield group
                group = []
            group.append(file)
        yield group

    def _text(self, files: Iterable[TextFile], report: SourceReport, advance: Advance) -> Iterator[str]:
        for file in files:
            with file.open() as stream:
                yield from read_text(
                    stream,
                    file.name,
                    advance=advance,
                    on_undecodable=lambda count, name=file.name: _count(report, name, count),  # type: ignore[misc]
                )

    def _rows(self, file: TextFile, report: SourceReport, advance: Advance) -> Iterator[Piece]:
        with file.open() as stream:
            lines = iter(lambda: stream.readline(_LONGEST_ROW + 1), b"")
            for number, line in enumerate(lines, start=1):
                advance(len(line))
                place = f"{file.name} line {number}"
                if len(line) > _LONGEST_ROW:
                    raise AtlasError(
                        f"{place}: is longer than {_LONGEST_ROW:,} bytes; split its text into rows"
                    )
                text = self._row_text(line, place)
                if text is not None:
                    yield from as_document(
                        [replace_undecodable(text, lambda n: _count(report, file.name, n))]
                    )

    def _row_text(self, line: bytes, place: str) -> str | None:
        line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            return None
        try:
            row = json.loads(line.decode("utf-8", errors="surrogateescape"))
        except (ValueError, RecursionError) as error:
            raise AtlasError(f"{place}: is not JSON: {error}; every line must be one JSON object") from None
        if not isinstance(row, dict):
            raise AtlasError(
                f"{place}: is {type(row).__name__}, not an object with a field {self.text_field!r}"
            )
        if self.text_field not in row:
            there = ", ".join(name[:40] for name in sorted(row)[:_NAMES_SHOWN]) or "none"
            raise AtlasError(
                f"{place}: has no field {self.text_field!r}, but {there}; name the field with --text-field"
            )
        text = row[self.text_field]
        if not isinstance(text, str):
            raise AtlasError(f"{place}: field {self.text_field!r} is {type(text).__name__}, not text")
        return text

    def _files_of(self, path: Path) -> Iterator[TextFile]:
        """The files that a given path stands for, in the order in which they are read."""
        if path.is_dir():
            found = sorted(
                (
                    file
                    for file in path.rglob("*")
                    if file.is_file() and not _is_hidden(file.relative_to(path))
                ),
                key=lambda file: _natural(file.relative_to(path).as_posix()),
            )
            root = path.resolve()
            for file in found:
                if not file.resolve().is_relative_to(root):
                    self.links_out.append(str(file))
                    continue
                yield from self._file(file, file.relative_to(path).as_posix(), named=False)
        elif path.is_file():
            yield from self._file(path, path.name, named=True)
        else:
            raise AtlasError(f"{path}: no such file or folder; give {_KINDS}")

    def _file(self, path: Path, name: str, *, named: bool) -> Iterator[TextFile]:
        file, resolved = TextFile(path), path.resolve()
        if resolved in self._roots:
            return  # given twice, or by its folder and by itself
        if path.suffix.lower() in SUFFIXES or file.is_part:
            self._roots[resolved] = name
            yield from self._members(path) if path.suffix.lower() == ".zip" else [file]
        elif named:
            raise AtlasError(f"{path}: {path.suffix or 'no'} ending: Atlas reads {_KINDS}")
        else:
            self.ignored.append(name)

    def _members(self, path: Path) -> Iterator[TextFile]:
        archive = open_archive(path, trust=self._trust_archives)
        for member in sorted(files_in(archive), key=lambda member: _natural(member.filename)):
            inner = PurePosixPath(member.filename)
            file = TextFile(path, archive, member)
            if _is_hidden(inner) or "__MACOSX" in inner.parts:
                continue
            if is_file(member) and (inner.suffix.lower() in (".txt", ".md", ".jsonl") or file.is_part):
                yield file
            else:
                self.ignored.append(file.name)

    def _without_doubled(self, files: list[TextFile]) -> list[TextFile]:
        combined = [file for file in files if file.is_combined]
        kept = []
        for file in files:
            if file.is_part and any(_holds(whole, file) for whole in combined):
                self.left_out.append(file.name)
            else:
                kept.append(file)
        return kept


def _archive(part: TextFile) -> tuple[Path | None, PurePosixPath]:
    """What a part belongs to: its zip, or the folder that holds `1of2` and `2of2`."""
    return (part.path if part.member else None, part.place.parent.parent)


def _holds(whole: TextFile, part: TextFile) -> bool:
    """Whether `AllCombined.txt` stands in the same zip or folder as a part below it."""
    return whole.archive is part.archive and part.place.is_relative_to(whole.place.parent)


def _is_hidden(path: Path | PurePosixPath) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _natural(name: str) -> list[list[str | int]]:
    """Sorts `wiki_9` before `wiki_10`, and a folder's files together."""
    parts = name.split("/")
    return [
        [int(run) if place % 2 else run for place, run in enumerate(_DIGITS.split(part))] for part in parts
    ]


def _count(report: SourceReport, name: str, count: int) -> None:
    report.undecodable[name] += count
