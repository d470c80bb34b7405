"""The same texts in every format, archive and place give the same documents, to the byte; and what is refused."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import pickle
import re
import sqlite3
import sys
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import fsspec
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from atlas.data.sequences.open import resolve_data
from atlas.data.text import hashes
from atlas.data.text.formats import rows
from atlas.data.text.formats.wikipedia import ArticleReport
from atlas.data.text.hashes import hashes_of
from atlas.data.text.report import SourceReport
from atlas.data.text.sources import Reading, Sources
from atlas.errors import AtlasError
from atlas.files import sha256_of
from tests.archive import ARTICLES, documents_of, kaggle_files, whole, write_folder, write_zip

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

TEXTS = ["First, with é.", " second\r\n", "third 🙂 " * 2000]
ROWS = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
PACKED: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstd.compress}


def write_tar(path: Path, files: dict[str, str | bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    if path.suffix == ".zst":
        path.write_bytes(zstd.compress(path.read_bytes()))
    return path


def read_to_the_end(sources: Sources) -> list[str]:
    """The documents, each group read as in another process. The bar ends at 100 %."""
    told: list[int] = []
    groups = pickle.loads(pickle.dumps(sources.groups))  # noqa: S301
    report = SourceReport()
    found = [piece for group in groups for piece in group.pieces(report, told.append)]
    report.check_faults(None, total_bytes=sources.total_bytes)
    assert sum(told) == sources.total_bytes
    assert min(told) >= 0
    return whole(found)


@pytest.mark.parametrize("ending", PACKED)
def test_text_and_rows_may_be_compressed(ending: str, tmp_path: Path) -> None:
    pack = PACKED[ending]
    (tmp_path / f"a.txt{ending}").write_bytes(pack(TEXTS[0].encode()))
    (tmp_path / f"b.jsonl{ending}").write_bytes(pack(ROWS))
    assert read_to_the_end(Sources([tmp_path])) == [TEXTS[0], *TEXTS]
    if ending:
        (tmp_path / f"c{ending}").write_bytes(pack(b"bare"))
        assert documents_of(tmp_path / f"c{ending}") == ["bare"]


UNREAD = {
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(50), "a 7z archive", "7z x "),
    "docx": (b"PK\x03\x04" + bytes(26) + b"[Content_Types].xml", "an Office document", "pandoc -t plain "),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(50), "a picture", ""),
    "bin": (bytes(range(256)), "a binary file", ""),
    "srt": (b"1\n00:00:01,000 --> 00:00:02,000\nHello\n", "subtitles", "sed -E "),
    "mbox": (b"From a@b.c Mon Jan  1 00:00:00 2024\nSubject: x\n\nbody\n", "a mailbox", "python -c "),
    "txt": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "a Git LFS pointer",
        "git lfs",
    ),
}


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("ending", UNREAD)
def test_what_atlas_does_not_read_is_named_with_its_conversion(
    ending: str, packing: str, tmp_path: Path
) -> None:
    """The content decides, compressed or not: left out of a folder or an archive, refused if the user named it."""
    content, what, command = UNREAD[ending]
    (tmp_path / "a.txt").write_text("text" * 1000, encoding="utf-8")
    unread = tmp_path / f"b.{ending}{packing}"
    unread.write_bytes(PACKED[packing](content))
    for source in (tmp_path, tmp_path.as_uri()):
        sources = Sources([source])
        assert whole(sources.documents()) == ["text" * 1000]
        [note] = sources.notes(SourceReport())
        assert re.match(rf"1 file is left out, [\d.]+ (kB|bytes?): {re.escape(what)}", note)
        assert unread.name in note
        assert command in note
    with pytest.raises(AtlasError, match=f"{unread.name}: cannot be read: {what}.*{command}"):
        Sources([unread])
    archive = write_zip(tmp_path / "c.zip", {"a.txt": "text" * 1000, unread.name: unread.read_bytes()})
    assert documents_of(archive) == ["text" * 1000]
    assert f"{archive}/{unread.name}: {what}" in "\n".join(Sources([archive]).choice.names_with_reasons())


@pytest.mark.parametrize("name", ["b.en", "b.1", "b.log", "b", "b.pdf", "b.docx"])
def test_a_text_with_any_ending_is_text(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("This is text.", encoding="utf-8")
    assert documents_of(tmp_path / name) == documents_of(tmp_path) == ["This is text."]


@pytest.mark.parametrize("ending", PACKED)
def test_json_with_an_object_per_line_is_rows(ending: str, tmp_path: Path) -> None:
    """C4's layout: `c4-train.00000-of-01024.json.gz`."""
    rows = [
        {"text": text, "timestamp": "2020-01-01T00:00:00Z", "url": "http://example.org"} for text in TEXTS
    ]
    content = PACKED[ending](("\n" + "".join(json.dumps(row) + "\n" for row in rows)).encode())
    name = f"c4-train.00000-of-00002.json{ending}"
    (tmp_path / name).write_bytes(content)
    assert read_to_the_end(Sources([tmp_path / name])) == TEXTS
    assert Sources([tmp_path / name]).stem == "c4-train.00000-of-00002"
    assert read_to_the_end(Sources([tmp_path])) == TEXTS
    url = f"file://{tmp_path.as_posix()}"
    for source in (url, f"{url}/{name}", f"{url}/*.json*"):
        assert read_to_the_end(Sources([source])) == TEXTS
    assert documents_of(write_zip(tmp_path / "c4.zip", {name: content})) == TEXTS
    assert documents_of(write_tar(tmp_path / "c4.tar", {name: content})) == TEXTS


NO_ROWS = {
    "words": "not JSON at all",
    "numbers": "1\n2\n",
    "nothing": "",
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("ending", PACKED)
@pytest.mark.parametrize("content", NO_ROWS.values(), ids=NO_ROWS)
def test_other_json_is_no_text(content: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.json{ending}"
    path.write_bytes(PACKED[ending](content.encode()))
    said = r"no JSON with rows|is not JSON after 0 rows"
    with pytest.raises(AtlasError, match=said):
        read_to_the_end(Sources([path]))
    with pytest.raises(AtlasError, match=said):
        resolve_data(path)
    (tmp_path / "b.txt").write_text("text", encoding="utf-8")
    for source in (str(tmp_path), tmp_path.as_uri()):
        report = SourceReport()
        sources = Sources([source])
        assert whole(sources.documents(report)) == ["text"]
        assert path.name in "\n".join([*sources.notes(report), *report.fault_notes()])


def test_a_single_json_object_is_a_row_where_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"text": "one"}', encoding="utf-8")
    (tmp_path / "b.txt").write_text("text", encoding="utf-8")
    assert documents_of(tmp_path / "a.json") == ["one"]
    assert documents_of(tmp_path) == ["one", "text"]
    (tmp_path / "a.json").write_text('{"hidden_size": 64}', encoding="utf-8")
    assert documents_of(tmp_path) == ["text"]
    assert [*Sources([tmp_path]).choice.left_out] == [
        "a JSON object without rows; convert it with jq -c '{text: .[]}' FILE > FILE.jsonl"
    ]


def test_an_object_with_several_arrays_is_refused_with_a_command_that_chooses_one(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(
        '{"train": [{"text": "a"}],\n "test": [{"text": "b"}]}', encoding="utf-8"
    )
    with pytest.raises(
        AtlasError, match=r"has several arrays of objects \('train' and 'test'\).*jq -c '\.test\[\]'"
    ):
        documents_of(tmp_path)


ROW_LISTS = {
    "array": '[{"text": "a"}, {"text": "b"}]',
    "array over lines": json.dumps([{"text": "a", "score": float("nan")}, {"text": "b"}], indent=1),
    "array of texts": '["a", "b"]',
    "array in an object": json.dumps(
        {"version": 1, "tags": ["x"], "data": [{"text": "a"}, {"text": "b"}]}, indent=2
    ),
    "objects over lines": json.dumps({"text": "a"}, indent=1) + "\n" + json.dumps({"text": "b"}, indent=1),
}


@pytest.mark.parametrize("ending", PACKED)
@pytest.mark.parametrize("content", ROW_LISTS.values(), ids=ROW_LISTS)
def test_json_over_lines_and_arrays_are_rows(content: str, ending: str, tmp_path: Path) -> None:
    (tmp_path / f"a.json{ending}").write_bytes(PACKED[ending](content.encode()))
    assert documents_of(tmp_path / f"a.json{ending}") == ["a", "b"]
    assert documents_of(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_concatenated_compressed_streams_are_one(ending: str, tmp_path: Path) -> None:
    """`cat a.gz b.gz` and parallel compressors make them."""
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(PACKED[ending](b"one ") + PACKED[ending](b"two"))
    assert read_to_the_end(Sources([path])) == ["one two"]


@pytest.mark.parametrize("form", ["zip", "tar", "tgz", "tar.gz", "tar.zst"])
def test_an_archive_gives_the_documents_of_its_folder(form: str, tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {f"b/text {n}.txt": f"Text {n}." for n in range(12)}
    files |= {"a/rows.jsonl.gz": gzip.compress(ROWS), "a.md": "top", ".hidden.txt": "no", "x.png": "\0"}
    write_folder(tmp_path / "in", {})
    for name, content in files.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content.encode() if isinstance(content, str) else content)
    path = tmp_path / f"all.{form}"
    if form == "zip":
        write_zip(path, files)
    elif form == "tar":
        write_tar(path, files)
    else:
        in_order = {name: files[name] for name in ("a/rows.jsonl.gz", "a.md", *list(files)[:12], "x.png")}
        write_tar(path, in_order, "w" if form == "tar.zst" else "w:gz")
    sources = Sources([path])
    assert read_to_the_end(sources) == documents_of(tmp_path / "in")
    assert [*sources.choice.names_with_reasons()] == [f"{path}/x.png: a picture"]
    assert sources.in_own_order == []


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_the_archive_may_be_a_tar(mode: str, tmp_path: Path) -> None:
    both = dict(reversed(kaggle_files().items()))
    path = write_tar(tmp_path / ("a.tgz" if mode == "w:gz" else "a.tar"), both, mode)  # type: ignore[arg-type]
    assert read_to_the_end(Sources([path])) == ARTICLES
    assert len(Sources([path]).doubled) == 3


def test_names_in_a_tar_may_begin_with_the_folder_it_was_made_in(tmp_path: Path) -> None:
    """`tar -c .` names the files `./a.txt`: they are not hidden."""
    path = write_tar(tmp_path / "a.tar", {"./a.txt": "a", "./.hidden.txt": "no", "./.git/b.txt": "no"})
    assert documents_of(path) == ["a"]


def test_a_compressed_tar_is_read_in_its_own_order_with_a_note(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar.gz", {"b.txt": "b", "a.txt": "a"}, "w:gz")
    sources = Sources([path])
    assert whole(sources.documents()) == ["b", "a"]
    assert f"{path}: is a compressed tar and is read in its own order" in " ".join(
        sources.notes(SourceReport())
    )


def test_the_last_member_of_a_name_in_a_tar_is_read(tmp_path: Path) -> None:
    """`tar --append` means it so, and unpacking would give it."""
    write_tar(tmp_path / "a.tar", {"a.txt": "old", "b.txt": "b"})
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        member = tarfile.TarInfo("a.txt")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"new"))
    with tarfile.open(tmp_path / "a.tar") as archive:
        archive.extractall(tmp_path / "out", filter="data")
    assert documents_of(tmp_path / "a.tar") == documents_of(tmp_path / "out") == ["new", "b"]


# Parquet


def write_parquet(path: Path, values: object, **options: object) -> Path:
    parquet.write_table(
        pyarrow.table({"other": [{"a": 1, "b": 2}] * len(values), "text": values}), path, **options
    )  # type: ignore[arg-type]
    return path


@given(
    texts=st.lists(st.none() | st.text(max_size=20), max_size=80),
    rows=st.integers(1, 50),
    dictionary=st.booleans(),
)
@settings(deadline=None, max_examples=30)
def test_parquet_rows_are_documents(
    texts: list[str | None], rows: int, dictionary: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    column = pyarrow.array(texts, type=pyarrow.string())
    path = tmp_path_factory.mktemp("parquet") / "a.parquet"
    write_parquet(path, column.dictionary_encode() if dictionary else column, row_group_size=rows)
    assert read_to_the_end(Sources([path])) == [text for text in texts if text and not text.isspace()]
    report = SourceReport()
    list(Sources([path]).documents(report))
    assert report.empty_rows["Parquet (.parquet)"] == sum(text is None or not text.strip() for text in texts)


def test_undecodable_bytes_in_parquet_are_counted(tmp_path: Path) -> None:
    column = pyarrow.array([b"fine", b"caf\xe9"], type=pyarrow.binary()).view(pyarrow.string())
    report = SourceReport()
    path = write_parquet(tmp_path / "a.parquet", column)
    assert whole(Sources([path]).documents(report)) == ["fine", "caf\ufffd"]
    assert report.undecodable == {str(path): 1}


@pytest.mark.parametrize(
    ("field", "reason"),
    [("body", r"has no column 'body' \(columns: other, text\); name"), ("other", "column 'other' is struct")],
)
def test_a_wrong_column_is_named(field: str, reason: str, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["a"])
    with pytest.raises(AtlasError, match=reason):
        documents_of(path, reading=Reading(field))


def test_parquet_without_its_package_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["a"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(AtlasError, match=r'pip install "atlas-llm\[parquet\]"'):
        documents_of(path)


# What is damaged, or a bomb


@pytest.mark.parametrize(
    "name", ["a.txt.gz", "a.txt.zst", "a.tar", "a.tar.gz", "a.tar.zst", "a.parquet", "a.zip"]
)
def test_a_file_that_is_cut_off_anywhere_is_refused(name: str, tmp_path: Path) -> None:
    """It is never read in part."""
    text = "".join(f"{n * n} words, " for n in range(200))
    path, files = tmp_path / name, {f"{n}.txt": text for n in range(3)}
    if name == "a.parquet":
        write_parquet(path, [text] * 3)
    elif name == "a.zip":
        write_zip(path, files)
    elif ".tar" in name:
        write_tar(path, files, "w:gz" if name.endswith(".gz") else "w")  # type: ignore[arg-type]
    else:
        path.write_bytes(PACKED[path.suffix](text.encode()))
    content = path.read_bytes()
    # A plain tar ends in more zeros than the two blocks that are its end.
    end = len(content.rstrip(b"\0")) if name == "a.tar" else len(content) - 1
    assert documents_of(path)
    for length in range(1, end, max(1, end // 40)):
        path.write_bytes(content[:length])
        with pytest.raises(AtlasError, match=r"damaged|not whole|not complete|not a complete|not a zip"):
            documents_of(path)


def test_a_tar_with_a_damaged_header_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{n}.txt": "text" for n in range(3)})
    content = bytearray(path.read_bytes())
    content[2 * 512] ^= 255
    path.write_bytes(content)
    with pytest.raises(AtlasError, match="neither a member nor the end at byte 1,024"):
        Sources([path])


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst", "a.jsonl.gz", "a.tgz", "a.tar.zst", "a.parquet"])
def test_a_file_that_unpacks_to_very_much_is_refused_unless_trusted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atlas.data.text.archives.RATIO_FREE_BYTES", 100_000)
    path, text = tmp_path / name, "many words " * 200_000
    if name == "a.parquet":  # long for its readers alone: the file's own figures name one text
        write_parquet(path, pyarrow.array([text[:11_000]] * 5000).dictionary_encode())
    elif name.startswith("a.t") and not name.startswith("a.txt"):
        write_tar(path, {"a.txt": text}, "w:gz" if name == "a.tgz" else "w")
    elif ".jsonl" in name:
        path.write_bytes(gzip.compress((json.dumps({"text": text[:2000]}) + "\n").encode() * 1000))
    else:
        path.write_bytes(PACKED[path.suffix](text.encode()))
    with pytest.raises(
        AtlasError, match=r"may be a bomb: .* more than 200 times as many; .*--trust-archives"
    ):
        documents_of(path)
    assert "".join(documents_of(path, trust_archives=True)).startswith("many words many")


def test_a_tar_of_folders_alone_is_a_bomb_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atlas.data.text.archives.RATIO_FREE_BYTES", 100_000)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        for _ in range(2000):
            member = tarfile.TarInfo("folder")
            member.type = tarfile.DIRTYPE
            archive.addfile(member)
    with pytest.raises(AtlasError, match="may be a bomb"):
        Sources([tmp_path / "a.tar.gz"])


def test_a_zstandard_window_is_limited(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    window = {zstd.CompressionParameter.window_log: 28}
    with zstd.open(
        path, "wb", options=window
    ) as file:  # streamed: a frame of known size has a smaller window
        file.write(os.urandom(100).hex().encode())
        file.flush()
        file.write(b"more")
    with pytest.raises(AtlasError, match=r"the file is damaged .*memory"):
        documents_of(path)


# Patterns, URLs, standard input


def test_a_pattern_stands_for_its_files_in_natural_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(
        tmp_path, {"in/10.txt": "ten", "in/9.txt": "nine", "in/deep/er/1.txt": "one", "in/a.md": "no"}
    )
    write_folder(tmp_path, {"odd[1].txt": "literal"})
    monkeypatch.chdir(tmp_path)
    assert documents_of("in/**/*.txt") == ["nine", "ten", "one"]
    assert documents_of("in/?.txt") == ["nine"]
    assert documents_of("odd[1].txt") == ["literal"]
    assert Sources(["in/*.txt"]).stem == "in"
    with pytest.raises(AtlasError, match=r"in/\*\.csv: no such file or folder"):
        Sources(["in/*.csv"])


@pytest.mark.skipif(os.name == "nt", reason="links and pipes")
@pytest.mark.parametrize("given", [".", "in", "to in"])
def test_a_folder_stands_for_the_text_files_below_it(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for hidden ones, pipes, and links that lead out. A file under two names is read once."""
    names = ["b/10.txt", "b/9.txt", "a.txt", "c d/é/x.md", ".git/no.txt", "b/.no.txt", "a b.gz"]
    folder = write_folder(tmp_path / "in", dict.fromkeys(names, "text") | {"no.bin": "\0"})
    write_folder(tmp_path / "out", {"secret.txt": "no"})
    (folder / "out").symlink_to(tmp_path / "out")
    (folder / "secret.txt").symlink_to(tmp_path / "out" / "secret.txt")
    (folder / "broken.txt").symlink_to(tmp_path / "nothing.txt")
    (folder / "z.txt").symlink_to(folder / "a.txt")
    (tmp_path / "to in").symlink_to(folder)
    os.mkfifo(folder / "pipe.txt")
    monkeypatch.chdir(folder if given == "." else tmp_path)
    sources = Sources([given])
    shown = [str(Path(given) / name) for name in ("a b.gz", "a.txt", "b/9.txt", "b/10.txt", "c d/é/x.md")]
    assert [file.name for file in sources.files] == shown
    assert sources.skipped.links == [f"{given}/out", str(Path(given) / "secret.txt")]
    assert [*sources.choice.left_out] == ["a binary file"]
    assert [*sources.roots] == ["a b.gz", "a.txt", "b/9.txt", "b/10.txt", "c d/é/x.md"]


def test_the_name_of_a_dataset_is_that_of_the_file_without_its_endings(tmp_path: Path) -> None:
    """wiki.de and wiki.en are two datasets."""
    (tmp_path / "wiki.de.txt").write_bytes(b"")
    (tmp_path / "v1.2.jsonl.gz").write_bytes(gzip.compress(b""))
    assert Sources([tmp_path / "wiki.de.txt"]).stem == "wiki.de"
    assert Sources([tmp_path / "v1.2.jsonl.gz"]).stem == "v1.2"
    assert Sources([tmp_path]).stem == tmp_path.name


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_urls_are_files_folders_and_patterns(scheme: str, tmp_path: Path) -> None:
    files = {"b.txt": TEXTS[0].encode(), "a/rows.jsonl.gz": gzip.compress(ROWS), "c.png": b"\x89PNG\0"}
    root = f"{scheme}://{tmp_path.as_posix()}"
    filesystem, place = fsspec.core.url_to_fs(root)
    for name, content in files.items():
        filesystem.makedirs(f"{place}/{name}".rpartition("/")[0], exist_ok=True)
        filesystem.pipe_file(f"{place}/{name}", content)
    with filesystem.open(f"{place}/d.parquet", "wb") as file:
        parquet.write_table(pyarrow.table({"text": TEXTS}), file)
    assert read_to_the_end(Sources([root])) == [*TEXTS, TEXTS[0], *TEXTS]
    assert read_to_the_end(Sources([f"{root}/*.txt"])) == [TEXTS[0]]
    sources = Sources([f"{root}/b.txt"])
    assert read_to_the_end(sources) == [TEXTS[0]]
    before = sources.content_key
    assert Sources([f"{root}/b.txt"]).content_key == before
    filesystem.pipe_file(f"{place}/b.txt", b"changed")
    assert Sources([f"{root}/b.txt"]).content_key != before
    with pytest.raises(AtlasError, match="no such file"):
        Sources([f"{root}/none.txt"])
    filesystem.pipe_file(f"{place}/e.zip", b"")
    with pytest.raises(AtlasError, match="Atlas reads archives only from the disk"):
        Sources([root])


@pytest.mark.parametrize("url", ["nonsense://a/b.txt", "zip://a.txt::file:///b.zip"])
def test_a_url_that_cannot_be_opened_is_one_line(url: str) -> None:
    with pytest.raises(AtlasError, match="download the file"):
        Sources([url])


@pytest.mark.parametrize(
    ("content", "expected"),
    [(ROWS, TEXTS), (b"\xef\xbb\xbf" + ROWS, TEXTS), (b"[1]\ntext", ["[1]\ntext"]), (b"words", ["words"])],
)
def test_standard_input_is_rows_if_it_begins_with_one(
    content: bytes, expected: list[str], tmp_path: Path
) -> None:
    (tmp_path / "spooled").write_bytes(content)
    sources = Sources(["-"], stdin=tmp_path / "spooled")
    assert read_to_the_end(sources) == expected
    assert list(sources.roots) == ["-"]
    assert sources.stem == "stdin"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no file may have such a name")
def test_a_name_that_is_not_utf8_can_be_shown(tmp_path: Path) -> None:
    (tmp_path / "caf\udce9.txt").write_bytes(b"caf\xe9")
    (tmp_path / "caf\udce9.png").write_bytes(b"")
    sources, report = Sources([tmp_path]), SourceReport()
    assert whole(sources.documents(report)) == ["caf\ufffd"]
    shown = "\n".join([*sources.notes(report), *sources.roots, json.dumps(sources.description(report))])
    assert r"caf\udce9.txt" in shown.encode().decode()


# Hashes, reports


def test_a_hash_is_cached_only_while_nothing_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATLAS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "_SETTLED_SECONDS", -1.0)
    read: list[Path] = []

    def counted(path: Path, advance: object) -> str:
        read.append(path)
        return sha256_of(path)

    monkeypatch.setattr(hashes, "sha256_of", counted)
    path = tmp_path / "a.txt"
    path.write_text("before", encoding="utf-8")
    before = hashes_of([path])
    assert hashes_of([path]) == before == [sha256_of(path)]
    assert read == [path]
    status = path.stat()
    path.write_text("after!", encoding="utf-8")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    assert hashes_of([path]) == [sha256_of(path)] != before
    replaced = tmp_path / "new.txt"
    replaced.write_text("before", encoding="utf-8")
    replaced.replace(path)
    assert hashes_of([path]) == before


def test_a_kill_loses_no_hash_that_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process sees the hashes of earlier files while a later file is hashed."""
    monkeypatch.setenv("ATLAS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "_SETTLED_SECONDS", -1.0)
    monkeypatch.setattr(hashes, "_SAVE_SECONDS", 0.0)
    saved: list[int] = []

    def look(path: Path, advance: object) -> str:
        with closing(sqlite3.connect(tmp_path / "cache" / "hashes.sqlite")) as cache:
            saved.append(cache.execute("SELECT count(*) FROM hashes").fetchone()[0])
        return sha256_of(path)

    monkeypatch.setattr(hashes, "sha256_of", look)
    hashes_of(sorted(write_folder(tmp_path / "in", {f"{n}.txt": "text" for n in range(4)}).iterdir()))
    assert saved == [0, 1, 2, 3]


def test_a_hash_of_a_file_that_just_changed_is_not_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could change again within the same tick of the clock (git calls such an entry racy)."""
    monkeypatch.setenv("ATLAS_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "a.txt"
    path.write_text("one", encoding="utf-8")
    assert hashes_of([path]) == [sha256_of(path)]
    monkeypatch.setattr(hashes, "stamp_of", lambda path: ("the same", path.stat().st_mtime))
    path.write_text("two", encoding="utf-8")
    assert hashes_of([path]) == [sha256_of(path)]


def test_a_cache_that_cannot_be_used_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATLAS_CACHE_DIR", str(tmp_path))
    (tmp_path / "hashes.sqlite").write_bytes(b"no database" * 1000)
    assert hashes_of([tmp_path / "hashes.sqlite"]) == [sha256_of(tmp_path / "hashes.sqlite")]


def test_reports_of_groups_make_the_report_of_all(tmp_path: Path) -> None:
    """Also through JSON, as an interrupted preparation keeps them."""
    write_folder(tmp_path, {"a/AllCombined.txt": kaggle_files(30)["AllCombined.txt"]})
    write_zip(tmp_path / "b.zip", kaggle_files(25))
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "d.parquet")
    sources = Sources([tmp_path])
    together, merged = SourceReport(), SourceReport()
    list(sources.documents(together))
    for group in sources.groups:
        own = SourceReport()
        list(group.pieces(own, lambda _: None))
        merged.merge(own)
        merged = SourceReport(**json.loads(json.dumps(merged.model_dump())))
    assert merged == together
    assert isinstance(merged.articles, ArticleReport)
    assert merged.articles.articles == 55
    assert merged.undecodable.total() == merged.empty_rows.total() == 1


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_a_row_that_is_too_long_is_refused(
    mark: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "LONGEST_ROW", 100)
    (tmp_path / "a.jsonl.zst").write_bytes(zstd.compress(mark + b'{"text": "' + b"x" * 200 + b'"}'))
    with pytest.raises(AtlasError, match=r"line 1: is longer than 100 characters"):
        documents_of(tmp_path)
