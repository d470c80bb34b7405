"""A text that changed since a run on it was complete starts nothing in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from atlas.data import resolve_data
from atlas.errors import AtlasError
from atlas.tokenizer import Tokenizer
from atlas.training.train import train
from tests.runs import layer, run_for, trained

ROWS = [f"Row {n} is about a mill, of a river and of {n * n} geese." for n in range(150)]


def write(path: Path, rows: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return path


def one_more_held_out(path: Path) -> list[str]:
    """The rows and one more, which is held out, so that the training data is the same."""
    tokenizer = Tokenizer.resolve("tests.toy:tokenizer")
    before = resolve_data(write(path, ROWS), tokenizer=tokenizer)
    for number in range(1000):
        rows = [*ROWS, f"One more row, number {number}."]
        now = resolve_data(write(path, rows), tokenizer=tokenizer)
        if now.fingerprint == before.fingerprint:
            assert now.val_fingerprint != before.val_fingerprint
            return rows
    raise AssertionError("no row is held out")


def test_a_row_that_is_held_out_is_not_passed_over_by_a_complete_run(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = one_more_held_out(path)
    explicit = layer(tmp_path / "out", write(path, ROWS))
    trained(explicit)
    assert run_for(explicit).is_complete
    write(path, rows)
    with pytest.raises(AtlasError, match=r"validation text has changed .*--output-dir.*--no-resume"):
        run_for(explicit)
    asked: list[str] = []
    fresh = run_for(explicit, ask=lambda question: bool(asked.append(question)) or True)
    assert "holds another run" in asked[0]
    assert fresh.state.step == 0


def test_a_run_that_is_not_complete_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = one_more_held_out(path)
    explicit = layer(tmp_path / "out", write(path, ROWS))
    trained(explicit)
    longer = layer(tmp_path / "out", write(path, rows), training__max_steps=8)
    run = run_for(longer)
    assert run.state.step == 6
    assert train(run).step == 8
