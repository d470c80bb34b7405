"""SIGTERM where the loop does not read the flag: in a compiler, in an evaluation, and a second one while saving."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from atlas.training.checkpoint.load import load_checkpoint
from atlas.training.devices import signals
from atlas.training.devices.signals import Stopped, StopRequest
from tests.runs import layer, logged, start_process, trained, write_config

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to send")


def wait_for(process: subprocess.Popen[str], words: str) -> list[str]:
    """Read the process's lines up to the one with these words."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        if words in line:
            return lines
    raise AssertionError("".join(lines))


def terminate(process: subprocess.Popen[str]) -> tuple[float, str]:
    """Send SIGTERM; the seconds until the process ended, and its standard error."""
    begin = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    return time.perf_counter() - begin, said


@pytest.mark.slow
def test_sigterm_in_an_evaluation_is_answered_and_the_evaluation_done_on_resume(
    tmp_path: Path, text_file: Path
) -> None:
    explicit = layer(
        tmp_path / "run", text_file, model__hidden_size=64, training__max_steps=3, training__eval_interval=2
    )
    explicit["training"].update(eval_sequences=60, eval_batch_size=1)
    explicit["model"]["num_layers"] = 60  # an evaluation takes long beside two updates
    process = start_process(write_config(tmp_path / "c.yaml", explicit), OMP_NUM_THREADS="1")
    wait_for(process, "step 2/3")
    seconds, said = terminate(process)
    assert process.returncode == 130, said
    assert seconds < 10
    assert "validation loss" not in said  # it was in the evaluation
    assert load_checkpoint(tmp_path / "run" / "atlas_interrupt_step_2.pt")["evaluated_at"] == 0
    trained(explicit, resume="auto")
    assert [line["step"] for line in logged(tmp_path / "run", "validation")] == [2, 3]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("seconds", [0.2, 4.0])
def test_sigterm_in_the_first_compile_saves_within_ten_seconds(
    tmp_path: Path, text_file: Path, seconds: float
) -> None:
    explicit = layer(tmp_path / "run", text_file, model__hidden_size=128, training__compile="on")
    config = write_config(tmp_path / "c.yaml", explicit)
    process = start_process(config, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"))
    wait_for(process, "checkpoints:")
    time.sleep(seconds)
    took, said = terminate(process)
    assert process.returncode == 130, said
    assert took < 10
    saved = tmp_path / "run" / "atlas_interrupt_step_0.pt"
    assert saved.exists() or seconds < 1  # before the first update's work begins, there is nothing to save
    process = start_process(config, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"))
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert [line["step"] for line in logged(tmp_path / "run")] == list(range(1, 7))


def test_a_rank_takes_two_signals_in_a_row_as_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm signals each process of a job, and torchrun passes its own signal on."""
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    with StopRequest(is_alone=False) as stop:
        for now[0] in (100.0, 100.1, 103.0):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
        now[0] = 120.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_request_raises_only_inside_the_context() -> None:
    stop = StopRequest()
    with stop:
        with stop.at_once(enabled=False):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        stop.asked = stop.requested = False
        with pytest.raises(Stopped), stop.at_once():
            os.kill(os.getpid(), signal.SIGTERM)
        stop.asked = stop.requested = False
        os.kill(os.getpid(), signal.SIGTERM)  # outside again
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
