"""Text in every layout → documents."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import re
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas.data.text.formats import decode as text
from atlas.data.text.formats import wikipedia as articles
from atlas.data.text.formats.wikipedia import (
    WIKIPEDIA_ARTICLES,
    WIKIPEDIA_CHARS,
    ArticleReport,
    split_articles,
)
from atlas.data.text.report import SourceReport
from atlas.data.text.sources import Reading, Sources
from atlas.errors import AtlasError
from tests.archive import ARTICLES, article, documents_of, kaggle_files, whole, write_folder, write_zip

# The Kaggle archive


def test_the_archive_is_read_once_in_each_of_its_layouts(tmp_path: Path) -> None:
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
    assert Sources([folder]).doubled == [str(folder / name) for name in sorted(kaggle_files(combined=False))]


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


def test_lines_that_only_look_like_titles() -> None:
    """A heading right under the title, a list, a one-line paragraph with a full stop, a colon."""
    april = "April\n\nMonth of the year\n\nApril is the fourth month.\n\nIts days:\n\nMonday\nTuesday\n\nShort one."
    august = "August\n\nAugust is the eighth month."
    assert whole(split_articles([f"{april}\n\n{august}\n"], ArticleReport())) == [april, august]


def test_stray_empty_lines_do_not_decide() -> None:
    """Runs of empty lines before lines that are no titles do not separate articles."""
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "PIECE_CHARS", 400)
        patch.setattr(articles, "PIECE_CHARS", 400)  # what is judged at once: else all of so small a text
        assert whole(split_articles(chunks, ArticleReport())) == ARTICLES[:20]


_ABOUT = "a few words about it, and then some more. Here ends what is said."


def _about(number: int, *sections: str) -> str:
    return "\n\n".join([f"Subject {number}", f"Subject {number} is {_ABOUT}", *sections])


TRAPS: dict[str, tuple[list[str], bool, str]] = {
    # Articles; whether the title's form alone can tell them apart; the doubt that it shows.
    "plain": ([_about(n) for n in range(30)], True, ""),
    "common headings": (
        [_about(n, "History", _ABOUT, "References", _ABOUT) for n in range(30)],
        True,
        "taken for headings inside articles: 'History' (30 times), 'References' (30 times)",
    ),
    "headings of their own": (
        [_about(n, f"Older days {n + 1000}", _ABOUT) for n in range(30)],
        False,
        "30 of 60 titles in the beginning are not mentioned in the text below them",
    ),
    "lists after a colon": (
        [_about(n, "Its parts:", f"One {n}", f"Two {n}", _ABOUT) for n in range(30)],
        True,
        "",
    ),
    "lists in one block": ([_about(n, f"One {n}\nTwo {n}\nThree", _ABOUT) for n in range(30)], True, ""),
    "lists without a colon": (
        [_about(n, f"One {n}", f"Two {n}", _ABOUT) for n in range(30)],
        False,
        "30 of 60 titles in the beginning have another short line below them",
    ),
    "articles of one line": ([f"Subject {n}\n\nSubject {n} is small." for n in range(30)], True, ""),
    "titles alone": (
        [f"Subject {n}" if n % 3 == 0 else _about(n) for n in range(30)],
        False,
        "have another short line below them",
    ),
    "titles that ask": (
        [f"What is {n}?\n\n{_ABOUT}" if n % 9 == 0 else _about(n) for n in range(30)],
        False,
        "3 short lines that end in ? or ! were not taken for titles",  # the first begins the text
    ),
}


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("trap", TRAPS)
def test_in_each_trap_the_boundaries_are_right_or_a_doubt_is_shown(trap: str, newline: str) -> None:
    meant, is_told_by_form, doubt = TRAPS[trap]
    meant = [article.replace("\n", newline) for article in meant]
    report = ArticleReport()
    assert whole(split_articles([(newline * 3).join(meant)], report)) == meant
    assert report.doubt is None or "groups of empty lines" in report.doubt
    report = ArticleReport()
    found = whole(split_articles([(newline * 2).join(meant)], report))
    assert (found == meant) == is_told_by_form
    assert doubt in (report.doubt or "")
    assert bool(doubt) == bool(report.doubt)


def test_a_doubt_is_a_warning_among_the_notes(tmp_path: Path) -> None:
    (tmp_path / "AllCombined.txt").write_text(
        "\n\n".join(TRAPS["headings of their own"][0]), encoding="utf-8"
    )
    sources, report = Sources([tmp_path]), SourceReport()
    list(sources.documents(report))
    warnings = [note for note in sources.notes(report) if note.startswith("warning: ")]
    assert len(warnings) == 1
    assert warnings[0].endswith("as is usual for section headings: look at the boundaries")


def test_articles_longer_than_the_buffer_do_not_depend_on_how_they_arrive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where pieces are passed on, no boundary is missed, and none is decided without the text before it."""
    for module in (text, articles):
        monkeypatch.setattr(module, "PIECE_CHARS", 3000)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "Zeta.", "eta:", "theta"]
    for seed in range(20):
        draw = random.Random(seed)
        gap = draw.choice(["\n\n", "\n\n\n", "\r\n\r\n", "\n \n"])
        paragraphs = [" ".join(draw.choices(words, k=draw.randint(1, 120))) for _ in range(150)]
        source = "".join(paragraph + draw.choice([gap, "\n"]) for paragraph in paragraphs)
        chunks = [source[start : start + 501] for start in range(0, len(source), 501)]
        assert whole(split_articles(chunks, ArticleReport())) == whole(
            split_articles([source], ArticleReport())
        )


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize(
    "ending", ["References", "History\n\nOld things of it.", "Its days:\n\nMonday\n\nTuesday\n\nThe end."]
)
def test_headings_and_lists_do_not_begin_articles(ending: str, newline: str) -> None:
    meant = [f"{article(n)}\n\n{ending}".replace("\n", newline) for n in range(9)]
    report = ArticleReport()
    assert whole(split_articles([(newline * 2).join(meant)], report)) == meant
    assert "'Title" not in (report.doubt or "")


@pytest.mark.parametrize(
    ("form", "gap", "doubt"),
    [
        ("Title {0}\n\nText of {0}.\n\n\nHistory\n\nOld things.", "\n\n\n", "'History' (9 times)"),
        ("Title {0}\n\nText of {0}.\n\nItem {0}\n\nOther {0}", "\n\n", "have another short line below them"),
        ("Title {0}\n\nAll of {0} in one line", "\n\n", "have another short line below them"),
    ],
)
def test_doubtful_boundaries_are_reported(form: str, gap: str, doubt: str) -> None:
    report = ArticleReport()
    found = whole(split_articles([gap.join(form.format(n) for n in range(9))], report))
    assert len(found) != 9
    assert doubt in str(report.doubt)


def test_another_number_of_articles_than_in_the_real_archive_is_a_warning() -> None:
    assert ArticleReport(articles=WIKIPEDIA_ARTICLES, chars=WIKIPEDIA_CHARS).warning is None
    assert ArticleReport(articles=900, chars=500_000).warning is None
    assert "about 249,396 articles, but 31,000 were found" in str(
        ArticleReport(articles=31_000, chars=WIKIPEDIA_CHARS).warning
    )


def test_long_articles_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "PIECE_CHARS", 50)
    monkeypatch.setattr(articles, "PIECE_CHARS", 50)
    paragraphs = ["First", "", "word " * 100, "x" * 300, "", "The end."]
    long, next_one = "\n".join(paragraphs), "Second\n\nShort."
    source = f"{long}\n\n\n{next_one}"
    chunks = [source[start : start + 40] for start in range(0, len(source), 40)]
    pieces = list(split_articles(chunks, ArticleReport()))
    assert whole(pieces) == [long, next_one]
    assert max(len(piece.text) for piece in pieces) <= 50


UNTITLED = {
    "one line": "A river ran past the mill.",
    "sentences": "It rained.\n\nThe mill stood still.\n\n\nNobody came!\n\nWhy?",
    "blank lines": "\n\n\n\nIt rained.\n\n\nThe mill stood still.\n\n\n",
    "long lines": f"{'word ' * 60}\n\n\n{'word ' * 60}",
    "headings only": "\n\n".join(["It rained.", "History"] * 4),
    "windows": "It rained.\r\n\r\n\r\nIt stopped.\r\n",
}


@pytest.mark.parametrize("name", ["wiki_00", "AllCombined.txt", "1of2/wiki_07"])
@pytest.mark.parametrize("content", UNTITLED.values(), ids=UNTITLED)
def test_a_file_of_the_archive_without_a_title_is_plain_text(name: str, content: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", {name: content})
    write_folder(tmp_path / "plain", {"a.txt": content})
    assert documents_of(folder) == documents_of(tmp_path / "plain") == [content]
    assert documents_of(write_zip(tmp_path / "in.zip", {name: content})) == [content]
    sources, report = Sources([folder]), SourceReport()
    list(sources.documents(report))
    [note] = sources.notes(report)
    assert note.startswith("1 file named like those of the Kaggle archive, but without a title")


def test_each_untitled_part_is_a_document(tmp_path: Path) -> None:
    parts = {"wiki_00": "It rained.", "wiki_01": "The mill stood still.", "wiki_02": "", "wiki_10": "Why?"}
    folder, report = write_folder(tmp_path / "in", parts), SourceReport()
    assert whole(Sources([folder]).documents(report)) == ["It rained.", "The mill stood still.", "Why?"]
    assert report.articles is None
    assert SourceReport(**json.loads(json.dumps(report.model_dump()))) == report


@pytest.mark.parametrize("name", ["wiki_00", "AllCombined.txt"])
@pytest.mark.parametrize("content", ["", "\n", " \n\t\n\n\n \r\n"])
def test_an_empty_file_of_the_archive_holds_no_document(name: str, content: str, tmp_path: Path) -> None:
    assert documents_of(write_folder(tmp_path / "in", {name: content})) == []
    beside = write_folder(tmp_path / "in", {name: content, "notes.md": "Notes."})
    assert documents_of(beside) == ["Notes."]


@given(
    st.lists(
        st.sampled_from(["Title", "History", "It rained.", "Why?", "Parts:", "x" * 300, "", " "]), max_size=30
    )
)
@settings(deadline=None)
def test_any_text_is_split_without_losing_a_word(lines: list[str]) -> None:
    found = whole(split_articles(["\n".join(lines)], ArticleReport()))
    assert " ".join(found).split() == " ".join(lines).split()


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
        "picture.png": "\0",
    }
    folder = write_folder(tmp_path / "folder", files)
    expected = [files[name] for name in ("a.md", "b.txt", "c/d.TXT")]
    sources = Sources([folder])
    assert whole(sources.documents()) == expected
    assert [*sources.choice.names_with_reasons()] == [f"{folder}/picture.png: a picture"]
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
    assert documents_of(path, reading=Reading("body")) == ["other"]
    assert documents_of(write_zip(tmp_path / "rows.zip", {"x/rows.jsonl": '{"text": "zipped"}'})) == [
        "zipped"
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"text": "open', "line 3: is not JSON"),
        ("[" * 100_000, "line 3: is not JSON"),
        ("[1]", "line 3: is an array, not an object"),
        (
            '{"body": "x", "id": 1}',
            "line 3: has no field 'text' (fields: body, id); name the field of the text, for example with atlas",
        ),
        ('{"text": 7}', "line 3: field 'text' is a number, not text; name the field"),
    ],
)
def test_a_bad_row_is_named_by_its_line(row: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "fine"}}\n\n{row}\n', encoding="utf-8")
    with pytest.raises(AtlasError, match=re.escape(reason)):
        documents_of(path)


def test_rows_without_text_are_counted_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": null}\n\n{"text": "one"}\n{"text": null}\n', encoding="utf-8")
    report = SourceReport()
    assert whole(Sources([path]).documents(report)) == ["one"]
    assert report.empty_rows == {"JSON lines (.jsonl)": 2}


def test_undecodable_bytes_are_replaced_counted_and_named(tmp_path: Path) -> None:
    much = b"Words that are long enough. " * 100
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + much + b"caf\xe9, na\xefve" + "é".encode())
    (tmp_path / "b.txt").write_text("fine: é", encoding="utf-8")
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "lone \\ud800 and \xff"}')
    report = SourceReport()
    assert whole(Sources([tmp_path]).documents(report)) == [
        much.decode() + "caf\ufffd, na\ufffdveé",
        "fine: é",
        "lone \ufffd and \ufffd",
    ]
    assert report.undecodable == {str(tmp_path / "a.txt"): 2, str(tmp_path / "c.jsonl"): 2}


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be", "utf-8"])
def test_text_with_a_byte_order_mark_is_recognised(codec: str, tmp_path: Path) -> None:
    text = "\ufeffnaïve, 漢字 🙂\n" * 3
    (tmp_path / "a.txt").write_bytes(text.encode(codec))
    rows = "".join(json.dumps({"text": word}, ensure_ascii=False) + "\n" for word in ("é", "漢", "🙂"))
    (tmp_path / "b.jsonl").write_bytes(("\ufeff" + rows).encode(codec))
    report = SourceReport()
    assert whole(Sources([tmp_path]).documents(report)) == [text[1:], "é", "漢", "🙂"]
    assert not report.undecodable
    (tmp_path / "c.txt").write_bytes("\ufeffodd".encode("utf-16-le") + b"\x00")
    assert documents_of(tmp_path / "c.txt") == ["odd\ufffd"]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"\x7fELF\x02\x01\x01\x00\x00", "a program"),
        (b"a\0b", "a binary file"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", "a picture"),
    ],
)
def test_a_file_that_is_no_text_is_refused_by_name(content: bytes, what: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(AtlasError, match=rf"nothing to read; 1 file is left out.*{what} \(.*a\.txt\)"):
        documents_of(tmp_path)
    with pytest.raises(AtlasError, match=rf"a\.txt: cannot be read: {what}"):
        documents_of(tmp_path / "a.txt")


@given(content=st.binary(max_size=300), size=st.integers(1, 7))
@settings(deadline=None, max_examples=100)
def test_decoding_does_not_depend_on_how_the_bytes_arrive(content: bytes, size: int) -> None:
    class Dripping(BytesIO):
        def read1(self, _: int | None = -1, /) -> bytes:
            return super().read(size)

    def outcome(stream: BytesIO) -> str:
        how = text.Decoding("x", None, lambda _: None, lambda _: None)
        try:
            return "".join(text.read_text(stream, how))
        except AtlasError as error:
            return f"error: {error}"

    found = outcome(Dripping(content))
    assert found == outcome(BytesIO(content))
    if b"\0" in content and not content.startswith((b"\xff\xfe", b"\xfe\xff")):
        assert "is a binary file" in found
    with contextlib.suppress(UnicodeDecodeError):
        expected = content.decode("utf-8-sig")
        assert found == expected or b"\0" in content or b"\x1b" in content


def notes_of(path: Path, **options: Any) -> list[str]:
    """The notes on a text that is read to its end."""
    report, sources = SourceReport(), Sources([path], **options)
    for _ in sources.documents(report):
        pass
    return sources.notes(report)


def test_what_has_no_effect_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_text("")
    assert notes_of(
        tmp_path,
        include=["*.txt", "*.md"],
        exclude=["*.css"],
        reading=Reading("body", names_text_field=True, separator="###"),
    ) == [
        "*.css: no file of a folder or an archive matches it",
        "*.md: no file of a folder or an archive matches it",
        f"1 empty file ({tmp_path}/b.txt)",
        "--text-field body: has no effect, since no file has rows",
        "--separator was not found in 2 files; each is one document",
    ]
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "c.jsonl").write_text('{"text": "a"}\n{"text": " "}\n{"text": null}\n')
    assert notes_of(rows, reading=Reading(separator="line")) == [
        "--separator line: has no effect, since no file is plain text",
        "JSON lines (.jsonl): 2 rows without text",
    ]


def test_the_likely_field_is_proposed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": "7", "Body Text": "A long text.", "n": 1}\n')
    with pytest.raises(
        AtlasError, match=r"has no field 'text' .* for example with .*--text-field 'Body Text'"
    ):
        documents_of(tmp_path / "a.jsonl")


def test_the_first_rows_together_show_the_likely_field(tmp_path: Path) -> None:
    rows = [
        {"title": "Title", "content": None},
        *({"title": "Title", "content": "A long text."} for _ in range(5)),
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(AtlasError, match=r"a.jsonl line 1: has no field 'text' .*--text-field content"):
        documents_of(tmp_path / "a.jsonl")


def test_lines_may_end_with_commas(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a,"},\n{"text": "b"}, \n{"text": "c"}\n')
    assert documents_of(tmp_path / "a.jsonl") == ["a,", "b", "c"]


@pytest.mark.parametrize("gap", ["", "\n"])
def test_the_lines_of_an_array_are_no_rows_with_commas(gap: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f'[{gap}{{"text": "a"}},\n{{"text": "b"}},\n{{"text": "c"}}{gap}]')
    assert documents_of(tmp_path / "a.jsonl") == ["a", "b", "c"]


def test_a_single_message_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(
        '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'
    )
    with pytest.raises(AtlasError, match=r"is a single message; .* jq -cs flatten FILE"):
        documents_of(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (["train.txt", "test.txt", "validation.txt"], "2 files named like a test or validation set"),
        (["data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"], "1 file named like a test"),
        (["test.txt", "other.txt"], None),
        (["trains.txt", "contest.txt"], None),
        (["dev/train.jsonl", "dev/more.jsonl"], None),
        (["train/a.txt", "dev/a.txt"], "1 file named like a test"),
    ],
)
def test_files_named_like_held_out_sets_are_said(names: list[str], named: str | None, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "a"}\n' if name.endswith("l") else "a")
    notes = [note for note in notes_of(tmp_path) if "named like" in note]
    assert len(notes) == (named is not None)
    assert all(str(named) in note for note in notes)


def test_a_mark_is_no_part_of_a_text_whose_encoding_is_named(tmp_path: Path) -> None:
    for named, written in (("UTF8", "utf-8-sig"), ("utf-16-le", "utf-16"), ("utf-8-sig", "utf-8-sig")):
        (tmp_path / "a.txt").write_bytes("ab".encode(written))
        assert documents_of(tmp_path, reading=Reading(encoding=named)) == ["ab"]


def test_two_empty_lines_in_code_are_no_hint(tmp_path: Path) -> None:
    for name, hints in (("a.py", 0), ("a.txt", 1)):
        (tmp_path / name).write_text("def f():\n    pass\n\n\n" * 20)
        assert len([note for note in notes_of(tmp_path / name) if "--separator" in note]) == hints
