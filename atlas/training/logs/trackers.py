"""Send the records of `metrics.jsonl` to TensorBoard and to Weights & Biases, each in its own thread.

Training puts records into a queue and does not wait for a tracker before the run ends. If a tracker fails, one line
reports the failure, and that tracker gets no more records.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from atlas.config import AtlasConfig, TrackingConfig
from atlas.errors import AtlasError

_MOST_WAITING = 1000
"""The most records that may wait for a tracker. A run that logs an update every millisecond produces this number of
records in a second."""
_SECONDS_TO_FINISH = 30.0

Record = dict[str, Any]


class Sink(Protocol):
    """A destination for records. All its methods are called from one thread, and may raise any exception."""

    def record(self, kind: str, record: Record) -> None:
        """Log a record of `metrics.jsonl`, in which None replaces each number that is not finite. `kind` is train,
        validation, sample or event."""

    def rewind(self, step: int) -> None:
        """Prepare for records that repeat the steps after `step`."""

    def close(self) -> None:
        """Write all pending records. More records may follow, if the run resumes in the same process."""


class Tracker:
    """A sink, and the thread that calls the sink's methods."""

    def __init__(self, name: str, sink: Sink, say: Callable[[str], None]) -> None:
        self._name = name
        self._sink = sink
        self._say = say
        self._tasks: queue.Queue[Callable[[], None]] = queue.Queue(_MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._is_dropped = False
        self._lock = threading.RLock()  # the thread that saves in the background also logs events

    def record(self, kind: str, record: Record) -> None:
        """Queue a record for the sink."""
        self._put(lambda: self._sink.record(kind, record))

    def rewind(self, step: int) -> None:
        """Queue a rewind to `step`."""
        self._put(lambda: self._sink.rewind(step))

    def close(self, seconds: float = _SECONDS_TO_FINISH) -> None:
        """Close the sink. Wait until all records are written, but at most `seconds`."""
        thread = self._thread
        if thread is None:
            return
        self._put(self._sink.close)
        thread.join(seconds)
        if thread.is_alive():
            self._drop(f"has not finished within {seconds:g} s")
        self._thread = None

    def _put(self, task: Callable[[], None]) -> None:
        with self._lock:
            if self._is_dropped:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=f"atlas-{self._name}", daemon=True)
                self._thread.start()
            try:
                self._tasks.put_nowait(task)
            except queue.Full:
                self._drop(f"is too slow ({_MOST_WAITING:,} records are waiting)")

    def _work(self) -> None:
        task = None
        try:
            while not self._is_dropped and task != self._sink.close:  # `close` is the last task
                task = self._tasks.get()
                task()
        except BaseException as error:  # whatever another package raises, training continues
            reason = (str(error).strip().splitlines() or [""])[0]
            self._drop(f"{type(error).__name__}: {reason:.200}")

    def _drop(self, reason: str) -> None:
        with self._lock:
            was_dropped, self._is_dropped = self._is_dropped, True
        if not was_dropped:
            self._say(
                f"tracking.{self._name}: {reason}: training continues without it; metrics.jsonl has all records"
            )


_OFF = {"tensorboard": "false", "wandb": "off"}
_EXTRAS = {"tensorboard": "tracking", "wandb": "wandb"}


def _wanted(config: TrackingConfig) -> dict[str, str]:
    """The trackers that the config turns on, with their settings."""
    asked = {"tensorboard": str(config.tensorboard).lower(), "wandb": config.wandb}
    return {name: setting for name, setting in asked.items() if setting != _OFF[name]}


def refuse_missing_trackers(config: TrackingConfig) -> None:
    """Raise `AtlasError` if the config turns on a tracker whose package is not installed. No package is imported."""
    for name, setting in _wanted(config).items():
        if importlib.util.find_spec(name) is None:
            raise AtlasError(
                f"tracking.{name}: {setting}: needs the package {name}: "
                f'pip install "atlas-llm[{_EXTRAS[name]}]", or set tracking.{name}={_OFF[name]}'
            )


def open_trackers(config: AtlasConfig, folder: Path, say: Callable[[str], None]) -> list[Tracker]:
    """The trackers that the config turns on. A tracker is imported and started when it gets its first record."""
    sinks: dict[str, Sink] = {
        "tensorboard": TensorBoard(folder / "tensorboard"),
        "wandb": WeightsAndBiases(config, folder),
    }
    return [Tracker(name, sinks[name], say) for name in _wanted(config.tracking)]


class TensorBoard:
    """Writes TensorBoard's event files to `folder`. Numbers such as `train/loss` are scalars; samples and events are
    texts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None
        self._purged: int | None = None

    def rewind(self, step: int) -> None:
        """Begin a new file at the next record. TensorBoard then ignores the steps after `step` in older files."""
        self.close()
        # In older files, TensorBoard ignores the step `purge_step` and all later steps.
        self._purged = step + 1

    def record(self, kind: str, record: Record) -> None:
        """Write a record, see `Sink`."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # the import takes a second

            self._writer = SummaryWriter(str(self._folder), purge_step=self._purged)
        for name, value in _named(kind, record, event="events").items():
            if isinstance(value, str):  # shown as Markdown, where four spaces mean a code block
                self._writer.add_text(name, "    " + value.replace("\n", "\n    "), record["step"])
            else:
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Write all pending records and close the file."""
        if self._writer is not None:
            self._writer.close()
        self._writer, self._purged = None, None


class WeightsAndBiases:
    """Logs to Weights & Biases. The files are in `wandb/` in the output folder. Each start of training begins a new W&B
    run; all W&B runs of an output folder form one group."""

    def __init__(self, config: AtlasConfig, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self._run: Any = None

    def rewind(self, step: int) -> None:
        """Do nothing. The charts use the `step` in each record as x axis (see `_opened`), so steps may repeat."""

    def _opened(self) -> Any:
        # By default wandb sends crash reports to its developers.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        run = wandb.init(
            project="atlas",
            name=self._folder.name,
            group=self._folder.name,
            dir=str(self._folder),
            mode="online" if self._config.tracking.wandb == "online" else "offline",
            config=self._config.model_dump(mode="json"),
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,
                x_disable_stats=True,
                init_timeout=_SECONDS_TO_FINISH,
            ),
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run

    def record(self, kind: str, record: Record) -> None:
        """Write a record, see `Sink`."""
        self._run = self._run or self._opened()
        self._run.log({"step": record["step"], **_named(kind, record, event="event")})

    def close(self) -> None:
        """Write all pending records and finish the W&B run."""
        if self._run is not None:
            self._run.finish()
        self._run = None


def _named(kind: str, record: Record, *, event: str) -> dict[str, float | str]:
    """Return the values of a record by chart name: numbers for a training or validation record, a text for a sample or
    an event."""
    if kind == "sample":
        return {f"samples/{record['number']}": record["prompt"] + record["text"]}
    if kind == "event":
        return {event: json.dumps(record, ensure_ascii=False)}
    return {
        f"{kind}/{name}": value
        for name, value in record.items()
        if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
    }
