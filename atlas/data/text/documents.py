"""A file → its documents. A text file, a JSONL line, a Parquet row or a Wikipedia article is one document."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, Field

from atlas.data.text.files import Advance, Format, TextFile, open_root
from atlas.data.text.formats import separators
from atlas.data.text.formats.chats import has_messages, layout_of
from atlas.data.text.formats.decode import (
    Decoding,
    Piece,
    as_document,
    lines_of,
    read_text,
    replace_undecodable,
)
from atlas.data.text.formats.rows import json_rows
from atlas.data.text.formats.wikipedia import ArticleReport, has_titles, split_articles
from atlas.errors import DataError, first_line

_LONGEST_ROW = 64 << 20
_NAMES_SHOWN, _BOUNDARIES_SHOWN = 8, 3
_PARQUET_ROWS = 32
"""Rows decoded per step. The number is small because a dictionary-encoded column can repeat a long text in every row,
at a cost of a few bytes per row."""
_BUFFER = 1 << 20


class SourceReport(BaseModel):
    """Findings about the sources, collected while Atlas reads them."""

    undecodable: Counter[str] = Field(default_factory=Counter)
    """Number of bytes that were replaced by U+FFFD, by file name."""
    encodings: Counter[str] = Field(default_factory=Counter)
    """Number of files in each encoding that Atlas recognised, besides UTF-8 and UTF-16."""
    separators: Counter[str] = Field(default_factory=Counter)
    """Number of documents that each separator gave."""
    boundaries: list[str] = Field(default_factory=list)
    """The first boundaries between documents, for the user to check."""
    hints: dict[str, str] = Field(default_factory=dict)
    """What may separate documents in files that were read as one document → the first such file."""
    empty_rows: Counter[str] = Field(default_factory=Counter)
    """Number of rows without text, by file name."""
    articles: ArticleReport | None = None
    untitled: int = 0
    """Number of files that are named like the files of the Kaggle archive, but contain no title."""

    def counter_of(self, file: TextFile) -> Callable[[int], None]:
        """Return a function that adds to the number of replaced bytes of a file."""
        return lambda count: self.undecodable.update({file.name: count})

    def add_encoding(self, encoding: str) -> None:
        """Count a file whose encoding Atlas recognised."""
        self.encodings[encoding] += 1

    def notes(self) -> Iterator[str]:
        """Yield notes for the user, one line each, except those on articles."""
        for name, count in self.undecodable.items():
            yield f"{name}: {count:,} bytes cannot be decoded and were replaced by U+FFFD"
        for name, count in self.empty_rows.items():
            yield f"{name}: {count:,} rows have no text"
        for encoding, count in self.encodings.items():
            yield f"{count:,} files are not UTF-8, and were decoded as {encoding}"
        for separator, count in self.separators.items():
            yield f"{count:,} documents, separated by {separator}"
        yield from (f"boundary: {boundary}" for boundary in self.boundaries)
        yield from (f"{name}: is read as one document; {hint}" for hint, name in self.hints.items())

    def merge(self, other: SourceReport) -> None:
        """Add `other`, the report on the text that follows."""
        for counts in ("undecodable", "encodings", "separators", "empty_rows"):
            getattr(self, counts).update(getattr(other, counts))
        self.boundaries = [*self.boundaries, *other.boundaries][:_BOUNDARIES_SHOWN]
        self.hints = other.hints | self.hints
        self.untitled += other.untitled
        if self.articles is None:
            self.articles = other.articles
        elif other.articles:
            self.articles.merge(other.articles)


@dataclass(frozen=True)
class Reading:
    """How to read the sources, as the user asked. Can be sent to another process.

    Raises `DataError` for a value that is not valid.
    """

    text_field: str = "text"
    names_text_field: bool = False
    """Whether the user named the text field. Otherwise, a row that is also a conversation is refused."""
    separator: str | None = None
    """What separates the documents of a text file, see `separators.parse`. None if the text itself shows it."""
    encoding: str | None = None
    """The encoding of all text files, or None if the bytes show it."""

    def __post_init__(self) -> None:
        if self.separator is not None:
            separators.parse(self.separator)
        if self.encoding is not None:
            try:
                b"a".decode(self.encoding, "replace")
            except (LookupError, ValueError):
                raise DataError(
                    f"--encoding {self.encoding}: no such encoding; examples are cp1252 and gb18030"
                ) from None


@dataclass(frozen=True)
class Group:
    """Files that Atlas reads as one text: a single file, or all parts of the Kaggle archive. An article may span two
    parts.

    A group can be sent to another process.
    """

    files: tuple[TextFile, ...]
    reading: Reading

    @property
    def size(self) -> int:
        """Sum of the sizes of the files, in bytes."""
        return sum(file.size for file in self.files)

    def pieces(self, report: SourceReport, advance: Advance) -> Iterator[Piece]:
        """Yield the documents in pieces, and fill `report`. `advance` receives the number of bytes of each read."""
        first, reading = self.files[0], self.reading
        if (first.is_part or first.is_combined) and reading.separator is None:
            yield from self._articles(report, advance)
        elif first.format == "text":
            yield from _documents(first, reading, report, advance)
        else:
            rows = _parquet if first.format == "parquet" else _rows
            for text in rows(first, reading, report, advance):
                if text is None:
                    report.empty_rows[first.name] += 1
                else:
                    yield from as_document([text])

    def _articles(self, report: SourceReport, advance: Advance) -> Iterator[Piece]:
        """Yield the articles of all files, read as one text. If no title is found, each file is a document."""
        beginning = (_text(file, self.reading, SourceReport(), lambda _: None) for file in self.files)
        texts = (_text(file, self.reading, report, advance) for file in self.files)
        if has_titles(itertools.chain.from_iterable(beginning)):
            articles = ArticleReport()
            yield from split_articles(itertools.chain.from_iterable(texts), articles)
            report.merge(SourceReport(articles=articles))
            return
        report.untitled += len(self.files)
        for text in texts:
            yield from as_document(text)


def _text(file: TextFile, reading: Reading, report: SourceReport, advance: Advance) -> Iterator[str]:
    """Yield the decoded text of a file in chunks."""
    how = Decoding(file.name, reading.encoding, report.counter_of(file), report.add_encoding)
    with file.open(advance) as stream:
        yield from read_text(stream, how)


def _documents(file: TextFile, reading: Reading, report: SourceReport, advance: Advance) -> Iterator[Piece]:
    """Yield the documents between the separators of a text, or the complete text as one document."""
    chunks = _text(file, reading, report, advance)
    sample = separators.take_sample(chunks)
    beginning = "".join(sample)
    separator = separators.parse(reading.separator) if reading.separator else separators.find(beginning)
    all_chunks = itertools.chain(sample, chunks)
    if separator is None:
        if hint := separators.hint_at(beginning):
            report.hints.setdefault(hint, file.name)
        yield from as_document(all_chunks)
        return
    found = separators.Boundaries()
    yield from separators.split_documents(all_chunks, separator, found)
    report.separators[separator.name] += found.documents
    report.boundaries = [*report.boundaries, *found.shown][:_BOUNDARIES_SHOWN]


def _rows(file: TextFile, reading: Reading, report: SourceReport, advance: Advance) -> Iterator[str | None]:
    for place, row in read_rows(
        file, reading, report, advance, like=f"{{{json.dumps(reading.text_field)}: …}}"
    ):
        text = _row_text(row, place, reading)
        # JSON can contain lone surrogates as escapes.
        yield None if text is None else replace_undecodable(text, report.counter_of(file))


def read_rows(
    file: TextFile, reading: Reading, report: SourceReport, advance: Advance, *, like: str
) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a JSON file, each with its place for error messages. The messages show `like` as an example
    row."""
    if file.format == "json":
        yield from json_rows(_text(file, reading, report, advance), file.name)
        return
    for number, line in enumerate(lines_of(_text(file, reading, report, advance), _LONGEST_ROW), start=1):
        place = f"{file.name} line {number}"
        if len(line) > _LONGEST_ROW:
            raise DataError(f"{place}: is longer than {_LONGEST_ROW:,} characters; split its text into rows")
        if line.strip():
            yield place, _row(line, place, like)


def holds_rows(file: TextFile, *, at_least: int = 2) -> bool:
    """Return whether the first `at_least` lines of `file` that are not blank are JSON objects."""
    how = Decoding(file.name, None, lambda _: None, lambda _: None)
    with file.open() as stream:
        lines = filter(str.strip, lines_of(read_text(stream, how), _LONGEST_ROW))
        return sum(map(_is_object, itertools.islice(lines, at_least))) == at_least


def refuse_text_and_messages(row: Any, place: str, text_field: str) -> None:
    """Raise `DataError` if a row has both a text and a list of messages: only the user knows which one is meant."""
    if has_messages(row) and text_field in row:
        raise DataError(
            f"{place}: has both a text and messages; for the text, run atlas prepare with --text-field {text_field}; "
            "for the conversations, leave that field out of the file"
        )


def json_format(file: TextFile, text_field: str, *, named: bool) -> Format | None:
    """Return the format of a `.json` file, or None if it has no rows.

    In a file that the user named, a single object is a row. In a folder, a single object may be the settings of some
    program, so it counts only with a text or a conversation.
    """
    if holds_rows(file, at_least=1 if named else 2):
        return "rows"
    as_json = replace(file, format="json")
    try:
        _, first = next(read_rows(as_json, Reading(), SourceReport(), lambda _: None, like=""), ("", None))
    except DataError:
        if named:
            raise
        return None
    is_row = (
        isinstance(first, str)
        or layout_of(first)
        or (isinstance(first, dict) and (named or text_field in first))
    )
    return "json" if is_row else None


def _is_object(line: str) -> bool:
    with suppress(ValueError, RecursionError):
        return line.lstrip().startswith("{") and isinstance(json.loads(line), dict)
    return False


def _row(line: str, place: str, like: str) -> Any:
    try:
        row = json.loads(line.rstrip("\r\n"))
    except (ValueError, RecursionError) as error:
        reason: object = error
        if isinstance(error, json.JSONDecodeError):
            reason = f"{error.msg.removesuffix(' at')} at character {error.colno}"
        raise DataError(f"{place}: is not JSON: {reason}; every line must be one JSON object") from None
    if not isinstance(row, (dict, list)):
        raise DataError(f"{place}: is {json_name(row)}, not an object; every line must be like {like}")
    return row


def _row_text(row: Any, place: str, reading: Reading) -> str | None:
    """Return the text of a row, or None if the field is null."""
    text_field = reading.text_field
    if isinstance(row, str):
        return row  # an item of a list of texts
    if not (isinstance(row, dict) and text_field in row) and layout_of(row):
        raise DataError(
            f"{place}: is a conversation, which atlas prepare does not support; pass a file of only conversations to "
            "atlas train --train-data, or name the field of a text with --text-field"
        )
    if not reading.names_text_field:
        refuse_text_and_messages(row, place, text_field)
    if not isinstance(row, dict):
        like = f"{{{json.dumps(text_field)}: …}}"
        raise DataError(f"{place}: is {json_name(row)}, not an object; every row must be like {like}")
    if text_field not in row:
        raise DataError(
            f"{place}: has no field {text_field!r} (fields: {_shown(sorted(row))}); name the field of the text with "
            "atlas prepare --text-field; a conversation needs the fields prompt and response"
        )
    text = row[text_field]
    if text is not None and not isinstance(text, str):
        raise DataError(
            f"{place}: field {text_field!r} is {json_name(text)}, not text; "
            "name the field that holds the text with --text-field, or remove the row"
        )
    return text


def json_name(value: object) -> str:
    """Return the JSON name of a parsed value's type."""
    names = {str: "a string", list: "an array", dict: "an object", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _parquet(
    file: TextFile, reading: Reading, report: SourceReport, advance: Advance
) -> Iterator[str | None]:
    text_field = reading.text_field
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(
            f'{file.name}: Parquet needs the package pyarrow; pip install "atlas-llm[parquet]"'
        ) from None
    try:
        with open_root(file.root, seekable=True) as stream:
            table = parquet.ParquetFile(stream, buffer_size=_BUFFER)
            _check_column(file, table, text_field)
            file.unpack_counter()(_claimed_bytes(table, text_field))
            on_unpacked, unread = file.unpack_counter(), file.size
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=[text_field]):
                column = batch.column(0)
                is_dictionary = pyarrow.types.is_dictionary(column.type)
                for row in column:
                    if not row.is_valid:
                        yield None
                        continue
                    content = (row.value if is_dictionary else row).as_buffer()
                    on_unpacked(content.size)
                    text = content.to_pybytes().decode("utf-8", errors="surrogateescape")
                    yield replace_undecodable(text, report.counter_of(file))
                share = file.size * len(batch) // table.metadata.num_rows
                unread -= share
                advance(share)
            advance(unread)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{file.name}: is not a complete Parquet file ({first_line(error)}); download or write it again"
        ) from None


def _check_column(file: TextFile, table: Any, text_field: str) -> None:
    from pyarrow import types

    columns = table.schema_arrow
    if text_field not in columns.names:
        raise DataError(
            f"{file.name}: has no column {text_field!r} (columns: {_shown(columns.names)}); name the column of the "
            "text with --text-field"
        )
    kind = columns.field(text_field).type
    value = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(value) or types.is_large_string(value)):
        raise DataError(f"{file.name}: column {text_field!r} is {value}, not text")


def _claimed_bytes(table: Any, text_field: str) -> int:
    groups = (table.metadata.row_group(number) for number in range(table.metadata.num_row_groups))
    columns = (group.column(place) for group in groups for place in range(group.num_columns))
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == text_field)


def _shown(names: list[str]) -> str:
    return ", ".join(name[:40] for name in names[:_NAMES_SHOWN]) or "none"
