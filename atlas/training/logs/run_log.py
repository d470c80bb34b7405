"""What a run says: a progress bar on a terminal, lines elsewhere, `training.log` and `metrics.jsonl` always."""

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

from atlas.errors import AtlasError
from atlas.training.logs.trackers import Tracker


def perplexity(loss: float) -> float:
    """exp(loss); infinite rather than an overflow for an absurd loss."""
    return math.exp(loss) if loss < 700 else math.inf


_WAIT_WORTH_SHOWING = 0.01
"""Of the time of a step."""


class _RunConsole(Console):
    def on_broken_pipe(self) -> None:
        """Rich would end the process here."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class RunLog:
    """The console, `training.log` (only ever appended to) and `metrics.jsonl` of one output folder; and `trackers`,
    which are given the very records of `metrics.jsonl`."""

    def __init__(
        self, folder: Path, *, console: Console | None = None, log_name: str = "training.log"
    ) -> None:
        self.trackers: list[Tracker] = []
        folder.mkdir(parents=True, exist_ok=True)
        self.console = console or _RunConsole(stderr=True, highlight=False, soft_wrap=True)
        self.log_path = folder / log_name
        self.metrics_path = folder / "metrics.jsonl"
        self._files = {
            path: _AppendedFile(path, self._console_only) for path in (self.log_path, self.metrics_path)
        }
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def say(self, line: str) -> None:
        """One line for the user, on the console and in `training.log`."""
        self._console_only(line)
        self._append(self.log_path, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}")

    def _console_only(self, line: str) -> None:
        with self._outliving_the_console():
            self.console.print(line, markup=False)

    @contextmanager
    def _outliving_the_console(self) -> Iterator[None]:
        """Around what is written to the console. When its terminal is closed, or `head` has read enough, the run
        continues without it, and `training.log` says so."""
        try:
            yield
        except OSError as error:
            with suppress(OSError, ValueError):
                # What else writes there, such as the progress bar, must not fail either.
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.console.file.fileno())
                os.close(nowhere)
            self.console = Console(quiet=True)
            reason = error.strerror or type(error).__name__
            line = (
                f"the console cannot be written to any more ({reason}): the run continues, and is logged here"
            )
            self._append(self.log_path, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}")

    def rewind(self, step: int) -> None:
        """Cut `metrics.jsonl` back to `step`; what is cut is appended to `metrics.lost.jsonl`.

        A killed run has logged steps that no checkpoint holds; they will be trained, and logged, again.
        """
        for tracker in self.trackers:
            tracker.rewind(step)
        self._files[self.metrics_path].write_waiting()
        if not self.metrics_path.exists():
            return
        kept: list[str] = []
        lost: list[str] = []
        for line in self.metrics_path.read_text(encoding="utf-8", errors="replace").splitlines():
            (kept if _step_of(line) <= step else lost).append(line + "\n")
        if lost:
            try:
                self._cut(kept, lost)
            except OSError as error:
                raise AtlasError(
                    f"{self.metrics_path}: cannot be cut back to step {step} ({error.strerror}): free some space"
                ) from None

    def _cut(self, kept: list[str], lost: list[str]) -> None:
        lost_path = self.metrics_path.with_name("metrics.lost.jsonl")
        with open(lost_path, "a", encoding="utf-8") as file:
            file.writelines(lost)
        temporary = self.metrics_path.with_name("metrics.jsonl.tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, self.metrics_path)

    def flush_to_disk(self) -> None:
        """Before a checkpoint is written: a power cut must not leave one whose steps the log does not hold."""
        self._files[self.metrics_path].write_waiting()
        with suppress(OSError), open(self.metrics_path, "ab") as file:
            os.fsync(file.fileno())

    @contextmanager
    def tracked(self) -> Iterator[None]:
        """Around a run: at its end the trackers are given a moment to finish, unless it ends at once."""
        try:
            yield
        except KeyboardInterrupt:
            raise
        except BaseException:
            self._close_trackers()
            raise
        self._close_trackers()

    def _close_trackers(self) -> None:
        for tracker in self.trackers:
            tracker.close()

    @contextmanager
    def progress(self, *, done: int, total: int | None) -> Iterator[None]:
        """A bar over the updates while on a terminal; elsewhere `train` prints lines instead."""
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
        # expand: the bar takes what the figures leave, whatever the terminal's width
        progress = self._progress = Progress(*columns, console=self.console, expand=True)
        self._task = progress.add_task("training", total=total, completed=done, status="")
        with self._outliving_the_console():
            progress.start()
        try:
            yield
        finally:
            with self._outliving_the_console():
                progress.stop()
            self._progress = None

    def total(self, total: int) -> None:
        if self._progress:
            self._progress.update(self._task, total=total)

    def advance(self, step: int) -> None:
        if self._progress:
            self._progress.update(self._task, completed=step)

    def train(self, metrics: dict[str, Any], *, total: int | None) -> None:
        """One training record: to `metrics.jsonl`, the bar or the console, and `training.log`. `total` is the number
        of updates of the whole run, if it is known."""
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
            self._append(self.log_path, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}")
        else:
            left = None if total is None else (total - metrics["step"]) / metrics["steps_per_second"]
            self.say(line if left is None else f"{line}  ETA {_duration(left)}")

    def validation(self, metrics: dict[str, Any], *, note: str = "") -> None:
        """One evaluation record."""
        self._record("validation", metrics)
        self.say(
            f"step {metrics['step']}: validation loss {metrics['val_loss']:.4f}, perplexity "
            f"{_large(metrics['val_perplexity'])}, {metrics['bits_per_byte']:.3f} bits per byte{note}"
        )

    def event(self, event: str, step: int, **facts: Any) -> None:
        """Something that is not an update or an evaluation, for `metrics.jsonl`."""
        self._record("event", {"event": event, "step": step, **facts})

    def samples(self, step: int, prompt: str, texts: Sequence[str]) -> None:
        """What the model wrote after `prompt`, a record a text."""
        for number, text in enumerate(texts):
            self._record("sample", {"step": step, "number": number, "prompt": prompt, "text": text})

    def _record(self, kind: str, facts: dict[str, Any]) -> None:
        record = finite(facts)
        self._append(self.metrics_path, json.dumps({"kind": kind, **record}, ensure_ascii=False))
        for tracker in self.trackers:
            tracker.record(kind, record)

    def _append(self, path: Path, line: str) -> None:
        self._files[path].append(line)


class RankLog(RunLog):
    """Of a rank that is not the first: all that it would say goes to a log of its own, `training.rank-1.log`."""

    def __init__(self, folder: Path, rank: int) -> None:
        super().__init__(folder, console=Console(quiet=True), log_name=f"training.rank-{rank}.log")

    def rewind(self, step: int) -> None:
        pass

    def flush_to_disk(self) -> None:
        pass

    def _append(self, path: Path, line: str) -> None:
        if path == self.log_path:
            super()._append(path, line)


class _AppendedFile:
    """Lines at the end of a file. On a full disk they wait here, and training goes on."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self._path = path
        self._say = say
        self._waiting: list[str] = []
        self._is_full = False
        self._lock = threading.Lock()  # saving in the background has lines to say, too

    def append(self, line: str) -> None:
        with self._lock:
            self._waiting.append(line + "\n")
        self.write_waiting()

    def write_waiting(self) -> None:
        """Write what could not be written before, in order."""
        with self._lock:
            if not self._waiting:
                return
            data = "".join(self._waiting).encode("utf-8")
            try:
                with open(self._path, "ab", buffering=0) as file:
                    end = file.seek(0, os.SEEK_END)
                    if file.write(data) != len(data):
                        file.truncate(end)  # no half lines
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                if not self._is_full:
                    self._say(f"{self._path}: cannot be written ({error.strerror}); its lines wait in memory")
                self._is_full = True
            else:
                self._is_full = False
                self._waiting.clear()


def finite(facts: dict[str, Any]) -> dict[str, Any]:
    """JSON has no word for a number that is not finite: null."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in facts.items()
    }


def _step_of(line: str) -> float:
    """The step of a metrics line; infinite for one that a kill cut in half, so that it is dropped."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _large(number: float) -> str:
    """A perplexity; that of a model gone wrong has hundreds of digits."""
    return f"{number:,.1f}" if number < 1e9 else f"{number:.1e}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
