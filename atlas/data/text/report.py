"""What Atlas finds in the sources while it reads them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import NoReturn

from pydantic import BaseModel, Field

from atlas.data.text.formats.separators import Boundaries
from atlas.data.text.formats.wikipedia import ArticleReport
from atlas.errors import DataError
from atlas.progress import notify

MOST_FAULTS = 100
"""With more faults, Atlas stops, since something is wrong with the input as a whole."""
MOST_NAMED = 10_000
"""Atlas names this many rows and files that cannot be read. With more, it only counts them."""
MOST_UNSURE = 0.1
"""Atlas stops if files with more than this share of the bytes cannot be read, or not to their end."""
_FREE_FAULTS, _FAULT_SHARE = 5, 0.001
_KINDS_SHOWN, BOUNDARIES_SHOWN, _FAULTS_SHOWN = 10, 3, 10
_DETAIL = re.compile(r"\(.*|'[^']*'|[\d,]+")


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, such as `1 file` or `2 files`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def megabytes(size: int) -> str:
    """Return a size in bytes as text in MB, or in kB if it is below 0.1 MB, or in bytes if it is below 1 kB."""
    if size < 1000:
        return counted(size, "byte")
    return f"{size / 1e6:,.2f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"


class TooManyFaultsError(DataError):
    """More rows or files cannot be read than may be left out."""


class SourceReport(BaseModel):
    """Findings about the sources, collected while Atlas reads them."""

    undecodable: Counter[str] = Field(default_factory=Counter)
    """Number of bytes that were replaced by U+FFFD, by file name."""
    encodings: Counter[str] = Field(default_factory=Counter)
    """Number of files in each encoding that Atlas recognised, besides UTF-8."""
    encoded: dict[str, str] = Field(default_factory=dict)
    """Encoding → the first file in it."""
    empty_rows: Counter[str] = Field(default_factory=Counter)
    """Number of rows without text, by kind of file."""
    documents: Counter[str] = Field(default_factory=Counter)
    """Number of documents, by kind of file."""
    characters: Counter[str] = Field(default_factory=Counter)
    """Number of characters in the documents, by kind of file."""
    pages_left_out: Counter[str] = Field(default_factory=Counter)
    """Number of pages of wikis that are no articles, by what they are."""
    separators: Counter[str] = Field(default_factory=Counter)
    """Number of documents that each separator gave."""
    separated: dict[str, str] = Field(default_factory=dict)
    """Separator → the first file with it, and `…` if there are more."""
    unseparated: int = 0
    """Number of files in which the separator that the user named was not found."""
    boundaries: list[str] = Field(default_factory=list)
    """The first boundaries between documents, for the user to check."""
    hints: dict[str, str] = Field(default_factory=dict)
    """What may separate documents in files that were read as one document → the first such file."""
    faults: list[str] = Field(default_factory=list)
    """The first rows and files that cannot be read and are left out, each with its place and the reason."""
    num_faults: int = 0
    """Number of all rows and files that cannot be read."""
    bytes_unsure: int = 0
    """Sum of the sizes of the files that cannot be read, or not to their end."""
    articles: ArticleReport | None = None
    untitled: int = 0
    """Number of files that are named like the files of the Kaggle archive, but contain no title."""

    def notes(self) -> Iterator[str]:
        """Yield notes for the user, one line each, except those on faults."""
        for name, count in self.undecodable.items():
            yield f"{name}: {counted(count, 'byte')} replaced by U+FFFD, since no text has such bytes"
        for kind, count in self.empty_rows.items():
            yield f"{kind}: {counted(count, 'row')} without text"
        for encoding, count in self.encodings.items():
            which = self.encoded[encoding] if count == 1 else f"{count:,} files ({self.encoded[encoding]} …)"
            yield f"{which}: not UTF-8; decoded as {encoding}"
        for separator, count in self.separators.items():
            yield f"{counted(count, 'document')}, separated by {separator} ({self.separated[separator]})"
        if self.unseparated:
            yield f"--separator was not found in {counted(self.unseparated, 'file')}; each is one document"
        yield from (f"boundary: {boundary}" for boundary in self.boundaries)
        yield from (f"{name}: is read as one document; {hint}" for hint, name in self.hints.items())
        if self.pages_left_out:
            pages = ", ".join(f"{what} {count:,}" for what, count in sorted(self.pages_left_out.items()))
            yield f"pages of a wiki that are left out: {pages}"
        if self.untitled:
            yield (
                f"{counted(self.untitled, 'file')} named like those of the Kaggle archive, but without a title: each "
                "is read as plain text"
            )
        if articles := self.articles:
            yield f"{counted(articles.articles, 'article')}, separated by {articles.rule}"
            yield from (f"boundary: {boundary}" for boundary in articles.boundaries)
            warnings = (articles.doubt and f"{articles.doubt}: look at the boundaries", articles.warning)
            yield from (f"warning: {warning}" for warning in warnings if warning)

    def merge(self, other: SourceReport) -> None:
        """Add `other`, the report on the text that follows."""
        for counts in (
            "undecodable",
            "encodings",
            "empty_rows",
            "documents",
            "characters",
            "pages_left_out",
            "separators",
        ):
            getattr(self, counts).update(getattr(other, counts))
        self.hints = other.hints | self.hints
        self.encoded = other.encoded | self.encoded
        for separator, name in other.separated.items():
            self._add_separated(separator, name)
        self.unseparated += other.unseparated
        self.boundaries = [*self.boundaries, *other.boundaries][:BOUNDARIES_SHOWN]
        self.faults = [*self.faults, *other.faults][:MOST_NAMED]
        self.num_faults += other.num_faults
        self.bytes_unsure += other.bytes_unsure
        self.untitled += other.untitled
        if self.articles is None:
            self.articles = other.articles
        elif other.articles:
            self.articles.merge(other.articles)

    def fault_notes(self, where: str = "") -> Iterator[str]:
        """Yield the number of rows and files that cannot be read, and the first of them. `where` says where all are
        named."""
        if self.faults:
            if self.num_faults == 1:
                yield f"1 row or file is left out, since it cannot be used{where}:"
            else:
                yield f"{self.num_faults:,} rows or files are left out, since they cannot be used{where}:"
            yield from self.faults[:_FAULTS_SHOWN]

    def add_undecodable(self, name: str, count: int) -> None:
        """Count bytes of a file that were replaced by U+FFFD."""
        self.undecodable[name] += count

    def add_encoding(self, name: str, encoding: str) -> None:
        """Count a file whose encoding Atlas recognised."""
        self.encodings[encoding] += 1
        self.encoded.setdefault(encoding, name)

    def add_boundaries(self, name: str, separator: str, found: Boundaries) -> None:
        """Record how a file was separated."""
        self._add_separated(separator, name)
        self.separators[separator] += found.documents
        self.boundaries = [*self.boundaries, *found.shown][:BOUNDARIES_SHOWN]

    def _add_separated(self, separator: str, name: str) -> None:
        before = self.separated.get(separator)
        self.separated[separator] = name if before is None else f"{before.removesuffix(' …')} …"

    def add_fault(self, error: DataError, on_error: str | None) -> None:
        """Record a row or file that cannot be read. Raises `DataError` if `on_error` is `stop`, or if there are more
        than `MOST_FAULTS` faults and `on_error` is not `skip`."""
        if on_error == "stop":
            raise error
        self.num_faults += 1
        if len(self.faults) < MOST_NAMED:
            self.faults.append(str(error))
        if on_error is None and self.num_faults > MOST_FAULTS:
            self._refuse()

    def check_faults(self, on_error: str | None, *, total_bytes: int | None = None) -> None:
        """Raise `DataError` if too many rows or files cannot be read. `on_error` is `skip` if the user allowed any
        number of them. `total_bytes` is the size of the sources, if all of them were read."""
        at_end = total_bytes is not None
        documents = self.documents.total()
        allowed = min(MOST_FAULTS, max(_FREE_FAULTS, _FAULT_SHARE * documents), documents - 1)
        too_many = {
            "stop": True,  # an earlier call left them out, and its work is resumed
            "skip": at_end and documents == 0,
            None: self.num_faults > (allowed if at_end else MOST_FAULTS)
            or (at_end and self.bytes_unsure > MOST_UNSURE * (total_bytes or 0)),
        }
        if self.num_faults and too_many[on_error]:
            self._refuse()

    def _refuse(self) -> NoReturn:
        """Print one fault of each kind, and raise `DataError`."""
        skip = "leave them out with --on-error skip" if self.documents.total() else "nothing else was read"
        kinds = {_DETAIL.sub("", fault.partition(": ")[2]): fault for fault in reversed(self.faults)}
        if self.num_faults == 1:
            raise TooManyFaultsError(self.faults[0])
        if len(kinds) == 1:
            more = self.num_faults - 1
            raise TooManyFaultsError(
                f"{self.faults[0]} ({more:,} more such {'row or file' if more == 1 else 'rows or files'}; {skip})"
            )
        for fault in [*reversed(kinds.values())][:_KINDS_SHOWN]:
            notify(fault)
        or_skip = f", or {skip}" if self.documents.total() else ""
        raise TooManyFaultsError(
            f"{self.num_faults:,} rows or files cannot be read (one of each kind above); correct them{or_skip}"
        )
