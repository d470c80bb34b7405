"""Documents → a dataset, and `atlas prepare`."""

from __future__ import annotations

import errno
import gzip
import json
import os
import random
import re
import shutil
import subprocess
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from atlas.cli import main
from atlas.data import PreparedDataset, open_dataset, prepare
from atlas.data.prepare.cleaning import Cleaning
from atlas.data.prepare.workspace import Workspace, building
from atlas.data.text.formats import decode as text
from atlas.data.text.sources import Sources
from atlas.errors import AtlasError
from atlas.tokenizer import Tokenizer
from tests.archive import article, kaggle_files, write_folder, write_zip
from tests.toy import CharacterTokenizer

ROOT = Path(__file__).parents[2]


def characters() -> Tokenizer:
    return Tokenizer.wrap(CharacterTokenizer())


def documents_in(dataset: PreparedDataset, split: str) -> list[str]:
    """A split's documents, decoded from its tokens."""
    stream = dataset.split(split)
    if stream is None:
        return []
    tokenizer = characters() if "tests" in dataset.tokenizer_state["name"] else dataset.tokenizer()
    ends = [*stream.document_starts().tolist()[1:], stream.num_tokens]
    starts = stream.document_starts().tolist()
    ids = [stream.read(start, end).tolist() for start, end in zip(starts, ends, strict=True)]
    return [tokenizer.decode(document).removesuffix("<|endoftext|>") for document in ids]


# Bad input


def make_broken_zip(path: Path) -> None:
    write_zip(path, {"a.txt": "text " * 1000})
    content = bytearray(path.read_bytes())
    content[45] ^= 0xFF
    path.write_bytes(content)


def make_encrypted_zip(path: Path) -> None:
    write_zip(path, {"a.txt": "text"})
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)


BAD_INPUT: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing.txt": (lambda p: None, "no such file or folder"),
    "notes.docx": (
        lambda p: p.write_bytes(b"PK\x03\x04" + bytes(26) + b"word/document.xml"),
        "cannot be read: an Office document; convert it with pandoc -t plain",
    ),
    "scan.pdf.gz": (
        lambda p: p.write_bytes(gzip.compress(b"%PDF-1.4\n1 0 obj\n")),
        "is not a PDF that pypdf can read",
    ),
    "table.csv.gz": (
        lambda p: p.write_bytes(gzip.compress(b"id,body\n1,words\n")),
        "has no field 'text' (fields: body, id); name the field",
    ),
    "array.json.gz": (lambda p: p.write_bytes(gzip.compress(b"[{}]")), "has no field 'text'"),
    "noending": (lambda p: p.touch(), "holds no text"),
    "text.zip": (lambda p: p.write_text("no zip"), "is not a zip archive"),
    "broken.zip": (make_broken_zip, "the archive is damaged"),
    "encrypted.zip": (make_encrypted_zip, "is encrypted"),
    "none.zip": (lambda p: write_zip(p, {}), "nothing to read"),
    "images.zip": (lambda p: write_zip(p, {"a.png": b"\0"}), "nothing to read"),
    "up.zip": (lambda p: write_zip(p, {"a/../../b.txt": "x"}), "points outside the archive"),
    "absolute.zip": (lambda p: write_zip(p, {"/etc/b.txt": "x"}), "points outside the archive"),
    "windows.zip": (lambda p: write_zip(p, {"..\\b.txt": "x"}), "points outside the archive"),
    "drive.zip": (lambda p: write_zip(p, {"C:\\b.txt": "x"}), "points outside the archive"),
    "folder": (lambda p: p.mkdir(), "nothing to read"),
    "blank.txt": (lambda p: p.write_text(" \n"), "holds no text"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, reason = BAD_INPUT[name]
    make(tmp_path / name)
    before = sorted(tmp_path.iterdir())
    assert main(["prepare", "--input", str(tmp_path / name), "--output", str(tmp_path / "out")]) == 2
    output = capsys.readouterr()
    assert reason in output.err
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert output.out == ""
    assert sorted(tmp_path.iterdir()) == before


# Documents → dataset


def test_both_splits_are_the_same_from_every_layout(tmp_path: Path) -> None:
    both = write_zip(tmp_path / "both.zip", kaggle_files(120))
    parts = write_folder(tmp_path / "parts", kaggle_files(120, combined=False))
    splits = []
    for number, form in enumerate((both, parts)):
        dataset = prepare([form], tmp_path / f"out{number}", characters(), val_fraction=0.3).dataset
        splits.append((documents_in(dataset, "train"), documents_in(dataset, "val")))
    assert splits[0] == splits[1]
    train, val = splits[0]
    assert Counter(train + val) == Counter(article(number) for number in range(120))
    assert 10 < len(val) < 60


def many(count: int, folder: Path, start: int = 0) -> Path:
    return write_folder(
        folder, {f"{n:04d}.txt": f"Document number {n}.\n" * 3 for n in range(start, start + count)}
    )


def test_the_split_is_by_document_and_new_files_move_none(tmp_path: Path) -> None:
    few = prepare([many(200, tmp_path / "in")], tmp_path / "few", characters(), val_fraction=0.2).dataset
    train, val = set(documents_in(few, "train")), set(documents_in(few, "val"))
    assert len(train) + len(val) == 200
    assert not train & val
    assert 20 <= len(val) <= 60
    many(200, tmp_path / "in", start=900)
    more = prepare([tmp_path / "in"], tmp_path / "more", characters(), val_fraction=0.2).dataset
    assert train < set(documents_in(more, "train"))
    assert val < set(documents_in(more, "val"))


def test_the_end_of_a_few_documents_is_held_out(tmp_path: Path) -> None:
    names = {f"{n}.txt": f"{n} " + "reading " * 63 for n in range(10)}
    folder = write_folder(tmp_path / "in", names)
    summary = prepare([folder], tmp_path / "out", val_fraction=0.05)
    splits = summary.dataset.manifest.splits
    tokens = {name: split.tokens for name, split in splits.items()}
    assert tokens["val"] / sum(tokens.values()) == pytest.approx(0.05, abs=0.003)
    assert sum(split.bytes for split in splits.values()) == sum(map(len, names.values()))
    train, val = documents_in(summary.dataset, "train"), documents_in(summary.dataset, "val")
    assert train[:9] == list(names.values())[:9]
    assert train[9] + val[0] == names["9.txt"]
    assert (
        "10 documents: too few to hold out some of them; instead, the ends of documents, 5 % of the characters, are "
        "held out for validation" in summary.notes
    )
    # Cut between two words: no token differs from those of the whole.
    last = Tokenizer.gpt2().encode(names["9.txt"])
    ids = [*token_ids(summary.dataset, "train")[:-1], *token_ids(summary.dataset, "val")]
    assert ids[-len(last) - 1 :] == [*last, 50256]


def token_ids(dataset: PreparedDataset, split: str) -> list[int]:
    stream = dataset.split(split)
    assert stream is not None
    return [int(id) for id in stream.read(0, stream.num_tokens)]


def test_nothing_is_held_out_at_zero_or_from_a_tiny_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("tiny", encoding="utf-8")
    zero = prepare([tmp_path / "a.txt"], tmp_path / "zero", val_fraction=0)
    tiny = prepare([tmp_path / "a.txt"], tmp_path / "tiny", val_fraction=0.05)
    assert list(zero.dataset.manifest.splits) == list(tiny.dataset.manifest.splits) == ["train"]
    assert zero.notes == []
    assert "nothing was held out for validation" in tiny.notes[-1]


def tidied(document: str) -> str:
    """The cleaning by its definition, a line at a time."""
    document = unicodedata.normalize("NFC", document)
    document = "".join("\n" if c in "\x0b\x0c\x1c\x1d\x1e\x85" else c for c in document)
    document = "".join(c for c in document if unicodedata.category(c) != "Cc" or c in "\t\r\n")
    lines = [line.rstrip(" \t") for line in document.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    lines[-1] += document[len(document.rstrip(" \t")) :]  # no line end behind it
    kept: list[str] = []
    for line in lines:
        indent = line[: len(line) - len(line.lstrip(" \t"))]
        kept.append(indent + re.sub(r"(\S)[ \t]{2,}(?=\S)", r"\1 ", line[len(indent) :]))
    return re.sub(r"\n\n\n+", lambda run: "\n" * min(3, len(run[0])), "\n".join(kept))


# Without the beginnings of what a terminal would not show: tests/data/test_cleaning.py has them.
TEXTS = st.text(
    st.characters(codec="utf-8", exclude_characters="\x1b\x08"), min_size=1, max_size=300
) | st.lists(
    st.sampled_from(["word", "e\u0301", "\x00", " ", "\t", "\r", "\n", "\x0c", "漢", "\u0085", "  x"]),
    min_size=1,
).map("".join)


@given(documents=st.lists(TEXTS.filter(lambda d: not d.isspace()), min_size=1, max_size=110))
@settings(deadline=None, max_examples=60)
def test_tokens_decode_to_the_cleaned_documents_byte_for_byte(
    documents: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("unicode")
    rows = "\n".join(json.dumps({"text": document}) for document in documents)
    (folder / "rows.jsonl").write_text(rows, encoding="utf-8")
    cleaned = {
        text.strip(): text for text in reversed([tidied(document) for document in documents]) if text.strip()
    }
    if not cleaned:
        with pytest.raises(AtlasError, match="no text to train on"):
            prepare([folder / "rows.jsonl"], folder / "out", val_fraction=0)
        return
    # Of fewer than 100 documents, some would be cut in two.
    fraction = 0.3 if len(documents) >= 100 and len(cleaned) > 10 else 0
    dataset = prepare(
        [folder / "rows.jsonl"], folder / "out", val_fraction=fraction, shard_tokens=100
    ).dataset
    train, val = documents_in(dataset, "train"), documents_in(dataset, "val")
    assert Counter(train + val) == Counter(cleaned.values())
    kept = "".join(train + val).encode()
    assert sum(split.bytes for split in dataset.manifest.splits.values()) == len(kept)


@given(
    numbers=st.lists(st.integers(0, 4), min_size=1, max_size=19),
    lengths=st.lists(st.integers(20, 300), min_size=5, max_size=5),
    piece_chars=st.sampled_from([100, 1 << 20]),
    min_chars=st.sampled_from([1, 300, 800]),
)
@settings(deadline=None, max_examples=30)
@example(
    numbers=[1, 1], lengths=[20, 80, 20, 20, 20], piece_chars=100, min_chars=1
)  # blanks make other pieces
@example(numbers=[0, 1], lengths=[60, 250, 20, 20, 20], piece_chars=100, min_chars=800)
def test_with_few_documents_no_copy_is_cut_and_a_short_document_is_left_out(
    numbers: list[int],
    lengths: list[int],
    piece_chars: int,
    min_chars: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Where the end of the text is held out, the cut may go through the first of two copies, or the second, and through
    a document that is long enough, but whose halves are not."""
    texts = [" ".join(f"{number}.{word}" for word in range(lengths[number])) for number in range(5)]
    folder = tmp_path_factory.mktemp("copies")
    rows = [
        json.dumps({"text": texts[number] + "  \n" * (place % 2)}) for place, number in enumerate(numbers)
    ]
    (folder / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "PIECE_CHARS", piece_chars)
        cleaning = Cleaning(min_chars=min_chars)
        assume(all(abs(len(texts[n]) - min_chars) > 2 for n in numbers))  # whatever their blanks
        long = [n for n in numbers if len(texts[n]) > min_chars]
        paths, out = [folder / "rows.jsonl"], folder / "out"
        if not long:
            with pytest.raises(
                AtlasError, match=rf"{len(numbers)} as too short\).*--min-chars than {min_chars}"
            ):
                prepare(paths, out, val_fraction=0.2, cleaning=cleaning)
            return
        dataset = prepare(paths, out, val_fraction=0.2, cleaning=cleaning).dataset
    train, val = (" ".join(documents_in(dataset, name)).split() for name in ("train", "val"))
    assert Counter(train + val) == Counter(" ".join(texts[n] for n in set(long)).split())
    assert {f"{n}.0" for n in long} <= {*train}  # no document is held out completely
    assert 0.1 < len(val) / len(train + val) < 0.3
    assert dataset.manifest.cleaning["duplicates"].documents == len(long) - len(set(long))
    assert dataset.manifest.cleaning["short"].documents == len(numbers) - len(long)


@given(documents=st.lists(TEXTS.filter(lambda d: not d.isspace()), min_size=1, max_size=40, unique=True))
@settings(deadline=None, max_examples=20)
def test_without_cleaning_every_byte_is_kept(
    documents: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("unicode")
    rows = "\n".join(json.dumps({"text": document}) for document in documents)
    (folder / "rows.jsonl").write_text(rows, encoding="utf-8")
    dataset = prepare(
        [folder / "rows.jsonl"], folder / "out", val_fraction=0, cleaning=Cleaning(steps=(), min_chars=0)
    ).dataset
    assert documents_in(dataset, "train") == documents


@given(
    document=st.lists(
        st.sampled_from(["word", " ", "\n", "  \n ", "é", "漢字", "'s", "12", "!?", "\x1c"]), min_size=1
    ).map("".join)
)
@settings(deadline=None, max_examples=150)
def test_a_long_document_has_the_tokens_of_its_pieces(document: str) -> None:
    tokenizer = Tokenizer.gpt2()
    end = text.last_word_end(document)
    assert 0 < end <= len(document)
    assert tokenizer.encode(document[:end]) + tokenizer.encode(document[end:]) == tokenizer.encode(document)


def test_a_long_file_is_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "PIECE_CHARS", 100)
    content = "A sentence of a few words, and then another.\n" * 50
    (tmp_path / "long.txt").write_text(content, encoding="utf-8")
    assert len(list(Sources([tmp_path / "long.txt"]).documents())) > 20
    dataset = prepare([tmp_path / "long.txt"], tmp_path / "out", val_fraction=0).dataset
    assert token_ids(dataset, "train") == [*Tokenizer.gpt2().encode(content), 50256]


def test_the_tokenizer_is_trained_on_training_documents_alone(tmp_path: Path) -> None:
    words = ["".join(random.Random(n).choices("abcdefghijklmnopqrstuvwxyz", k=12)) for n in range(120)]
    folder = write_folder(tmp_path / "in", {f"{word}.txt": word + f" {word}" * 30 for word in words})
    dataset = prepare([folder], tmp_path / "out", train_tokenizer=5000, val_fraction=0.3).dataset
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert tokenizer.fingerprint == dataset.tokenizer_fingerprint
    for split, learnt in (("train", True), ("val", False)):
        held = {document.split()[0] for document in documents_in(dataset, split)}
        assert len(held) > 5
        assert {len(tokenizer.encode(f" {word}")) == 1 for word in held} == {learnt}
    assert any("the text is too small for 5,000 tokens" in note for note in dataset.manifest.notes)


# The output folder


def test_unchanged_input_returns_immediately_and_any_change_is_noticed(tmp_path: Path) -> None:
    source, out = many(30, tmp_path / "in"), tmp_path / "out"
    assert not prepare([source], out, characters()).unchanged
    written = (out / "dataset.json").stat().st_mtime_ns
    assert prepare([source], out, characters()).unchanged
    assert (out / "dataset.json").stat().st_mtime_ns == written
    assert not prepare([source], out, characters(), val_fraction=0.1).unchanged
    assert not prepare([source], out).unchanged
    assert not prepare([source], out, train_tokenizer=300).unchanged
    assert prepare([source], out, train_tokenizer=300).unchanged
    (source / "0000.txt").write_text("document number 0.\n" * 3, encoding="utf-8")
    assert not prepare([source], out, train_tokenizer=300).unchanged
    assert not prepare([source], out).unchanged
    assert not (out / "tokenizer.json").exists()


def test_a_damaged_dataset_is_rebuilt(tmp_path: Path) -> None:
    source, out = many(30, tmp_path / "in"), tmp_path / "out"
    prepare([source], out, characters())
    os.truncate(out / "train-00000.npy", 200)
    assert not prepare([source], out, characters()).unchanged
    open_dataset(out, verify=True)


def test_only_a_dataset_is_ever_replaced(tmp_path: Path) -> None:
    source, out = many(30, tmp_path / "in"), tmp_path / "out"
    prepare([source], out, characters())
    (out / "notes.md").write_text("mine", encoding="utf-8")
    with pytest.raises(AtlasError, match=r"holds other files \(notes\.md\)"):
        prepare([source], out)
    with pytest.raises(AtlasError, match="holds other files"):
        prepare([source], source)
    with pytest.raises(AtlasError, match="is a file"):
        prepare([source], source / "0000.txt")
    (tmp_path / "empty").mkdir()
    assert prepare([source], tmp_path / "empty", characters()).dataset.folder == tmp_path / "empty"


class Failing(CharacterTokenizer):
    """Fails at the twentieth document, as a full disk or a bug would."""

    error: BaseException = RuntimeError("a bug")

    def __init__(self) -> None:
        self.calls = 0

    def encode(self, text: str) -> list[int]:
        self.calls += 1
        if self.calls > 20:
            raise self.error
        return super().encode(text)


def test_a_failure_in_the_middle_leaves_the_older_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = many(30, tmp_path / "in"), tmp_path / "out"
    prepare([source], out, characters())
    many(10, source, start=50)
    for error, shown in (
        (RuntimeError("a bug"), RuntimeError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "No space left on device"), AtlasError),
    ):
        monkeypatch.setattr(Failing, "error", error)
        with pytest.raises(shown):
            prepare([source], out, Tokenizer.wrap(Failing()))
        assert len(documents_in(open_dataset(out, verify=True), "train")) > 20
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_what_a_kill_after_the_last_rename_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a river and a stone\n\n" * 20, encoding="utf-8")
    first = prepare([tmp_path / "text.txt"], tmp_path / "out", characters())
    shutil.copytree(tmp_path / "out", tmp_path / ".out.replaced-0a1b2c3d")
    (tmp_path / ".out.preparing").mkdir()
    (tmp_path / ".out.preparing/journal.json").touch()
    (tmp_path / ".out.lock").touch()
    again = prepare([tmp_path / "text.txt"], tmp_path / "out", characters())
    assert again.unchanged
    assert again.dataset.fingerprint == first.dataset.fingerprint
    assert sorted(os.listdir(tmp_path)) == ["out", "text.txt"]


def test_the_files_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    left = [tmp_path / name for name in (".out.preparing-0a1b2c3d", ".out.replaced-99999", ".out.lock")]
    others = [tmp_path / name for name in (".outer.preparing-0a1b2c3d", ".out.preparing-mine", "out.txt")]
    for folder in (*left[:2], *others):
        folder.mkdir()
        (folder / "train-00000.npy").touch()
    left[2].touch()
    prepare([many(30, tmp_path / "in")], tmp_path / "out", characters())
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in others)
    open_dataset(tmp_path / "out", verify=True)


def test_a_dataset_that_was_moved_away_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill between the two renames the older dataset is back, whatever the next call does."""
    source, out = many(30, tmp_path / "in"), tmp_path / "out"
    fingerprint = prepare([source], out, characters()).dataset.fingerprint
    out.rename(tmp_path / ".out.replaced-0a1b2c3d")
    many(10, source, start=50)
    monkeypatch.setattr(Failing, "error", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        prepare([source], out, Tokenizer.wrap(Failing()))
    assert open_dataset(out, verify=True).fingerprint == fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_a_full_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "a.txt", tmp_path / "new" / "out"
    source.write_text("Some words of a text. " * 1000, encoding="utf-8")
    needed = 2 * len(Tokenizer.gpt2().encode(source.read_text(encoding="utf-8")))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 100))
    assert main(["prepare", "--input", str(source), "--output", str(out)]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(
        r"error: .*new.out: its disk has 0\.0 MB free, but the tokens of .* need about 0\.0 MB;.*\n", error
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed + 100))
    assert main(["prepare", "--input", str(source), "--output", str(out)]) == 0


# The command


def test_prepare_command_prints_what_it_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "raw").mkdir(parents=True)
    write_zip(Path("data/raw/archive.zip"), kaggle_files())
    command = ["prepare", "--input", "data/raw/archive.zip", "--val-fraction", "0.2"]
    assert main(command) == 0
    output = capsys.readouterr()
    folder = str(Path("data/processed/wikipedia"))
    assert output.out.startswith(f"{folder}: tokenizer gpt2 (50,257 tokens)\ntrain")
    assert "3 parts that hold the same text as AllCombined.txt are left out" in output.err
    assert "60 articles, separated by two or more empty lines before a title" in output.err
    assert output.err.count("boundary: …") == 3
    assert f"atlas train --config modern-nano --train-data {folder} (on a GPU: --config small)" in output.err

    assert main(command) == 0
    assert "unchanged" in capsys.readouterr().err
    Path("poems.md").write_text("A poem of many words. " * 300, encoding="utf-8")
    assert main(["prepare", "--input", "poems.md", "--train-tokenizer", "300"]) == 0
    assert Tokenizer.load("data/processed/poems").vocab_size <= 300
    capsys.readouterr()

    (tmp_path / "data/processed/broken").mkdir()
    (tmp_path / "data/processed/broken/dataset.json").write_text("{", encoding="utf-8")
    assert main(["prepare", "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == [
        str(Path("data", *parts.split("/")))
        for parts in ("processed/broken", "processed/poems", "processed/wikipedia", "raw/archive.zip")
    ]
    assert "cannot be read" in listed[0]
    assert "tokenizer bpe" in listed[1]
    assert "train 48 documents" in listed[2] or re.search(
        r"train \d+ documents .* val \d+ documents", listed[2]
    )
    assert listed[3].endswith(" text")


def test_prepare_command_refuses_impossible_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("text", encoding="utf-8")
    (tmp_path / "taken").write_text("a file", encoding="utf-8")
    for arguments, reason in (
        ([], "--input: is missing"),
        (["--input", "a.txt", "--tokenizer", "nothing"], "tokenizer nothing: no such file"),
        (["--input", "a.txt", "--tokenizer", "gpt2", "--train-tokenizer", "300"], "cannot be combined"),
        (["--input", "a.txt", "--train-tokenizer", "100"], "at least 257 tokens"),
        (["--input", "a.txt", "--output", "taken"], "is a file"),
        (["--input", "a.txt", "--output", "taken/below"], "taken"),
    ):
        assert main(["prepare", *arguments]) == 2
        output = capsys.readouterr()
        assert output.err.startswith("error: ")
        assert reason in output.err
        assert output.err.count("\n") == 1
    assert main(["prepare", "--list"]) == 0
    assert capsys.readouterr().out.startswith("nothing in data")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "taken"]


def test_prepare_data_script_runs_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "custom.py").write_text(
        "class Bytes:\n    vocab_size, eos_id = 257, 256\n"
        "    def encode(self, text): return list(text.encode())\n"
        "    def decode(self, ids): return bytes(ids).decode()\n",
        encoding="utf-8",
    )
    (tmp_path / "a.txt").write_text("Some text. " * 30, encoding="utf-8")
    script = ROOT / "scripts" / "prepare_data.py"
    command = [sys.executable, str(script), "--input", "a.txt", "--tokenizer", "custom:Bytes"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert "tokenizer custom:Bytes (257 tokens)" in done.stdout
    assert (tmp_path / "data" / "processed" / "a" / "train-00000.npy").is_file()


def test_the_command_accepts_a_url(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("The river runs past the old mill. " * 40, encoding="utf-8")
    out = tmp_path / "out"
    assert main(["prepare", "--input", (tmp_path / "a.txt").as_uri(), "--output", str(out)]) == 0
    assert documents_in(open_dataset(out), "train")[0].startswith("The river runs")
    assert main(["prepare", "--input", "nosuch://bucket/a.txt", "--output", str(tmp_path / "none")]) == 2
    assert "nosuch://bucket/a.txt" in capsys.readouterr().err


def test_an_interrupt_during_the_first_commit_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("atlas.files.flush_folder", interrupt)
    with pytest.raises(KeyboardInterrupt), building(tmp_path / "set", tmp_path / "set", "key") as workspace:
        workspace.commit({"position": 3})
    assert "the same command resumes it" in capsys.readouterr().err
    assert Workspace(tmp_path / ".set.preparing", "key").state == {"position": 3}


def test_a_dataset_keeps_the_tokenizer_of_another_model(tmp_path: Path, text_file: Path) -> None:
    """Its split differs from GPT-2's: each digit is a token. Hugging Face's library reads the stored file."""
    made = HFTokenizer(models.BPE())
    digits, level = (
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    )
    made.pre_tokenizer, made.decoder = pre_tokenizers.Sequence([digits, level]), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet)
    made.train_from_iterator([text_file.read_text()], trainer)
    model = tmp_path / "model"
    model.mkdir()
    made.save(str(model / "tokenizer.json"))
    (model / "config.json").write_text('{"eos_token_id": 0, "vocab_size": 320}')
    folder = tmp_path / "set"
    assert (
        main(["prepare", "--input", str(text_file), "--tokenizer", str(model), "--output", str(folder)]) == 0
    )
    text = "Verse 1234 of the river"
    expected = HFTokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    assert expected == made.encode(text).ids
    for tokenizer in (open_dataset(folder).tokenizer(), Tokenizer.load(folder)):
        assert tokenizer.encode(text) == expected
        assert (tokenizer.eos_id, tokenizer.vocab_size) == (0, 320)
    assert Tokenizer.load(folder / "tokenizer.json").fingerprint == tokenizer.fingerprint
    for damage in ("missing", "{", "[1]"):  # a dataset of an earlier version had no such file
        (folder / "tokenizer.json").unlink()
        if damage != "missing":
            (folder / "tokenizer.json").write_text(damage)
        with pytest.raises(AtlasError, match=r"set/tokenizer\.json: .*; prepare the dataset again$"):
            open_dataset(folder).tokenizer()
        assert main(["info", str(folder)]) == 0
        again = ["prepare", "--input", str(text_file), "--tokenizer", str(model), "--output", str(folder)]
        assert main(again) == 0
        assert open_dataset(folder).tokenizer().encode(text) == expected


def test_it_shows_what_it_read_and_some_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.md").write_text(f"Chapter {number}. " + "Some words. " * 100, encoding="utf-8")
    (folder / "rows.jsonl").write_text('{"text": "a row"}\n{"text": "another"}\n', encoding="utf-8")
    assert main(["prepare", "--input", str(folder), "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    sizes = [sum(len(file.read_text()) for file in folder.glob("*.md")), len("a row" + "another")]
    shares = [f"{100 * size / sum(sizes):.1f}%" for size in sizes]
    texts = rf"text \(\.md\) +3 +3 +{sizes[0]:,} +{shares[0]}\n"
    assert re.search(texts + rf"JSON lines \(\.jsonl\) +1 +2 +{sizes[1]} +{shares[1]}\n", said)
    assert "5 random documents of train" in said
    assert "Chapter 1. Some words." in said
    assert main(["info", str(tmp_path / "out")]) == 0
    assert re.search(texts, capsys.readouterr().out)


def test_many_kinds_of_files_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(20):
        (tmp_path / f"a.e{number}").write_text(f"text {number} " * (30 - number), encoding="utf-8")
    assert main(["prepare", "--input", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    rows = re.findall(r"^(\S.*?) +(\d+) +(\d+) +[\d,]+ +[\d.]+%$", capsys.readouterr().err, re.M)
    assert len(rows) == 12
    assert rows[0] == ("text (.e0)", "1", "1")
    assert rows[-1] == ("others", "9", "9")
