"""The logs of a run: a progress bar or lines on the console, and the files `training.log` and `metrics.jsonl`."""

from __future__ import annotations

import errno
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from atlas.files import encodable, explain_failed_write, open_regular
from atlas.streams import lost_streams, protect_streams
from atlas.training.logs.rewind import rewind
from atlas.training.logs.trackers import Tracker


def perplexity(loss: float) -> float:
    """exp(loss), or infinity if exp(loss) would overflow."""
    return math.exp(loss) if loss < 700 else math.inf


_BLOCK = 1 << 20  # bytes
_LONGEST_UPDATE = 1 << 16
"""More bytes than the record of an update has."""
_WAIT_WORTH_SHOWING = 0.01
"""The smallest share of a step's time at which the log shows the wait for data."""


class RunLog:
    """Writes the logs of a run to the console, and to `training.log` (append-only) and `metrics.jsonl` in the output
    folder.

    `trackers` get the same records as `metrics.jsonl`. Every rank except the first writes only lines, to
    `training.rank-N.log`.
    """

    def __init__(self, folder: Path, *, rank: int = 0) -> None:
        self.trackers: list[Tracker] = []
        folder.mkdir(parents=True, exist_ok=True)
        self._is_first = rank == 0
        protect_streams("stderr")
        self.console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=rank > 0)
        self._reported: list[str] = []
        self.log_path = folder / (f"training.rank-{rank}.log" if rank else "training.log")
        self.metrics_path = folder / "metrics.jsonl"
        self._log = _AppendedFile(self.log_path, self._print)
        self._metrics = _AppendedFile(self.metrics_path, self._print)
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def say(self, line: str) -> None:
        """Write one line for the user to the console and to `training.log`."""
        self._print(line)
        self._write_to_log(line)

    def _print(self, line: str) -> None:
        # A signal handler may print while the same thread prints. Python then raises "reentrant call".
        with suppress(RuntimeError):
            self.console.print(encodable(line), markup=False)

    def _write_to_log(self, line: str) -> None:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        for lost in lost_streams():
            if lost not in self._reported:
                self._reported.append(lost)
                self._log.append(f"{now} {lost}: the run continues without it, and its log is in this file")
        self._log.append(f"{now} {line}")

    def is_untouched(self) -> bool:
        """Return whether `training.log` is as this run left it. Another run in this folder would have written to it, or
        moved it away."""
        return self._log.is_untouched()

    def rewind(self, step: int) -> None:
        """Move the records after `step` from `metrics.jsonl` to the end of `metrics.lost.jsonl`.

        A killed run may have logged steps after its last checkpoint. The resumed run trains and logs these steps again.
        """
        for tracker in self.trackers:
            tracker.rewind(step)
        self._metrics.write_waiting(wait=True)
        if not self._is_first:
            return
        problem = f"cannot be cut back to step {step}"
        with explain_failed_write(self.metrics_path, "check the file and the disk", problem=problem):
            rewind(self.metrics_path, self.metrics_path.with_name("metrics.lost.jsonl"), step)

    def flush_to_disk(self) -> None:
        """Flush `metrics.jsonl` to the disk before a checkpoint is written. After a power cut, the log must contain all
        steps up to the checkpoint."""
        self._metrics.write_waiting(wait=True)
        with suppress(OSError), open_regular(self.metrics_path, "ab") as file:
            os.fsync(file.fileno())

    @contextmanager
    def tracked(self) -> Iterator[None]:
        """A context for a run. When the run ends, the trackers get some time to finish, unless Ctrl-C ended the run."""
        try:
            yield
        except KeyboardInterrupt:
            self.trackers.clear()
            raise
        finally:
            for tracker in self.trackers:
                tracker.close()

    @contextmanager
    def progress(self, *, done: int, total: int | None) -> Iterator[None]:
        """A context that shows the progress of the updates as a bar, if the console is a terminal. Otherwise `train`
        prints lines."""
        if not self.console.is_terminal:
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        )
        # With `expand`, the bar fills the rest of the line.
        progress = self._progress = Progress(*columns, console=self.console, expand=True)
        self._task = progress.add_task("training", total=total, completed=done, status="")
        progress.start()
        try:
            yield
        finally:
            progress.stop()
            self._progress = None

    def total(self, total: int) -> None:
        """Set the number of updates of the run."""
        if self._progress:
            self._progress.update(self._task, total=total)

    def advance(self, step: int) -> None:
        """Move the progress bar to `step`."""
        if self._progress:
            self._progress.update(self._task, completed=step)

    def train(self, metrics: dict[str, Any], *, total: int | None) -> None:
        """Log a training record to `metrics.jsonl`, to `training.log`, and to the progress bar or the console. `total`
        is the number of updates of the run, if it is known."""
        self._record("train", metrics)
        status = (
            f"loss {metrics['loss']:.4f}  ppl {_large(metrics['perplexity'])}  {metrics['steps_per_second']:.2f} it/s  "
            f"{metrics['tokens_per_second']:,.0f} tok/s  lr {metrics['learning_rate']:.2e}"
        )
        if metrics["data_wait"] >= _WAIT_WORTH_SHOWING:
            status += f"  waiting for data {metrics['data_wait']:.0%}"
        place = metrics["step"] if total is None else f"{metrics['step']}/{total}"
        line = f"step {place}  {status}"
        if self._progress:
            self._progress.update(self._task, status=status)
            self._write_to_log(line)
        else:
            left = None if total is None else (total - metrics["step"]) / metrics["steps_per_second"]
            self.say(line if left is None else f"{line}  ETA {_duration(left)}")

    def validation(self, metrics: dict[str, Any], *, note: str = "") -> None:
        """Log an evaluation record to `metrics.jsonl`, to `training.log`, and to the console."""
        self._record("validation", metrics)
        self.say(
            f"step {metrics['step']}: validation loss {metrics['val_loss']:.4f}, perplexity "
            f"{_large(metrics['val_perplexity'])}, {metrics['bits_per_byte']:.3f} bits per byte{note}"
        )

    def event(self, event: str, step: int, **facts: Any) -> None:
        """Log an event, such as a save, to `metrics.jsonl`."""
        self._record("event", {"event": event, "step": step, **facts})

    def samples(self, step: int, prompt: str, texts: Sequence[str]) -> None:
        """Log the completions of `prompt`, with one record per completion."""
        for number, text in enumerate(texts):
            self._record("sample", {"step": step, "number": number, "prompt": prompt, "text": text})

    def _record(self, kind: str, facts: dict[str, Any]) -> None:
        if not self._is_first:
            return
        record = {key: None if _is_not_finite(value) else value for key, value in facts.items()}
        self._metrics.append(json.dumps({"kind": kind, **record}, ensure_ascii=False))
        for tracker in self.trackers:
            tracker.record(kind, record)


class _AppendedFile:
    """Appends lines to a file. If the disk is full, the lines wait in memory, and training continues."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self._path = path
        self._say = say
        self._waiting: list[str] = []
        self._is_full = False
        self._lock = threading.Lock()  # the thread that saves in the background also logs lines
        self._left_as: tuple[int, int] | None = None  # inode and size after the last write
        self._was_touched = False

    def is_untouched(self) -> bool:
        """Return whether no other process has replaced this file, or written to it, since the first line. A file that
        was removed counts as untouched."""
        with self._lock, suppress(OSError):
            self._compare(self._path.stat())
        self.write_waiting()  # lines of a signal handler that came meanwhile
        return not self._was_touched

    def _compare(self, found: os.stat_result) -> None:
        if self._left_as and self._left_as != (found.st_ino, found.st_size):
            self._was_touched = True

    def append(self, line: str) -> None:
        """Append a line to the file, or keep the line in memory until it can be written. A signal handler may call this
        method while the same thread writes a line."""
        self._waiting.append(line + "\n")
        self.write_waiting()

    def write_waiting(self, *, wait: bool = False) -> None:
        """Write all waiting lines, in order. If another call is writing, that call writes the lines instead. With
        `wait`, return when it has written them."""
        while self._waiting and self._lock.acquire(blocking=wait):
            try:
                if not self._write(self._waiting[:]):
                    return
            finally:
                self._lock.release()

    def _write(self, lines: list[str]) -> bool:
        """Write `lines`, the first of the waiting lines, and return whether this succeeded."""
        # A path that is not UTF-8 has lone surrogates, which become escapes. JSON has the same escapes.
        data = "".join(lines).encode("utf-8", "backslashreplace")
        try:
            with suppress(FileNotFoundError):
                self._compare(self._path.stat())
            with open_regular(self._path, "ab", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                if file.write(data) != len(data):
                    file.truncate(end)  # leave no incomplete line
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._left_as = os.fstat(file.fileno()).st_ino, end + len(data)
        except OSError as error:
            if not self._is_full:
                self._say(f"{self._path}: cannot be written ({error.strerror}); its lines wait in memory")
            self._is_full = True
            return False
        self._is_full = False
        del self._waiting[: len(lines)]
        return True


def _is_not_finite(value: Any) -> bool:
    """Whether `value` is NaN or infinite, which JSON cannot hold."""
    return isinstance(value, float) and not math.isfinite(value)


def _large(number: float) -> str:
    """Format a perplexity. A diverged model's perplexity can have hundreds of digits."""
    return f"{number:,.1f}" if number < 1e9 else f"{number:.1e}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
