"""The worked examples of docs/CONTRIBUTING.md: each diff is applied to a copy of the tree, which then trains."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import REPOSITORY

EXAMPLES = {"alibi": 3, "nadam": 2, "gemma_norm": 2}
"""The diffs in docs/examples, and how many files each may change."""


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_worked_example_applies_trains_and_generates(tmp_path: Path, name: str) -> None:
    diff = REPOSITORY / "docs" / "examples" / f"{name}.diff"
    for folder in ("atlas", "tests"):
        shutil.copytree(
            REPOSITORY / folder,
            tmp_path / folder,
            ignore=shutil.ignore_patterns("fixtures", "page", "test_*"),  # with what Python has compiled
        )
    subprocess.run(["git", "apply", str(diff)], cwd=tmp_path, check=True)
    done = subprocess.run(
        [sys.executable, "-m", "tests.worked_examples", name],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("name", "most"), EXAMPLES.items())
def test_a_worked_example_touches_as_few_lines_as_the_page_says(name: str, most: int) -> None:
    diff = (REPOSITORY / "docs" / "examples" / f"{name}.diff").read_text(encoding="utf-8")
    subprocess.run(["git", "apply", "--check", "-"], cwd=REPOSITORY, input=diff, text=True, check=True)
    files = re.findall(r"^\+\+\+ b/(atlas/\S+)$", diff, flags=re.M)
    assert 0 < len(files) <= most
    lines = len(re.findall(r"^\+(?!\+\+ )", diff, flags=re.M))
    page = (REPOSITORY / "docs" / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\|.*examples/{name}\.diff.*$", page, flags=re.M)
    assert f"| {len(files)} files, {lines} lines |" in row
    assert all(f"`{file.removeprefix('atlas/')}`" in row for file in files)
