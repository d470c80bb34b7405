"""Two runs and one output folder: a run locks the folder before it reads the folder, and keeps the lock to the end."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from atlas.config.loader import nested, overlay
from atlas.errors import AtlasError
from atlas.files import try_to_lock
from atlas.training import launch, resume
from atlas.training.checkpoint.lock import FolderLock
from atlas.training.logs.run_log import RunLog
from atlas.training.resume import Request, choose_start
from atlas.training.train import train
from tests.runs import layer, on_updates, run_for, trained

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the second process is forked")


def in_another_process(work: Callable[[], object]) -> object:
    """What `work` returns in a forked process, which shares no lock with this process."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(work()))
    process.start()
    answer = receiver.recv()
    process.join()
    return answer


def is_locked(folder: Path) -> bool:
    """Whether another process could not lock the folder now."""
    return bool(in_another_process(lambda: try_to_lock(folder / "atlas.lock") is None))


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("way", ["auto", "no_resume", "named", "init_from"])
def test_the_folder_is_locked_before_it_is_examined(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Otherwise another run could save after this run has decided where to resume, and lose these updates."""
    folder = tmp_path / "run"
    explicit = layer(folder, text_file, training__max_steps=2)
    _run, result = trained(explicit)
    saved = result.saved[0]
    wish = {
        "auto": {"resume": "auto"},
        "no_resume": {"no_resume": True},
        "named": {"resume": str(saved)},
        "init_from": {"init_from": str(saved), "no_resume": True},
    }[way]
    name = {"named": "_from_named_checkpoint", "init_from": "_earlier_finetuning", "no_resume": "_start_over"}
    examine = name.get(way, "_from_occupied_folder")
    locked, original = [], getattr(resume, examine)

    def examined(*arguments: object) -> object:
        locked.append(is_locked(folder))
        return original(*arguments)

    monkeypatch.setattr(resume, examine, examined)
    choose_start(Request(explicit, **wish))
    assert locked == [True]


def test_a_checkpoint_that_was_replaced_while_it_was_read_is_refused(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    explicit = layer(tmp_path / "run", text_file, training__max_steps=2)
    best = trained(explicit)[1].saved[-1].with_name("atlas_best.pt")
    load = resume.load_checkpoint

    def replaced_meanwhile(*arguments: object, **options: object) -> dict:
        contents = load(*arguments, **options)
        trained(overlay(explicit, nested("training.max_steps", 4)))[0].checkpoints.lock.release()
        return contents

    monkeypatch.setattr(resume, "load_checkpoint", replaced_meanwhile)
    with pytest.raises(AtlasError, match=r"atlas_best.pt: another run has replaced this checkpoint"):
        choose_start(Request(explicit, resume=str(best)))


def test_a_mistake_leaves_neither_folder_nor_lock(tmp_path: Path, text_file: Path) -> None:
    folder = tmp_path / "new" / "run"
    explicit = layer(folder, text_file)
    for mistake in (nested("data.train_data", "nowhere"), nested("lora.rank", 2)):
        with pytest.raises(AtlasError):
            run_for(overlay(explicit, mistake))
        assert names(tmp_path) == [text_file.name]
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("kept", encoding="utf-8")
    with pytest.raises(AtlasError):
        run_for(overlay(explicit, nested("lora.rank", 2)))
    assert names(folder) == ["mine.txt"]


@pytest.mark.parametrize("what", ["lock", "folder"])
def test_a_removed_lock_is_taken_again(tmp_path: Path, text_file: Path, what: str) -> None:
    folder = tmp_path / "run"
    run = run_for(layer(folder, text_file))

    def remove() -> None:
        if run.state.step == 2:
            (folder / "atlas.lock").unlink() if what == "lock" else shutil.rmtree(folder)
        elif run.state.step == 4:
            assert is_locked(folder)

    on_updates(run, after=remove)
    result = train(run)
    assert result.step == 6
    assert result.saved[0].exists()
    said = (folder / "training.log").read_text(encoding="utf-8")
    assert said.count("atlas.lock was removed, perhaps with the folder; the run continues here") == 1


@pytest.mark.parametrize("background", [False, True])
def test_a_run_whose_folder_another_run_took_writes_nothing_more(
    tmp_path: Path, text_file: Path, background: bool
) -> None:
    folder = tmp_path / "run"
    settings = {"checkpoint__save_interval": 2, "checkpoint__background": background}
    run = run_for(layer(folder, text_file, **settings))
    taken: list[dict] = []

    def take() -> None:
        if run.state.step == 3:
            run.saver.join()
            shutil.rmtree(folder)
            in_another_process(lambda: FolderLock(folder).release())
            (folder / "atlas_writing.tmp").write_text("the other run's save", encoding="utf-8")
            taken.append({path.name: path.read_bytes() for path in folder.iterdir()})

    on_updates(run, after=take)
    with pytest.raises(AtlasError, match="another run has taken this folder"):
        train(run)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == taken[0]


@pytest.mark.parametrize("moved", [False, True])
def test_a_run_ends_if_both_locks_were_removed_and_another_run_wrote_meanwhile(
    tmp_path: Path, text_file: Path, moved: bool
) -> None:
    """No lock file is left that could show it, but `training.log` does."""
    folder = tmp_path / "run"
    run = run_for(layer(folder, text_file))

    def another_run() -> None:
        lock = FolderLock(folder)
        if moved:  # as --no-resume does
            (folder / "training.log").rename(tmp_path / "training.log")
        RunLog(folder).say("the first line of the other run")
        lock.release()

    def take() -> None:
        if run.state.step == 3:
            (folder / "atlas.lock").unlink()
            in_another_process(another_run)
            (folder / "atlas.lock").unlink()

    on_updates(run, after=take)
    with pytest.raises(AtlasError, match="another run has taken this folder"):
        train(run)
    assert not [*folder.glob("*.pt")]
    assert not is_locked(folder)


def test_a_save_does_not_touch_a_folder_that_another_run_took(tmp_path: Path, text_file: Path) -> None:
    """The thread that saves checks the lock itself: a save can take longer than an update."""
    run = run_for(layer(tmp_path / "run", text_file))
    folder = run.checkpoints.folder
    (folder / "atlas.lock").unlink()
    in_another_process(lambda: FolderLock(folder).release())
    before = names(folder)
    with pytest.raises(AtlasError, match="another run has taken this folder"):
        run.checkpoints.save(run.contents(), ["step", "best"])
    assert names(folder) == before


def test_a_lock_that_two_threads_check_is_taken_again_once(tmp_path: Path) -> None:
    """The training loop and the thread that saves both notice that the lock file is gone."""
    lock = FolderLock(tmp_path)
    for _ in range(20):
        (tmp_path / "atlas.lock").unlink()
        with ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(lock.check) for _ in range(8)]:
                done.result()
        assert lock.is_held
    gc.collect()
    assert is_locked(tmp_path)


def test_two_starts_in_one_process_share_the_lock(tmp_path: Path, text_file: Path) -> None:
    """As in a notebook, whose cell is run again: the first start is deleted, and closes its file."""
    explicit = layer(tmp_path / "run", text_file)
    start = choose_start(Request(explicit))
    start = choose_start(Request(explicit))
    gc.collect()
    assert is_locked(tmp_path / "run")
    start.lock.release()
    assert not is_locked(tmp_path / "run")


def test_a_start_that_has_failed_is_not_started_again(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = choose_start(Request(layer(tmp_path / "run", text_file)))
    monkeypatch.setattr(launch, "_build", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        launch.start_run(start)
    with pytest.raises(AtlasError, match="this start has failed before: call choose_start again"):
        launch.start_run(start)


def test_a_folder_that_cannot_be_reached_for_a_moment_ends_no_run(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system may answer with an error for some seconds."""
    run = run_for(layer(tmp_path / "run", text_file, checkpoint__save_interval=1))
    stat = Path.stat

    def unreachable(path: Path, **options: object) -> os.stat_result:
        if run.state.step in (2, 3) and path.name == "atlas.lock":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", unreachable)
    assert train(run).step == 6
