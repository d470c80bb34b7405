"""Read a run from the disk: its records, config, events and samples, and the data of its charts.

A run may have any age and state: still running, killed in the middle of a line, interrupted, rolled back, without
validation, without a config. Values that a run did not record are missing in its charts. `axes_missing` gives the
reason for each missing axis.
"""

from __future__ import annotations

import json
import math
import platform
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from atlas.config.loader import read_sections
from atlas.errors import AtlasError
from atlas.files import check_regular, lines_of, read_limited
from atlas.reporting.curves import MOST_POINTS, Floats, last_of_each_step, smooth, thin

_NOISY = ("grad_norm", "tokens_per_second", "utilisation", "data_wait", "gpu_temperature")
"""Metrics whose small charts show a smoothed curve over the raw curve."""
_METRICS = ("loss", "learning_rate", "memory", *_NOISY)
"""Metrics of train records for which the report has a chart."""
_COLUMNS = {
    "train": ("step", "tokens", "seconds", "sequences_consumed", *_METRICS),
    "validation": ("step", "tokens", "seconds", "val_loss", "val_perplexity", "bits_per_byte"),
}
_WHY_MISSING = {
    "tokens": "some records have no token count, and the sequences or the max_seq_len to compute it are missing",
    "time": "not all of its records contain seconds",
}
"""Axis → the reason why a run has no curve over this axis."""
_LARGEST_LOG = 4 << 30
_LARGEST_SIDECAR = 32 << 20
_MOST_SMALL_POINTS = 800
"""The largest number of points of a curve in a small chart."""
_MOST_EVENTS = 400
_LONGEST_TEXT = 4000
"""The largest number of characters of a sample or an event."""


class Run:
    """One run, read from its folder or from its `metrics.jsonl`. `refresh` reads the lines that were added later.

    Raises `AtlasError` if the path contains no run.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.metrics_path = path if path.is_file() else path / "metrics.jsonl"
        self.folder = self.metrics_path.parent
        self._file: tuple[int, int] = (0, 0)
        self._chart: tuple[Any, dict[str, Any]] = (None, {})
        self._clear()
        self.refresh()
        self.name = encodable(self.folder.resolve().name or str(self.folder))

    def _clear(self) -> None:
        self._offset = 0
        self._columns = {kind: {name: list[float]() for name in names} for kind, names in _COLUMNS.items()}
        self.events: list[dict[str, Any]] = []
        self.samples: list[dict[str, Any]] = []
        self.unreadable = 0
        """Number of lines that are not records."""

    def refresh(self) -> None:
        """Read the lines that were added since the last call. If the file was truncated, for example by a resumed run,
        or replaced, read all lines again."""
        try:
            size = check_regular(self.metrics_path)
            if size > _LARGEST_LOG:
                raise AtlasError(
                    f"{self.metrics_path}: has {size:,} bytes, and Atlas reads at most {_LARGEST_LOG:,}: name a run "
                    "that logs less often (training.log_interval)"
                )
            with self.metrics_path.open("rb") as file:
                status = self.metrics_path.stat()
                identity = (status.st_dev, status.st_ino)
                if identity != self._file or size < self._offset:
                    self._clear()
                self._file = identity
                file.seek(self._offset)
                for line in lines_of(file):
                    if not line.endswith(b"\n"):  # the last line may be incomplete
                        break
                    self._offset += len(line)
                    self._add(line)
        except OSError as error:
            is_missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
            reason = "there is no such file" if is_missing else error.strerror or error
            remedy = "name a folder that atlas train wrote to (its --output-dir)"
            raise AtlasError(f"{self.metrics_path}: cannot be read ({reason}): {remedy}") from None
        self.config, self.config_problem = _read_config(self.folder / "config.yaml")
        self._interrupts = list(_interrupt_steps(self.folder))

    def _add(self, line: bytes) -> None:
        try:
            record = json.loads(line)
            columns = self._columns.get(kind := record["kind"])  # raises TypeError for a list
            int(_number(record["step"]))  # raises ValueError for NaN
        except (ValueError, KeyError, TypeError, RecursionError):
            self.unreadable += bool(line.strip())
            return
        if columns:
            for name, values in columns.items():
                values.append(_number(record.get(name)))
        elif kind == "event":
            self.events.append(record)
        elif kind == "sample":
            self.samples.append(record)

    # Facts

    @property
    def last_step(self) -> int:
        """The last step that the run logged, or 0 if the run logged no step."""
        steps = [step for columns in self._columns.values() for step in columns["step"]]
        return int(max(steps, default=0))

    @property
    def state(self) -> str:
        """The state of the run: `finished`, `running`, `interrupted`, `stopped` (before its end), or `unknown` (written
        on another machine)."""
        horizon = self.config.get("training.max_steps")
        if isinstance(horizon, int) and self.last_step >= horizon:
            return "finished"
        alive = _writer_lives(self.folder / "atlas.lock")
        if alive:
            return "running"
        names = [event.get("event") for event in self.events]
        last = next((name for name in reversed(names) if name != "save"), None)
        if last in ("finished", "stopped early", "stopped in time"):
            return "finished"
        if last in ("interrupted", "interrupt") or any(step >= self.last_step for step in self._interrupts):
            return "interrupted"
        return "unknown" if alive is None else "stopped"

    def records(self, kind: str) -> dict[str, Floats]:
        """Return the `train` or `validation` records in the order of steps: name → float64 (N,), with NaN for missing
        values.

        If a rollback made the run train a step again, the result contains only the step's last record.
        """
        columns = {name: np.array(values, dtype=np.float64) for name, values in self._columns[kind].items()}
        kept = last_of_each_step(columns["step"])
        return {name: values[kept] for name, values in columns.items()}

    def axes(self) -> dict[str, Floats]:
        """Return the x axes of the train records: `step`, and also `tokens` and `time` if every record has a value."""
        train, length = self.records("train"), self.config.get("model.max_seq_len")
        tokens = train["tokens"]
        if isinstance(length, int) and not _all_known(tokens):
            tokens = train["sequences_consumed"] * length
        optional = {"tokens": tokens, "time": train["seconds"]}
        return {"step": train["step"]} | {axis: at for axis, at in optional.items() if _all_known(at)}

    def evaluations(self) -> tuple[dict[str, float], dict[str, float]] | None:
        """Return the last validation record and the validation record with the lowest loss; None without validation."""
        records = self.records("validation")
        known = np.flatnonzero(np.isfinite(records["val_loss"]))
        if not known.size:
            return None
        best = known[np.argmin(records["val_loss"][known])]
        at_last, at_best = ({name: float(v[at]) for name, v in records.items()} for at in (known[-1], best))
        return at_last, at_best

    def start(self) -> dict[str, Any]:
        """Return the facts that the run logged at its latest start, such as versions, machine and precision. The result
        is empty for a run of an old version of Atlas."""
        starts = [event for event in self.events if event.get("event") == "start"] or [{}]
        return {key: value for key, value in _flat(starts[-1]) if key not in ("kind", "event", "step")}


def read_runs(paths: Iterable[str | Path]) -> list[Run]:
    """Return the runs in `paths`. If two folders have the same name, the names of these runs contain more of their
    paths."""
    runs = [Run(path) for path in paths]
    folders = [run.folder.resolve() for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        if folders.count(folder) > 1:
            raise AtlasError(f"{run.folder}: is named twice: name each run once")
        parts, others = folder.parts, [other.parts for other in folders if other != folder]
        depths = range(1, len(parts))
        depth = next((n for n in depths if all(other[-n:] != parts[-n:] for other in others)), 1)
        run.name = encodable("/".join(parts[-depth:]))
    return runs


def chart_data(run: Run) -> dict[str, Any]:
    """Return the data from which `charts.js` draws a run's charts, as values for JSON.

    The result is cached until the run changes, because 50,000 records take 70 ms, and the server's page requests up to
    eight runs every 2 seconds.

    A series has the lists `value`, `step`, `tokens` and `time` (seconds), all of the same length. Axes that the run did
    not record are missing. A series has at most a few thousand points, including the smallest and the largest value of
    every interval.
    """
    version = (run._file, run._offset, run.state, run.name, run.config.get("model.max_seq_len"))
    if run._chart[0] != version:
        run._chart = (version, _chart_data(run))
    return run._chart[1]


def _chart_data(run: Run) -> dict[str, Any]:
    train, validation = run.records("train"), run.records("validation")
    axes = run.axes()
    curves = {name: train[name] for name in _METRICS}
    curves |= {f"smoothed_{name}": smooth(train[name]) for name in ("loss", *_NOISY)}
    series = {
        name: _series(axes, values, most=MOST_POINTS if name.endswith("loss") else _MOST_SMALL_POINTS)
        for name, values in curves.items()
    }
    series["val_loss"] = _series(_positions(axes, validation), validation["val_loss"], most=MOST_POINTS)
    return {
        "name": run.name,
        "state": run.state,
        "last_step": run.last_step,
        "axes": list(axes),
        "axes_missing": {axis: reason for axis, reason in _WHY_MISSING.items() if axis not in axes},
        "series": {name: found for name, found in series.items() if found["value"]},
        "events": _events(run, axes),
    }


def _series(axes: dict[str, Floats], values: Floats, *, most: int) -> dict[str, list[float]]:
    known = np.flatnonzero(np.isfinite(values))
    kept = known[thin(values[known], most)]
    return {axis: _rounded(places[kept]) for axis, places in axes.items()} | {"value": _rounded(values[kept])}


def _positions(axes: dict[str, Floats], records: dict[str, Floats]) -> dict[str, Floats]:
    """Return the positions of records on each axis. If records have no values of an axis, interpolate between the train
    records by step."""
    positions = {axis: records["seconds" if axis == "time" else axis] for axis in axes}
    for axis, own in positions.items():
        if not _all_known(own) and axes["step"].size:
            positions[axis] = np.interp(records["step"], axes["step"], axes[axis])
    return positions


def _events(run: Run, axes: dict[str, Floats]) -> list[dict[str, Any]]:
    """Return each event with its text and its positions. If there are more than `_MOST_EVENTS` events, return only the
    latest `_MOST_EVENTS`, without saves."""
    events = [event for event in run.events if isinstance(event.get("event"), str)]
    if len(events) > _MOST_EVENTS:
        events = ([event for event in events if event["event"] != "save"] or events)[-_MOST_EVENTS:]
    columns = {
        key: np.array([_number(event.get(key)) for event in events], dtype=np.float64)
        for key in ("step", "tokens", "seconds")
    }
    positions = {axis: _rounded(values) for axis, values in _positions(axes, columns).items()}
    return [
        {"event": event["event"][:80], "text": event_text(event)}
        | {axis: values[number] for axis, values in positions.items()}
        for number, event in enumerate(events)
        if all(math.isfinite(values[number]) for values in positions.values())
    ]


def event_text(event: dict[str, Any]) -> str:
    """Return one line that describes an event, without its step."""
    details = [f"from step {event['from_step']}"] if event.get("from_step") is not None else []
    if isinstance(names := event.get("names"), list):
        details.append(", ".join(map(str, names)))
    if event.get("reason"):
        details.append(str(event["reason"]))
    text = f"{event.get('event')}: {'; '.join(details)}" if details else str(event.get("event"))
    return encodable(text[:_LONGEST_TEXT])


def samples_by_prompt(run: Run, *, most: int = 12) -> dict[str, list[tuple[int, str]]]:
    """Return prompt → (step, text) in the order of steps. If a prompt has more than `most` texts, return an even
    selection that includes the first and the last."""
    found: dict[str, dict[int, str]] = {}
    for sample in run.samples:
        step = int(_number(sample["step"]))
        prompt, text = (encodable(str(sample.get(key) or "")[:_LONGEST_TEXT]) for key in ("prompt", "text"))
        found.setdefault(prompt, {})[step] = text
    spread = {}
    for prompt, texts in found.items():
        steps = sorted(texts)
        chosen = {round(place) for place in np.linspace(0, len(steps) - 1, min(most, len(steps)))}
        spread[prompt] = [(steps[place], texts[steps[place]]) for place in sorted(chosen)]
    return spread


def _read_config(path: Path) -> tuple[dict[str, Any], str | None]:
    """Return a dict of the settings, with keys such as `model.num_layers`, and None. If the file cannot be read, return
    an empty dict and the reason."""
    if not path.exists():
        return {}, "there is no config.yaml beside its metrics.jsonl"
    try:
        return dict(_flat(read_sections(path))), None
    except AtlasError as error:
        return {}, str(error)


def _interrupt_steps(folder: Path) -> Iterable[float]:
    """Yield the steps of the interrupt checkpoints in the folder. Older versions of Atlas recorded an interruption only
    by such a checkpoint. Files that are not sidecars, or that were just deleted, are skipped."""
    for path in folder.glob("atlas_*.json"):
        with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
            facts = json.loads(read_limited(path, limit=_LARGEST_SIDECAR))
            if (facts["format"], facts["kind"]) == ("atlas-checkpoint", "interrupt"):
                yield _number(facts.get("step"))


def _writer_lives(lock: Path) -> bool | None:
    """Return whether the process that the lock names is running; None if the process is on another machine. The
    function does not try to take the lock, because a run that starts at the same moment would then fail to take the
    lock."""
    try:
        owner = json.loads(read_limited(lock, limit=1000))
        if owner["host"] != platform.node():
            return None
        process = psutil.Process(int(owner["process"]))
        if process.status() == psutil.STATUS_ZOMBIE:  # the process has already exited
            return False
        # A process that started after the lock was written is another process with the same number.
        return process.create_time() <= lock.stat().st_mtime + 1
    except (OSError, ValueError, KeyError, TypeError, OverflowError, psutil.Error):
        return False


def _flat(values: dict[Any, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _number(value: Any) -> float:
    """Return the value as a float; NaN for a value that is not a finite number: null, a string, a bool, or a number
    that is too large for a float."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) <= sys.float_info.max else math.nan


def encodable(text: str) -> str:
    """Return the text with ? in place of unpaired surrogates, which JSON and file names may contain, but UTF-8 may
    not."""
    return text.encode("utf-8", "replace").decode()


def _all_known(values: Floats) -> bool:
    return bool(values.size) and bool(np.isfinite(values).all())


def _rounded(values: Floats | Sequence[float]) -> list[float]:
    """Return whole numbers unchanged, and other numbers rounded to 7 significant digits, to keep the page short."""
    return [int(value) if float(value).is_integer() else float(f"{value:.7g}") for value in values]
