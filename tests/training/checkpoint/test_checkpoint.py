"""Checkpoints: a partial one is never used, a damaged one is never loaded, and no code in one runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from atlas.errors import AtlasError
from atlas.training.checkpoint import manager as module
from atlas.training.checkpoint import manifest
from atlas.training.checkpoint.load import load_checkpoint
from atlas.training.checkpoint.manager import CheckpointManager


def contents(step: int) -> dict:
    return {
        "format_version": 1,
        "model_state_dict": {"weight": torch.full((100,), float(step))},
        "optimizer_state_dict": {"state": {}, "param_groups": []},
        "config": {},
        "tokenizer": {},
        "data": {"fingerprint": "f"},
        "step": step,
        "epoch": 2,
        "loss": 1.0 / step,
        "sequences_consumed": step * 8,
        "horizon": 99,
    }


def save(manager: CheckpointManager, step: int, *kinds: str) -> list[Path]:
    return manager.save(contents(step), list(kinds) or ["step"])


def test_names_and_contents_are_those_of_the_faq(tmp_path: Path) -> None:
    written = save(CheckpointManager(tmp_path), 7, "step", "epoch", "best", "interrupt")
    assert [path.name for path in written] == [
        "atlas_step_7.pt",
        "atlas_epoch_2_step_7.pt",
        "atlas_best.pt",
        "atlas_interrupt_step_7.pt",
    ]
    assert {path.name for _, path in CheckpointManager(tmp_path).found()} == {path.name for path in written}
    loaded = CheckpointManager("elsewhere").load_checkpoint(tmp_path / "best_model.pt")
    assert (loaded["step"], loaded["loss"]) == (7, 1 / 7)
    assert torch.equal(loaded["model_state_dict"]["weight"], torch.full((100,), 7.0))


def test_a_real_best_model_wins_over_the_alias(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    save(manager, 3, "best")
    save(manager, 5)
    os.rename(tmp_path / "atlas_step_5.pt", tmp_path / "best_model.pt")
    assert load_checkpoint(tmp_path / "best_model.pt")["step"] == 5


def test_the_sidecar_names_size_and_hash_as_others_compute_them(tmp_path: Path) -> None:
    import hashlib

    save(CheckpointManager(tmp_path), 4)
    data = (tmp_path / "atlas_step_4.pt").read_bytes()
    entry = json.loads((tmp_path / "atlas_step_4.json").read_text())["files"][0]
    assert entry == {"name": "atlas_step_4.pt", "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_retention_counts_each_kind_and_never_the_best(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep_checkpoints=2)
    save(manager, 1, "best")
    for step in range(1, 6):
        save(manager, step, "step", "epoch", "interrupt")
    names = sorted(path.name for path in tmp_path.glob("*.pt"))
    assert names == [
        "atlas_best.pt",
        "atlas_epoch_2_step_4.pt",
        "atlas_epoch_2_step_5.pt",
        "atlas_interrupt_step_4.pt",
        "atlas_interrupt_step_5.pt",
        "atlas_step_4.pt",
        "atlas_step_5.pt",
    ]
    assert {path.stem for path in tmp_path.glob("*.json")} == {path.stem for path in tmp_path.glob("*.pt")}


def test_latest_goes_by_step_and_not_by_time_and_skips_what_is_damaged(tmp_path: Path) -> None:
    said: list[str] = []
    manager = CheckpointManager(tmp_path, say=said.append)
    for step in (9, 100, 20):
        save(manager, step)
    os.utime(tmp_path / "atlas_step_9.pt", (2e9, 2e9))
    assert manager.load_latest()[0].name == "atlas_step_100.pt"
    damage(tmp_path / "atlas_step_100.pt")
    assert manager.load_latest()[0].name == "atlas_step_20.pt"
    assert "atlas_step_100.pt" in said[0]
    (tmp_path / "atlas_step_20.json").unlink()
    assert manager.load_latest()[0].name == "atlas_step_9.pt"


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(torch.full((4,), 1.0 * data_step(path)).numpy().tobytes())] ^= 1
    path.write_bytes(data)


def data_step(path: Path) -> int:
    return int(path.stem.rsplit("_", 1)[-1])


def test_a_flipped_bit_is_found_with_and_without_sidecar(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    save(manager, 6)
    save(manager, 5)
    path = tmp_path / "atlas_step_6.pt"
    damage(path)
    torch.load(path, weights_only=True)  # PyTorch itself does not notice
    with pytest.raises(AtlasError, match=r"such as atlas_step_5\.pt"):
        load_checkpoint(path)
    (tmp_path / "atlas_step_6.json").unlink()
    with pytest.raises(AtlasError, match="damaged"):
        load_checkpoint(path)


def test_loading_an_intact_checkpoint_reads_no_other_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = CheckpointManager(tmp_path)
    for step in (1, 2, 3):
        save(manager, step)
    compare, read = manifest.sha256_of, []

    def noting(path: Path, advance: Callable[[int], None]) -> str:
        read.append(path.name)
        return compare(path, advance)

    monkeypatch.setattr(manifest, "sha256_of", noting)
    load_checkpoint(tmp_path / "atlas_step_1.pt")
    assert read == ["atlas_step_1.pt"]


def test_a_renamed_checkpoint_loads_with_a_note(tmp_path: Path) -> None:
    said: list[str] = []
    save(CheckpointManager(tmp_path), 6)
    os.rename(tmp_path / "atlas_step_6.pt", tmp_path / "mine.pt")
    assert load_checkpoint(tmp_path / "mine.pt", say=said.append)["step"] == 6
    assert "no sidecar" in said[0]


class _Stop(BaseException):
    """Stands for a kill: nothing after it runs, no handler catches it."""


def test_no_kill_while_a_name_is_overwritten_loses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Die before the n-th change of the file system, for every n: the old best or the new one is there, intact."""
    for moment in range(100):
        folder = tmp_path / str(moment)
        save(CheckpointManager(folder), 1, "best")
        with monkeypatch.context() as patch:
            calls = iter(range(1000))
            for owner, name in ((os, "replace"), (os, "fsync"), (module, "copy_file")):
                patch.setattr(owner, name, _dying(getattr(owner, name), calls, moment))
            killed = True
            try:
                save(CheckpointManager(folder), 2, "step", "best")
                killed = False
            except _Stop:
                pass
        found = {path.name: manifest for manifest, path in CheckpointManager(folder).found()}
        best = load_checkpoint(folder / "atlas_best.pt")
        assert best["step"] == found["atlas_best.pt"].step
        for path in folder.glob("atlas_step*.pt"):
            if path.with_suffix(".json").exists():
                assert load_checkpoint(path)["step"] == 2
        if not killed:
            assert best["step"] == 2
            assert moment > 10  # there were many moments to die in
            return
    raise AssertionError("the save never finished")


def _dying(function: Callable, calls: Iterator[int], moment: int) -> Callable:
    def call(*args, **kwargs):
        if next(calls) == moment:
            raise _Stop
        return function(*args, **kwargs)

    return call


def test_too_little_disk_skips_the_save_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    manager = CheckpointManager(tmp_path, say=said.append)
    save(manager, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert save(manager, 2) == []
    assert len(said) == 1
    assert "no checkpoint saved" in said[0]
    assert "Training continues; the newest checkpoint is atlas_step_1.pt" in said[0]
    assert manager.load_latest()[0].name == "atlas_step_1.pt"


def test_a_disk_that_fills_in_mid_write_leaves_no_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    manager = CheckpointManager(tmp_path, say=said.append)
    save(manager, 1)
    before = sorted(os.listdir(tmp_path))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert save(manager, 2) == []
    assert sorted(os.listdir(tmp_path)) == before
    assert "No space left" in said[0]


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    plain = tmp_path / "plain.pt"
    plain.write_bytes(pickle.dumps(_Bomb(ran)))
    zipped = tmp_path / "zipped.pt"
    torch.save({"format_version": 1, "x": _Bomb(ran)}, zipped)
    for path in (plain, zipped):
        with pytest.raises(AtlasError):
            load_checkpoint(path)
    assert not ran.exists()
    torch.load(zipped, weights_only=False)  # the bomb is live: an unsafe load would have run it
    assert ran.exists()


@pytest.mark.parametrize("size", [0, 10, 500, -1])
def test_a_truncated_checkpoint_is_refused(tmp_path: Path, size: int) -> None:
    save(CheckpointManager(tmp_path), 6)
    data = (tmp_path / "atlas_step_6.pt").read_bytes()
    cut = tmp_path / "cut.pt"
    cut.write_bytes(data[:size])
    with pytest.raises(AtlasError, match=r"cut\.pt"):
        load_checkpoint(cut)


@pytest.mark.parametrize(
    ("foreign", "reason"),
    [
        ({"weight": torch.zeros(2)}, "format_version"),
        ({**contents(1), "format_version": 99}, "update Atlas"),
        ({key: value for key, value in contents(1).items() if key != "config"}, "config is missing"),
        ([1, 2], "format_version"),
    ],
)
def test_a_foreign_file_is_refused_with_the_reason(tmp_path: Path, foreign: object, reason: str) -> None:
    path = tmp_path / "foreign.pt"
    torch.save(foreign, path)
    with pytest.raises(AtlasError, match=reason):
        load_checkpoint(path)


def test_other_zips_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(AtlasError, match="refused"):
        load_checkpoint(path)


def test_a_missing_checkpoint_names_the_existing_ones(tmp_path: Path) -> None:
    save(CheckpointManager(tmp_path), 6)
    with pytest.raises(AtlasError, match=r"atlas_step_6\.pt"):
        load_checkpoint(tmp_path / "atlas_step_7.pt")
    with pytest.raises(AtlasError, match="train a model first"):
        load_checkpoint(tmp_path / "nowhere" / "atlas_best.pt")
