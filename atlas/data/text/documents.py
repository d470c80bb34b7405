"""A file → its documents. A text file, a part of it between separators, a row, a page or an article is one document."""

from __future__ import annotations

import functools
import io
import itertools
import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from atlas.data.text.archives import BombError
from atlas.data.text.files import Advance, TextFile, is_url, open_root
from atlas.data.text.formats import markup, mediawiki, rows, separators, tables
from atlas.data.text.formats.chats import SINGLE_MESSAGE, has_messages, is_message
from atlas.data.text.formats.code import is_code_name
from atlas.data.text.formats.decode import (
    Decoding,
    Piece,
    as_document,
    lines_of,
    read_text,
    replace_undecodable,
)
from atlas.data.text.formats.rows import Row
from atlas.data.text.formats.separators import Boundaries
from atlas.data.text.formats.sniff import ROWS, Format
from atlas.data.text.formats.tables import ColumnarFile, column_texts, shown_names
from atlas.data.text.formats.wikipedia import ArticleReport, has_titles, split_articles
from atlas.data.text.hashes import written_at
from atlas.data.text.report import SourceReport, TooManyFaultsError
from atlas.errors import DataError

_PLAIN_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
ROWS_LOOKED_AT = 20
"""Number of rows at the beginning of a file that show what its rows are."""
BOTH = "both a text and messages"
"""What only the user can decide between."""


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
    on_error: str | None = None
    """`stop` at the first row or file that cannot be read, or `skip` any number of them, or None to skip a few."""

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
        if self.on_error not in (None, "stop", "skip"):
            raise DataError(f"--on-error {self.on_error}: must be stop or skip")


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
        is_open = False
        try:
            for piece in self._documents(report, advance):
                is_open = not piece.ends_document
                report.documents[self.files[0].kind] += piece.ends_document
                report.characters[self.files[0].kind] += len(piece.text)
                yield piece
        except DataError as error:
            # A URL that cannot be read now may be readable at the next call.
            may_get_better = is_url(self.files[0].root) and not isinstance(error, rows.NotJsonError)
            if isinstance(error, (BombError, TooManyFaultsError)) or may_get_better:
                raise
            report.add_fault(error, self.reading.on_error)
            report.bytes_unsure += self.size
            if is_open:  # the text before the fault is kept
                yield Piece("")

    def _documents(self, report: SourceReport, advance: Advance) -> Iterator[Piece]:
        first, reading = self.files[0], self.reading
        if (first.is_part or first.is_combined) and reading.separator is None:
            yield from _articles(self.files, reading, report, advance)
        elif first.format in ROWS:
            for text in _row_texts(first, reading, report, advance):
                yield from as_document([text])
        else:
            yield from _READERS[first.format](first, reading, report, advance)


def _text(file: TextFile, reading: Reading, report: SourceReport, advance: Advance) -> Iterator[str]:
    """Yield the decoded text of a file in chunks."""
    how = Decoding(
        file.name,
        reading.encoding,
        partial(report.add_undecodable, file.name),
        partial(report.add_encoding, file.name),
    )
    with file.open(advance) as stream:
        yield from read_text(stream, how)


def _text_documents(
    file: TextFile, reading: Reading, report: SourceReport, advance: Advance
) -> Iterator[Piece]:
    chunks = _text(file, reading, report, advance)
    sample = separators.take_sample(chunks)
    beginning = "".join(sample)
    separator = separators.parse(reading.separator) if reading.separator else separators.find(beginning)
    all_chunks = itertools.chain(sample, chunks)
    if separator is None:
        if (hint := separators.hint_at(beginning)) and not is_code_name(file.basename):
            report.hints.setdefault(hint, file.name)
        yield from as_document(all_chunks)
        return
    found = Boundaries()
    yield from separators.split_documents(all_chunks, separator, found)
    if found.gaps:
        report.add_boundaries(file.name, separator.name, found)
    else:
        report.unseparated += 1


def _articles(
    files: Sequence[TextFile], reading: Reading, report: SourceReport, advance: Advance
) -> Iterator[Piece]:
    """Yield the articles of all files, read as one text. If no title is found, each file is a document."""
    beginning = (_text(file, reading, SourceReport(), lambda _: None) for file in files)
    texts = (_text(file, reading, report, advance) for file in files)
    if has_titles(itertools.chain.from_iterable(beginning)):
        articles = ArticleReport()
        yield from split_articles(itertools.chain.from_iterable(texts), articles)
        report.merge(SourceReport(articles=articles))
        return
    report.untitled += len(files)
    for text in texts:
        yield from as_document(text)


def _extracted(file: TextFile, reading: Reading, report: SourceReport, advance: Advance) -> Iterator[Piece]:
    found = Boundaries()
    yield from mediawiki.extracted_articles(_text(file, reading, report, advance), found)
    report.add_boundaries(file.name, "<doc> elements", found)


def _dump(file: TextFile, reading: Reading, report: SourceReport, advance: Advance) -> Iterator[Piece]:
    def on_bad(error: DataError) -> None:
        report.add_fault(error, reading.on_error)

    with file.open(advance) as stream:
        for article in mediawiki.dump_articles(stream, file.name, on_bad, report.pages_left_out):
            yield from as_document([article])


def _page(file: TextFile, reading: Reading, report: SourceReport, advance: Advance) -> Iterator[Piece]:
    """Yield the text of an HTML page. Without a named encoding, the page itself names its encoding, or is UTF-8."""
    with file.open(advance) as stream:
        page = markup.read_page(stream, file.name)
    yield from as_document([markup.html_text(page, file.name, reading.encoding)])


def _pdf(file: TextFile, reading: Reading, report: SourceReport, advance: Advance) -> Iterator[Piece]:
    text = _pdf_text(file, None if is_url(file.root) else written_at(file.root))
    advance(file.size)
    yield from as_document([text])


@functools.lru_cache(maxsize=64)
def _pdf_text(file: TextFile, _written: object) -> str:
    """Return the text of a PDF. pypdf needs seconds for a book, and a preparation reads its first files several
    times."""
    with file.open() as stream:
        return markup.pdf_text(io.BytesIO(markup.read_book(stream, file.name)), file.name)


def _epub(file: TextFile, reading: Reading, report: SourceReport, advance: Advance) -> Iterator[Piece]:
    with file.open(advance) as stream:
        content = io.BytesIO(markup.read_book(stream, file.name))
    on_unpacked = file.unpack_counter()

    def text() -> Iterator[str]:
        for number, chapter in enumerate(markup.epub_chapters(content, file.name)):
            on_unpacked(len(chapter))
            yield f"\n\n{chapter}" if number else chapter

    yield from as_document(text())


_READERS: dict[Format, Callable[..., Iterator[Piece]]] = {
    "text": _text_documents,
    "wikiextractor": _extracted,
    "mediawiki": _dump,
    "html": _page,
    "pdf": _pdf,
    "epub": _epub,
}


def read_rows(file: TextFile, reading: Reading, report: SourceReport, advance: Advance) -> Iterator[Row]:
    """Yield the rows of a file with all fields. Rows that cannot be read become faults in `report`."""

    def on_bad(error: DataError) -> None:
        report.add_fault(error, reading.on_error)

    if file.format in ("parquet", "arrow"):
        yield from _column_rows(file, on_bad, advance)
        return
    chunks = _text(file, reading, report, advance)
    if file.format == "json":
        yield from rows.json_rows(chunks, file.name)
    elif file.format == "csv":
        yield from tables.csv_rows(lines_of(chunks, rows.LONGEST_ROW), file.name, on_bad)
    else:
        yield from rows.json_lines(lines_of(chunks, rows.LONGEST_ROW), file.name, on_bad)


def _column_rows(file: TextFile, on_bad: rows.OnBad, advance: Advance) -> Iterator[Row]:
    numbers = itertools.count(1)
    with _columns(file) as table:
        for batch in _batches(file, table, table.schema.names, advance):
            for start in range(len(batch)):
                place = f"{file.name} row {next(numbers)}"
                try:
                    [value] = batch.slice(start, 1).to_pylist()
                except (
                    ValueError,
                    ArithmeticError,
                    LookupError,
                ) as error:  # such as a date that Python cannot hold
                    on_bad(DataError(f"{place}: has a value that cannot be read ({error!s:.100})"))
                else:
                    yield Row(place, value)


def _row_texts(file: TextFile, reading: Reading, report: SourceReport, advance: Advance) -> Iterator[str]:
    """Yield the text of each row."""
    texts = _column_texts if file.format in ("parquet", "arrow") else _field_texts
    for text in texts(file, reading, report, advance):
        if text is None or not text or text.isspace():
            report.empty_rows[file.kind] += 1
        else:
            yield replace_undecodable(text, partial(report.add_undecodable, file.name))


def _field_texts(
    file: TextFile, reading: Reading, report: SourceReport, advance: Advance
) -> Iterator[str | None]:
    for row in read_rows(file, reading, report, advance):
        try:
            text = _text_of(row, reading, file)
        except DataError as error:
            report.add_fault(error, reading.on_error)
        else:
            yield text


def _text_of(row: Row, reading: Reading, file: TextFile) -> str | None:
    """Return the text of a row of a file, or None if the field is null."""
    (place, value), text_field = row, reading.text_field
    if isinstance(value, str):
        return value  # an item of an array of texts
    if not isinstance(value, dict):
        raise DataError(
            f"{place}: is {json_name(value)}, not an object; every row must be like {{{json.dumps(text_field)}: …}}"
        )
    if text_field not in value:
        if is_message(value):
            raise DataError(f"{place}: {SINGLE_MESSAGE}")
        if inside := _rows_inside(value):
            raise DataError(
                f"{place}: has no field {text_field!r}, but other rows inside; write them to a file of their own: "
                f"jq -c '{inside}' FILE > FILE.jsonl"
            )
        raise DataError(
            f"{place}: has no field {text_field!r} (fields: {shown_names(sorted(value))}); name the field of the text, "
            f"for example with atlas prepare --text-field {likely_field(file, reading)}"
        )
    if not reading.names_text_field and has_messages(value):
        raise DataError(f"{place}: has {BOTH}; name the field of the text with atlas prepare --text-field")
    text = value[text_field]
    if text is not None and not isinstance(text, str):
        raise DataError(
            f"{place}: field {text_field!r} is {json_name(text)}, not text; name the field that holds the text with "
            "--text-field, or remove the row"
        )
    return text


def _rows_inside(row: dict[str, Any], levels: int = 2) -> str | None:
    """Return how `jq` names the objects of a list in a row, such as `.data.items[]`, or an object with a list of
    messages, or None."""
    for name, value in row.items():
        if not _PLAIN_NAME.fullmatch(name):
            continue
        if isinstance(value, list) and len(value) > 1 and all(isinstance(item, dict) for item in value):
            return f".{name}[]"
        if isinstance(value, dict) and has_messages(value):
            return f".{name}"
        if isinstance(value, dict) and levels > 1 and (inside := _rows_inside(value, levels - 1)):
            return f".{name}{inside}"
    return None


@functools.lru_cache(maxsize=64)
def likely_field(file: TextFile, reading: Reading) -> str:
    """Return the name of the field that probably holds the text: the one with the most characters in the first rows,
    without ids and addresses. Returns NAME if there is none."""
    lengths = Counter[str]()
    with suppress(DataError):  # it is reported when the row is read
        rows = read_rows(file, replace(reading, on_error="skip"), SourceReport(), lambda _: None)
        for row in itertools.islice(rows, ROWS_LOOKED_AT):
            fields = row.value.items() if isinstance(row.value, dict) else ()
            lengths.update({name: len(value) for name, value in fields if _may_be_prose(value)})
    return shlex.quote(max(lengths, key=lambda name: lengths[name])) if lengths else "NAME"


def _may_be_prose(value: object) -> bool:
    """Return whether a value is a text with a blank, or in a script that may have none."""
    return isinstance(value, str) and (not value.isascii() or len(value.split()) > 1)


def json_name(value: object) -> str:
    """Return the JSON name of a parsed value's type."""
    names = {str: "a string", list: "an array", dict: "an object", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _column_texts(
    file: TextFile, reading: Reading, report: SourceReport, advance: Advance
) -> Iterator[str | None]:
    with _columns(file) as table:
        table.check_text(reading.text_field, partial(likely_field, file, reading))
        file.unpack_counter()(table.claimed_bytes(reading.text_field))
        on_unpacked = file.unpack_counter()
        for batch in _batches(file, table, [reading.text_field], advance):
            for text in column_texts(batch.column(0)):
                on_unpacked(len(text or ""))
                yield text


@contextmanager
def _columns(file: TextFile) -> Iterator[ColumnarFile]:
    with open_root(file.root, seekable=True) as stream:
        yield ColumnarFile(stream, file.name, is_parquet=file.format == "parquet")


def _batches(file: TextFile, table: ColumnarFile, columns: list[str], advance: Advance) -> Iterator[Any]:
    """Yield record batches. `advance` receives a share of the file's size for each batch."""
    unread = file.size
    for batch in table.batches(columns):
        yield batch
        share = file.size * len(batch) // table.num_rows if table.num_rows else 0
        unread -= share
        advance(share)
    advance(unread)
