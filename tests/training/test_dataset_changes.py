"""No checkpoint is saved on bytes of the dataset that differ from those that were prepared."""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from atlas.data import prepare
from atlas.data.sequences import verify
from atlas.errors import AtlasError
from atlas.files import cache_folder
from atlas.tokenizer import Tokenizer
from atlas.training.train import train
from tests.runs import assert_same_run, layer, on_updates, run_for, trained

STEPS = 8
TOKENIZER = Tokenizer.resolve("tests.toy:tokenizer")


@pytest.fixture
def dataset(tmp_path: Path, text_file: Path) -> Path:
    """A dataset of several shards, whose files are old enough for their hashes to be cached."""
    folder = prepare([text_file], tmp_path / "data", TOKENIZER, shard_tokens=4000).dataset.folder
    for path in folder.glob("*.npy"):
        os.utime(path, (1e9, 1e9))
    return folder


def run_on(dataset: Path, folder: Path, **settings: object) -> dict:
    return layer(folder, dataset, **{"training__max_steps": STEPS, "checkpoint__save_interval": 2} | settings)


def overwrite(path: Path) -> None:
    """Other valid ids, in place: size and inode stay, and the times are set back, as `cp -p` and `rsync -t` do."""
    before = path.stat()
    tokens = np.load(path, mmap_mode="r+")
    tokens[:] = tokens[::-1].copy()
    tokens.flush()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path: Path) -> None:
    np.save(path.with_name("other.npy"), np.load(path)[::-1])
    path.with_name("other.npy").replace(path)


def swap(path: Path) -> None:
    other = path.with_name("train-00001.npy")
    path.rename(path.with_name("third.npy"))
    other.rename(path)
    path.with_name("third.npy").rename(other)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def remove(path: Path) -> None:
    path.unlink()


CHANGES = [
    overwrite,
    *(pytest.param(change, marks=pytest.mark.slow) for change in (replace, swap, cut, remove)),
]


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_runs_ends_the_second(
    dataset: Path, tmp_path: Path, change: Callable[[Path], None], background: bool
) -> None:
    explicit = run_on(dataset, tmp_path / "run", checkpoint__background=background)
    whole = tmp_path / "whole"
    trained(run_on(dataset, whole))
    run = run_for(explicit)
    on_updates(run, after=lambda: setattr(run.stop, "requested", run.state.step == 4))
    train(run)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("atlas_*.pt")}
    shutil.copytree(dataset, tmp_path / "copy")
    change(dataset / "train-00000.npy")
    with pytest.raises(
        AtlasError, match=r"train-0000[01]\.npy: .*(prepare the dataset again|restore the file)"
    ):
        trained(explicit, resume="auto")
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("atlas_*.pt")}
    assert after == before
    shutil.rmtree(dataset)
    shutil.move(tmp_path / "copy", dataset)  # the same bytes in other files
    trained(explicit, resume="auto")
    assert_same_run(tmp_path / "run", whole, steps=STEPS)


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_during_a_run_ends_it_at_the_last_save(
    dataset: Path, tmp_path: Path, change: Callable[[Path], None], background: bool
) -> None:
    folder = tmp_path / "run"
    run = run_for(run_on(dataset, folder, checkpoint__background=background))

    def attack() -> None:
        if run.state.step == 5:
            run.saver.join()
            change(dataset / "train-00000.npy")

    on_updates(run, after=attack)
    with pytest.raises(AtlasError, match=r"train-0000[01]\.npy"):
        train(run)
    saved = [manifest.step for manifest, _ in run.checkpoints.found()]
    assert saved
    assert max(saved) <= 4  # in the background, the save at step 4 may be left out


def test_touching_and_copying_files_harms_nothing(dataset: Path, tmp_path: Path) -> None:
    run = run_for(run_on(dataset, tmp_path / "run"))

    def harmless() -> None:
        path = dataset / f"train-0000{run.state.step % 2}.npy"
        shutil.copy(path, tmp_path / "same.npy")
        os.replace(tmp_path / "same.npy", path)
        os.utime(dataset / "train-00001.docs.npy")

    on_updates(run, after=harmless)
    assert train(run).step == STEPS


def test_the_first_updates_do_not_wait_for_the_hashes(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But the first save does, and says so."""
    hashes_of = verify.hashes_of

    def slow(paths: object) -> list[str]:
        began.wait()  # no file is hashed before the second update has ended
        time.sleep(1.5)
        return hashes_of(paths)

    began = threading.Event()
    monkeypatch.setattr(verify, "hashes_of", slow)
    explicit = run_on(dataset, tmp_path / "run", checkpoint__background=True, checkpoint__save_interval=4)
    run = run_for(explicit)
    on_updates(run, after=lambda: run.state.step == 2 and began.set())
    train(run)
    log = (tmp_path / "run" / "training.log").read_text(encoding="utf-8")
    assert "the checkpoint waits until the bytes of the dataset are verified" in log


def test_a_known_dataset_is_not_read_again(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    time.sleep(2.1)  # a hash is cached for files that did not change just now
    trained(run_on(dataset, tmp_path / "one"))
    from atlas.data.text import hashes

    read: list[Path] = []
    monkeypatch.setattr(hashes, "sha256_of", lambda path, advance: read.append(path))
    trained(run_on(dataset, tmp_path / "two"))
    assert read == []


def test_a_changed_plan_of_packing_is_noticed(dataset: Path, tmp_path: Path) -> None:
    explicit = run_on(dataset, tmp_path / "run", data__packing="best_fit")
    run = run_for(explicit)
    plan = next(path for path, _ in run.data.train.files if path.name == "starts")
    on_updates(run, after=lambda: run.state.step == 3 and plan.write_bytes(bytes(plan.stat().st_size)))
    with pytest.raises(AtlasError, match=r"starts: this file of the plan .* has changed: remove the folder"):
        train(run)
    shutil.rmtree(plan.parent)
    assert trained(explicit, resume="auto")[1].step == STEPS


def test_preparing_again_repairs_a_dataset(dataset: Path, text_file: Path) -> None:
    """The remedy in the message."""
    before = (dataset / "train-00000.npy").read_bytes()
    overwrite(dataset / "train-00000.npy")
    assert (dataset / "train-00000.npy").read_bytes() != before
    summary = prepare([text_file], dataset, TOKENIZER, shard_tokens=4000)
    assert not summary.unchanged
    assert (dataset / "train-00000.npy").read_bytes() == before


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limit")
def test_more_shards_than_a_process_may_open(tmp_path: Path, text_file: Path) -> None:
    import resource

    folder = prepare([text_file], tmp_path / "data", TOKENIZER, shard_tokens=200).dataset.folder
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_now = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 64
    assert len(list(folder.glob("train-*.npy"))) > 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 40, hard))
    try:
        assert trained(run_on(folder, tmp_path / "run"))[1].step == STEPS
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_damaged_cache_of_hashes_ends_no_run(dataset: Path, tmp_path: Path) -> None:
    time.sleep(2.1)  # a hash is cached for files that did not change just now
    trained(run_on(dataset, tmp_path / "one"))
    cache = cache_folder() / "hashes.sqlite"
    whole = cache.read_bytes()
    cache.write_bytes(whole[:4096] + b"\x5a" * (len(whole) - 4096))
    assert trained(run_on(dataset, tmp_path / "two"))[1].step == STEPS
    with sqlite3.connect(cache) as wrong:
        wrong.execute("CREATE TABLE IF NOT EXISTS hashes (path BLOB PRIMARY KEY, stamp TEXT, sha256 TEXT)")
        wrong.execute("UPDATE hashes SET sha256 = 'wrong'")
    assert trained(run_on(dataset, tmp_path / "three"))[1].step == STEPS


def test_bytes_that_are_changed_and_restored_between_two_saves_are_noticed(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashing at the save alone would find the right bytes."""
    monkeypatch.setattr(verify, "_INTERVAL", 0.05)
    run = run_for(run_on(dataset, tmp_path / "run", checkpoint__save_interval=STEPS))
    shard = dataset / "train-00000.npy"
    before = shard.read_bytes()

    def change() -> None:
        if run.state.step == 3:
            overwrite(shard)
            deadline = time.monotonic() + 30
            while run.data.verifier._error is None and time.monotonic() < deadline:
                time.sleep(0.01)
            shard.write_bytes(before)

    on_updates(run, after=change)
    with pytest.raises(AtlasError, match="its content changed"):
        train(run)
    assert not [*(tmp_path / "run").glob("*.pt")]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")
def test_a_pipe_in_place_of_a_shard_ends_the_run(dataset: Path, tmp_path: Path) -> None:
    run = run_for(run_on(dataset, tmp_path / "run"))

    def change() -> None:
        if run.state.step == 3:
            for path in dataset.glob("train-?????.npy"):
                path.unlink()
                os.mkfifo(path)

    on_updates(run, after=change)
    with pytest.raises(AtlasError, match=r"cut during the run|changed since|cannot be read"):
        train(run)
