"""The helpers of the benchmarks: recording a run, contenders that do not start, the counting of speeds."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> object:
    """A module of the folder, found as if a script there ran."""
    monkeypatch.syspath_prepend(FOLDER)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@pytest.fixture
def results(module: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    loaded: ModuleType = module("results")  # type: ignore[operator]
    (tmp_path / "RESULTS.md").write_text("# Measured\n", encoding="utf-8")
    monkeypatch.setattr(loaded, "RESULTS", tmp_path / "RESULTS.md")
    return loaded


def options(results: ModuleType, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    results.add_record_option(parser)
    return parser.parse_args(words)


def test_the_output_is_recorded_on_request(
    results: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks/some.py", "--peer", "nanoGPT=/a b/c/nanoGPT/", "--record"])
    with results.recorded("Some figures", options(results, "--record")):
        print("| a | 1.00 |")
    assert "| a | 1.00 |" in capsys.readouterr().out
    kept = results.RESULTS.read_text(encoding="utf-8")
    assert kept.startswith("# Measured\n\n## Some figures\n\n")
    assert "```text\n| a | 1.00 |\n```\n" in kept
    assert "python benchmarks/some.py --peer nanoGPT=../nanoGPT --record" in kept
    assert re.search(r"\d{4}-\d\d-\d\d, \d+ cores \(.+\), \d+ GiB, .*Python 3\.\d+\.\d+, PyTorch \d", kept)


def test_nothing_is_recorded_without_a_request_or_after_a_failure(results: ModuleType) -> None:
    with results.recorded("Some figures", options(results)):
        print("| a | 1.00 |")
    with pytest.raises(SystemExit), results.recorded("Some figures", options(results, "--record")):
        raise SystemExit("nothing to compare")
    assert results.RESULTS.read_text(encoding="utf-8") == "# Measured\n"


CHILD = """
from contenders import take_turns

def prepare():
    print("noise")
    return lambda request: [request, request * 2]

take_turns(prepare)
"""


def test_contenders_answer_in_turn(
    module: object, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    contenders: ModuleType = module("contenders")  # type: ignore[operator]
    monkeypatch.setattr(contenders, "PAUSE", 0)
    monkeypatch.setenv("PYTHONPATH", str(FOLDER))
    here = contenders.Contender("here", [sys.executable, "-c", CHILD])
    here.launch()
    assert here.is_ready()
    assert [here.ask(number) for number in (1, 3)] == [[1, 2], [3, 6]]
    here.stop()
    assert here.process is not None
    assert here.process.returncode == 0
    missing = contenders.Contender("missing", [sys.executable, "-c", "raise SystemExit('no such library')"])
    missing.launch()
    assert not missing.is_ready()
    said = capfd.readouterr().err
    assert "no such library" in said
    assert "missing: did not start and is left out" in said


def test_speed_counts_after_the_first_token_of_every_text(module: object) -> None:
    decode: ModuleType = module("decode")  # type: ignore[operator]
    assert decode.tokens_per_second([[1.0, 2.0, 3.0]]) == 1.0
    assert decode.tokens_per_second([[0.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]]) == pytest.approx(5 / 3)
    first, last = decode.milliseconds_in_quarters([*range(50), *range(50, 150, 2)])
    assert last == 2 * first == 2000


def test_drift_is_an_absolute_value(module: object, capsys: pytest.CaptureFixture[str]) -> None:
    quantization: ModuleType = module("quantization")  # type: ignore[operator]
    f32 = quantization.Row("f32", 8_000_000, 100.0, 2.0, np.array([-1.0, -2.0, -3.0, -4.0]))
    q8_0 = quantization.Row("q8_0", 2_000_000, 150.0, 1.9, np.array([-1.5, -1.5, -3.0, -4.0]))
    quantization.report([f32, q8_0])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].endswith("| f32 | 8.00 | 1.00 | 100 | 1.00 | 2.0000 | +0.0000 | 0.0000 | 0.000 |")
    assert lines[-1].endswith("| q8_0 | 2.00 | 0.25 | 150 | 1.50 | 1.9000 | -0.1000 | 0.2500 | 0.500 |")


def test_efficiency_is_relative_to_n_times_one_process(
    module: object, capsys: pytest.CaptureFixture[str]
) -> None:
    scaling: ModuleType = module("scaling")  # type: ignore[operator]
    task = scaling.Task(
        "nano", batch_size=4, parallel="ddp", updates=10
    )  # 10,240 tokens per process and turn
    seconds = {("Atlas", 1): 2.0, ("plain DDP", 1): 1.0, ("Atlas", 2): 4.0, ("plain DDP", 2): 2.5}
    chosen = [scaling.trainee(name, "atlas", processes, task) for name, processes in seconds]
    for one, median in zip(chosen, seconds.values(), strict=True):
        one.seconds = [0.0, median, 100.0]
    scaling.report(task, chosen)
    assert capsys.readouterr().out.splitlines()[-4:] == [
        "| 1 | Atlas | 5,120 | 100.0% | 1.000 |",
        "| 1 | plain DDP | 10,240 | 100.0% | 0.500 |",
        "| 2 | Atlas | 5,120 | 50.0% | 1.000 |",
        "| 2 | plain DDP | 8,192 | 40.0% | 0.625 |",
    ]


def test_the_contributors_page_names_every_benchmark() -> None:
    page = (FOLDER.parent / "docs/CONTRIBUTING.md").read_text(encoding="utf-8")
    scripts = [
        path
        for path in FOLDER.iterdir()
        if path.suffix == ".sh" or (path.suffix == ".py" and "__main__" in path.read_text(encoding="utf-8"))
    ]
    assert len(scripts) > 5
    assert [path.name for path in scripts if f"benchmarks/{path.name}`" not in page] == []
