"""JSON lines, and JSON that contains an array of rows → rows."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from atlas.data.text.formats.chats import PARTS_OF_A_ROW
from atlas.errors import DataError

LONGEST_ROW = 64 << 20
_CHUNK = 1 << 18
_LOOK_AHEAD = 1000
_LIST_OF_OBJECTS = re.compile(r"\[\s*\{")
_BLANKS = re.compile(r"[ \t\r\n\f\ufeff]*")
OnBad = Callable[[DataError], None]
"""Receives the error of a row that cannot be read. It returns if the row is left out, or raises the error."""


class NotJsonError(DataError):
    """A text that is not JSON from some place on."""


class Row(NamedTuple):
    """A row, and its place for messages, such as `a.jsonl line 3`."""

    place: str
    value: Any


def json_lines(lines: Iterable[str], name: str, on_bad: OnBad) -> Iterator[Row]:
    """Yield the value of each line that is not blank. The error of a line that is no JSON, or has more than
    `LONGEST_ROW` characters, goes to `on_bad`."""
    number, is_rest = 0, False  # whether the line continues one that is too long
    for line in lines:
        number += not is_rest
        skip = is_rest or not line.strip()
        is_rest = not line.endswith("\n")
        if skip:
            continue
        place = f"{name} line {number}"
        if len(line) > LONGEST_ROW:
            on_bad(DataError(f"{place}: is longer than {LONGEST_ROW:,} characters; split its text into rows"))
            continue
        try:
            value = json.loads(without_comma(line))
        except (ValueError, RecursionError) as error:
            on_bad(DataError(f"{place}: is not JSON: {_reason(error)}; every line must be one JSON object"))
        else:
            yield Row(place, value)


def without_comma(line: str) -> str:
    """Return a line without the comma at its end, as the lines of an array have it that were written without its
    brackets."""
    return line.rstrip().removesuffix(",")


def json_rows(chunks: Iterable[str], name: str) -> Iterator[Row]:
    """Yield the rows of a JSON text: the items of an array, or of the one array of objects in an object, or complete
    objects, one after the other. A long array needs little memory.

    Raises `DataError` if an object has several arrays of objects, or the text is not JSON: after such an error, nothing
    can be understood.
    """
    text, numbers, done = _JsonText(chunks), itertools.count(1), 0
    try:
        while begins := text.next_char():
            found = (
                text.items() if begins == "[" else text.rows_of_object(name) if begins == "{" else text.one()
            )
            for value in found:
                done = next(numbers)
                yield Row(f"{name} row {done}", value)
    except (ValueError, RecursionError) as error:
        place = f"{name} line {text.line}"
        raise NotJsonError(
            f"{place}: is not JSON after {done:,} {'row' if done == 1 else 'rows'}: {_reason(error)}; correct the file"
        ) from None


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at character {error.colno}"
    return str(error)


class _JsonText:
    """A JSON text that is read value by value, so that a long array needs little memory."""

    _decode = json.JSONDecoder().raw_decode

    def __init__(self, chunks: Iterable[str]) -> None:
        self._chunks = iter(chunks)
        self._text, self._at, self._at_end = "", 0, False
        self._lines_before = 0

    @property
    def line(self) -> int:
        """The number of the line where the next value begins."""
        return 1 + self._lines_before + self._text.count("\n", 0, self._at)

    def next_char(self) -> str:
        """Skip blanks, and return the character after them without reading it, or an empty string at the end."""
        while True:
            self._at = _BLANKS.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text) or self._at_end:
                return self._text[self._at : self._at + 1]
            self._read_more()

    def expect(self, *chars: str) -> str:
        """Read one of `chars` after blanks, and return it."""
        found = self.next_char()
        if not found or found not in chars:
            what = f"found {found!r}" if found else "the text ends"
            raise ValueError(f"{what} where {' or '.join(map(repr, chars))} is expected")
        self._at += 1
        return found

    def value(self) -> Any:
        """Read one value."""
        self.next_char()
        while True:
            try:
                value, end = self._decode(self._text, self._at)
                if end < len(self._text) or self._at_end:  # otherwise a number may continue
                    self._at = end
                    return value
            except json.JSONDecodeError as error:
                if self._at_end or len(self._text) - self._at > LONGEST_ROW:
                    self._at = max(self._at, error.pos)
                    raise ValueError(error.msg.removesuffix(" at")) from None
            self._read_more()

    def one(self) -> Iterator[Any]:
        """Yield one value."""
        yield self.value()

    def items(self) -> Iterator[Any]:
        """Yield the items of the array that begins here."""
        self.expect("[")
        if self.next_char() == "]":
            self.expect("]")
            return
        yield self.value()
        while self.expect(",", "]") == ",":
            yield self.value()

    def rows_of_object(self, name: str) -> Iterator[Any]:
        """Yield the items of the array of objects in the object that begins here, or the object itself if it has no
        such array."""
        fields: dict[str, Any] = {}
        rows: str | None = None
        self.expect("{")
        if self.next_char() == "}":
            self.expect("}")
            yield fields
            return
        while True:
            key = self.value()
            self.expect(":")
            if self.next_char() != "[" or key in PARTS_OF_A_ROW or not self._is_list_of_objects():
                fields[key] = self.value()
            elif rows is not None:
                raise DataError(
                    f"{name}: has several arrays of objects ({rows!r:.40} and {key!r:.40}); choose one, for example "
                    f"with jq -c '.{key}[]'"
                )
            else:
                rows = key
                yield from self.items()
            if self.expect(",", "}") == "}":
                break
            if self.next_char() != '"':
                self.expect('"')
        if rows is None:
            yield fields

    def _is_list_of_objects(self) -> bool:
        """Return whether the array that begins here begins with an object."""
        if len(self._text) - self._at < _LOOK_AHEAD:
            self._read_more()
        return _LIST_OF_OBJECTS.match(self._text, self._at) is not None

    def _read_more(self) -> None:
        """Read about as much text as is not yet parsed, so that parsing a long value again takes linear time."""
        self._lines_before += self._text.count("\n", 0, self._at)
        parts = [self._text[self._at :]]
        wanted = max(_CHUNK, len(parts[0]))
        while wanted > 0:
            chunk = next(self._chunks, None)
            if chunk is None:
                self._at_end = True
                break
            parts.append(chunk)
            wanted -= len(chunk)
        self._text, self._at = "".join(parts), 0
