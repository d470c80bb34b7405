"""CSV, TSV, Parquet and Arrow → rows."""

from __future__ import annotations

import csv
import io
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import IO, Any

from atlas.data.text.formats.rows import LONGEST_ROW, OnBad, Row
from atlas.errors import DataError, first_line

DELIMITERS = "\t,;|"
_SAMPLE_LINES = 100
_MOST_LINES = 1000
"""A quoted cell may have this many lines. A longer one is a stray quote."""
_BATCH_ROWS = 32
"""Rows decoded per step. The number is small because a dictionary-encoded column can repeat a long text in every row,
at a cost of a few bytes per row."""
_BUFFER = 1 << 20
_NAMES_SHOWN = 8


def delimiter_of(header: str) -> str:
    """Return the most frequent delimiter in the first line of a table."""
    return max(DELIMITERS, key=header.count)


def _has_quotes(lines: list[str], delimiter: str) -> bool:
    """Return whether quotes in a table enclose cells. In a table with tabs, they are often part of the text."""
    return delimiter != "\t" or _bad_rows(lines, csv.QUOTE_MINIMAL) <= _bad_rows(lines, csv.QUOTE_NONE)


def _bad_rows(lines: list[str], quoting: Any) -> int:
    """Return how many rows at the beginning of a table with tabs have not as many cells as the first row."""
    rows = csv.reader(lines, delimiter="\t", quoting=quoting, strict=True)
    widths = []
    with suppress(csv.Error):  # the last row of the sample may be cut
        widths = [len(row) for row in rows if row]
    return sum(width != widths[0] for width in widths) + max(0, len(lines) - rows.line_num)


def csv_rows(lines: Iterable[str], name: str, on_bad: OnBad) -> Iterator[Row]:
    """Yield the rows of a table, as dicts by the names in its first line.

    A row with too many or too few cells goes to `on_bad`, and so does a line with a quote that does not end. The next
    line then begins a row, so that a stray quote costs only its own line.
    """
    source = iter(lines)
    sample = [*itertools.islice(itertools.dropwhile(lambda line: not line.strip(), source), _SAMPLE_LINES)]
    delimiter = delimiter_of(sample[0] if sample else "")
    quoting: Any = csv.QUOTE_MINIMAL if _has_quotes(sample, delimiter) else csv.QUOTE_NONE
    csv.field_size_limit(LONGEST_ROW)
    waiting, names, number = deque(sample), None, 0
    while line := waiting.popleft() if waiting else next(source, ""):
        taken = [line]
        if quoting == csv.QUOTE_MINIMAL:
            _take_quoted(taken, waiting, source)
        try:
            found = [*csv.reader(taken, delimiter=delimiter, quoting=quoting, strict=True)]
        except csv.Error as error:
            number += 1
            waiting.extendleft(reversed(taken[1:]))
            on_bad(DataError(f"{name} row {number}: cannot be read: {error}; correct its quotes"))
            continue
        for cells in filter(None, found):
            number += 1
            if names is None:
                names = _checked_names(cells, name)
            elif len(cells) == len(names):
                yield Row(f"{name} row {number}", dict(zip(names, cells, strict=True)))
            else:
                on_bad(
                    DataError(
                        f"{name} row {number}: has {len(cells):,} cells, but the first line has {len(names):,}; quote "
                        "each cell that contains the delimiter"
                    )
                )


def _take_quoted(taken: list[str], waiting: deque[str], source: Iterator[str]) -> None:
    """Add the lines of the quoted cell that the first line opens, if it ends within `_MOST_LINES` lines."""
    is_open = taken[0].count('"') % 2 == 1
    while (
        is_open and len(taken) < _MOST_LINES and (line := waiting.popleft() if waiting else next(source, ""))
    ):
        taken.append(line)
        is_open ^= line.count('"') % 2 == 1


def _checked_names(names: list[str], name: str) -> list[str]:
    names = [cell.strip() for cell in names]
    if twice := next((cell for cell in names if cell and names.count(cell) > 1), None):
        raise DataError(f"{name}: has several columns {twice!r}; give each column a name of its own")
    return names


class ColumnarFile:
    """An open Parquet or Arrow file. `batches` yields record batches of the given columns.

    Raises `DataError` if the file is damaged.
    """

    def __init__(self, stream: IO[bytes], name: str, *, is_parquet: bool) -> None:
        self.name = name
        with _damage(name, "Parquet" if is_parquet else "Arrow"):
            bounded = _Bounded(stream)
            if is_parquet:
                from pyarrow import parquet

                table = parquet.ParquetFile(bounded, buffer_size=_BUFFER)
                self.schema = table.schema_arrow
                self.num_rows: int | None = table.metadata.num_rows
                self._metadata = table.metadata
                self._batches = partial(table.iter_batches, batch_size=_BATCH_ROWS)
            else:
                from pyarrow import ipc

                is_file = bounded.read(6) == b"ARROW1"
                bounded.seek(0)
                reader = ipc.open_file(bounded) if is_file else ipc.open_stream(bounded)
                self.schema, self.num_rows, self._metadata = reader.schema, None, None
                self._batches = partial(_arrow_batches, reader, is_file=is_file)

    def batches(self, columns: list[str]) -> Iterator[Any]:
        """Yield record batches of at most `_BATCH_ROWS` rows."""
        with _damage(self.name, "Parquet" if self._metadata else "Arrow"):
            yield from self._batches(columns=columns)

    def claimed_bytes(self, column: str) -> int:
        """Return the size of a column after decompression, as the file states it."""
        if self._metadata is None:
            return 0
        groups = (self._metadata.row_group(number) for number in range(self._metadata.num_row_groups))
        found = (group.column(place) for group in groups for place in range(group.num_columns))
        return sum(part.total_uncompressed_size for part in found if part.path_in_schema == column)

    def check_text(self, column: str, likely: Callable[[], str]) -> None:
        """Raise `DataError` unless the file has this column, with text in it. `likely` names the column that probably
        holds the text."""
        if self.schema.names.count(column) > 1:
            raise DataError(
                f"{self.name}: has several columns {column!r}; give each column a name of its own"
            )
        if column not in self.schema.names:
            raise DataError(
                f"{self.name}: has no column {column!r} (columns: {shown_names(self.schema.names)}); name the column "
                f"of the text, for example with --text-field {likely()}"
            )
        if not _is_text(kind := self.schema.field(column).type):
            raise DataError(
                f"{self.name}: column {column!r} is {kind}, not text; name the column of the text"
            )


class _Bounded(io.RawIOBase):
    """A stream whose reads ask for at most the bytes that are left. A damaged length would reserve gigabytes."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._size = stream, stream.seek(0, io.SEEK_END)
        stream.seek(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def read(self, size: int = -1, /) -> bytes:
        left = max(0, self._size - self._stream.tell())
        return self._stream.read(left if size < 0 else min(size, left))


def _is_text(kind: Any) -> bool:
    """Return whether a column of this type has text."""
    from pyarrow import types

    value = kind.value_type if types.is_dictionary(kind) else kind
    return bool(types.is_string(value) or types.is_large_string(value) or types.is_string_view(value))


def _arrow_batches(reader: Any, columns: list[str], *, is_file: bool) -> Iterator[Any]:
    all_batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
    for batch in all_batches:
        batch.validate(full=True)  # otherwise a damaged offset reads beyond the memory of the batch
        chosen = batch.select(columns)
        for start in range(0, len(chosen), _BATCH_ROWS):
            yield chosen.slice(start, _BATCH_ROWS)


def column_texts(column: Any) -> Iterator[str | None]:
    """Yield the texts of a column. Lone surrogates stand for bytes that are not UTF-8."""
    from pyarrow import types

    is_dictionary = types.is_dictionary(column.type)
    for row in column:
        content = (row.value if is_dictionary else row).as_buffer() if row.is_valid else None
        yield None if content is None else content.to_pybytes().decode("utf-8", errors="surrogateescape")


def shown_names(names: Iterable[str]) -> str:
    """Return the first names of fields, for messages."""
    names = [*names]
    return ", ".join(str(name)[:40] for name in names[:_NAMES_SHOWN]) or "none"


@contextmanager
def _damage(name: str, kind: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{name}: is not a complete {kind} file ({first_line(error)}); download or write it again"
        ) from None
