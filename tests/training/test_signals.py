"""Killed and terminated at any moment: what a command leaves, and what the next one makes of it."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from atlas.cli import main
from atlas.data import open_dataset
from atlas.training.logs.run_log import _AppendedFile

REPOSITORY = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")


def start(*arguments: object, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    """`atlas ARGUMENTS` in a process group of its own, as a shell or a batch system starts it."""
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "RAYON_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
        "ATLAS_CACHE_DIR": str(cwd / "cache"),
        **environment,
    }
    return subprocess.Popen(
        [sys.executable, "-m", "atlas", *map(str, arguments)],
        cwd=cwd,
        env=variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    return output, errors


def wait_for(happened: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def content(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def words(count: int) -> str:
    """Text with so many different words that a vocabulary of it takes its time."""
    rng = random.Random(5)
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=9)) for _ in range(count)]
    return "".join(" ".join(rng.choices(vocabulary, k=12)) + ".\n" for _ in range(count // 4))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, and below `whole/` the dataset that an undisturbed call makes of it."""
    folder = tmp_path_factory.mktemp("signals")
    (folder / "text").mkdir()
    text = words(60_000)
    for number in range(30):
        part = slice(number * len(text) // 30, (number + 1) * len(text) // 30)
        (folder / "text" / f"{number:02d}.txt").write_text(text[part], encoding="utf-8")
    here(*PREPARE, "whole/set", cwd=folder)
    return folder


def here(*arguments: object, cwd: Path) -> None:
    """The same command in this process, undisturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setenv("ATLAS_CACHE_DIR", str(cwd / "cache"))
        assert main([str(argument) for argument in arguments]) == 0


PREPARE = ("prepare", "--input", "text", "--train-tokenizer", "2000", "--output")


LEARNING, WRITING = ".set.lock", ".set.preparing/journal.json"
"""What shows in the dataset's parent folder that the vocabulary is being learnt, or that it is learnt and
the text is read again."""


@pytest.mark.parametrize("moment", [pytest.param(LEARNING, marks=pytest.mark.slow), WRITING])
def test_sigterm_in_prepare_and_the_next_call_makes_the_same(moment: str, place: Path) -> None:
    folder = place / f"terminated-{moment[-8:]}"
    for _ in range(5):
        process = start(*PREPARE, folder / "set", cwd=place)
        wait_for(lambda: any(folder.glob(moment)), process)
        if moment == LEARNING:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        output, errors = process.communicate(timeout=20)
        if not (folder / "set").exists():
            break
        shutil.rmtree(folder)  # the signal came too late
    assert (process.returncode, output) == (130, "")
    assert time.monotonic() - sent < 5
    if moment == LEARNING:
        assert errors == "interrupted\n"
        assert not folder.exists()
    else:  # the vocabulary is kept
        assert errors.endswith("the same command resumes it\ninterrupted\n")
        assert not (folder / "set").exists()
    here(*PREPARE, folder / "set", cwd=place)
    assert content(folder) == content(place / "whole")


@pytest.mark.parametrize("rounds", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_prepare_killed_at_random_moments(rounds: int, place: Path) -> None:
    """SIGKILL, in turn while it makes the dataset anew and while it replaces another one."""
    rng = random.Random(7)
    folder, older = place / f"killed-{rounds}", None
    for number in range(rounds):
        if number == rounds // 2:  # from now on the dataset of another text is to be replaced
            here("prepare", "--input", "text/00.txt", "--output", folder / "set", cwd=place)
            older = content(folder / "set")
        elif content(folder / "set") == content(place / "whole" / "set"):  # the kill came too late
            shutil.rmtree(folder / "set")
        (folder / LEARNING).unlink(missing_ok=True)
        process = start(*PREPARE, folder / "set", cwd=place)
        wait_for((folder / LEARNING).exists, process)
        time.sleep(rng.random() * 0.8)
        process.kill()
        process.communicate()
        if (folder / "set" / "dataset.json").exists():
            open_dataset(folder / "set", verify=True)
            assert content(folder / "set") in (older, content(place / "whole" / "set"))
    here(*PREPARE, folder / "set", cwd=place)
    assert content(folder) == content(place / "whole")


def test_sigterm_while_train_prepares_its_text(place: Path) -> None:
    folder = place / "trained"
    folder.mkdir()
    command = ["train", "--train-data", place / "text", "--output-dir", "run", "--device", "cpu"]
    for setting in ("hidden_size=8", "num_layers=1", "num_heads=1", "max_seq_len=8"):
        command += ["--set", f"model.{setting}"]
    command += ["--set", "training.warmup_steps=1", "--max-steps", "2", "--batch-size", "1"]
    datasets = folder / "cache" / "datasets"
    process = start(*command, cwd=folder)
    wait_for(lambda: any(datasets.glob(".*.preparing")), process)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=20)
    assert (process.returncode, output, errors) == (130, "", "interrupted\n")
    assert {path for path in content(folder) if "hashes.sqlite" not in path} == set()
    here(*command, cwd=folder)
    assert (folder / "run" / "atlas_step_2.pt").exists()
    (made,) = datasets.iterdir()
    open_dataset(made, verify=True)


def test_two_at_once_make_one_dataset(place: Path) -> None:
    """The second waits for the first and finds its work done."""
    folder = place / "two"
    first = start(*PREPARE, folder / "set", cwd=place)
    wait_for((folder / LEARNING).exists, first)
    time.sleep(0.1)  # the file is there a moment before it is locked
    first.send_signal(signal.SIGSTOP)
    second = start(*PREPARE, folder / "set", cwd=place)
    assert second.stderr is not None
    assert "another process prepares this dataset; waiting" in second.stderr.readline()
    first.send_signal(signal.SIGCONT)
    assert "unchanged" not in finish(first)[1]
    assert "unchanged: the same text" in finish(second)[1]
    assert content(folder) == content(place / "whole")


def test_a_file_that_cannot_grow_is_one_line_and_leaves_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The system's own limit on a file's size fails as a full disk does, in the middle of a write."""
    resource = pytest.importorskip("resource")
    monkeypatch.chdir(place)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        code = main([*PREPARE, "limited/set"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    output, errors = capsys.readouterr()
    expected = "error: limited/set: File too large; check its permissions and the free space\n"
    assert (code, output, errors) == (2, "", expected)
    assert not (place / "limited").exists()


def test_sigterm_at_a_prompt(place: Path) -> None:
    fixtures = REPOSITORY / "tests" / "fixtures"
    path = next(fixtures.rglob("*.pt"))
    process = start("generate", "--checkpoint", path, "--interactive", "--max-tokens", "3", cwd=place)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("Once\n")
    process.stdin.flush()
    assert process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130, errors
    assert errors.endswith("interrupted\n")


def test_a_signal_may_come_while_a_line_of_the_log_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handler logs a line, and the lock of the file is held by the same thread: the run waited for ever."""
    file = _AppendedFile(tmp_path / "training.log", print)
    lines = iter(["second"])
    write = file._write

    def interrupted(waiting: list[str]) -> bool:
        for line in lines:
            file.append(line)
        return write(waiting)

    monkeypatch.setattr(file, "_write", interrupted)
    thread = threading.Thread(target=file.append, args=("first",), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert (tmp_path / "training.log").read_text() == "first\nsecond\n"
