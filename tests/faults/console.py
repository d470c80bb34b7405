"""Standard streams that fail, and SIGHUP: closed pipes and terminals, full disks, streams that are not there.

    python -m tests.faults.console                         every command, many minutes
    python -m tests.faults.console --commands train info   these commands

A run must continue without its console: it must end with the same bits as a run with one, exit code 0, and a line in
`training.log`. Any other command must exit with 2 and one line on the other stream if its result is lost. If only its
messages are lost, it must give its result. No command may print a traceback, or write a stream's text to another file.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import corpus
from tests.faults.runs import PATIENCE_S, Broken, command, hard_run, sound_checkpoints
from tests.runs import REPOSITORY, assert_same_run, layer, write_config

STEPS = 6
REASONS = {
    "EPIPE": "Broken pipe",
    "EIO": "Input/output error",
    "ENOSPC": "No space left on device",
    "closed": "Bad file descriptor",
}
"""Fault of a stream → the reason that Atlas gives. On standard input, EPIPE is an empty input, and ENOSPC is a stream
that was opened for writing."""

Faults = dict[int, str]
"""Number of a stream (0, 1 or 2) → its fault. The other streams are intact."""

ALONE: list[Faults] = [{stream: fault} for stream in range(3) for fault in REASONS]
TOGETHER: list[Faults] = [
    dict.fromkeys(streams, fault) for fault in REASONS for streams in ((0, 1), (0, 2), (1, 2), (0, 1, 2))
]

COMMANDS = {
    "train": "train --config run.yaml --output-dir OUT",
    "info": "info data",
    "plan": "plan --config nano",
    "prepare": "prepare --input text.txt --tokenizer data --output OUT",
    "prepare-stdin": "prepare --input - --tokenizer data --output OUT",
    "generate": "generate --checkpoint MODEL --prompt The --seed 1",
    "generate-stdin": "generate --checkpoint MODEL --interactive --seed 1",
    "look": "look --checkpoint MODEL --prompt The",
    "evaluate": "evaluate --checkpoint MODEL --data data",
    "report": "report model --output OUT.html",
    "export": "export --checkpoint MODEL --format hf --output OUT",
    "checkpoint": "info MODEL",
    "doctor": "doctor",
    "help": "train --help",
    "version": "--version",
    "mistake": "train --config missing.yaml",
}
"""Name → words of a command. OUT is a new path, and MODEL a checkpoint."""
_SAME = 40
"""The number of characters with which each call of a command begins its output. Times and speeds come later."""


@dataclass(frozen=True)
class Ended:
    """A process that has ended: its exit code, what it wrote to its intact streams, and its output folder."""

    code: int
    out: str
    err: str
    result: Path


@contextlib.contextmanager
def _opened(stream: int, fault: str | None, intact: Path) -> Iterator[int]:
    """A descriptor with this fault. If the fault is "closed", the shell closes the descriptor."""
    if fault == "EPIPE":
        reader, writer = os.pipe()
        descriptor, other = (writer, reader) if stream else (reader, writer)
        os.close(other)
    elif fault == "EIO":
        master, descriptor = os.openpty()
        os.close(master)
    elif fault == "ENOSPC":
        descriptor = os.open("/dev/full", os.O_WRONLY)
    else:
        descriptor = os.open(intact, os.O_RDWR)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def call(words: str, faults: Faults, folder: Path, scratch: Path, *, unbuffered: bool = False) -> Ended:
    """Run `atlas WORDS` in `folder` with these faults. `scratch` receives what the command writes. `unbuffered` stands
    for `python -u`."""
    scratch.mkdir(parents=True)
    files = [scratch / name for name in ("in", "out", "err")]
    for path, text in zip(files, ("The\n", "", ""), strict=True):
        path.write_text(text, encoding="utf-8")
    result = scratch / "result"
    words = words.replace("OUT", str(result)).replace("MODEL", "model/atlas_best.pt")
    redirects = {0: "<&-", 1: ">&-", 2: "2>&-"}
    closed = " ".join(redirects[stream] for stream, fault in faults.items() if fault == "closed")
    shell = f"exec {shlex.join([sys.executable, '-m', 'atlas', *words.split()])} {closed}"
    environment = _environment(folder) | {"PYTHONUNBUFFERED": "1" * unbuffered}
    with contextlib.ExitStack() as stack:
        fds = [stack.enter_context(_opened(number, faults.get(number), files[number])) for number in range(3)]
        process = subprocess.Popen(
            ["sh", "-c", shell], cwd=folder, env=environment, stdin=fds[0], stdout=fds[1], stderr=fds[2]
        )
    try:
        code = process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise Broken(f"atlas {words}: hangs") from None
    out, err = (path.read_text(encoding="utf-8").replace(str(scratch), "") for path in files[1:])
    return Ended(code, out, err, result)


def _environment(folder: Path) -> dict[str, str]:
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "ATLAS_CACHE_DIR": str(folder / "cache")}
    return {**os.environ, **own, "COLUMNS": "80"}


def check_command(ended: Ended, faults: Faults, reference: Ended, *, reads_input: bool) -> None:
    """Raise `AssertionError` if a command other than `train` has not ended as promised."""
    errors = re.findall("^error: .*", ended.err, re.M)
    if 0 in faults and reads_input:
        assert ended.code in (0, 2), f"exit code {ended.code}"
        assert len(errors) == (ended.code == 2 and 2 not in faults), ended.err
    elif 1 in faults and reference.out:
        assert ended.code == 2, f"exit code {ended.code} although the result was lost"
        if 2 not in faults:
            assert len(errors) == 1, ended.err
            assert f"standard output: {REASONS[faults[1]]}" in errors[0], ended.err
    else:
        assert ended.code == reference.code, f"exit code {ended.code}: {ended.err}"
        assert 1 in faults or ended.out[:_SAME] == reference.out[:_SAME], f"another result: {ended.out}"


def check_run(ended: Ended, faults: Faults, reference: Ended) -> None:
    """Raise `AssertionError` or `Broken` if `train` has not continued without its console."""
    assert ended.code == 0, f"exit code {ended.code}: {ended.err}"
    sound_checkpoints(ended.result)
    assert_same_run(ended.result, reference.result, steps=STEPS)
    files = {path.name for path in ended.result.iterdir()}
    assert files == {path.name for path in reference.result.iterdir()}, sorted(files)
    log, intact = ((one.result / "training.log").read_text(encoding="utf-8") for one in (ended, reference))
    assert log.count("\n") == intact.count("\n") + (2 in faults), f"training.log has other lines: {log}"
    if 2 in faults:
        line = f" standard error: {REASONS[faults[2]]}: "
        assert line in log, "training.log does not say that the console is lost"


def streams(
    folder: Path, names: Sequence[str] = tuple(COMMANDS), cases: Sequence[Faults] = (*ALONE, *TOGETHER)
) -> list[str]:
    """Run each command with each of the cases. Return the counts as lines."""
    _prepare(folder, trains=any("MODEL" in COMMANDS[name] for name in names))
    references = {name: call(COMMANDS[name], {}, folder, folder / name / "intact") for name in names}

    def attempt(name: str, number: int) -> None:
        faults, reference = cases[number], references[name]
        try:
            scratch = folder / name / str(number)
            ended = call(COMMANDS[name], faults, folder, scratch, unbuffered=number % 2 == 1)
            assert not re.search("Traceback|Exception ignored", ended.err), ended.err[-200:]
            if name == "train":
                check_run(ended, faults, reference)
            else:
                check_command(ended, faults, reference, reads_input=name.endswith("-stdin"))
        except (AssertionError, Broken) as error:
            raise Broken(f"{name} with {faults}: {error!s:.200}") from None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        attempts = [pool.submit(attempt, name, number) for name in names for number in range(len(cases))]
    broken = [str(error) for done in attempts if (error := done.exception())]
    if broken:
        raise Broken(f"{len(broken)} of {len(attempts)} commands: " + "\n".join(broken))
    return [
        f"console: {len(attempts)} commands with failing streams ({len(cases)} cases × {', '.join(names)})",
        "  tracebacks: 0; runs that did not continue: 0; lost results without exit code 2 and a line: 0",
    ]


def hangups(folder: Path) -> list[str]:
    """Send SIGHUP to runs in the middle of an update. Return the counts as lines.

    A run must save and exit with code 130, as after SIGTERM. A second SIGHUP must not end it without saving, since the
    shell and the system may both send one. Under `nohup`, SIGHUP must do nothing. Each run must end with the same bits.
    """
    reference = hard_run(folder / "never", words=600)
    reference.finish()
    for name, signals, is_ignored in (("once", 1, False), ("twice", 2, False), ("nohup", 2, True)):
        run, stalls = hard_run(folder / name, words=600), folder / name / "stalls"
        previous = signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
        try:  # the process inherits whether SIGHUP is ignored
            process = run.start(ATLAS_TEST_STALL_AT="20", ATLAS_TEST_STALL_FILE=str(stalls))
        finally:
            signal.signal(signal.SIGHUP, previous)
        deadline = time.monotonic() + PATIENCE_S
        while not stalls.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        for _ in range(signals):
            process.send_signal(signal.SIGHUP)
            time.sleep(0.2)
        Path(f"{stalls}.go").touch()
        code = process.wait(PATIENCE_S)
        if code != (0 if is_ignored else 130):
            raise Broken(f"SIGHUP {name}: exit code {code}: {run.last_words()}")
        if not is_ignored:
            if not [*run.output.glob("atlas_interrupt_step_*.pt")]:
                raise Broken(f"SIGHUP {name}: nothing was saved: {run.last_words()}")
            run.finish("--resume", "auto")
        assert_same_run(run.output, reference.output, steps=40)
    return [
        "  SIGHUP once, twice and under nohup: saved with exit code 130, or ignored; the same bits at the end"
    ]


def _prepare(folder: Path, *, trains: bool) -> None:
    """Write a text, a dataset and the config of a run to `folder`, and a model if `trains` is true."""
    (folder / "text.txt").write_text(corpus(300), encoding="utf-8")
    explicit = layer(Path("model"), Path("data"), training__max_steps=STEPS, checkpoint__save_interval=3)
    explicit["data"] = {"train_data": "data"}
    write_config(folder / "run.yaml", explicit)
    steps = ["prepare --input text.txt --train-tokenizer 300 --output data", "train --config run.yaml"]
    for words in steps if trains else steps[:1]:
        arguments = [sys.executable, "-m", "atlas", *words.split()]
        subprocess.run(arguments, cwd=folder, env=_environment(folder), capture_output=True, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.console")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=[*COMMANDS])
    asked = parser.parse_args()
    return command("console", lambda folder: [*streams(folder, asked.commands), *hangups(folder)])


if __name__ == "__main__":
    sys.exit(main())
