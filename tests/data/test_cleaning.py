"""Cleaning, duplicates and the split: each step by its definition, counted, and left out on request."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas.data import PreparedDataset, prepare
from atlas.data.prepare.cleaning import Cleaning
from atlas.data.prepare.dedup import SeenDigests
from atlas.data.text.formats import decode as text
from atlas.errors import AtlasError
from tests.archive import write_zip
from tests.data.test_prepare import characters, documents_in

STEPS = {
    "nfc": ("Cafe\u0301 de la pai\u0308x", "Café de la païx", 2),
    "control": (
        "a\x00b\x07c\x85d\x7fe\tf\x0cg \x1b[1;31mred\x1b[0m \x1b]0;title\x07N\x08NO\x08O",
        "abc\nde\tf\ng red NO",
        28,
    ),
    "whitespace": (
        "one\r\ntwo  \r  if x:   pass\t\n\n\n\n\nend \t of it",
        "one\ntwo\n  if x: pass\n\n\nend of it",
        10,
    ),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_step_does_exactly_what_its_definition_says(step: str) -> None:
    before, after, shorter = STEPS[step]
    assert Cleaning(steps=(step,)).clean(before) == (after, {step: shorter})
    assert len(before) - len(after) == shorter
    others = tuple(name for name in STEPS if name != step)
    assert Cleaning(steps=others).clean(before) == (before, {})
    assert Cleaning().clean(after) == (after, {})


@pytest.mark.parametrize("blank", [" ", "\t", "\n", "\r", " \n", "x \n", "\n\n\n\n", "e\u0301", "\x00"])
def test_a_run_of_any_length_is_scanned_once(blank: str) -> None:
    """A pattern that is tried at each place of a run would take hours here."""
    cleaned, _ = Cleaning().clean("a" + blank * 200_000 + "b")
    assert (cleaned[0], cleaned[-1]) == ("a", "b")


def test_an_escape_without_its_end_removes_only_itself() -> None:
    assert Cleaning(("control",)).clean("one\x1b]0 stray\ntwo\x1b[")[0] == "one]0 stray\ntwo["


def test_pieces_are_cleaned_as_the_complete_text(monkeypatch: pytest.MonkeyPatch) -> None:
    document = "".join(
        random.Random(1).choices(["word", "  ", " ", "\n", "\r\n", "é", "e\u0301", "\t"], k=9000)
    )
    monkeypatch.setattr(text, "PIECE_CHARS", 200)
    pieces = [piece.text for piece in text.as_document([document])]
    assert len(pieces) > 50
    assert all(not piece[-1].isspace() for piece in pieces[:-1])
    cleaned = [Cleaning().clean(piece, starts_document=not place)[0] for place, piece in enumerate(pieces)]
    assert "".join(cleaned) == Cleaning().clean(document)[0]


def rows(path: Path, documents: Sequence[str]) -> Path:
    path.write_text("\n".join(json.dumps({"text": document}) for document in documents), encoding="utf-8")
    return path


def both(dataset: PreparedDataset) -> list[str]:
    return documents_in(dataset, "train") + documents_in(dataset, "val")


def test_what_each_step_removed_is_counted(tmp_path: Path) -> None:
    unique = [f"Document number {n}, with some words." for n in range(120)]
    documents = [*unique, "tiny", unique[3] + "  ", unique[5] + "\x00", " " + unique[5], *unique[:2]]
    cleaning = Cleaning(min_chars=10)
    dataset = prepare(
        [rows(tmp_path / "a.jsonl", documents)], tmp_path / "out", characters(), cleaning=cleaning
    ).dataset
    assert sorted(both(dataset)) == sorted(unique)
    counted = {
        step: (record.documents, record.characters) for step, record in dataset.manifest.cleaning.items()
    }
    lost = sum(len(unique[n]) for n in (3, 5, 5, 0, 1))
    assert counted == {
        "nfc": (0, 0),
        "control": (1, 1),
        "whitespace": (0, 0),  # blanks at the very end are not at a line's end
        "short": (1, 4),
        "duplicates": (5, lost),
    }
    kept = prepare(
        [tmp_path / "a.jsonl"], tmp_path / "all", characters(), cleaning=Cleaning(steps=(), min_chars=0)
    ).dataset
    assert sorted(both(kept)) == sorted(documents)
    assert [*kept.manifest.cleaning] == ["short"]


def test_a_long_copy_is_removed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes in pieces, over several shards, and what was written of it is removed."""
    monkeypatch.setattr(text, "PIECE_CHARS", 100)
    long = [f"Document {n} is " + f"long and number {n} " * 60 for n in range(4)]
    short = [f"Short document {n}." for n in range(120)]
    documents = [
        long[0],
        *short[:10],
        long[1],
        long[0],
        *short[10:20],
        long[1],
        long[1],
        long[2],
        long[0],
        *short[20:],
    ]
    dataset = prepare(
        [rows(tmp_path / "a.jsonl", documents)],
        tmp_path / "out",
        characters(),
        shard_tokens=97,
        val_fraction=0.4,
    ).dataset
    assert sorted(both(dataset)) == sorted([*long[:3], *short])
    assert dataset.manifest.cleaning["duplicates"].documents == 4
    clean = prepare(
        [rows(tmp_path / "b.jsonl", list(dict.fromkeys(documents)))],
        tmp_path / "unique",
        characters(),
        shard_tokens=97,
        val_fraction=0.4,
    ).dataset
    assert clean.manifest.splits == dataset.manifest.splits
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in (tmp_path / "unique").iterdir()}


def test_copies_are_never_on_both_sides(tmp_path: Path) -> None:
    documents = [f"Document number {n}." for n in range(60)]
    keep = Cleaning(steps=("nfc",))
    dataset = prepare(
        [rows(tmp_path / "a.jsonl", documents * 3)],
        tmp_path / "out",
        characters(),
        cleaning=keep,
        val_fraction=0.4,
    ).dataset
    train, val = documents_in(dataset, "train"), documents_in(dataset, "val")
    assert len(train) + len(val) == 180
    assert not set(train) & set(val)
    assert val


def test_the_order_of_files_does_not_change_the_split(tmp_path: Path) -> None:
    files = {f"{n:03d}.txt": f"Text of file {n}, which says {n * n}." for n in range(120)}
    other = dict(zip(files, random.Random(2).sample(list(files.values()), len(files)), strict=True))
    sides = []
    for name, content in (("a", files), ("b", other)):
        archive = write_zip(tmp_path / f"{name}.zip", content)
        dataset = prepare([archive], tmp_path / name, characters(), val_fraction=0.3).dataset
        sides.append((set(documents_in(dataset, "train")), set(documents_in(dataset, "val"))))
    assert sides[0] == sides[1]
    assert len(sides[0][0] | sides[0][1]) == 120


def test_near_duplicates_are_dropped_when_asked(tmp_path: Path) -> None:
    words = random.Random(3).choices("abcdefghijklmnopqrstuvwxyz", k=4000)
    different = [" ".join(words[n * 100 : n * 100 + 100]) for n in range(30)]
    near = [document + " and z" for document in different[:7]]  # 96 of 98 runs of five words are the same
    source = rows(tmp_path / "a.jsonl", different + near)
    near_dedup = Cleaning(near_dedup=True)
    dataset = prepare([source], tmp_path / "near", characters(), val_fraction=0, cleaning=near_dedup).dataset
    assert sorted(both(dataset)) == sorted(different)
    assert dataset.manifest.cleaning["near_duplicates"].documents == 7
    assert len(both(prepare([source], tmp_path / "exact", characters(), val_fraction=0).dataset)) == 37


def test_unknown_steps_are_refused() -> None:
    assert Cleaning.parse("whitespace, nfc") == ("nfc", "whitespace")
    assert Cleaning.parse("none") == ()
    with pytest.raises(AtlasError, match="--clean nfk: no such step; the steps are nfc, control"):
        Cleaning.parse("nfc,nfk")
    with pytest.raises(AtlasError, match="--min-chars -1"):
        Cleaning(min_chars=-1)


# The set of digests


@given(
    batches=st.lists(st.lists(st.integers(0, 60), max_size=30), max_size=12),
    limit=st.sampled_from([1 << 20, 16 * 40, 16]),
    stop=st.integers(0, 12),
)
@settings(deadline=None, max_examples=60)
def test_a_digest_is_new_once(
    batches: list[list[int]], limit: int, stop: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Compared with a Python set; with a tiny cache, and after a stop that loses the last batches."""
    log = tmp_path_factory.mktemp("seen") / "seen.bin"
    digest = {n: bytes([n % 3]) * 8 + n.to_bytes(8, "big") for n in range(61)}  # many share a first half
    seen, known = SeenDigests(log, cache_bytes=limit), set[int]()
    for place, batch in enumerate(batches):
        if place == stop:
            count = seen.sync()
            seen.add(digest[0] + digest[60])  # not committed
            seen.close()
            seen = SeenDigests(log, count=count, cache_bytes=limit)
        expected = []
        for number in batch:
            expected.append(number not in known)
            known.add(number)
        assert seen.add(b"".join(digest[number] for number in batch)).tolist() == expected
    assert seen.count == len(known)
    seen.close()


@pytest.mark.slow
def test_digests_need_constant_memory(tmp_path: Path) -> None:
    """A million digests, in a process of their own: the memory stays near the cache's limit, whatever allocates it."""
    program = """
import sys, psutil, numpy as np
from pathlib import Path
from atlas.data.prepare.dedup import SeenDigests
seen = SeenDigests(Path(sys.argv[1]), cache_bytes=2 << 20)
random = np.random.default_rng(0)
first = random.bytes(16 * 4000)
assert seen.add(first).all()
before = psutil.Process().memory_info().rss
for _ in range(249):
    assert seen.add(random.bytes(16 * 4000)).all()
assert not seen.add(first).any() and seen.count == 1_000_000
print(psutil.Process().memory_info().rss - before)
"""
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "seen.bin")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert int(run.stdout) < 8 << 20, run.stderr
    assert (tmp_path / "seen.bin").stat().st_size <= 16 * 1_000_000


def test_a_missing_datasketch_is_named() -> None:
    program = """
import sys
sys.modules["datasketch"] = None
from atlas.data.prepare.dedup import require_datasketch
require_datasketch()
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert 'pip install "atlas-llm[dedup]"' in run.stderr


@pytest.mark.parametrize("marks", ["\u0301\u0323", "\U00011046\U000110ba"])
def test_a_million_marks_on_a_letter_take_linear_time(marks: str) -> None:
    start = time.process_time()
    assert len(Cleaning(("nfc",)).clean("a" + marks * 500_000)[0]) >= 1_000_000
    assert time.process_time() - start < 60  # in the time of the library, which is quadratic: many minutes


@given(st.text("aeo\u0301\u0323\u0327\u05b0\u0915\u093c각\U000110a5\U000110ba", max_size=30))
def test_with_few_marks_the_text_is_in_nfc(text: str) -> None:
    assert Cleaning(("nfc",)).clean(text)[0] == unicodedata.normalize("NFC", text)
