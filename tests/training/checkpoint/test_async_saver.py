"""Saving while training continues, what is kept, what is removed for lack of space, and one run per folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from atlas.errors import AtlasError
from atlas.training.checkpoint import manager as checkpoint_module
from atlas.training.checkpoint.async_saver import BackgroundSaver, Pacer, Snapshot
from atlas.training.checkpoint.load import load_checkpoint
from atlas.training.checkpoint.lock import FolderLock
from atlas.training.checkpoint.manager import CheckpointManager
from atlas.training.train import train
from tests.runs import layer, logged, on_updates, run_for, same_bits, trained
from tests.training.checkpoint.test_checkpoint import contents, save


class SlowDisk:
    """Delays every write until it is released."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_go, self.writing = threading.Event(), threading.Event()
        write = checkpoint_module.write_tensors

        def held(*args: object, **kwargs: object) -> object:
            self.writing.set()
            assert self.may_go.wait(30)
            return write(*args, **kwargs)

        monkeypatch.setattr(checkpoint_module, "write_tensors", held)


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> SlowDisk:
    return SlowDisk(monkeypatch)


# In the background.


def test_training_continues_while_a_save_is_written_and_the_save_is_of_its_moment(
    tmp_path: Path, text_file: Path, slow_disk: SlowDisk
) -> None:
    explicit = layer(tmp_path / "run", text_file, checkpoint__background=True, checkpoint__save_interval=2)
    run = run_for(explicit)

    def release() -> None:
        if run.state.step == 5:  # four updates after the copy, and with three of them the disk still held
            assert run.saver.is_writing
            slow_disk.may_go.set()

    on_updates(run, before=release)
    result = train(run)
    slow_disk.may_go.set()
    names = sorted(path.name for path in (tmp_path / "run").glob("atlas_step_*.pt"))
    assert names == ["atlas_step_2.pt", "atlas_step_6.pt"]  # 4 fell due meanwhile, 6 is the last
    assert tmp_path / "run" / "atlas_step_6.pt" in result.saved  # joined before train returned
    log = (tmp_path / "run" / "training.log").read_text()
    assert log.count("step 4: no checkpoint saved: the previous checkpoint is still being written") == 1
    blocking, _ = trained(layer(tmp_path / "blocking", text_file, checkpoint__save_interval=2))
    for name in names:
        one, other = load_checkpoint(tmp_path / "run" / name), load_checkpoint(tmp_path / "blocking" / name)
        for key in ("model_state_dict", "optimizer_state_dict", "step", "sequences_consumed", "loss"):
            assert same_bits(one[key], other[key]), (name, key)
    assert blocking.state.step == 6


@pytest.mark.parametrize("kind", ["best", "epoch", "interrupt"])
def test_only_a_step_save_is_dropped_while_another_is_written(
    kind: str, tmp_path: Path, slow_disk: SlowDisk
) -> None:
    said: list[str] = []
    saver = BackgroundSaver(CheckpointManager(tmp_path, say=said.append), in_background=True)
    saver.save(contents(1), ["step"], wait=False)
    assert slow_disk.writing.wait(10)
    for step in (2, 3):
        saver.save(contents(step), ["step"], wait=False)
    assert len(said) == 1  # once, with what it takes to change it
    assert "save_interval" in said[0]
    threading.Timer(0.1, slow_disk.may_go.set).start()
    saver.save(contents(4), [kind], wait=False)
    saver.join()
    [kept] = {path.name for path in tmp_path.glob("*.pt")} - {"atlas_step_1.pt"}
    assert kept.startswith(f"atlas_{kind}")
    assert load_checkpoint(tmp_path / kept)["step"] == 4


def test_a_bug_while_saving_is_raised_in_the_training_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(checkpoint_module, "commit", broken)
    saver = BackgroundSaver(CheckpointManager(tmp_path), in_background=True)
    saver.save(contents(1), ["step"], wait=False)
    with pytest.raises(ZeroDivisionError):
        saver.join()


def test_a_second_interrupt_leaves_the_save_in_flight_and_nothing_of_it(
    tmp_path: Path, slow_disk: SlowDisk
) -> None:
    saver = BackgroundSaver(CheckpointManager(tmp_path), in_background=True)

    def interrupted() -> None:
        with saver:
            saver.save(contents(1), ["step"], wait=False)
            assert slow_disk.writing.wait(10)
            threading.Timer(0.1, slow_disk.may_go.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_snapshot_is_a_copy_in_the_same_memory_each_time() -> None:
    state = {"a": torch.arange(6.0), "b": [torch.ones(2, dtype=torch.int64), {"c": (1, "x", None)}]}
    snapshot = Snapshot()
    first = snapshot.take(state)
    assert same_bits(first, state)
    address = first["a"].data_ptr()
    state["a"] += 1
    assert first["a"][0] == 0
    second = snapshot.take(state)
    assert second["a"].data_ptr() == address
    assert same_bits(second, state)


def test_too_little_memory_for_a_copy_is_reported_and_training_waits_instead(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atlas.training.launch.measure_memory", lambda device: 100_000)
    run = run_for(layer(tmp_path / "run", text_file, checkpoint__background=True))
    assert not run.saver.in_background
    assert "do not fit into the 0.00 GB" in (tmp_path / "run" / "training.log").read_text()
    assert train(run).saved


# What is kept.


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.pt")}


SPARE = 4096
"""More than these small files have besides their tensors."""


def test_max_total_is_never_exceeded_and_spares_the_newest_and_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_module, "SPARE_BYTES", SPARE)
    size = save(CheckpointManager(tmp_path / "one"), 1)[0].stat().st_size
    folder, most = tmp_path / "run", 4 * size + SPARE
    manager = CheckpointManager(folder, keep_checkpoints=99, max_total=most)
    largest = 0
    for step in range(1, 12):
        assert save(manager, step, *(["step", "best"] if step == 1 else ["step"]))
        largest = max(largest, sum(path.stat().st_size for path in folder.glob("*.pt")))
    assert largest <= most
    kept = names(folder)
    assert {"atlas_best.pt", "atlas_step_11.pt"} <= kept
    assert len(kept) < 11


def test_a_max_total_that_cannot_be_kept_is_refused(tmp_path: Path, text_file: Path) -> None:
    with pytest.raises(AtlasError, match=r"checkpoint\.max_total: .*four must fit .*set at least 9MB"):
        run_for(layer(tmp_path / "run", text_file, checkpoint__max_total="8.5MB"))
    assert not (tmp_path / "run").exists()
    explicit = layer(tmp_path / "run", text_file, checkpoint__max_total="9MB", checkpoint__save_interval=1)
    assert trained(explicit)[1].saved  # the size in the message is enough


def test_slim_old_leaves_the_optimizer_in_the_newest_two_and_the_best(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, slim_old=True)
    whole = {
        **contents(1),
        "optimizer_state_dict": {"state": {0: {"m": torch.ones(1000)}}, "param_groups": []},
    }
    for step in range(1, 5):
        manager.save({**whole, "step": step}, ["step", "best"] if step == 1 else ["step"])
    for name, has_state in (
        ("best", True),
        ("step_1", False),
        ("step_2", False),
        ("step_3", True),
        ("step_4", True),
    ):
        loaded = load_checkpoint(tmp_path / f"atlas_{name}.pt")  # all are intact by their sidecars
        assert bool(loaded["optimizer_state_dict"].get("state")) is has_state, name
        assert torch.equal(loaded["model_state_dict"]["weight"], torch.full((100,), 1.0))
    assert (tmp_path / "atlas_step_1.pt").stat().st_size < (tmp_path / "atlas_step_3.pt").stat().st_size
    for step in (3, 4):
        (tmp_path / f"atlas_step_{step}.pt").write_bytes(b"rotten")
    (tmp_path / "atlas_best.pt").unlink()
    said: list[str] = []
    assert CheckpointManager(tmp_path, say=said.append).load_latest() is None  # no run can resume from these
    assert any("holds no optimizer state" in line for line in said)


def test_a_run_cannot_resume_without_optimizer_state_but_a_new_one_can_start(
    tmp_path: Path, text_file: Path
) -> None:
    explicit = layer(tmp_path / "run", text_file, checkpoint__save_interval=2, checkpoint__slim_old=True)
    trained(explicit)
    slim = tmp_path / "run" / "atlas_step_2.pt"
    with pytest.raises(AtlasError, match="--init-from"):
        run_for(explicit, resume=str(slim))
    tuned = layer(tmp_path / "tuned", text_file)
    assert trained(tuned, init_from=str(slim))[1].step == 6


@pytest.mark.parametrize("free_after", [0, 1])
def test_a_nearly_full_disk_removes_old_steps_beyond_the_newest_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_after: int
) -> None:
    """A disk that holds only checkpoints and is full, with space for one more once enough of them are removed."""
    said: list[str] = []
    manager = CheckpointManager(tmp_path, say=said.append)
    for step in range(1, 6):
        save(manager, step, *(["step", "best"] if step == 1 else ["step"]))
    size = (tmp_path / "atlas_step_5.pt").stat().st_size
    used = sum(path.stat().st_size for path in tmp_path.glob("*.pt"))
    monkeypatch.setattr(checkpoint_module, "SPARE_BYTES", SPARE)
    needed = 400 + SPARE
    capacity = used + needed - (size // 2 if free_after else 4 * size)

    def usage(folder: Path) -> object:
        taken = sum(path.stat().st_size for path in tmp_path.glob("*.pt"))
        return shutil._ntuple_diskusage(capacity, taken, capacity - taken)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    before = names(tmp_path)
    written = save(manager, 6)
    if free_after:
        assert written
        assert names(tmp_path) == (before - {"atlas_step_1.pt"}) | {"atlas_step_6.pt"}
        assert said == ["atlas_step_1.pt: removed to make room for step 6"]
    else:  # not even removing three would suffice: none is removed
        assert not written
        assert names(tmp_path) == before
        save(manager, 7)
        assert len(said) == 1
        assert "Training continues; the newest checkpoint is atlas_step_5.pt" in said[0]


# One run per folder.

HOLDER = """
import sys, time
from pathlib import Path
from atlas.training.checkpoint.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path, text_file: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(AtlasError, match=rf"is writing to this folder \(process {holder.pid} on "):
            run_for(layer(folder, text_file))
        assert os.listdir(folder) == ["atlas.lock"]  # refused before anything was written
    finally:
        holder.kill()
        holder.wait()
    FolderLock(folder).release()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_fork_does_not_hold_the_lock_after_its_parent(tmp_path: Path) -> None:
    """Workers that read data ahead outlive a killed run by seconds; the next start must not wait for them."""
    program = HOLDER.replace("print(", "import os\nif os.fork() == 0: time.sleep(20); os._exit(0)\nprint(")
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.wait()
    FolderLock(tmp_path).release()
    holder.stdout.close()


# A full disk under the log.


def test_lines_that_a_full_disk_refuses_are_written_later_once_and_in_order(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = run_for(layer(tmp_path / "run", text_file, training__max_steps=9))
    full = fill_disk_for(monkeypatch, lambda: 3 <= run.state.step < 7)
    assert train(run).outcome == "finished"
    assert full
    assert [line["step"] for line in logged(tmp_path / "run")] == list(range(1, 10))
    assert capfd.readouterr().err.count("metrics.jsonl: cannot be written (No space left on device)") == 1


def fill_disk_for(monkeypatch: pytest.MonkeyPatch, is_full: Callable[[], bool]) -> list[float]:
    """Write only half of the bytes that are appended to log files, as a disk does that has just filled up."""
    import builtins

    opened, refused = builtins.open, []

    def open_(file: object, mode: str = "r", *args: object, **kwargs: object) -> object:
        stream = opened(file, mode, *args, **kwargs)
        if mode == "ab" and is_full():
            refused.append(time.time())
            return HalfWriter(stream)
        return stream

    monkeypatch.setattr(builtins, "open", open_)
    return refused


class HalfWriter:
    def __init__(self, stream: object) -> None:
        self._stream = stream

    def __enter__(self) -> HalfWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()

    def seek(self, *place: int) -> int:
        return self._stream.seek(*place)

    def truncate(self, size: int) -> int:
        return self._stream.truncate(size)

    def write(self, data: bytes) -> int:
        return self._stream.write(data[: len(data) // 2])


def test_a_save_pauses_only_if_it_still_takes_less_than_half_of_the_time() -> None:
    pacer, begin = Pacer(), time.perf_counter()
    pacer.begin(0.0, num_bytes=10**8)  # on a GPU, or with no time to lose
    for _ in range(100):
        pacer(0.01)
    assert time.perf_counter() - begin < 0.1
    begin = time.perf_counter()
    pacer.begin(0.8, num_bytes=10**8)  # the last one worked for a second: no pause would be short enough
    pacer(0.1)
    assert time.perf_counter() - begin < 0.05
    begin = time.perf_counter()
    pacer.begin(0.8, num_bytes=10**8)  # and then for a tenth of one: it may pause for three tenths
    pacer(0.05)
    pacer(0.05)
    assert 0.25 < time.perf_counter() - begin < 0.6
    begin = time.perf_counter()
    pacer.hurry.set()
    pacer(0.1)
    assert time.perf_counter() - begin < 0.1


# An unexpected exception.


@pytest.mark.parametrize(("raised_in", "is_saved"), [("loss", True), ("optimizer", False)])
def test_an_unexpected_exception_leaves_a_checkpoint_of_the_last_complete_update(
    tmp_path: Path, text_file: Path, raised_in: str, is_saved: bool
) -> None:
    """Not so in the optimizer's step, where the weights are between two updates."""
    explicit = layer(tmp_path / "run", text_file)
    run = run_for(explicit)

    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("a bug")

    def break_it() -> None:
        if run.state.step == 3:
            part = run.learner.objective if raised_in == "loss" else run.optimizer
            setattr(part, "forward" if raised_in == "loss" else "step", broken)

    on_updates(run, before=break_it)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        train(run)
    saved = tmp_path / "run" / "atlas_interrupt_step_3.pt"
    assert saved.exists() == is_saved
    if is_saved:
        run.checkpoints.lock.release()
        trained(explicit, resume="auto")
        never_stopped, _ = trained(layer(tmp_path / "other", text_file))
        ends = [load_checkpoint(tmp_path / name / "atlas_step_6.pt") for name in ("run", "other")]
        for key in ("model_state_dict", "optimizer_state_dict", "loss"):
            assert same_bits(ends[0][key], ends[1][key])
        assert never_stopped.state.step == 6
