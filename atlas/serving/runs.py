"""The data of the page at /runs: the curves of the runs in a folder, while they grow."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from atlas.errors import AtlasError
from atlas.reporting.runs import Run, chart_data, encodable

MOST_RUNS = 8
"""Only the runs that were written to last are drawn: more curves cannot be told apart."""
_DEPTH = 3
"""Levels of subfolders that are searched."""


class RunFolder:
    """The runs below a folder. Each is read once; after that only its new lines are read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._runs: dict[Path, Run] = {}
        self._lock = threading.Lock()  # several pages may ask in parallel

    def curves(self) -> dict[str, Any]:
        """The input of `AtlasCharts` for the runs that were written to last, by name, and the number of other runs."""
        with self._lock:
            found = [path for _, path in sorted(self._found(), reverse=True)]
            before, self._runs = self._runs, {}
            for path in found[:MOST_RUNS]:
                with suppress(AtlasError):  # not a run, or no longer one
                    if run := before.get(path):
                        run.refresh()
                    self._runs[path] = run or Run(path)
            runs = list(self._runs.values())
            # By name, not by age: two runs that are both written to would swap places, and colours, at each refresh.
            named = sorted(zip(self._names(runs), runs, strict=True), key=lambda one: one[0])
            drawn = [{**chart_data(run), "name": name} for name, run in named]
            folder, more = encodable(str(self.folder)), max(0, len(found) - MOST_RUNS)
            return {"folder": folder, "more": more, "runs": drawn}

    def _found(self) -> Iterator[tuple[int, Path]]:
        """(modification time, path) of each metrics file."""
        for depth in range(_DEPTH + 1):
            for path in self.folder.glob("*/" * depth + "metrics.jsonl"):
                with suppress(OSError):  # deleted meanwhile
                    if path.is_file():
                        yield path.stat().st_mtime_ns, path

    def _names(self, runs: Sequence[Run]) -> list[str]:
        """Their paths inside the folder; a run that is the folder itself has its own name."""
        inside = [encodable(run.folder.relative_to(self.folder).as_posix()) for run in runs]
        return [
            name if name != "." else run.name if run.name not in inside else f"{run.name}/"
            for name, run in zip(inside, runs, strict=True)
        ]
