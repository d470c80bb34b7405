"""HTML, EPUB, PDF, tables and dumps, recognised by their content, and what is chosen of a folder."""

from __future__ import annotations

import bz2
import csv
import gzip
import html
import io
import json
import lzma
import re
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from atlas.cli import main
from atlas.data import prepare
from atlas.data.shards import open_dataset
from atlas.data.text.documents import Reading
from atlas.data.text.report import SourceReport
from atlas.data.text.sources import Sources
from atlas.errors import AtlasError
from tests.archive import documents_of, whole, write_folder, write_zip

PAGE = """<!DOCTYPE html>
<html><head><title>Not text</title><style>p {color: red}</style><script>let x = "<p>no</p>";</script></head>
<body><nav><a href="/">Home</a> | <a href="/all">All</a></nav>
<main><h1>The mill</h1><p>A river runs&nbsp;past the
 mill, &amp; geese sleep.</p><ul><li>first</li><li>second</li></ul>
<pre>code:
    indented</pre><table><tr><td>1</td><td>2</td></tr></table></main>
<footer>Printed by nobody</footer></body></html>"""
PAGE_TEXT = "The mill\n\nA river runs\xa0past the mill, & geese sleep.\n\nfirst\nsecond\n\ncode:\n    indented\n\n1\t2"


def pdf(*pages: str) -> bytes:
    """A PDF with one line of text on each page, as the specification describes it (ISO 32000-1, annex H)."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", ""]
    kids = []
    font = "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"
    for page in pages:
        stream = f"BT /F1 12 Tf 72 720 Td ({page}) Tj ET"
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
        contents = len(objects)
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {contents} 0 R "
            f"/Resources << /Font << /F1 {font} >> >> >>"
        )
        kids.append(f"{len(objects)} 0 R")
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>"
    out, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        places.append(len(out))
        out += f"{number} 0 obj\n{content}\nendobj\n".encode()
    start = len(out)
    out += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n".encode()
    out += b"".join(f"{place:010d} 00000 n \n".encode() for place in places)
    return out + f"trailer << /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{start}\n%%EOF\n".encode()


def epub(**chapters: str) -> bytes:
    """An EPUB whose spine has the chapters in the given order, although its files are in another order."""
    content = io.BytesIO()
    items = "".join(f'<item id="{name}" href="text/{name}.xhtml"/>' for name in sorted(chapters))
    spine = "".join(f'<itemref idref="{name}"/>' for name in chapters)
    package = f'<package xmlns="http://www.idpf.org/2007/opf"><manifest>{items}</manifest><spine>{spine}</spine></package>'
    container = (
        '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
        '<rootfile full-path="OEBPS/book.opf"/></rootfiles></container>'
    )
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as book:
        book.writestr("mimetype", "application/epub+zip", zipfile.ZIP_STORED)
        book.writestr("META-INF/container.xml", container)
        book.writestr("OEBPS/book.opf", package)
        for name in sorted(chapters):
            book.writestr(f"OEBPS/text/{name}.xhtml", f"<html><body><p>{chapters[name]}</p></body></html>")
    return content.getvalue()


DUMP = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" xml:lang="de">
<siteinfo><namespaces><namespace key="6">Datei</namespace><namespace key="14">Kategorie</namespace></namespaces>
</siteinfo>
<page><title>M\u00fchle</title><ns>0</ns><revision><text>{{Infobox|name=M}}
\'\'\'M\u00fchle\'\'\' ist ein [[Bauwerk|Haus]] am [[Fluss]].&lt;ref>Ein Buch&lt;/ref> [[Datei:M.jpg|mini|Ein [[Bild]]]]

== Lage ==
Sie liegt am Wasser.
{| class="wikitable"
| 1 || 2
|}
[[Kategorie:Bau]] [[en:Mill]]</text></revision></page>
<page><title>Alt</title><ns>0</ns><redirect title="Neu"/><revision><text>#REDIRECT [[Neu]]</text></revision></page>
<page><title>Diskussion:M\u00fchle</title><ns>1</ns><revision><text>Reden.</text></revision></page>
<page><title>Fluss</title><ns>0</ns><revision><text>Ein Fluss flie\u00dft.</text></revision></page>
</mediawiki>""".replace("\\'", "'")
DUMP_TEXTS = [
    "Mühle\n\nMühle ist ein Haus am Fluss.\n\nLage\nSie liegt am Wasser.",
    "Fluss\n\nEin Fluss fließt.",
]
EXTRACTED = """<doc id="1" url="x?curid=1" title="Mill">
Mill

A mill stands here.
</doc>
<doc id="2" url="x?curid=2" title="River">
River

A river runs.
</doc>
"""


def table(delimiter: str = ",") -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerows(
        [["id", "text"], [1, 'One, "quoted"\nand a second line; end'], [2, "Two\ttabs"], [3, ""]]
    )
    return file.getvalue().encode()


TABLE_TEXTS = ['One, "quoted"\nand a second line; end', "Two\ttabs"]
FORMATS: dict[str, tuple[str, bytes, list[str]]] = {
    "html": ("a.html", PAGE.encode(), [PAGE_TEXT]),
    "html without an ending": ("index", PAGE.encode(), [PAGE_TEXT]),
    "html in another encoding": (
        "a.htm",
        "<html><head><meta charset=iso-8859-1></head><body><p>Caf\u00e9</p></body></html>".encode("latin-1"),
        ["Café"],
    ),
    "pdf": ("a.pdf", pdf("A river runs.", "A mill stands."), ["A river runs.\n\nA mill stands."]),
    "epub": ("a.epub", epub(b="It began.", a="It ended."), ["It began.\n\nIt ended."]),
    "csv": ("a.csv", table(), TABLE_TEXTS),
    "semicolons": ("a.csv", table(";"), TABLE_TEXTS),
    "tabs": ("a.tsv", table("\t"), TABLE_TEXTS),
    "csv named txt": ("a.txt", table(), TABLE_TEXTS),
    "dump": ("dewiki-pages-articles.xml", DUMP.encode(), DUMP_TEXTS),
    "extracted": ("wiki_00", EXTRACTED.encode(), ["Mill\n\nA mill stands here.", "River\n\nA river runs."]),
    "extracted as json": (
        "wiki_00",
        b"".join(
            json.dumps({"id": n, "title": t, "text": t * 9}).encode() + b"\n" for n, t in enumerate("AB")
        ),
        ["A" * 9, "B" * 9],
    ),
    "json lines named txt": ("a.txt", b'{"text": "one"}\n{"text": "two"}\n', ["one", "two"]),
    "text named json": ("a.jsonl", b'\n\n{"text": "one"}\n', ["one"]),
}
PACKING: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


@pytest.mark.parametrize("packing", PACKING)
@pytest.mark.parametrize("kind", FORMATS)
def test_the_content_decides_the_format(kind: str, packing: str, tmp_path: Path) -> None:
    name, content, expected = FORMATS[kind]
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / f"{name}{packing}").write_bytes(PACKING[packing](content))
    assert documents_of(folder / f"{name}{packing}") == expected
    assert documents_of(folder) == expected
    assert (
        documents_of(write_zip(tmp_path / "a.zip", {f"x/{name}{packing}": PACKING[packing](content)}))
        == expected
    )
    (tmp_path / "standard").write_bytes(PACKING[packing](content))
    if packing == "":
        found = [piece.text for piece in Sources(["-"], stdin=tmp_path / "standard").documents()]
        if kind not in ("html in another encoding",):
            assert "".join(found) == "".join(expected)


@pytest.mark.parametrize("package", ["selectolax", "pypdf", "mwparserfromhell", "pyarrow"])
def test_a_format_without_its_package_is_named_and_left_out(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    names = {"selectolax": "html", "pypdf": "pdf", "mwparserfromhell": "dump"}
    path = tmp_path / "a.parquet"
    if package == "pyarrow":
        path.write_bytes(b"PAR1\0\0PAR1")
    else:
        name, content, _ = FORMATS[names[package]]
        path = tmp_path / name
        path.write_bytes(content)
    with pytest.raises(
        AtlasError, match=rf"reads with the package {package}; pip install \"atlas-llm\[\w+\]"
    ):
        documents_of(path)
    (tmp_path / "b.txt").write_text("words " * 9000, encoding="utf-8")
    assert documents_of(tmp_path) == ["words " * 9000]


def test_string_views_and_arrow_files_are_columns(tmp_path: Path) -> None:
    column = pyarrow.array(["one", None, "two"], pyarrow.string_view())
    parquet.write_table(pyarrow.table({"text": column.cast(pyarrow.string())}), tmp_path / "a.parquet")
    with pyarrow.ipc.new_file(tmp_path / "b.arrow", pyarrow.schema({"text": pyarrow.string_view()})) as file:
        file.write_table(pyarrow.table({"text": column}))
    with pyarrow.ipc.new_stream(tmp_path / "c.arrow", pyarrow.schema({"text": pyarrow.string()})) as stream:
        stream.write_table(pyarrow.table({"text": column.cast(pyarrow.string())}))
    for name in ("a.parquet", "b.arrow", "c.arrow"):
        assert documents_of(tmp_path / name) == ["one", "two"]


# What is chosen of a folder


def test_a_dataset_repository_gives_its_rows(tmp_path: Path) -> None:
    files = {
        "README.md": "# About\n" * 20,
        "data/train.json": json.dumps([{"text": f"Text {n}. " * 30} for n in range(60)]),
        "LICENSE": "You may.\n" * 9,
    }
    sources = Sources([write_folder(tmp_path / "in", files)])
    assert [file.basename for file in sources.files] == ["train.json"]
    [note] = sources.notes(SourceReport())
    assert re.match(r"2 files are left out, [\d.]+ (kB|bytes?): no rows, beside files of rows \(", note)
    assert "README.md" in note
    assert "LICENSE" in note


def test_a_folder_of_mostly_code_is_read_as_text(tmp_path: Path) -> None:
    code = {f"src/m{n}.py": f"def f{n}():\n    return {n}\n" * 20 for n in range(25)}
    files = code | {"README.md": "# Code\n", "Makefile": "all:\n\ttrue\n", "settings.json": '{"a": 1}'}
    assert sorted(documents_of(write_folder(tmp_path / "in", files))) == sorted(files.values())


def test_code_beside_texts_is_left_out(tmp_path: Path) -> None:
    files = {"a.txt": "Prose. " * 1000, "page.css": "p {}", "x.py": "pass"}
    sources = Sources([write_folder(tmp_path / "in", files)])
    assert [file.basename for file in sources.files] == ["a.txt"]
    assert [*sources.choice.left_out] == ["source code"]


def test_more_than_a_tenth_left_out_is_refused_with_the_options_that_do_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "in", {"a.txt": "Prose. " * 100, "b.txt": "More. " * 100})
    (folder / "scan.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(2000))
    command = ["prepare", "--input", str(folder), "--output", str(tmp_path / "out")]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "1 file is left out, 2.0 kB: a picture" in said
    assert "61% of the bytes are in files that Atlas does not read" in said
    assert "--exclude '*.png'" in said
    assert main([*command, "--exclude", "*.png"]) == 0
    assert sum(split.documents for split in open_dataset(tmp_path / "out").manifest.splits.values()) >= 2


def test_include_and_exclude_choose_files(tmp_path: Path) -> None:
    files = {"a.txt": "a", "b.md": "b", "old/c.txt": "c", "old/d.md": "d"}
    folder = write_folder(tmp_path / "in", files)
    archive = write_zip(tmp_path / "a.zip", files)
    for source in (folder, archive):
        assert documents_of(source, include=["*.txt"]) == ["a", "c"]
        assert documents_of(source, exclude=["old/*"]) == ["a", "b"]
        assert documents_of(source, include=["*.md"], exclude=["d.md"]) == ["b"]
    with pytest.raises(AtlasError, match="nothing to read"):
        documents_of(folder, include=["*.pdf"])


def test_asking_leaves_files_out(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", {"a.txt": "Prose. " * 100})
    (folder / "x.bin").write_bytes(bytes(2000))
    asked: list[str] = []
    prepare([folder], tmp_path / "out", ask=lambda question: bool(asked.append(question)) or True)
    assert asked == [f"leave out 74% of the bytes in {folder}?"]
    assert (tmp_path / "out" / "left_out.txt").read_text() == f"{folder}/x.bin: a binary file\n"
    with pytest.raises(AtlasError, match=r"--exclude '\*\.bin'"):
        prepare([folder], tmp_path / "other", ask=lambda _: False)


# Rows and files that cannot be read


def bad_rows(path: Path, good: int, bad: int) -> Path:
    rows = [json.dumps({"text": f"Row {n} is fine."}) for n in range(good)]
    path.write_text("\n".join([*rows, *['{"text": '] * bad]), encoding="utf-8")
    return path


def test_a_few_bad_rows_are_left_out_and_named(tmp_path: Path) -> None:
    path = bad_rows(tmp_path / "a.jsonl", 200, 1)
    summary = prepare([path], tmp_path / "out", workers=1)
    reason = (
        f"{path} line 201: is not JSON: Expecting value at character 9; every line must be one JSON object"
    )
    assert summary.notes[-2:] == [
        f"1 row or file is left out, since it cannot be used, see {tmp_path}/out/left_out.txt:",
        reason,
    ]
    assert (tmp_path / "out" / "left_out.txt").read_text() == reason + "\n"
    assert sum(split.documents for split in summary.dataset.manifest.splits.values()) == 200
    assert prepare([path], tmp_path / "out").unchanged
    with pytest.raises(AtlasError, match="line 201: is not JSON"):
        prepare([path], tmp_path / "out", workers=1, reading=Reading(on_error="stop"))


@pytest.mark.parametrize(
    ("good", "bad", "works"), [(200, 5, True), (200, 6, False), (5, 5, False), (6, 5, True)]
)
def test_more_bad_rows_end_it_with_the_work_kept(
    good: int, bad: int, works: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bad_rows(tmp_path / "a.jsonl", good, bad)
    command = ["prepare", "--input", str(path), "--output", str(tmp_path / "out"), "--workers", "1"]
    assert main(command) == (0 if works else 2)
    said = capsys.readouterr().err
    if not works:
        assert f"line {good + 1}: is not JSON" in said
        assert f"({bad - 1} more such rows or files; leave them out with --on-error skip)" in said
        assert main([*command, "--on-error", "skip"]) == 0
        assert "tokens were done before; resuming after them" in capsys.readouterr().err
    assert main([*command, "--on-error", "stop"]) == 2


def test_one_fault_of_each_kind_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        *[json.dumps({"text": f"Row {n}."}) for n in range(30)],
        "[1]",
        "{",
        '{"text": 7}',
        "[2]",
        '{"a": 1}',
        "{{",
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(rows), encoding="utf-8")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"words " * 100)[:-9])
    assert (
        main(["prepare", "--input", str(tmp_path), "--output", str(tmp_path / "out"), "--workers", "1"]) == 2
    )
    said = capsys.readouterr().err
    for fault in (
        "line 31: is an array",
        "line 32: is not JSON",
        "line 33: field 'text'",
        "line 35: has no field",
    ):
        assert said.count(fault) == 1
    assert "line 34" not in said
    assert "b.txt.gz: the file is damaged" in said
    assert "7 rows or files cannot be read (one of each kind above)" in said


@pytest.mark.parametrize("name", ["deep.html", "open.html"])
def test_hostile_pages_take_little_time(name: str, tmp_path: Path) -> None:
    tags = "<div>" * 100_000 if name == "deep.html" else "<b><i>" * 50_000
    (tmp_path / name).write_text(f"<!doctype html><html><body>{tags}words", encoding="utf-8")
    with pytest.raises(AtlasError, match="more than 2,000 open elements"):
        documents_of(tmp_path / name)


def test_a_small_table_beside_texts_is_left_out_and_a_large_one_needs_its_field(tmp_path: Path) -> None:
    files = {"a.txt": "Prose. " * 1000, "b.csv": "Name,Value\nx,1\ny,2\n", "README.md": "Prose too."}
    folder = write_folder(tmp_path / "in", files)
    assert documents_of(folder) == ["Prose too.", "Prose. " * 1000]
    assert [*Sources([folder]).choice.left_out] == ["rows without 'text'"]
    (folder / "a.txt").unlink()
    (folder / "b.csv").write_text("Name,Value\n" + "x,1\n" * 9000, encoding="utf-8")
    with pytest.raises(AtlasError, match=r"b.csv row 2: has no field 'text' \(fields: Name, Value\)"):
        documents_of(folder)


def test_a_stray_quote_costs_its_own_line(tmp_path: Path) -> None:
    rows = [f"{n},text {n}\n" for n in range(3000)]
    rows[100], rows[107] = '100,"stray\n', '107,a "b" c\n'
    rows[200] = '200,"two\n\nlines"\n'
    (tmp_path / "a.csv").write_text("id,text\n" + "".join(rows), encoding="utf-8")
    report = SourceReport()
    found = [piece.text for piece in Sources([tmp_path / "a.csv"]).documents(report)]
    assert len(found) == 2999
    assert found[199] == "two\n\nlines"
    assert report.num_faults == 1
    assert "row 102: cannot be read" in report.faults[0]


def test_a_file_that_is_not_read_to_its_end_counts_with_all_its_bytes(tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"Row {n}."}) for n in range(200)]
    (tmp_path / "a.json").write_text(
        "[" + ",".join(rows[:10]) + ",," + ",".join(rows) + "]", encoding="utf-8"
    )
    with pytest.raises(AtlasError, match="is not JSON after 10 rows"):
        documents_of(tmp_path / "a.json")
    (tmp_path / "b.txt").write_text("Prose. " * 20_000, encoding="utf-8")
    assert len(documents_of(tmp_path)) == 11


@pytest.mark.parametrize(
    "text",
    [
        "[[Home]] is a page of these notes.",
        '["Quote"](http://x) is a link.',
        '["INFO", 12:01] started',
        '{"a","b"} is a set.',
        "From Paris to London in 1889, a journey.\nNote: this is prose.\n",
        "About PDF\n\n%PDF-1.4\n\nis how a file begins, and objects follow.",
        "RIFFRAFF, or the life of the poor.",
        "MZ is how a program begins.",
    ],
)
def test_prose_that_looks_like_another_format_is_text(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert documents_of(tmp_path) == documents_of(tmp_path / "a.txt") == [text]


@pytest.mark.parametrize(
    ("name", "content", "encoding"),
    [
        ("a.txt", "words".encode("utf-16-le"), "utf-16"),
        ("a.csv", b"a,text\n1,x\r2,y\r", ""),
        ("a.csv", b'"a"b,text\n1,x\n', ""),
        ("a.html", b"<html><meta charset=idna><body>words</body></html>", ""),
        ("a.xml", b'<?xml version="1.0" encoding="foo"?><mediawiki></mediawiki>', ""),
        ("a.epub", epub(a="words")[:400], ""),
        ("a.jsonl", b'{"\\ud800": 1}\n', ""),
    ],
)
def test_odd_files_end_in_one_line(
    name: str, content: bytes, encoding: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    words = ["prepare", "--input", str(tmp_path / name), "--output", str(tmp_path / "out"), "--workers", "1"]
    code = main([*words, *(["--encoding", encoding] if encoding else [])])
    said = capsys.readouterr().err
    assert code == (2 if "error: " in said else 0)
    assert code == 0 or name in said.splitlines()[-1]


def test_a_damaged_arrow_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    table = pyarrow.table({"text": [f"words {n}" for n in range(50)]})
    with pyarrow.ipc.new_file(path, table.schema) as file:
        file.write_table(table)
    content = bytearray(path.read_bytes())
    place = content.index((7).to_bytes(4, "little") + (14).to_bytes(4, "little"))  # the offsets of two texts
    content[place + 3] = 0x7F
    path.write_bytes(content)
    with pytest.raises(AtlasError, match="is not a complete Arrow file"):
        documents_of(path)


def test_columns_with_one_name_and_odd_values(tmp_path: Path) -> None:
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    parquet.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(AtlasError, match="has several columns 'text'"):
        documents_of(tmp_path / "a.parquet")
    far = pyarrow.array([10**7], pyarrow.int32()).cast(pyarrow.date32())
    parquet.write_table(pyarrow.table({"text": ["a"], "day": far}), tmp_path / "a.parquet")
    assert documents_of(tmp_path / "a.parquet") == ["a"]


@pytest.mark.parametrize("opening", ["<ol><li>", "<dl><dd>", "<center>", "<article>"])
def test_elements_that_never_end_are_refused(opening: str, tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(f"<html>{'</div>' * 50_000}{opening * 50_000}words", encoding="utf-8")
    with pytest.raises(AtlasError, match="more than 2,000 open elements"):
        documents_of(tmp_path / "a.html")


def test_an_element_with_very_many_attributes_is_refused(tmp_path: Path) -> None:
    attributes = " ".join(f"a{n}=1" for n in range(100_000))
    (tmp_path / "a.html").write_text(f"<html><p {attributes}>words</p>", encoding="utf-8")
    with pytest.raises(AtlasError, match="more than 5,000 attributes"):
        documents_of(tmp_path / "a.html")
    picture = f'<img src="data:image/png;base64,{"A B" * 20_000}"><p>words</p>'
    (tmp_path / "a.html").write_text(f"<html>{picture}", encoding="utf-8")
    assert documents_of(tmp_path / "a.html") == ["words"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_a_page_with_a_unicode_mark(encoding: str, tmp_path: Path) -> None:
    page = '<html><head><meta charset="iso-8859-1"></head><body><p>Größe</p><p>x</p></body></html>'
    (tmp_path / "a.html").write_bytes(page.encode(encoding))
    assert documents_of(tmp_path / "a.html") == ["Größe\n\nx"]


def dump_of(*pages: str) -> str:
    written = "".join(
        f"<page><title>Page {number}</title><ns>0</ns><revision><text>{html.escape(page)}</text></revision></page>"
        for number, page in enumerate(pages)
    )
    return f"<mediawiki>{written}</mediawiki>"


def test_a_page_of_a_wiki_with_many_references_takes_little_time(tmp_path: Path) -> None:
    page = "Text<ref name='a'>note</ref> and [[File:a.png|thumb|a [[picture]]]]links. " * 5000
    (tmp_path / "a.xml").write_text(dump_of(page), encoding="utf-8")
    start = time.process_time()
    [document] = documents_of(tmp_path)
    assert document.startswith("Page 0\n\nText and links. Text and links.")
    assert "note" not in document
    assert "thumb" not in document
    assert time.process_time() - start < 30  # quadratic: minutes


@pytest.mark.parametrize(
    "opening", ["{{a|", "[http://a.b ", "<div a=b ", "{|\n", "[[a|", "<nowiki>", "<br ", "<li>"]
)
def test_a_page_of_a_wiki_with_very_many_open_brackets_is_left_out(opening: str, tmp_path: Path) -> None:
    pages = [f"An article about {n}." for n in range(6)]
    (tmp_path / "a.xml").write_text(dump_of(*pages, opening * 5000), encoding="utf-8")
    report = SourceReport()
    found = whole(Sources([tmp_path]).documents(report))
    assert found == [f"Page {n}\n\n{page}" for n, page in enumerate(pages)]
    [fault] = report.faults
    assert "page 'Page 6': has more than 500 brackets or tags that do not end" in fault


def test_a_book_that_unpacks_to_very_much_is_a_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atlas.data.text.archives.RATIO_FREE_BYTES", 100_000)
    chapters = {f"c{n}": f"<p>{'la ' * 300_000}{n}</p>" for n in range(12)}
    (tmp_path / "a.epub").write_bytes(epub(**chapters))
    with pytest.raises(AtlasError, match="--trust-archives"):
        documents_of(tmp_path / "a.epub")


def test_what_a_wiki_loses_is_counted_and_words_stay_apart(tmp_path: Path) -> None:
    page = (
        "One<br />two<br>three ({{IPA|x}}) four <source lang=c>int x;</source>[[:Category:Ships]] ends (see)."
    )
    redirect = (
        "<page><title>R</title><ns>0</ns><redirect title='x'/><revision><text>#R</text></revision></page>"
    )
    talk = "<page><title>Talk:R</title><ns>1</ns><revision><text>words</text></revision></page>"
    written = dump_of(page, "{{stub}}").replace("</mediawiki>", f"{redirect}{talk}</mediawiki>")
    (tmp_path / "a.xml").write_text(written, encoding="utf-8")
    report, sources = SourceReport(), Sources([tmp_path])
    assert whole(sources.documents(report)) == ["Page 0\n\nOne\ntwo\nthree four Category:Ships ends (see)."]
    assert "pages of a wiki that are left out: about the wiki itself 1, redirects 1, without text 1" in (
        sources.notes(report)
    )


def test_a_pattern_may_name_the_folders_as_messages_do(tmp_path: Path) -> None:
    write_folder(tmp_path / "in", {"nodejs/x.txt": "left out", "a.txt": "kept"})
    for pattern in ("*/nodejs/*", "nodejs/*", "x.txt", f"{tmp_path}/in/nodejs/*"):
        assert documents_of(tmp_path / "in", exclude=[pattern]) == ["kept"]


def test_a_missing_package_is_the_first_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atlas.data.text.formats.sniff.find_spec", lambda name: None)
    page = "<!doctype html><html><body><p>a page</p></body></html>"
    write_folder(tmp_path / "in", {"a.html": page * 50, "b.pdf": "%PDF-1.4\n1 0 obj\0", "c.txt": "text"})
    with pytest.raises(
        AtlasError, match=r'to read more, pip install "atlas-llm\[html,pdf\]"; or leave them out'
    ):
        prepare([tmp_path / "in"], tmp_path / "out")


def test_rows_after_an_error_do_not_decide_what_a_file_is(tmp_path: Path) -> None:
    rows = '{"items": [{"name": "a"}, {"name": "b"}], "more": [{"x": 1}]}'
    write_folder(tmp_path / "in", {"a.json": rows, "b.txt": "text " * 200})
    assert documents_of(tmp_path / "in") == ["text " * 200]


@pytest.mark.parametrize("piece", ["<!--", "'''''a ", "<br>", "<hr/>", "<br />x "])
def test_marks_of_a_wiki_that_never_end_take_little_time(piece: str, tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text(dump_of("Words. " + piece * 50_000), encoding="utf-8")
    start = time.process_time()
    [document] = documents_of(tmp_path)
    assert document.startswith("Page 0\n\nWords.")
    assert time.process_time() - start < 30


EXPORTS: dict[str, tuple[object, str]] = {
    "telegram": (
        {"name": "Us", "messages": [{"from": "Anna", "text": "Hi"}, {"from": "Ben", "text": "Yes"}]},
        ".messages",
    ),
    "discord": (
        {"guild": {"id": 1}, "messages": [{"content": "Hi", "author": {}}, {"content": "Yes"}]},
        ".messages",
    ),
    "api": ({"status": "ok", "data": {"items": [{"body": "A text."}, {"body": "Another."}]}}, ".data.items"),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_rows_inside_an_object_are_named_with_the_command(name: str, tmp_path: Path) -> None:
    content, place = EXPORTS[name]
    (tmp_path / "a.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(AtlasError, match=rf"jq -c '{re.escape(place)}\[\]' FILE > FILE.jsonl"):
        documents_of(tmp_path / "a.json", reading=Reading("text", names_text_field=True))


NAMED = {
    "a.ipynb": (
        b'{\n "cells": [\n {"cell_type": "code"}]}',
        "a Jupyter notebook; convert it with jupyter nbconvert",
    ),
    "Posts.xml": (
        b'<?xml version="1.0"?>\n<posts>\n  <row Body="x" />\n</posts>',
        "a dump of Stack Exchange",
    ),
    "a.txt": ("Ein Text ohne Marke.".encode("utf-16-le"), "if so, give --encoding utf-16-le"),
}


@pytest.mark.parametrize("name", NAMED)
def test_more_files_are_named_with_what_reads_them(name: str, tmp_path: Path) -> None:
    content, said = NAMED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AtlasError, match=re.escape(said)):
        documents_of(tmp_path / name)
