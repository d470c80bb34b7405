"""Text in every form it comes in → documents."""

from __future__ import annotations

import itertools
import random
import re
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas.data import articles, text
from atlas.data.articles import WIKIPEDIA_ARTICLES, WIKIPEDIA_CHARS, ArticleReport, split_articles
from atlas.data.sources import SourceReport, Sources
from atlas.errors import AtlasError
from tests.archive import ARTICLES, article, documents_of, kaggle_files, whole, write_folder, write_zip

# The Kaggle archive


def test_the_archive_is_read_once_from_any_of_its_forms(tmp_path: Path) -> None:
    both, parts = kaggle_files(), kaggle_files(combined=False)
    shuffled = list(both)
    random.Random(0).shuffle(shuffled)
    forms = [
        write_zip(tmp_path / "both.zip", both),
        write_zip(tmp_path / "shuffled.zip", both, shuffled),
        write_zip(tmp_path / "parts.zip", parts),
        write_zip(tmp_path / "nested.zip", {f"archive/data/{name}": text for name, text in both.items()}),
        write_folder(tmp_path / "both", both),
        write_folder(tmp_path / "parts", parts),
        tmp_path / "both" / "AllCombined.txt",
    ]
    for form in forms:
        assert documents_of(form) == ARTICLES, form


def test_a_text_beside_the_archive_is_read_too(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "raw", {**kaggle_files(3), "other/notes.txt": "Notes of my own."})
    assert documents_of(folder) == [*ARTICLES[:3], "Notes of my own."]
    assert Sources([folder]).left_out == [str(folder / name) for name in sorted(kaggle_files(combined=False))]


def test_parts_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    everything = kaggle_files()["AllCombined.txt"]
    size = len(everything) // 12 + 1
    parts = {f"{n + 1}of12/wiki_00": everything[n * size : (n + 1) * size] for n in range(12)}
    assert documents_of(write_zip(tmp_path / "a.zip", parts)) == ARTICLES


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("gap", ["\n\n\n", "\n\n \t\n\n\n", "\n\n"])
def test_articles_by_empty_lines_or_by_titles(gap: str, newline: str) -> None:
    report = ArticleReport()
    source = kaggle_files(gap=gap, newline=newline)["AllCombined.txt"]
    found = whole(split_articles([source], report))
    assert found == [article(n, newline=newline) for n in range(60)]
    assert report.articles == 60
    assert report.rule.startswith("the title's form" if gap == "\n\n" else "two or more empty lines")
    assert len(report.boundaries) == 3
    assert report.boundaries[0].startswith("…Its last paragraph counts to 0. ⏎⏎")
    assert report.boundaries[0].endswith(" Title of 1")


def test_what_looks_like_a_title_but_is_none() -> None:
    """A heading right under the title, a list, a one-line paragraph with a full stop, a colon."""
    april = "April\n\nMonth of the year\n\nApril is the fourth month.\n\nIts days:\n\nMonday\nTuesday\n\nShort one."
    august = "August\n\nAugust is the eighth month."
    assert whole(split_articles([f"{april}\n\n{august}\n"], ArticleReport())) == [april, august]


def test_stray_empty_lines_do_not_decide() -> None:
    """Runs of empty lines before what is no title are not what sets articles apart."""
    text = "\n\n".join(
        f"Title {n}\n\nA sentence, and another one here.\n\n\nthen one more after a gap, in small letters."
        for n in range(9)
    )
    report = ArticleReport()
    found = whole(split_articles([text], report))
    assert [document.splitlines()[0] for document in found] == [f"Title {n}" for n in range(9)]


@given(cuts=st.lists(st.integers(0, 4000), max_size=12), gap=st.sampled_from(["\n\n\n", "\n\n"]))
@settings(deadline=None, max_examples=60)
def test_articles_do_not_depend_on_how_the_bytes_arrive(cuts: list[int], gap: str) -> None:
    source = "\n\n\n" + kaggle_files(20, gap=gap)["AllCombined.txt"] + "\n\n \n"
    places = [0, *sorted(cuts), len(source)]
    chunks = [source[start:end] for start, end in itertools.pairwise(places)]
    assert whole(split_articles(chunks, ArticleReport())) == ARTICLES[:20]


def test_a_size_like_the_real_archive_warns_of_another_number_of_articles() -> None:
    assert ArticleReport(articles=WIKIPEDIA_ARTICLES, chars=WIKIPEDIA_CHARS).warning is None
    assert ArticleReport(articles=900, chars=500_000).warning is None
    assert "about 249,396 articles, 31,000 were found" in str(
        ArticleReport(articles=31_000, chars=WIKIPEDIA_CHARS).warning
    )


def test_long_articles_are_handed_on_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "PIECE_CHARS", 50)
    monkeypatch.setattr(articles, "PIECE_CHARS", 50)
    paragraphs = ["First", "", "word " * 100, "x" * 300, "", "The end."]
    long, next_one = "\n".join(paragraphs), "Second\n\nShort."
    source = f"{long}\n\n\n{next_one}"
    chunks = [source[start : start + 40] for start in range(0, len(source), 40)]
    pieces = list(split_articles(chunks, ArticleReport()))
    assert whole(pieces) == [long, next_one]
    assert max(len(piece.text) for piece in pieces) <= 50


# Other sources


def test_a_file_is_a_document_and_its_bytes_are_kept(tmp_path: Path) -> None:
    files = {
        "b.txt": " Two\r\n\r\nlines \n",
        "a.md": "# Title\n\ntext 🙂",
        "c/d.TXT": "deep",
        "e.txt": "",
        "f.txt": " \n\t\n",
        ".hidden.txt": "no",
        ".git/x.txt": "no",
        "picture.png": "no",
    }
    folder = write_folder(tmp_path / "folder", files)
    expected = [files[name] for name in ("a.md", "b.txt", "c/d.TXT")]
    sources = Sources([folder])
    assert whole(sources.documents()) == expected
    assert sources.ignored == ["picture.png"]
    zipped = files | {"__MACOSX/a.txt": "no"}
    assert documents_of(write_zip(tmp_path / "folder.zip", zipped)) == expected
    assert documents_of(folder / "b.txt", folder, folder / "a.md") == [
        files[n] for n in ("b.txt", "a.md", "c/d.TXT")
    ]


def test_rows_are_documents(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = ['{"text": "one\\n", "id": 1}', "", '{"text": "  "}', '{"text": "tw\\u00f6 \\ud83d\\ude42"}']
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode())
    assert documents_of(path) == ["one\n", "twö 🙂"]
    path.write_text('{"body": "other"}\n', encoding="utf-8")
    assert documents_of(path, text_field="body") == ["other"]
    assert documents_of(write_zip(tmp_path / "rows.zip", {"x/rows.jsonl": '{"text": "zipped"}'})) == [
        "zipped"
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"text": "open', "line 3: is not JSON"),
        ("[" * 100_000, "line 3: is not JSON"),
        ("[1]", "line 3: is list, not an object"),
        (
            '{"body": "x", "id": 1}',
            "line 3: has no field 'text', but body, id; name the field with --text-field",
        ),
        ('{"text": 7}', "line 3: field 'text' is int, not text"),
    ],
)
def test_a_bad_row_is_named_by_its_line(row: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "fine"}}\n\n{row}\n', encoding="utf-8")
    with pytest.raises(AtlasError, match=re.escape(reason)):
        documents_of(path)


def test_undecodable_bytes_are_replaced_counted_and_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfcaf\xe9, na\xefve" + "é".encode())
    (tmp_path / "b.txt").write_text("fine: é", encoding="utf-8")
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "lone \\ud800 and \xff"}')
    report = SourceReport()
    assert whole(Sources([tmp_path]).documents(report)) == [
        "caf\ufffd, na\ufffdveé",
        "fine: é",
        "lone \ufffd and \ufffd",
    ]
    assert report.undecodable == {str(tmp_path / "a.txt"): 2, str(tmp_path / "c.jsonl"): 2}
    (tmp_path / "d.txt").write_bytes("text".encode("utf-16"))
    with pytest.raises(AtlasError, match=r"d\.txt: is UTF-16 text; save it as UTF-8"):
        documents_of(tmp_path)


@given(content=st.binary(max_size=300), size=st.integers(1, 7))
@settings(deadline=None, max_examples=100)
def test_decoding_does_not_depend_on_how_the_bytes_arrive(content: bytes, size: int) -> None:
    class Dripping(BytesIO):
        def read(self, _: int | None = -1, /) -> bytes:
            return super().read(size)

    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return
    counts: list[int] = []
    found = "".join(
        text.read_text(Dripping(content), "x", advance=lambda _: None, on_undecodable=counts.append)
    )
    expected = content.removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="surrogateescape")
    assert found == re.sub("[\ud800-\udfff]", "\ufffd", expected)
    assert sum(counts) == sum(0xD800 <= ord(char) < 0xE000 for char in expected)
