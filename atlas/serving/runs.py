"""The data of the page at /runs: the curves of the runs in a folder, including runs that are still training."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from atlas.errors import AtlasError
from atlas.reporting.runs import Run, chart_data, encodable

MOST_RUNS = 8
"""The largest number of runs in a chart, since a reader could not distinguish more curves. The chart shows the most
recently changed runs."""
_DEPTH = 3
"""The number of levels of subfolders in which Atlas searches for runs."""


class RunFolder:
    """The runs in a folder and its subfolders. Each run is read once; later, only the new lines of its metrics are
    read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._runs: dict[Path, Run] = {}
        self._lock = threading.Lock()  # several browser pages may request the curves in parallel

    def curves(self) -> dict[str, Any]:
        """Return the data of `AtlasCharts` for the most recently changed runs, sorted by name. `more` is the number of
        other runs."""
        with self._lock:
            found = [path for _, path in sorted(self._found(), reverse=True)]
            before, self._runs = self._runs, {}
            for path in found[:MOST_RUNS]:
                with suppress(AtlasError):  # the folder is not a run, or was deleted
                    if run := before.get(path):
                        run.refresh()
                    self._runs[path] = run or Run(path)
            runs = list(self._runs.values())
            # The order is by name. If it were by age, two active runs would swap positions and colours at each refresh.
            named = sorted(zip(self._names(runs), runs, strict=True), key=lambda one: one[0])
            drawn = [{**chart_data(run), "name": name} for name, run in named]
            folder, more = encodable(str(self.folder)), max(0, len(found) - MOST_RUNS)
            return {"folder": folder, "more": more, "runs": drawn}

    def _found(self) -> Iterator[tuple[int, Path]]:
        """Yield (modification time in ns, path) of each metrics file."""
        for depth in range(_DEPTH + 1):
            for path in self.folder.glob("*/" * depth + "metrics.jsonl"):
                with suppress(OSError):  # the file was deleted after the search
                    if path.is_file():
                        yield path.stat().st_mtime_ns, path

    def _names(self, runs: Sequence[Run]) -> list[str]:
        """Return the runs' paths relative to the folder. If the folder itself is a run, return the run's name."""
        inside = [encodable(run.folder.relative_to(self.folder).as_posix()) for run in runs]
        return [
            name if name != "." else run.name if run.name not in inside else f"{run.name}/"
            for name, run in zip(inside, runs, strict=True)
        ]
