"""Run the tests that need a GPU, and record a result for each test. Another call does not repeat tests that passed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from gpu.figures import Figures, Setup

LIMIT = 45
ROOT = Path(__file__).parents[2]


class Outcomes:
    """A plugin of pytest that writes each test's outcome as soon as it is known."""

    def __init__(self, figures: Figures) -> None:
        self.figures = figures

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        passed = {line["figure"] for line in self.figures.lines() if line.get("outcome") == "passed"}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
        items[:] = [item for item in items if item.nodeid not in passed]

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            reason = {} if report.outcome == "passed" else {"reason": str(report.longrepr)[-300:]}
            seconds = round(report.duration, 2)
            self.figures.add(report.nodeid, outcome=report.outcome, seconds=seconds, **reason)


def tests(setup: Setup, figures: Figures) -> None:
    import pytest

    os.chdir(ROOT)
    # Other files may import packages that are not installed.
    files = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "mark.gpu" in path.read_text(encoding="utf-8")
    ]
    options = ["-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider"]
    code = pytest.main([*options, *files], plugins=[Outcomes(figures)])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise SystemExit(f"pytest ended with {int(code)}: {setup.log.name} has its output")


JOBS = {"tests": tests}
