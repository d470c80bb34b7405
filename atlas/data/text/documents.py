"""A file → its documents. A text file, a JSONL line, a Parquet row or a Wikipedia article is one document."""

from __future__ import annotations

import codecs
import io
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field

from atlas.data.text.decode import Piece, as_document, is_utf16, read_text, replace_undecodable
from atlas.data.text.files import Advance, TextFile, open_root
from atlas.data.text.wikipedia import ArticleReport, has_titles, split_articles
from atlas.errors import DataError, first_line

_LONGEST_ROW = 64 << 20
_NAMES_SHOWN = 8
_PARQUET_ROWS = 32
"""Rows decoded per step. The number is small because a dictionary-encoded column can repeat a long text in every row,
at a cost of a few bytes per row."""
_BUFFER = 1 << 20


class SourceReport(BaseModel):
    """Findings about the sources, collected while Atlas reads them."""

    undecodable: Counter[str] = Field(default_factory=Counter)
    """Number of bytes that were replaced by U+FFFD, by file name."""
    empty_rows: Counter[str] = Field(default_factory=Counter)
    """Number of rows without text, by file name."""
    articles: ArticleReport | None = None
    untitled: int = 0
    """Number of files that are named like the files of the Kaggle archive, but contain no title."""

    def counter_of(self, file: TextFile) -> Callable[[int], None]:
        """Return a function that adds to the number of replaced bytes of a file."""
        return lambda count: self.undecodable.update({file.name: count})

    def merge(self, other: SourceReport) -> None:
        """Add `other`, the report on the text that follows."""
        self.undecodable.update(other.undecodable)
        self.empty_rows.update(other.empty_rows)
        self.untitled += other.untitled
        if self.articles is None:
            self.articles = other.articles
        elif other.articles:
            self.articles.merge(other.articles)


@dataclass(frozen=True)
class Group:
    """Files that Atlas reads as one text: a single file, or all parts of the Kaggle archive. An article may span two
    parts.

    A group can be sent to another process.
    """

    files: tuple[TextFile, ...]
    text_field: str

    @property
    def size(self) -> int:
        """Sum of the sizes of the files, in bytes."""
        return sum(file.size for file in self.files)

    def pieces(self, report: SourceReport, advance: Advance) -> Iterator[Piece]:
        """Yield the documents in pieces, and fill `report`. `advance` receives the number of bytes of each read."""
        first = self.files[0]
        if first.is_part or first.is_combined:
            yield from self._articles(report, advance)
        elif first.format == "text":
            yield from as_document(_text(first, report, advance))
        else:
            rows = _rows if first.format == "rows" else _parquet
            for text in rows(first, self.text_field, advance):
                if text is None:
                    report.empty_rows[first.name] += 1
                else:
                    yield from as_document([replace_undecodable(text, report.counter_of(first))])

    def _articles(self, report: SourceReport, advance: Advance) -> Iterator[Piece]:
        """Yield the articles of all files, read as one text. If no title is found, each file is a document."""
        beginning = (_text(file, SourceReport(), lambda _: None) for file in self.files)
        texts = (_text(file, report, advance) for file in self.files)
        if has_titles(itertools.chain.from_iterable(beginning)):
            articles = ArticleReport()
            yield from split_articles(itertools.chain.from_iterable(texts), articles)
            report.merge(SourceReport(articles=articles))
            return
        report.untitled += len(self.files)
        for text in texts:
            yield from as_document(text)


def _text(file: TextFile, report: SourceReport, advance: Advance) -> Iterator[str]:
    with file.open(advance) as stream:
        yield from read_text(stream, file.name, on_undecodable=report.counter_of(file))


def _rows(file: TextFile, text_field: str, advance: Advance) -> Iterator[str | None]:
    for place, row in read_rows(file, advance, like=f"{{{json.dumps(text_field)}: …}}"):
        yield _row_text(row, place, text_field)


def read_rows(file: TextFile, advance: Advance, *, like: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a JSONL file, each with its file name and line number for error messages. The
    messages show `like` as an example row."""
    with file.open(advance) as stream:
        for number, line in enumerate(_lines(stream), start=1):
            place = f"{file.name} line {number}"
            if len(line) > _LONGEST_ROW:
                raise DataError(f"{place}: is longer than {_LONGEST_ROW:,} bytes; split its text into rows")
            if line.strip():
                yield place, _row(line, place, like)


def holds_rows(file: TextFile, *, at_least: int = 2) -> bool:
    """Return whether the first `at_least` lines of `file` that are not blank are JSON objects."""
    with file.open() as stream:
        lines = filter(bytes.strip, _lines(stream))
        return sum(map(_is_object, itertools.islice(lines, at_least))) == at_least


def _is_object(line: bytes) -> bool:
    with suppress(ValueError, RecursionError):
        text = line.decode("utf-8", errors="surrogateescape")
        return text.lstrip().startswith("{") and isinstance(json.loads(text), dict)
    return False


def _lines(stream: io.BufferedReader) -> Iterator[bytes]:
    """Yield the lines in UTF-8. A line that is too long comes in pieces, of which the first is longer than
    `_LONGEST_ROW`, so that the caller can refuse the line without reading all of it."""
    if is_utf16(stream.peek(4)):
        text = io.TextIOWrapper(stream, "utf-16", errors="replace", newline="\n")
        for line in iter(lambda: text.readline(_LONGEST_ROW + 1), ""):
            yield line.encode("utf-8", "replace")
        return
    if stream.peek(3).startswith(codecs.BOM_UTF8):
        stream.read(3)
    yield from iter(lambda: stream.readline(_LONGEST_ROW + 1), b"")


def _row(line: bytes, place: str, like: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8", errors="surrogateescape").rstrip("\r\n"))
    except (ValueError, RecursionError) as error:
        reason: object = error
        if isinstance(error, json.JSONDecodeError):
            reason = f"{error.msg.removesuffix(' at')} at character {error.colno}"
        raise DataError(f"{place}: is not JSON: {reason}; every line must be one JSON object") from None
    if not isinstance(row, dict):
        raise DataError(f"{place}: is {json_name(row)}, not an object; every line must be like {like}")
    return row


def _row_text(row: dict[str, Any], place: str, text_field: str) -> str | None:
    """Return the text of a row, or None if the field is null."""
    if text_field not in row and ("messages" in row or {"prompt", "response"} <= row.keys()):
        raise DataError(
            f"{place}: is a conversation, which atlas prepare does not support; pass a file of only conversations to "
            "atlas train --train-data"
        )
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


def _parquet(file: TextFile, text_field: str, advance: Advance) -> Iterator[str | None]:
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
                    yield content.to_pybytes().decode("utf-8", errors="surrogateescape")
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
