"""A move to `previous-N` that is killed at any step is completed by the next run."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from atlas.errors import AtlasError
from atlas.training.checkpoint import moves
from atlas.training.checkpoint.load import load_checkpoint
from atlas.training.checkpoint.moves import complete_move, move_aside
from atlas.training.output_folder import is_run_file, run_files
from atlas.training.resume import Request, choose_start
from tests.runs import layer, trained


class Killed(BaseException):
    pass


def killed_at(number: int) -> Callable[[], bool]:
    """Count the calls; at call `number`, raise `Killed`."""
    counts = iter(range(1, 1000))

    def count() -> None:
        if next(counts) == number:
            raise Killed

    return count


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def folder_of_a_run(folder: Path) -> dict[str, bytes]:
    for name in ("atlas_best", "atlas_step_2", "atlas_step_4"):
        (folder / f"{name}.pt").write_bytes(name.encode())
        (folder / f"{name}.json").write_text("{}", encoding="utf-8")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n', encoding="utf-8")
    return files_in(folder)


@pytest.mark.parametrize("number", range(1, 13))
def test_all_files_move_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    before, count = folder_of_a_run(tmp_path), killed_at(number)
    for name in ("rename", "replace", "mkdir", "unlink"):
        change = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, change=change, **kw: (count(), change(*args, **kw))[1])
    with suppress(Killed):
        move_aside(tmp_path, run_files(tmp_path))
    monkeypatch.undo()
    complete_move(tmp_path, may_move=is_run_file)
    here = {name: content for name, content in files_in(tmp_path).items() if not name.endswith(".tmp")}
    there = files_in(tmp_path / "previous-1") if (tmp_path / "previous-1").exists() else {}
    assert before in (here, there)
    assert {} in (here, there)


def test_the_next_run_completes_a_move(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise `--resume auto` would resume from a file that the killed command had left behind."""
    folder = tmp_path / "run"
    explicit = layer(folder, text_file, checkpoint__save_interval=2)
    trained(explicit)
    monkeypatch.setattr(moves, "complete_move", lambda folder, **_: None)
    move_aside(folder, [folder / "atlas_step_4.pt", folder / "atlas_step_6.pt", folder / "atlas_best.pt"])
    monkeypatch.undo()
    os.rename(
        folder / "atlas_step_6.pt", (folder / "previous-1").mkdir() or folder / "previous-1/atlas_step_6.pt"
    )
    start = choose_start(Request(explicit, resume="auto"))
    assert start.contents["step"] == 2
    assert "previous-1 is complete now" in start.notes[0]
    assert load_checkpoint(folder / "previous-1/atlas_step_6.pt")["step"] == 6
    assert (folder / "previous-1/atlas_step_6.json").exists()
    assert not (folder / "moving.json").exists()


@pytest.mark.parametrize(
    "journal",
    [
        {"to": "../previous-1", "files": []},
        {"to": "previous-1", "files": ["../secret"]},
        {"to": "previous-1", "files": ["a/b"]},
        {"to": "previous-1", "files": ["thesis"]},
        {"to": "previous-1"},
        [],
    ],
)
def test_a_journal_from_a_stranger_moves_nothing_outside(tmp_path: Path, journal: object) -> None:
    (tmp_path / "secret").write_text("mine", encoding="utf-8")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "moving.json").write_text(json.dumps(journal), encoding="utf-8")
    with pytest.raises(AtlasError, match=r"moving\.json: is not the list of files"):
        complete_move(folder, may_move=is_run_file)
    assert sorted(os.listdir(tmp_path)) == ["run", "secret"]


def test_a_link_as_target_is_refused(tmp_path: Path) -> None:
    folder, outside = tmp_path / "run", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (folder / "atlas_best.pt").write_bytes(b"")
    (folder / "previous-1").symlink_to(outside)
    journal = {"to": "previous-1", "files": ["atlas_best.pt"]}
    (folder / "moving.json").write_text(json.dumps(journal), encoding="utf-8")
    with pytest.raises(AtlasError, match="previous-1: files cannot be moved there"):
        complete_move(folder, may_move=is_run_file)
    assert os.listdir(outside) == []


@pytest.mark.parametrize("there", ["", "old", "new and more"])
def test_a_folder_is_removed_only_where_its_copy_is_complete(tmp_path: Path, there: str) -> None:
    for name, content in (("", "new"), ("previous-1", there)):
        (tmp_path / name / "tensorboard").mkdir(parents=True)
        if content:
            (tmp_path / name / "tensorboard/events").write_text(content, encoding="utf-8")
    journal = {"to": "previous-1", "files": ["tensorboard"]}
    (tmp_path / "moving.json").write_text(json.dumps(journal), encoding="utf-8")
    with pytest.raises(AtlasError, match="tensorboard is already there"):
        complete_move(tmp_path, may_move=is_run_file)
    assert (tmp_path / "tensorboard/events").read_text(encoding="utf-8") == "new"


@pytest.mark.parametrize("killed", [False, True])
def test_a_folder_that_cannot_be_renamed_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    """As on an overlay file system, if the folder is in a lower layer."""
    for name in ("tensorboard/deep", "tensorboard"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "events").write_bytes(name.encode())
    rename, rmtree, removed = os.rename, shutil.rmtree, []

    def other_layer(source: Path, target: Path) -> None:
        if source == tmp_path / "tensorboard":
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        rename(source, target)

    def kill(path: Path, **options: object) -> None:
        if killed and path == tmp_path / "tensorboard" and not removed:
            removed.append(path)
            (path / "events").unlink()
            raise Killed
        rmtree(path, **options)

    monkeypatch.setattr(moves.os, "rename", other_layer)
    monkeypatch.setattr(moves.shutil, "rmtree", kill)
    with suppress(Killed):
        move_aside(tmp_path, run_files(tmp_path))
    complete_move(tmp_path, may_move=is_run_file)
    assert os.listdir(tmp_path) == ["previous-1"]
    assert (tmp_path / "previous-1/tensorboard/events").read_bytes() == b"tensorboard"
    assert (tmp_path / "previous-1/tensorboard/deep/events").read_bytes() == b"tensorboard/deep"
