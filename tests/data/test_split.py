"""With few documents, a passage of each is held out: enough, and never a complete document."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atlas.data import prepare
from atlas.data.prepare.split import _cuts
from atlas.tokenizer import Tokenizer
from tests.archive import write_folder
from tests.data.test_prepare import documents_in


@given(lengths=st.lists(st.integers(0, 5000), max_size=99), fraction=st.floats(0.001, 0.5))
def test_the_share_is_held_out_and_every_document_keeps_its_half(lengths: list[int], fraction: float) -> None:
    cuts = _cuts(lengths, fraction)
    held_out = [length - cut for length, cut in zip(lengths, cuts, strict=True) if cut is not None]
    wanted = int(sum(lengths) * fraction)
    assert all(cut is None or cut >= length / 2 for length, cut in zip(lengths, cuts, strict=True))
    assert sum(held_out) <= wanted
    assert sum(held_out) == min(wanted, sum(length // 2 for length in lengths))


@pytest.mark.parametrize("count", [1, 2, 5, 20, 25, 60, 99])
def test_any_few_documents_leave_some_text_for_validation(count: int, tmp_path: Path) -> None:
    files = {f"{n:02d}.txt": f"Book d {n} is about mill {n} and of geese.\n" for n in range(count)}
    for name, texts in (("short", files), ("long", {name: text * 50 for name, text in files.items()})):
        dataset = prepare([write_folder(tmp_path / name, texts)], tmp_path / f"{name}.out").dataset
        train, val = (" ".join(documents_in(dataset, split)).split() for split in ("train", "val"))
        assert val
        assert len(val) < 0.2 * len(train) + 6
        in_train = " ".join(train)
        assert all(f"Book d {n} " in in_train for n in range(count))


def test_a_hundred_documents_are_split_by_document(tmp_path: Path) -> None:
    rows = [f"Row {n} is one of many, and is never cut." for n in range(100)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": row}) for row in rows), encoding="utf-8")
    dataset = prepare([path], tmp_path / "out", val_fraction=0.2).dataset
    train, val = documents_in(dataset, "train"), documents_in(dataset, "val")
    assert sorted(train + val) == sorted(rows)
    assert val


def test_documents_are_separated_where_a_passage_was_taken(tmp_path: Path) -> None:
    files = {f"{n}.txt": f"Text {n}. " * 200 for n in range(5)}
    dataset = prepare([write_folder(tmp_path / "in", files)], tmp_path / "out").dataset
    stream = dataset.split("train")
    assert stream is not None
    assert stream.num_documents == 5
    ends = Tokenizer.gpt2().decode(stream.read(0, stream.num_tokens).tolist()).count("<|endoftext|>")
    assert ends == 5


def test_a_title_before_text_without_blanks_keeps_its_text(tmp_path: Path) -> None:
    text = "标题\n" + "这是一个没有空格的中文文档。" * 300
    dataset = prepare([write_folder(tmp_path / "in", {"a.txt": text})], tmp_path / "out").dataset
    train, val = ("".join(documents_in(dataset, split)) for split in ("train", "val"))
    assert train + val == text
    assert 0.04 < len(val) / len(text) < 0.06


def test_documents_that_share_a_half_are_all_kept(tmp_path: Path) -> None:
    files = {f"{n}.txt": "The same words. " * 100 + f"Other words {n}. " * 100 for n in range(4)}
    dataset = prepare([write_folder(tmp_path / "in", files)], tmp_path / "out", val_fraction=0.5).dataset
    assert dataset.manifest.splits["train"].documents == 4
    assert dataset.manifest.cleaning["duplicates"].documents == 0
