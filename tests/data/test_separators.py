"""Documents that a separator ends: found where it is plain, or named by the user."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import pytest

from atlas.data import prepare
from atlas.data.text.formats import separators
from atlas.data.text.formats.separators import END_OF_TEXT, Boundaries, split_documents
from atlas.data.text.report import SourceReport
from atlas.data.text.sources import Reading, Sources
from atlas.errors import AtlasError
from atlas.tokenizer import Tokenizer
from tests.archive import documents_of, whole

STORIES = [f"Story {n} is about geese. They sat by the mill." for n in range(40)]


@pytest.mark.parametrize(
    "between", [f"\n{END_OF_TEXT}\n", END_OF_TEXT, f" {END_OF_TEXT} ", f"\r\n{END_OF_TEXT}\r\n"]
)
def test_the_end_of_text_mark_separates_documents_and_is_no_text(between: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(between.join(STORIES).encode())
    assert documents_of(tmp_path) == STORIES
    dataset = prepare([tmp_path], tmp_path / "data", Tokenizer.gpt2(), val_fraction=0).dataset
    tokens = np.concatenate([np.load(path) for path, _ in dataset.train.files if "docs" not in path.name])
    assert (tokens == Tokenizer.gpt2().eos_id).sum() == len(STORIES)
    assert END_OF_TEXT not in Tokenizer.gpt2().decode(tokens[tokens != Tokenizer.gpt2().eos_id].tolist())
    note = f"{len(STORIES)} documents, separated by {END_OF_TEXT} ({tmp_path}/a.txt)"
    assert note in dataset.manifest.notes


def test_lines_that_are_a_percent_sign_separate_documents(tmp_path: Path) -> None:
    (tmp_path / "fortunes.txt").write_text("\n%\n".join(STORIES) + "\n%\n", encoding="utf-8")
    assert documents_of(tmp_path) == STORIES


@pytest.mark.parametrize(
    "text", [f"GPT-2 ends a text with {END_OF_TEXT} by itself.", "100 %\nof it\n%\nonce"]
)
def test_a_mark_that_is_part_of_a_text_stays(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert documents_of(tmp_path) == [text]


@pytest.mark.parametrize(
    ("separator", "content", "documents"),
    [
        ("line", "one\n\n two \r\nthree", ["one", "two", "three"]),
        (r"\n\n\n", "one\n\ntwo\n\n\nthree", ["one\n\ntwo", "three"]),
        ("###", "one###two ### three", ["one", "two", "three"]),
        ("re:^={3,}$", "one\n===\ntwo\n=====\nthree", ["one", "two", "three"]),
        (".", "one.two", ["one", "two"]),
    ],
)
def test_a_named_separator(separator: str, content: str, documents: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(content.encode())
    assert documents_of(tmp_path, reading=Reading(separator=separator)) == documents


@pytest.mark.parametrize("separator", ["", "re:(", "re:x*"])
def test_a_separator_that_cannot_separate_is_refused(separator: str) -> None:
    with pytest.raises(AtlasError, match="--separator"):
        Reading(separator=separator)


def test_what_looks_like_a_separator_is_hinted_at_with_the_option(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("".join(f"{story}\n" for story in STORIES * 2), encoding="utf-8")
    (tmp_path / "gaps.txt").write_text("\n\n\n".join(STORIES), encoding="utf-8")
    report = SourceReport()
    sources = Sources([tmp_path])
    list(sources.documents(report))
    notes = "\n".join(sources.notes(report))
    assert "lines.txt: is read as one document; every line looks like a document: --separator line" in notes
    assert (
        r"gaps.txt: is read as one document; two empty lines may separate documents: --separator '\n\n\n'"
        in notes
    )
    assert documents_of(tmp_path / "lines.txt", reading=Reading(separator="line")) == STORIES * 2


def test_documents_do_not_depend_on_how_the_text_arrives() -> None:
    chance = random.Random(3)
    for _ in range(200):
        words = ["aa", "b", "c\n\nd", "%x", "e" * 50]
        documents = [" ".join(chance.choices(words, k=chance.randrange(1, 3000))) for _ in range(9)]
        content, size = f"\n{END_OF_TEXT}\n".join(documents), chance.choice([700, 5000, 1 << 20])
        separator, found = separators.parse(END_OF_TEXT), Boundaries()
        chunks = (content[at : at + size] for at in range(0, len(content), size))
        texts = [""]
        for piece in split_documents(chunks, separator, found):
            texts[-1] += piece.text
            texts += [""] if piece.ends_document else []
        assert texts[:-1] == documents
        assert found.documents == len(documents)


@pytest.mark.parametrize("separator", [END_OF_TEXT, "line", r"\n\n\n", "re:^%$"])
def test_no_text_takes_quadratic_time(separator: str) -> None:
    for filler in (" " * (1 << 21), "\n" * (1 << 21), "%" * (1 << 21), "<" * (1 << 21)):
        begun = time.process_time()
        for _ in split_documents([filler, "end"], separators.parse(separator), Boundaries()):
            pass
        separators.find(filler[: 1 << 18])
        separators.hint_at(filler[: 1 << 18])
        assert time.process_time() - begun < 10


def test_lines_of_percent_between_comments_are_no_separator(tmp_path: Path) -> None:
    tex = "% A comment of TeX.\n%\n% Another one.\n%\n\\chapter{One}\n%\n%    more\nText.\n" * 5
    (tmp_path / "a.tex").write_text(tex)
    assert documents_of(tmp_path / "a.tex") == [tex]


def test_the_first_file_with_a_separator_is_named(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text("One.\n%\nTwo.\n%\nThree.\n%\nFour.\n")
    report, sources = SourceReport(), Sources([tmp_path])
    assert len(whole(sources.documents(report))) == 12
    assert f"12 documents, separated by lines that are % ({tmp_path}/a …)" in sources.notes(report)
