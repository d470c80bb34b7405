"""TensorBoard and Weights & Biases: each is told what `metrics.jsonl` holds, in a thread of its own.

Training never waits for them: a record is put into a queue. What goes wrong with one of them is said once, and that one
is told nothing more.
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
"""Records; a run that logs each of its milliseconds makes so many in seconds."""
_SECONDS_TO_FINISH = 30.0

Record = dict[str, Any]


class Sink(Protocol):
    """Where records go. Called from one thread; may raise whatever it likes."""

    def record(self, kind: str, record: Record) -> None:
        """`kind` is train, validation, sample or event; `record` as in `metrics.jsonl`, null for what is not finite."""

    def rewind(self, step: int) -> None:
        """What comes next follows `step`; later steps that were told of are told anew."""

    def close(self) -> None:
        """Write what is left. A record may follow, when the run goes on in the same process."""


class Tracker:
    """A sink, and the thread in which it works."""

    def __init__(self, name: str, sink: Sink, say: Callable[[str], None]) -> None:
        self._name = name
        self._sink = sink
        self._say = say
        self._tasks: queue.Queue[Callable[[], None]] = queue.Queue(_MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._is_dropped = False
        self._lock = threading.Lock()  # saving in the background has events to tell, too

    def record(self, kind: str, record: Record) -> None:
        self._put(lambda: self._sink.record(kind, record))

    def rewind(self, step: int) -> None:
        self._put(lambda: self._sink.rewind(step))

    def close(self, seconds: float = _SECONDS_TO_FINISH) -> None:
        """Wait until everything is written, but not longer than `seconds`."""
        thread = self._thread
        if thread is None:
            return
        self._put(self._finish)
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
                return
            except queue.Full:
                pass
        self._drop(f"does not keep up with {_MOST_WAITING:,} records")

    def _work(self) -> None:
        while not self._is_dropped:
            try:
                self._tasks.get()()
            except _Finished:
                return
            except BaseException as error:  # whatever a package of somebody else's raises, training goes on
                reason = (str(error).strip().splitlines() or [""])[0]
                self._drop(f"{type(error).__name__}: {reason:.200}")

    def _finish(self) -> None:
        self._sink.close()
        raise _Finished

    def _drop(self, reason: str) -> None:
        with self._lock:
            was_dropped, self._is_dropped = self._is_dropped, True
        if not was_dropped:
            self._say(
                f"tracking.{self._name}: {reason}: training goes on without it; metrics.jsonl has everything"
            )


class _Finished(Exception):
    """The thread's work is done."""


def refuse_missing_trackers(config: TrackingConfig) -> None:
    """Raises `AtlasError` for a tracker that is asked for and not installed; imports nothing."""
    for name, asked, is_wanted, extra in (
        ("tensorboard", str(config.tensorboard).lower(), config.tensorboard, "tracking"),
        ("wandb", config.wandb, config.wandb != "off", "wandb"),
    ):
        if is_wanted and importlib.util.find_spec(name) is None:
            off = "false" if name == "tensorboard" else "off"
            raise AtlasError(
                f"tracking.{name}: {asked}: needs the package {name}: "
                f'pip install "atlas-llm[{extra}]", or set it to {off}'
            )


def open_trackers(config: AtlasConfig, folder: Path, say: Callable[[str], None]) -> list[Tracker]:
    """Those that the config asks for. They begin to work, and are imported, when they are first told something."""
    trackers, asked = [], config.tracking
    if asked.tensorboard:
        trackers.append(Tracker("tensorboard", TensorBoard(folder / "tensorboard"), say))
    if asked.wandb != "off":
        trackers.append(Tracker("wandb", WeightsAndBiases(config, folder), say))
    return trackers


class TensorBoard:
    """Event files in `folder`: scalars such as `train/loss` and `validation/val_loss`, texts for samples and events."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None
        self._purged: int | None = None

    def rewind(self, step: int) -> None:
        self.close()
        # TensorBoard then forgets what older files hold of this step and later ones.
        self._purged = step + 1

    def record(self, kind: str, record: Record) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # it takes a second

            self._writer = SummaryWriter(str(self._folder), purge_step=self._purged)
        step = record["step"]
        if kind == "sample":
            # Markdown: four spaces keep a text as it is
            text = "    " + (record["prompt"] + record["text"]).replace("\n", "\n    ")
            self._writer.add_text(f"samples/{record['number']}", text, step)
        elif kind == "event":
            self._writer.add_text("events", "    " + json.dumps(record, ensure_ascii=False), step)
        for name, value in numbers(kind, record).items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer, self._purged = None, None


class WeightsAndBiases:
    """A run in `wandb/` of the output folder, one for each process that trains; those of a folder are one group."""

    def __init__(self, config: AtlasConfig, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self._run: Any = None

    def rewind(self, step: int) -> None:
        """Nothing: its charts are drawn over the steps that it is told, see `_opened`."""

    def _opened(self) -> Any:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it would tell its makers of crashes, online
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
        self._run = self._run or self._opened()
        facts: Record = {f"{kind}/{name}": value for name, value in numbers(kind, record).items()}
        if kind == "sample":
            facts[f"samples/{record['number']}"] = record["prompt"] + record["text"]
        elif kind == "event":
            facts["event"] = json.dumps(record, ensure_ascii=False)
        self._run.log({"step": record["step"], **facts})

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
        self._run = None


def numbers(kind: str, record: Record) -> dict[str, float]:
    """What of a record of training or validation can be drawn."""
    if kind not in ("train", "validation"):
        return {}
    return {
        name: value
        for name, value in record.items()
        if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
    }
