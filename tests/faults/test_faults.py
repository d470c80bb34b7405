"""Kills, damaged bytes, full disks and costly requests, in a short form; `-m slow` runs the long one."""

from __future__ import annotations

import os
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch

from atlas import files
from atlas.training.checkpoint.lock import FolderLock
from atlas.training.checkpoint.manager import CheckpointManager
from tests.faults.actors import ForkedHistories, two_actors
from tests.faults.console import hangups, streams
from tests.faults.corrupt import corrupt_and_resume
from tests.faults.dataset import change_and_resume
from tests.faults.disk import (
    Strike,
    fill_a_tmpfs,
    fill_at_each_point,
    make_run,
    no_tmpfs_because,
    train,
    watched,
)
from tests.faults.file_types import strange_files
from tests.faults.history import make_scene
from tests.faults.kill import kill_and_resume
from tests.faults.numbers import short_memory, wrong_numbers
from tests.faults.refusal import TEXTS, abuse, refuse
from tests.faults.runs import Broken, Run, sound_checkpoints
from tests.runs import logged


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The kinds of faults name a cache of their own; what they set is taken back."""
    monkeypatch.setenv("ATLAS_CACHE_DIR", str(tmp_path / "cache"))


forking = pytest.mark.skipif(
    not hasattr(os, "fork") or torch.cuda.is_available(),
    reason="with a GPU, PyTorch computes no gradients in forked children; python -m tests.faults.report does",
)


@pytest.mark.slow
def test_kills_lose_nothing(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, rounds=3, steps=12, seed=7, fsync_s=0.03)


@pytest.mark.slow
def test_rotten_files_are_never_believed(tmp_path: Path) -> None:
    corrupt_and_resume(tmp_path, rounds=25, seed=random.randrange(1 << 32), processes=False)


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_point_of_a_save(tmp_path: Path) -> None:
    fill_at_each_point(tmp_path, variants=1, once_each=True)


def test_wrong_numbers_move_nothing(tmp_path: Path) -> None:
    wrong_numbers(tmp_path, rounds=2, seed=random.randrange(1 << 32))


def test_short_memory_changes_no_loss(tmp_path: Path) -> None:
    short_memory(tmp_path, rounds=1, seed=random.randrange(1 << 32))


def test_the_worst_bodies_are_cheap_to_refuse() -> None:
    refuse(fields=TEXTS)


@pytest.mark.slow
def test_every_field_is_cheap_to_refuse() -> None:
    refuse()


@pytest.mark.slow
def test_a_good_client_beside_abuse(tmp_path: Path) -> None:
    abuse(tmp_path, minutes=0.5, seed=random.randrange(1 << 32))


@forking
def test_two_actors_in_one_folder(tmp_path: Path) -> None:
    two_actors(tmp_path, histories=1, real=0, seed=random.randrange(1 << 32), runs=1)


@forking
@pytest.mark.slow
def test_changed_data_are_never_believed(tmp_path: Path) -> None:
    change_and_resume(tmp_path, rounds=5, seed=random.randrange(1 << 32))


@forking
@pytest.mark.slow
def test_two_hundred_histories_of_two_actors(tmp_path: Path) -> None:
    two_actors(tmp_path, histories=200, real=3, seed=random.randrange(1 << 32))


@forking
@pytest.mark.slow
def test_every_change_of_the_data_at_every_moment(tmp_path: Path) -> None:
    change_and_resume(tmp_path, rounds=78, seed=random.randrange(1 << 32))


def test_a_command_with_streams_that_fail(tmp_path: Path) -> None:
    streams(tmp_path, ["version"], [{1: "ENOSPC"}, {2: "EPIPE"}, {1: "closed", 2: "closed"}])


@pytest.mark.slow
def test_a_run_continues_without_its_streams(tmp_path: Path) -> None:
    streams(tmp_path, ["train", "generate"])


@pytest.mark.slow
def test_hangups_lose_nothing(tmp_path: Path) -> None:
    hangups(tmp_path)


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="makes pipes, and gives up root's privileges"
)
def test_strange_files_stop_nothing(tmp_path: Path) -> None:
    strange_files(tmp_path, rounds=4, seed=random.randrange(1 << 32))


@pytest.mark.slow
@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="makes pipes, and gives up root's privileges"
)
def test_every_strange_file_in_every_place(tmp_path: Path) -> None:
    strange_files(tmp_path, rounds=None, seed=0)


@pytest.mark.slow
def test_sixty_kills(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, rounds=60, steps=300, seed=random.randrange(1 << 32))


@pytest.mark.slow
def test_two_hundred_corruptions(tmp_path: Path) -> None:
    corrupt_and_resume(tmp_path, rounds=200, seed=random.randrange(1 << 32))


@pytest.mark.slow
def test_every_point_in_every_way(tmp_path: Path) -> None:
    fill_at_each_point(tmp_path)


@pytest.mark.slow
def test_a_true_full_disk(tmp_path: Path) -> None:
    if reason := no_tmpfs_because():
        pytest.skip(reason)
    fill_a_tmpfs(tmp_path)


# Bugs that the faults found, one test each


class Killed(BaseException):
    """Ends a run immediately, as a kill would: no handler catches it."""


def kill_in_the_first_save(folder: Path, operation: str) -> Run:
    """A run that ended just before this operation on its disk, with no other checkpoint."""
    run = make_run(folder, training__eval_interval=100)

    def before(name: str) -> None:
        if name == operation:
            raise Killed

    with watched(run.output, before), pytest.raises(Killed):
        train(run)
    return run


def test_a_kill_before_the_first_checkpoint_leaves_no_step_twice(tmp_path: Path) -> None:
    run = kill_in_the_first_save(tmp_path, "open atlas_writing.tmp")
    assert train(run)[0] == 0
    assert [line["step"] for line in logged(run.output)] == list(range(1, 9))


def test_a_kill_in_the_first_save_does_not_stop_the_next_start(tmp_path: Path) -> None:
    for operation in (
        "rename to atlas_step_N.pt",
        "open atlas_step_N.json.tmp",
        "rename to atlas_step_N.json",
    ):
        code, said = train(kill_in_the_first_save(tmp_path / operation, operation))
        assert code == 0, f"before {operation}: {said.splitlines()[-1]}"


def test_a_name_that_cannot_be_written_costs_no_other(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.output.mkdir()
    (run.output / "atlas_best.pt").mkdir()
    code, said = train(run)
    assert (run.output / "atlas_step_8.pt").is_file(), said.splitlines()[-1]
    assert code == 0


def test_lines_that_waited_for_room_are_written_at_the_end(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    full_until_the_last = Strike(("open atlas_writing.tmp", 1), save=3, lasts=True)
    with watched(run.output, full_until_the_last):
        assert train(run)[0] == 0
    assert [line["step"] for line in logged(run.output)] == list(range(1, 9))


def test_a_file_that_is_replaced_while_it_is_read_is_not_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, longer = tmp_path / "dataset.json", tmp_path / "longer"
    file.write_text("{}", encoding="utf-8")
    longer.write_text('{"a": 1}', encoding="utf-8")
    check = files.check_regular

    def replaced_after_the_check(path: Path) -> int:
        size = check(path)
        os.replace(longer, path)
        return size

    monkeypatch.setattr(files, "check_regular", replaced_after_the_check)
    assert files.read_limited(file, limit=100) == b'{"a": 1}'


# The harness itself notices faults


def test_a_checkpoint_that_its_sidecar_denies_is_noticed(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert train(run)[0] == 0
    assert sound_checkpoints(run.output)["atlas_step_8.pt"] == 8
    shutil.copy(run.output / "atlas_step_6.pt", run.output / "atlas_step_4.pt")
    with pytest.raises(Broken, match=r"atlas_step_4\.pt"):
        sound_checkpoints(run.output)


@forking
def test_two_writers_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FolderLock, "check", lambda self, is_untouched: None)
    history = type("History", (ForkedHistories,), {"scene": make_scene(tmp_path, runs=1)})()
    history.start("plain", 0, {"updates": 2})
    history.meddle("lock")
    history.start("plain", 0, {"updates": 1})
    with pytest.raises(Broken, match="two writers"):
        history.proceed(0, {})
    history.teardown()


@pytest.mark.slow
def test_going_on_from_an_older_checkpoint_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = CheckpointManager.found
    monkeypatch.setattr(CheckpointManager, "found", lambda self: found(self)[::-1])
    with pytest.raises(Broken, match="resumed from step 2, but an intact checkpoint of step 8 was there"):
        corrupt_and_resume(tmp_path, rounds=3, seed=1, processes=False)


@pytest.mark.slow
def test_a_save_without_a_commit_point_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes written directly under their final name: a full disk in the middle leaves a partial file."""

    def save_directly(self: CheckpointManager, contents: dict, kinds: list[str], **_: object) -> list[Path]:
        path = self.folder / f"atlas_step_{contents['step']}.pt"
        try:
            with open(self.folder / "atlas_writing.tmp", "wb"), open(path, "wb") as file:
                torch.save(dict(contents), file)
                os.fsync(file.fileno())
        except OSError as error:
            self.say(f"no checkpoint saved: {error.strerror}")
            return []
        return [path]

    monkeypatch.setattr(CheckpointManager, "save", save_directly)
    with pytest.raises(Broken):
        fill_at_each_point(tmp_path, variants=1, once_each=True)
