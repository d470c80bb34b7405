"""A run whose terminal is closed, or whose output is no longer read."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from atlas.config.loader import nested, overlay, read_yaml
from atlas.training.checkpoint.load import load_checkpoint
from tests.runs import REPOSITORY, config_flags, layer, logged, trained, write_config

pytestmark = pytest.mark.skipif(os.name == "nt", reason="uses pseudo-terminals and SIGHUP")

# The terminal controls the session, so that closing it sends SIGHUP as closing a window does.
TAKE_TERMINAL = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)"
HANGUP = "import signal; signal.signal(signal.SIGHUP, signal.{})"
RUN = "import sys; from atlas.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture
def config(tmp_path: Path, text_file: Path) -> Path:
    explicit = layer(tmp_path / "run", text_file, training__max_steps=60, checkpoint__save_interval=50)
    explicit["training"]["loss"] = "tests.toy:slow_loss"
    return write_config(tmp_path / "c.yaml", explicit)


@pytest.fixture
def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "TERM": "xterm"}


@contextmanager
def at_a_terminal(
    config: Path, environment: dict[str, str], *, hangup: str = "SIG_DFL"
) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], None]]]:
    """`atlas train --resume auto` at a terminal, and what closes the terminal. `hangup` is how the process starts to
    handle SIGHUP; the tests themselves may run under nohup."""
    import pty

    master, slave = pty.openpty()
    code = "; ".join([HANGUP.format(hangup), TAKE_TERMINAL, RUN])
    command = [sys.executable, "-c", code, "train", *config_flags(config), "--resume", "auto"]
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
    )
    os.close(slave)
    read = b""
    while b"checkpoints:" not in read and (piece := _read(master)):
        read += piece
    time.sleep(0.3)  # some updates

    def close() -> None:
        with suppress(OSError):
            os.close(master)

    yield process, close
    close()
    process.wait(60)


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # the process has ended
        return b""


def test_a_run_outlives_the_reader_of_its_output(
    config: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """As in `atlas train 2>&1 | head -3`."""
    command = [sys.executable, "-m", "atlas", "train", *config_flags(config)]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    )
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 0
    log = (tmp_path / "run" / "training.log").read_text(encoding="utf-8")
    assert log.count("standard error: Broken pipe: the run continues without it") == 1
    assert "finished at step 60" in log
    assert [line["step"] for line in logged(tmp_path / "run")] == list(range(1, 61))
    assert load_checkpoint(tmp_path / "run" / "atlas_step_60.pt")["step"] == 60


def test_a_closed_terminal_saves_the_run_and_the_next_call_resumes_it(
    config: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    explicit = overlay(
        read_yaml(config), nested("training.max_steps", 2000)
    )  # longer than any pause of this process
    with at_a_terminal(write_config(config, explicit), environment) as (process, close):
        close()
        assert process.wait(60) == 130
    [interrupted] = (tmp_path / "run").glob("atlas_interrupt_step_*.pt")
    step = load_checkpoint(interrupted)["step"]
    assert 0 < step < 2000
    _, result = trained(overlay(explicit, nested("training.max_steps", step + 5)))
    assert result.step == step + 5
    assert [line["step"] for line in logged(tmp_path / "run")] == list(range(1, step + 6))


@pytest.mark.slow
def test_under_nohup_the_run_finishes_without_its_terminal(
    config: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    with at_a_terminal(config, environment, hangup="SIG_IGN") as (process, close):
        close()
        assert process.wait(60) == 0
    log = (tmp_path / "run" / "training.log").read_text(encoding="utf-8")
    assert log.count("standard error: Input/output error: the run continues without it") == 1
    assert "finished at step 60" in log
    assert [line["step"] for line in logged(tmp_path / "run")] == list(range(1, 61))
