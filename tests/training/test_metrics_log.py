"""How a resumed run cuts `metrics.jsonl` back, whatever the file has become."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import pytest

from atlas.errors import AtlasError
from atlas.files import open_regular, try_to_lock
from atlas.training.logs import rewind
from atlas.training.logs.run_log import RunLog


def update(step: int) -> bytes:
    return json.dumps({"kind": "train", "step": step, "loss": 1.5}).encode() + b"\n"


def rewound(folder: Path, lines: list[bytes], step: int) -> tuple[bytes, bytes]:
    """What is kept of these lines, and what is moved away."""
    (folder / "metrics.jsonl").write_bytes(b"".join(lines))
    RunLog(folder).rewind(step)
    lost = folder / "metrics.lost.jsonl"
    return (folder / "metrics.jsonl").read_bytes(), lost.read_bytes() if lost.exists() else b""


def test_records_up_to_the_step_stay_in_order_also_behind_later_ones(tmp_path: Path) -> None:
    save = b'{"kind": "event", "event": "save", "step": 2}\n'  # of a save in the background
    kept, lost = rewound(tmp_path, [update(1), update(2), update(3), save, update(4)], 2)
    assert kept == update(1) + update(2) + save
    assert lost == update(3) + update(4)


def test_a_line_separator_in_a_sample_does_not_end_its_line(tmp_path: Path) -> None:
    text = "before\u2028after\u0085end\x0c"
    RunLog(tmp_path).samples(1, "", [text])
    sample = (tmp_path / "metrics.jsonl").read_bytes()
    kept, lost = rewound(tmp_path, [update(1), sample, update(2)], 1)
    assert json.loads(kept.split(b"\n")[1])["text"] == text
    assert lost == update(2)


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 200_000,
        b'{"kind": "train", "step": NaN}',
        b'{"kind": "train", "step": 1e999}',
        b'{"kind": "train", "step": 1' + b"0" * 4000 + b"}",
        b'{"kind": "train", "step": [1]}',
        b'{"kind": "train"}',
        b"\xff\xfe",
    ],
    ids=lambda line: line[:40].decode(errors="replace"),
)
def test_a_line_that_is_no_record_moves_away(tmp_path: Path, line: bytes) -> None:
    assert rewound(tmp_path, [update(1), line + b"\n", update(2)], 1) == (update(1), line + b"\n" + update(2))


def test_a_line_that_a_kill_cut_moves_away(tmp_path: Path) -> None:
    whole = update(2)
    for cut in (whole[:-1], whole[:-9]):
        (tmp_path / "metrics.lost.jsonl").unlink(missing_ok=True)
        assert rewound(tmp_path, [update(1), cut], 5) == (update(1), cut + b"\n")


def test_a_kill_between_the_two_files_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the file of lost records ends with an incomplete line."""
    lines = [update(1), update(2), update(3)]
    (tmp_path / "metrics.lost.jsonl").write_bytes(update(9) + b'{"torn')

    def killed(*paths: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(rewind.shutil, "copyfile", killed)
        with pytest.raises(KeyboardInterrupt):
            rewound(tmp_path, lines, 1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(lines)
    expected = update(9) + b'{"torn\n' + update(2) + update(3)
    assert rewound(tmp_path, lines, 1) == (update(1), expected)


def test_a_power_cut_in_the_file_of_lost_records_doubles_nothing(tmp_path: Path) -> None:
    """It may leave any beginning of what was appended, while `metrics.jsonl` is as before."""
    lines = [update(1), update(2), update(3), update(4)]
    moved = b"".join(lines[1:])
    for before in (b"", update(9)):
        for length in range(len(moved) + 1):
            (tmp_path / "metrics.lost.jsonl").write_bytes(before + moved[:length])
            assert rewound(tmp_path, lines, 1) == (update(1), before + moved)


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path) -> None:
    lines = [update(step) for step in range(1, 400_001)]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines))
    log = RunLog(tmp_path)
    tracemalloc.start()
    try:
        log.rewind(399_990)
        assert tracemalloc.get_traced_memory()[1] < 6 << 20  # the log has 20 MB
    finally:
        tracemalloc.stop()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(lines[:-10])
    assert (tmp_path / "metrics.lost.jsonl").read_bytes() == b"".join(lines[-10:])


@pytest.mark.skipif(os.name == "nt", reason="makes links")
def test_a_hard_link_to_the_log_keeps_all_records(tmp_path: Path) -> None:
    lines = [update(1), update(2)]
    (tmp_path / "backup").write_bytes(b"".join(lines))
    os.link(tmp_path / "backup", tmp_path / "metrics.jsonl")
    RunLog(tmp_path).rewind(1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == lines[0]
    assert (tmp_path / "backup").read_bytes() == b"".join(lines)


@pytest.mark.skipif(os.name == "nt", reason="makes pipes and links")
def test_logs_and_locks_are_opened_without_waiting_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    (tmp_path / "link").symlink_to(tmp_path / "missing")
    for name in ("metrics.jsonl", "link"):
        for mode in ("ab", "rb", "rb+"):
            with pytest.raises(OSError, match="is not a regular file"):
                open_regular(tmp_path / name, mode)
        with pytest.raises(OSError, match="is not a regular file"):
            try_to_lock(tmp_path / name)
    assert not (tmp_path / "missing").exists()
    with pytest.raises(
        AtlasError, match=r"metrics\.jsonl: cannot be cut back to step 1 \(is not a regular file\)"
    ):
        RunLog(tmp_path).rewind(1)
