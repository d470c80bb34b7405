"""Text behind HTTP, from servers that can send little more than whole files."""

from __future__ import annotations

import gzip
import http.server
import json
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from atlas.cli import main
from atlas.data.text.sources import Sources
from atlas.errors import DataError
from tests.archive import documents_of, whole

pytest.importorskip("aiohttp")

TEXTS = [f"Text number {n}. " * 4000 for n in range(120)]  # more than the 5 MB that fsspec asks for at once


class Server(http.server.SimpleHTTPRequestHandler):
    """As `python -m http.server`, which knows no ranges. `Cut` files end in the middle, as if the server died."""

    def copyfile(self, source, outputfile) -> None:  # type: ignore[no-untyped-def]
        content = source.read()
        outputfile.write(content[: len(content) // 2] if "cut" in self.path else content)

    def log_message(self, *_: object) -> None: ...

    def handle(self) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # the client has read enough
            super().handle()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("site")
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    for name in ("rows.jsonl", "rows.json", "cut.jsonl"):
        (folder / name).write_bytes(rows)
    (folder / "all.txt").write_text("".join(TEXTS), encoding="utf-8")
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(rows, 1))
    parquet.write_table(pyarrow.table({"text": TEXTS}), folder / "rows.parquet")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz", "all.txt"])
def test_a_server_without_ranges_is_read_from_start_to_end(name: str, site: tuple[Path, str]) -> None:
    folder, url = site
    assert whole(Sources([f"{url}/{name}"]).documents()) == documents_of(folder / name)


def test_parquet_from_a_server_without_ranges_is_one_line(
    site: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"{site[1]}/rows.parquet"
    assert main(["prepare", "--input", url, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {url}: cannot be read (The HTTP server doesn't appear to support range")
    assert error.endswith("download the file\n")
    assert error.count("\n") == 1


def test_a_download_that_ends_early_is_one_line_that_names_it(site: tuple[Path, str]) -> None:
    with pytest.raises(DataError, match=r"/cut\.jsonl: cannot be read \(.*download the file"):
        list(Sources([f"{site[1]}/cut.jsonl"]).documents())


def test_a_change_behind_a_url_without_etag_is_noticed(site: tuple[Path, str]) -> None:
    folder, url = site
    path = folder / "same size.txt"
    path.write_text("one", encoding="utf-8")
    before = Sources([f"{url}/same size.txt"]).content_key
    assert Sources([f"{url}/same size.txt"]).content_key == before
    path.write_text("two", encoding="utf-8")
    os.utime(path, (1e9, 1e9))
    assert Sources([f"{url}/same size.txt"]).content_key != before
