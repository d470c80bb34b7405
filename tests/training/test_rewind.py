"""`metrics.jsonl` is cut back to a step, and no record is lost or doubled, whatever interrupts it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from atlas.training.logs import rewind as module
from atlas.training.logs.rewind import rewind

SEPARATOR = "line\u2028separator"


def record(step: int, **facts: object) -> str:
    return json.dumps({"kind": "train", "step": step, **facts}, ensure_ascii=False) + "\n"


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    metrics = tmp_path / "metrics.jsonl"
    records = [record(1), record(2, text=SEPARATOR), record(3, text=SEPARATOR), record(4)]
    metrics.write_text("".join(records), encoding="utf-8")
    return metrics, tmp_path / "metrics.lost.jsonl"


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.mark.parametrize("torn", ["", '{"kind": "tra', "[" * 200_000 + "\n"])
def test_records_after_the_step_move(files: tuple[Path, Path], torn: str) -> None:
    metrics, lost = files
    with metrics.open("a", encoding="utf-8") as file:
        file.write(torn)
    rewind(metrics, lost, 2)
    assert steps(metrics) == [1, 2]
    moved = lost.read_text(encoding="utf-8")
    assert moved == record(3, text=SEPARATOR) + record(4) + torn
    rewind(metrics, lost, 2)
    assert (steps(metrics), lost.read_text(encoding="utf-8")) == ([1, 2], moved)
    rewind(metrics, lost, -1)
    assert metrics.read_bytes() == b""


def test_the_event_of_a_save_comes_after_later_records(files: tuple[Path, Path]) -> None:
    """A save in the background ends while the next updates are logged."""
    metrics, lost = files
    event = json.dumps({"kind": "event", "event": "save", "step": 2}) + "\n"
    with metrics.open("a", encoding="utf-8") as file:
        file.write(event)
    rewind(metrics, lost, 2)
    assert steps(metrics) == [1, 2, 2]
    assert metrics.read_text(encoding="utf-8").endswith(event)
    assert steps(lost) == [3, 4]


def test_a_kill_between_the_two_files_doubles_nothing(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics, lost = files
    lost.write_text(record(9) + '{"torn', encoding="utf-8")

    def killed(*paths: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.shutil, "copyfile", killed)
    with pytest.raises(KeyboardInterrupt):
        rewind(metrics, lost, 2)
    assert steps(metrics) == [1, 2, 3, 4]
    monkeypatch.undo()
    assert shutil.copyfile is not killed
    rewind(metrics, lost, 2)
    assert steps(metrics) == [1, 2]
    assert lost.read_text(encoding="utf-8").split("\n")[:2] == [record(9).strip(), '{"torn']
    assert lost.read_text(encoding="utf-8").endswith("\n" + record(3, text=SEPARATOR) + record(4))
    assert lost.read_text(encoding="utf-8").count(SEPARATOR) == 1


def test_only_the_end_of_a_long_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of weeks has hundreds of megabytes of records, and a resume needs the last few."""
    metrics, lost = tmp_path / "metrics.jsonl", tmp_path / "metrics.lost.jsonl"
    metrics.write_text("".join(map(record, range(10_000))), encoding="utf-8")
    parsed, loads = [], json.loads
    monkeypatch.setattr(module.json, "loads", lambda text: (parsed.append(text), loads(text))[1])
    rewind(metrics, lost, 9_990)
    assert len(parsed) == 10  # the nine that move, and the first that stays
    monkeypatch.undo()
    assert steps(metrics) == list(range(9_991))
    assert steps(lost) == list(range(9_991, 10_000))
