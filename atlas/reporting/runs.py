"""A run as it lies on the disk: its records, config, events, samples and checkpoints, and the curves drawn from them.

A run may be of any age and in any state: still written, killed in the middle of a line, interrupted, rolled back,
without validation, without a config. What it does not hold is missing here as well, and `axes_missing` says why.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from atlas.config.loader import read_sections
from atlas.errors import AtlasError
from atlas.files import check_regular, read_limited
from atlas.reporting.curves import MOST_POINTS, Floats, last_of_each_step, smooth, thin

METRICS = (
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "utilisation",
    "memory",
    "data_wait",
    "gpu_temperature",
)
"""Of train records, those that are drawn."""
_NOISY = ("grad_norm", "tokens_per_second", "utilisation", "data_wait", "gpu_temperature")
"""Drawn small, smoothed over the raw."""
VALIDATION = ("val_loss", "val_perplexity", "bits_per_byte")
_COLUMNS = {
    "train": ("step", "tokens", "seconds", "sequences_consumed", *METRICS),
    "validation": ("step", "tokens", "seconds", *VALIDATION),
}
_ENDS = {
    "finished": "finished",
    "stopped early": "finished",
    "stopped in time": "finished",
    "interrupted": "interrupted",
    "interrupt": "interrupted",
}
"""How a run says that it ends, and what that makes it."""
_LARGEST_LOG = 4 << 30
_LARGEST_SIDECAR = 32 << 20
_MOST_SMALL_POINTS = 800
"""Of what is drawn small."""
_MOST_EVENTS = 400
_LONGEST_TEXT = 4000
"""Of a sample or an event, in characters."""


class Run:
    """One run, read from its folder or its `metrics.jsonl`. `refresh` reads what was added since.

    Raises `AtlasError` where there is no run.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.metrics_path = path if path.is_file() else path / "metrics.jsonl"
        self.folder = self.metrics_path.parent
        self.name = encodable(self.folder.resolve().name or str(self.folder))
        self._file: tuple[int, int] = (0, 0)
        self._drawn: tuple[Any, dict[str, Any]] = (None, {})
        self._forget()
        self.refresh()

    def _forget(self) -> None:
        self._offset = 0
        self._columns = {kind: {name: list[float]() for name in names} for kind, names in _COLUMNS.items()}
        self.events: list[dict[str, Any]] = []
        self.samples: list[dict[str, Any]] = []
        self.unreadable = 0
        """Lines that are no records."""

    def refresh(self) -> None:
        """Read the lines that were written since, or all once more where the file was cut back, as at a resume."""
        try:
            size = check_regular(self.metrics_path)
            if size > _LARGEST_LOG:
                raise AtlasError(
                    f"{self.metrics_path}: is {size:,} bytes long, where {_LARGEST_LOG:,} are the most that are "
                    "read: name a run that logs more rarely (training.log_interval)"
                )
            with self.metrics_path.open("rb") as file:
                status = self.metrics_path.stat()
                identity = (status.st_dev, status.st_ino)
                if identity != self._file or size < self._offset:
                    self._forget()
                self._file = identity
                file.seek(self._offset)
                lines = file.read(size - self._offset)
        except (FileNotFoundError, NotADirectoryError):
            raise AtlasError(
                f"{self.metrics_path}: there is no such file, so that {self.folder} is no run: name a folder that "
                "atlas train wrote to (its --output-dir)"
            ) from None
        except OSError as error:
            raise AtlasError(
                f"{self.metrics_path}: cannot be read ({error.strerror or error}): name the folder of a run"
            ) from None
        whole = lines.rfind(b"\n") + 1  # what follows is still being written, or was cut by a kill
        self._offset += whole
        for line in lines[:whole].splitlines():
            self._take(line)
        self.config_problem: str | None = None
        self.config = self._read_config()
        self.checkpoints = list(_sidecars(self.folder))

    def _take(self, line: bytes) -> None:
        try:
            record = json.loads(line)
            kind, step = record["kind"], _number(record["step"])
        except (ValueError, KeyError, TypeError, RecursionError):
            self.unreadable += bool(line.strip())
            return
        if math.isnan(step):
            self.unreadable += 1
        elif kind in self._columns:
            for name, values in self._columns[kind].items():
                values.append(_number(record.get(name)))
        elif kind == "event":
            self.events.append(record)
        elif kind == "sample":
            self.samples.append(record)

    def _read_config(self) -> dict[str, Any]:
        """Setting → value, as in `model.num_layers`; empty without a readable config.yaml."""
        path = self.folder / "config.yaml"
        if not path.exists():
            self.config_problem = "there is no config.yaml beside its metrics.jsonl"
            return {}
        try:
            return dict(_flat(read_sections(path)))
        except AtlasError as error:
            self.config_problem = str(error)
            return {}

    # What is known of it

    @property
    def last_step(self) -> int:
        steps = [step for columns in self._columns.values() for step in columns["step"]]
        return int(max(steps, default=0))

    @property
    def state(self) -> str:
        """`finished`, `running`, `interrupted`, `stopped` before its end, or `unknown`, on another machine."""
        horizon, last = self.config.get("training.max_steps"), self.last_step
        if isinstance(horizon, int) and last >= horizon:
            return "finished"
        alive = _writer_lives(self.folder / "atlas.lock")
        if alive:
            return "running"
        told = [event.get("event") for event in self.events if event.get("event") != "save"]
        if told and told[-1] in _ENDS:
            return _ENDS[told[-1]]
        saved_so = any(
            sidecar.get("kind") == "interrupt" and _number(sidecar.get("step")) >= last
            for sidecar in self.checkpoints
        )
        if saved_so:  # as an older run had it
            return "interrupted"
        return "unknown" if alive is None else "stopped"

    def records(self, kind: str) -> dict[str, Floats]:
        """Of `train` or `validation`: name → float64 (N,), NaN where it is not known, the steps rising.

        Of steps that were trained again, after a rollback, the last time counts.
        """
        columns = {name: np.array(values, dtype=np.float64) for name, values in self._columns[kind].items()}
        kept = last_of_each_step(columns["step"])
        return {name: values[kept] for name, values in columns.items()}

    def axes(self) -> tuple[dict[str, Floats], dict[str, str]]:
        """What the train records lie on, axis → float64 (N,); and for each axis that is not known, why."""
        train = self.records("train")
        axes, missing = {"step": train["step"]}, {}
        length = self.config.get("model.max_seq_len")
        if _all_known(train["tokens"]):
            axes["tokens"] = train["tokens"]
        elif isinstance(length, int) and _all_known(train["sequences_consumed"]):
            axes["tokens"] = train["sequences_consumed"] * length
        else:
            missing["tokens"] = (
                "not all of its records hold tokens, or sequences beside a max_seq_len in config.yaml"
            )
        if _all_known(train["seconds"]):
            axes["time"] = train["seconds"]
        else:
            missing["time"] = "not all of its records hold seconds"
        return axes, missing

    def evaluations(self) -> tuple[dict[str, float], dict[str, float]] | None:
        """The last validation record and the best; None without validation."""
        records = self.records("validation")
        known = np.flatnonzero(np.isfinite(records["val_loss"]))
        if not known.size:
            return None
        best = known[np.argmin(records["val_loss"][known])]
        last, lowest = (
            {name: float(values[at]) for name, values in records.items()} for at in (known[-1], best)
        )
        return last, lowest

    def chart_data(self) -> dict[str, Any]:
        """See `chart_data`; made anew only when something has changed."""
        seen = (self._file, self._offset, self.state, self.name, self.config.get("model.max_seq_len"))
        if self._drawn[0] != seen:
            self._drawn = (seen, _chart_data(self))
        return self._drawn[1]

    def start(self) -> dict[str, Any]:
        """Versions, machine, precision and what else the latest start told; empty for an old run."""
        starts = [event for event in self.events if event.get("event") == "start"]
        facts = starts[-1] if starts else {}
        return dict(_flat({key: facts[key] for key in facts if key not in ("kind", "event", "step")}))


def read_runs(paths: Iterable[str | Path]) -> list[Run]:
    """The runs, each under a name of its own: of two that end alike, more of the path is shown."""
    runs = [Run(path) for path in paths]
    for run in runs:
        parts = run.folder.resolve().parts
        others = [other.folder.resolve().parts for other in runs if other is not run]
        depth = next(
            (n for n in range(1, len(parts)) if all(other[-n:] != parts[-n:] for other in others)), 1
        )
        run.name = encodable("/".join(parts[-depth:]))
    for place, run in enumerate(runs):
        if any(run.folder.resolve() == other.folder.resolve() for other in runs[:place]):
            raise AtlasError(f"{run.folder}: is named twice: name each run once")
    return runs


def chart_data(run: Run) -> dict[str, Any]:
    """What `charts.js` draws of a run, as JSON takes it.

    A series holds `value` and, of equal length, `step`, `tokens` and `time` (seconds), as far as these are known;
    at most some thousand points, among them the smallest and the largest of every stretch.
    """
    return run.chart_data()


def _chart_data(run: Run) -> dict[str, Any]:
    train, validation = run.records("train"), run.records("validation")
    axes, missing = run.axes()
    series = {
        name: _series(axes, train[name], most=MOST_POINTS if name == "loss" else _MOST_SMALL_POINTS)
        for name in METRICS
    }
    series["smoothed_loss"] = _series(axes, smooth(train["loss"]))
    for name in _NOISY:
        series[f"smoothed_{name}"] = _series(axes, smooth(train[name]), most=_MOST_SMALL_POINTS)
    of_validation = {axis: _placed(axes, axis, validation, validation["step"]) for axis in axes}
    series["val_loss"] = _series(of_validation, validation["val_loss"])
    return {
        "name": run.name,
        "state": run.state,
        "last_step": run.last_step,
        "axes": list(axes),
        "axes_missing": missing,
        "series": {name: found for name, found in series.items() if found["value"]},
        "events": _events(run, axes),
    }


def _series(axes: dict[str, Floats], values: Floats, *, most: int = MOST_POINTS) -> dict[str, list[float]]:
    known = np.flatnonzero(np.isfinite(values))
    kept = known[thin(values[known], most)]
    return {axis: _rounded(places[kept]) for axis, places in axes.items()} | {"value": _rounded(values[kept])}


def _placed(
    axes: dict[str, Floats], axis: str, records: dict[str, Floats], steps: Floats
) -> NDArray[np.float64]:
    """Where records lie on an axis: their own word, else between the train records around their step."""
    own = records["seconds" if axis == "time" else axis]
    if _all_known(own) or not axes["step"].size:
        return own
    return np.interp(steps, axes["step"], axes[axis])


def _events(run: Run, axes: dict[str, Floats]) -> list[dict[str, Any]]:
    """What happened, told in a line each; of very many the latest, and saves go first."""
    told = [(place, event) for place, event in enumerate(run.events) if isinstance(event.get("event"), str)]
    if len(told) > _MOST_EVENTS:
        rare = [(place, event) for place, event in told if event["event"] != "save"]
        told = (rare or told)[-_MOST_EVENTS:]
    steps = np.array([_number(event["step"]) for _, event in told], dtype=np.float64)
    columns = {
        key: np.array([_number(event.get(key)) for _, event in told], dtype=np.float64)
        for key in ("step", "tokens", "seconds")
    }
    places = {axis: _rounded(_placed(axes, axis, columns, steps)) for axis in axes}
    return [
        {"event": event["event"][:80], "text": event_text(event)}
        | {axis: values[number] for axis, values in places.items()}
        for number, (_, event) in enumerate(told)
        if all(math.isfinite(values[number]) for values in places.values())
    ]


def event_text(event: dict[str, Any]) -> str:
    """An event in a line, without its step."""
    name = str(event.get("event"))
    said = [name]
    if event.get("from_step") is not None:
        said.append(f"from step {event['from_step']}")
    if isinstance(names := event.get("names"), list):
        said.append(", ".join(map(str, names)))
    if event.get("reason"):
        said.append(str(event["reason"]))
    return encodable((said[0] + (": " + "; ".join(said[1:]) if said[1:] else ""))[:_LONGEST_TEXT])


def samples_by_prompt(run: Run, *, most: int = 12) -> dict[str, list[tuple[int, str]]]:
    """Prompt → (step, text), in order; of more than `most` texts some evenly spread, the first and last among them."""
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


def _sidecars(folder: Path) -> Iterable[dict[str, Any]]:
    """What the manifests of the folder's checkpoints say, each with its `name`."""
    for path in sorted(folder.glob("atlas_*.json")):
        try:
            facts = json.loads(read_limited(path, limit=_LARGEST_SIDECAR))
        except (OSError, ValueError, RecursionError):  # removed meanwhile, or not a sidecar
            continue
        if isinstance(facts, dict) and facts.get("format") == "atlas-checkpoint":
            yield facts | {"name": path.stem}


def _writer_lives(lock: Path) -> bool | None:
    """Whether the process that the lock names is at work; None if it is one of another machine. The lock is not
    tried: a run that starts in that moment would be refused."""
    try:
        owner = json.loads(read_limited(lock, limit=1000))
        if owner["host"] != platform.node():
            return None
        process = psutil.Process(int(owner["process"]))
        if process.status() == psutil.STATUS_ZOMBIE:  # killed, and not waited for
            return False
        began = process.create_time()
        return began <= lock.stat().st_mtime + 1  # a later one has only got its number
    except (OSError, ValueError, KeyError, TypeError, OverflowError, psutil.Error):
        return False


def _flat(values: dict[Any, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _number(value: Any) -> float:
    """NaN for what is no finite number: null, a word, a bool, or a number beyond all floats."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:
        return math.nan


def encodable(text: str) -> str:
    """With ? for half a surrogate pair, which JSON and names of files may hold and UTF-8 may not."""
    return text.encode("utf-8", "replace").decode()


def _all_known(values: Floats) -> bool:
    return bool(values.size) and bool(np.isfinite(values).all())


def _rounded(values: Floats | Sequence[float]) -> list[float]:
    """Whole numbers as they are, others to 7 digits: more would only make the file longer."""
    return [int(value) if float(value).is_integer() else float(f"{value:.7g}") for value in values]
