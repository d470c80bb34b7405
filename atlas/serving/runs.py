"""The page at /runs: curves of the runs in a folder, as they grow."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastapi import APIRouter

from atlas.errors import AtlasError
from atlas.reporting.runs import Run, chart_data, encodable

MOST_RUNS = 8
"""Those that were written to last are drawn: more curves cannot be told apart."""
_DEPTH = 3
"""Folders below the one that is looked through."""


class Shelf:
    """The runs below a folder, each read once and then as far as it grows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._runs: dict[Path, Run] = {}
        self._lock = threading.Lock()  # several pages may look at once

    def curves(self) -> dict[str, Any]:
        """What `AtlasCharts` draws, of the runs that were written to last, by name; and how many more there are."""
        with self._lock:
            found = [path for _, path in sorted(self._found(), reverse=True)]
            self._runs = {path: run for path, run in self._runs.items() if path in found[:MOST_RUNS]}
            runs = [run for path in found[:MOST_RUNS] if (run := self._read(path))]
            names = self._names(runs)
            # By name and not by age: two that write at once would change places at each look, and their colours.
            drawn = [
                {**chart_data(run), "name": name}
                for name, run in sorted(zip(names, runs, strict=True), key=lambda one: one[0])
            ]
            return {
                "folder": encodable(str(self.folder)),
                "more": max(0, len(found) - MOST_RUNS),
                "runs": drawn,
            }

    def _found(self) -> Iterator[tuple[int, Path]]:
        """When it was written to, and the path."""
        for depth in range(_DEPTH + 1):
            for path in self.folder.glob("*/" * depth + "metrics.jsonl"):
                with suppress(OSError):  # it has gone meanwhile
                    if path.is_file():
                        yield path.stat().st_mtime_ns, path

    def _read(self, path: Path) -> Run | None:
        try:
            if path not in self._runs:
                self._runs[path] = Run(path)
            else:
                self._runs[path].refresh()
        except AtlasError:  # it is no run, or none any more
            self._runs.pop(path, None)
            return None
        return self._runs[path]

    def _names(self, runs: Sequence[Run]) -> list[str]:
        """By their place in the folder; a run that is the folder itself is called as it is."""
        inside = [encodable(run.folder.relative_to(self.folder).as_posix()) for run in runs]
        return [
            name if name != "." else run.name if run.name not in inside else f"{run.name}/"
            for name, run in zip(inside, runs, strict=True)
        ]


def run_routes(folder: Path) -> APIRouter:
    """The page, its files, and the curves."""
    router, shelf = APIRouter(include_in_schema=False), Shelf(folder)

    @router.get("/api/runs")
    async def runs() -> dict[str, Any]:
        return await asyncio.to_thread(shelf.curves)

    return router
