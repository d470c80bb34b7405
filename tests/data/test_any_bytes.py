"""Any bytes, through every reader: no traceback, and little memory."""

from __future__ import annotations

import io
import itertools
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import get_args

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import ipc, parquet

from atlas.data.text.documents import Group, Reading, read_rows
from atlas.data.text.files import TextFile
from atlas.data.text.formats.chats import ChatReport, read_conversation
from atlas.data.text.formats.sniff import ROWS, Format
from atlas.data.text.report import SourceReport
from atlas.data.text.sources import Sources
from atlas.errors import DataError
from tests.data.test_other_formats import DUMP, EXTRACTED, epub, pdf

READERS: tuple[Format, ...] = get_args(Format)
MOST_MEMORY = 64 << 20
"""Python's memory for a file of at most a megabyte."""


def columnar() -> dict[Format, bytes]:
    table = pyarrow.table({"text": ["one", None, "three"] * 40, "n": [1, 2, 3] * 40})
    as_parquet, as_arrow = io.BytesIO(), io.BytesIO()
    parquet.write_table(table, as_parquet)
    with ipc.new_file(as_arrow, table.schema) as writer:
        writer.write_table(table)
    return {"parquet": as_parquet.getvalue(), "arrow": as_arrow.getvalue()}


SEEDS: dict[Format, bytes] = {
    "text": "Ein Text.\n%\nÜber Größe.\n%\n<|endoftext|>\nEnd.\n".encode(),
    "jsonl": b'{"text": "a"}\n{"messages": [{"role": "user", "content": "b"}]}\n{"prompt": "c", "completion": "d"}\n',
    "json": b'{"data": [{"text": "a"}, {"text": ["b", {"c": null}]}], "n": 1e9}',
    "csv": b'text,n\n"a ""b""\nc",1\nd,2\n',
    "html": b"<!doctype html><html><head><meta charset=utf-8><title>t</title></head><body><main><p>a<pre>b\n</pre>"
    b"<table><tr><td>c<td>d</table><ul><li>e</ul></main><script>f</script></body></html>",
    "pdf": pdf("A page of text.", "Another one."),
    "epub": epub(one="First.", two="Second."),
    "mediawiki": DUMP.encode(),
    "wikiextractor": EXTRACTED.encode(),
    **columnar(),
}
PIECES = [
    *b"{}[]<>\"',:;|=&\\/\n\t\r %\0",
    *range(0xF8, 0x100),
]
fragments = st.sampled_from(
    [bytes([piece]) for piece in PIECES]
    + [
        b"</",
        b"<!--",
        b"]]>",
        b"{{",
        b"[[",
        b"{|",
        b"<ref>",
        b"<pre>",
        b"&#x0;",
        b"\\ud800",
        b'"text":',
        b"null",
    ]
    + [
        b"1e999",
        b"\xed\xa0\x80",
        b"\xff\xfe",
        b"\x1b$B",
        b"obj",
        b"stream",
        b"PK\x03\x04",
        b"role",
        b"<doc id=",
    ]
)
edits = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 60), st.lists(fragments | st.binary(max_size=30), max_size=12)),
    max_size=6,
)
made = st.lists(fragments | st.binary(max_size=60), max_size=80).map(b"".join)


def edited(seed: bytes, changes: list[tuple[float, int, list[bytes]]]) -> bytes:
    for where, length, pieces in changes:
        place = int(where * len(seed))
        seed = seed[:place] + b"".join(pieces) + seed[place + length :]
    return seed


def read_with(reader: Format, path: Path) -> None:
    """Read a file as if it had the format of `reader`; only errors for people are allowed."""
    file, report = TextFile(str(path), reader, path.stat().st_size), SourceReport()
    with suppress(DataError):
        for piece in Group((file,), Reading(on_error="skip")).pieces(report, lambda _: None):
            piece.text.encode()
    if reader in ROWS:
        with suppress(DataError):
            for row in read_rows(file, Reading(on_error="skip"), report, lambda _: None):
                with suppress(DataError):
                    read_conversation(row.value, row.place, ChatReport())


def read_every_way(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    for reader in READERS:
        read_with(reader, path)
    with suppress(DataError):
        for _ in Sources([path]).documents(SourceReport()):
            pass


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bytes") / "file"


def test_the_seeds_are_read(place: Path) -> None:
    assert SEEDS.keys() == set(READERS)
    for reader, seed in SEEDS.items():
        place.write_bytes(seed)
        report = SourceReport()
        group = Group((TextFile(str(place), reader, len(seed)),), Reading())
        assert [*group.pieces(report, lambda _: None)], reader
        assert report.num_faults == {"jsonl": 2, "json": 1}.get(reader, 0), reader


@given(st.sampled_from(READERS), edits, made, st.integers(1, 30))
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
def test_some_bytes_through_every_reader(
    place: Path, reader: Format, changes: list[tuple[float, int, list[bytes]]], new: bytes, times: int
) -> None:
    read_every_way(edited(SEEDS[reader], changes), place)
    read_every_way(new * times, place)


@pytest.mark.slow
def test_ten_megabytes_through_every_reader(place: Path) -> None:
    read = itertools.count()
    total = peak = 0

    @given(st.sampled_from(READERS), edits, made, st.integers(1, 1500))
    @settings(deadline=None, max_examples=300, database=None, suppress_health_check=[HealthCheck.too_slow])
    def through_all(
        reader: Format, changes: list[tuple[float, int, list[bytes]]], new: bytes, times: int
    ) -> None:
        nonlocal total, peak
        for content in (edited(SEEDS[reader], changes), new * times):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            read_every_way(content, place)
            total, peak = total + len(content), max(peak, tracemalloc.get_traced_memory()[1] - before)
            next(read)

    tracemalloc.start()
    try:
        while total < 10_000_000:
            through_all()
    finally:
        tracemalloc.stop()
    print(
        f"{next(read):,} files, {total:,} bytes through each of {len(READERS)} readers; peak {peak:,} bytes"
    )
    assert peak < MOST_MEMORY
