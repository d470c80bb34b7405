"""The page at /runs: curves of the runs in a folder, as they grow."""

from __future__ import annotations

import asyncio
import threading
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from atlas.errors import AtlasError
from atlas.reporting.runs import Run, chart_data
from atlas.serving.files import page_file

MOST_RUNS = 8
"""Those that were written to last are drawn: more curves cannot be told apart."""
_DEPTH = 3
"""Folders below the one that is looked through."""
FILES = {
    "/runs": ("runs.html", "text/html"),
    "/runs.js": ("runs.js", "text/javascript"),
    "/charts.js": ("charts.js", "text/javascript"),
    "/report.css": ("report.css", "text/css"),
    "/uplot/uPlot.iife.min.js": ("uplot/uPlot.iife.min.js", "text/javascript"),
    "/uplot/uPlot.min.css": ("uplot/uPlot.min.css", "text/css"),
}
_OWN = ("runs.html", "runs.js")


class Shelf:
    """The runs below a folder, each read once and then as far as it grows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._runs: dict[Path, Run] = {}
        self._lock = threading.Lock()  # several pages may look at once

    def curves(self) -> dict[str, Any]:
        """What `AtlasCharts` draws, the run that was written to last first; and how many more there are."""
        with self._lock:
            found = sorted(self._found(), key=lambda path: -path.stat().st_mtime_ns)
            runs = [run for path in found[:MOST_RUNS] if (run := self._read(path))]
            drawn = [{**chart_data(run), "name": self._name(run)} for run in runs]
            return {"folder": str(self.folder), "more": max(0, len(found) - MOST_RUNS), "runs": drawn}

    def _found(self) -> list[Path]:
        patterns = ["/".join(["*"] * depth + ["metrics.jsonl"]) for depth in range(_DEPTH + 1)]
        return [path for pattern in patterns for path in self.folder.glob(pattern) if path.is_file()]

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

    def _name(self, run: Run) -> str:
        name = run.folder.relative_to(self.folder).as_posix()
        return run.name if name == "." else name


def run_routes(folder: Path) -> APIRouter:
    """The page, its files, and the curves."""
    router, shelf = APIRouter(include_in_schema=False), Shelf(folder)
    for path, (name, kind) in FILES.items():
        package = "atlas.serving" if name in _OWN else "atlas.reporting"
        inside = "page" if name in _OWN else "static"
        content = (resources.files(package) / inside / name).read_bytes()
        router.add_api_route(path, page_file(content, kind), methods=["GET"], response_class=Response)

    @router.get("/api/runs")
    async def runs() -> dict[str, Any]:
        return await asyncio.to_thread(shelf.curves)

    return router
