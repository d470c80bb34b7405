"""Power cuts in a short form; `-m slow` runs a longer one, and kills at system calls. To run all of them:
`python -m tests.faults.syscalls` and `python -m tests.faults.power`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from atlas.data.prepare import workspace
from tests.faults.crash.disk_model import Disk, Recording, crashes, replay
from tests.faults.crash.scenes import PREPARATIONS
from tests.faults.crash.strace import no_strace_because, record
from tests.faults.power import cut_the_power
from tests.faults.runs import Broken
from tests.faults.syscalls import kill_at_each_call

OVER_AN_OLDER = [PREPARATIONS[1]]
needs_strace = pytest.mark.usefixtures("_strace")


@pytest.fixture
def _strace() -> None:
    if reason := no_strace_because():
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands run with an environment of their own; what they set is taken back."""
    for name in ("ATLAS_CACHE_DIR", "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.slow
def test_a_kill_at_any_change_of_names_leaves_a_dataset(tmp_path: Path) -> None:
    kill_at_each_call(tmp_path, scenes=OVER_AN_OLDER, once_each=True, without_strace=True)


@needs_strace
def test_a_power_cut_leaves_a_dataset(tmp_path: Path) -> None:
    cut_the_power(tmp_path, scenes=OVER_AN_OLDER, most=15, seed=1)


@needs_strace
@pytest.mark.slow
def test_a_kill_at_any_call_loses_nothing(tmp_path: Path) -> None:
    kill_at_each_call(tmp_path, once_each=True)


@needs_strace
@pytest.mark.slow
def test_a_power_cut_loses_nothing(tmp_path: Path) -> None:
    cut_the_power(tmp_path, most=20)


# The harness itself notices faults


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.slow
def test_a_replacement_in_pieces_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older dataset that is removed before the new one is in its place."""

    def in_pieces(new: Path, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)

    monkeypatch.setattr(workspace, "replace_folder", in_pieces)
    with pytest.raises(Broken, match=r"older dataset: .* lost or wrong"):
        kill_at_each_call(tmp_path, scenes=OVER_AN_OLDER, once_each=True, without_strace=True)


@needs_strace
@pytest.mark.slow
def test_a_missing_flush_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "flush_to_disk", lambda file: None)
    with pytest.raises(Broken, match=r"older dataset: .* lost or wrong"):
        cut_the_power(tmp_path, scenes=OVER_AN_OLDER, most=40, seed=1)


def states_of(folder: Path, *, flushes: bool) -> set[bytes | None]:
    """What may be in `name` after a crash of a replacement of its content "old" by "new!"."""
    (folder / "before").mkdir(parents=True)
    (folder / "before" / "name").write_bytes(b"old")
    shutil.copytree(folder / "before", folder / "recorded")

    def replace() -> int:
        with open("name.tmp", "wb") as file:
            file.write(b"new!")
            file.flush()
            if flushes:
                os.fsync(file.fileno())
        os.replace("name.tmp", "name")
        return 0

    _, calls = record(replace, folder / "recorded")
    recording = Recording(folder / "before", calls)
    assert recording.end == Disk.read(folder / "recorded").tree() == {"name": b"new!"}
    return {replay(recording, crash).get("name") for crash in crashes(recording.operations)}


@needs_strace
def test_the_model_of_the_disk_tears_what_was_not_flushed(tmp_path: Path) -> None:
    assert states_of(tmp_path / "flushed", flushes=True) == {b"old", b"new!"}
    assert states_of(tmp_path / "not", flushes=False) == {b"old", b"new!", b"", b"ne", bytes(4)}
