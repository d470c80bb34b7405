"""`benchmarks/gpu.sh` without a GPU: missing packages are named, figures are kept, limits hold, and every part runs."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType

import packaging
import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or sys.version_info < (3, 11), reason="the script needs Linux and Python 3.11"
)

NANOGPT = '''
import torch
from dataclasses import dataclass
from torch import nn

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(nn.Module):
    """No more than a table, with nanoGPT's names."""
    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)

    def forward(self, inputs, targets):
        logits = self.wte(inputs) @ self.wte.weight.T
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
'''


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def call(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The script, with its output and caches in `folder`."""
    folders = ["--output", str(folder / "out"), "--scratch", str(folder / "scratch")]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        ["bash", str(SCRIPT), *folders, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def bare_python(tmp_path: Path) -> Path:
    """A Python that has only its library, `packaging`, and PyTorch's name."""
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "packaging").symlink_to(Path(packaging.__file__).parent)
    distribution(packages, "torch", "2.11.0")
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{packages}" exec "{sys.executable}" -S "$@"\n', encoding="utf-8"
    )
    python.chmod(0o755)
    return python


def distribution(folder: Path, name: str, version: str) -> None:
    (folder / f"{name}-{version}.dist-info").mkdir(parents=True)
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(metadata, encoding="utf-8")


def wheel(folder: Path, name: str, version: str, *requirements: str) -> Path:
    path = folder / f"{name}-{version}-py3-none-any.whl"
    needs = "".join(f"Requires-Dist: {requirement}\n" for requirement in requirements)
    files = {
        f"{name}.py": f"version = {version!r}\n",
        f"{name}-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}",
        f"{name}-{version}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{name}-{version}.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
    return path


def test_missing_packages_are_named_immediately(tmp_path: Path, bare_python: Path) -> None:
    start = time.monotonic()
    done = call(tmp_path, PYTHON=str(bare_python))
    assert time.monotonic() - start < 5  # 0.2 s on an idle machine
    assert done.returncode == 2
    first, _, command, last = done.stderr.splitlines()
    assert first.startswith("error: these packages are missing: numpy>=")
    assert "pydantic>=" in first
    assert "torch" not in first
    assert "-m pip download --only-binary=:all: --python-version 3." in command
    assert command.endswith("'pytest>=8.2'")
    assert last == "Then here: benchmarks/gpu.sh --wheels wheels"


def test_only_missing_packages_are_installed_from_wheels(module: object, tmp_path: Path) -> None:
    wheels: ModuleType = module("gpu.wheels")  # type: ignore[operator]
    folder, packages = tmp_path / "wheels", tmp_path / "packages"
    folder.mkdir()
    wheel(folder, "probe_one", "1.0")
    wheel(
        folder,
        "probe_one",
        "2.0",
        "probe-two>=1; python_version >= '3'",
        "probe-three; extra == 'more'",
        "numpy",
    )
    wheel(folder, "probe_two", "1.5")
    wheel(folder, "numpy", "99.0")
    chosen = wheels.choose(["numpy>=1.26", "probe-one>=1", "absent; python_version < '3'"], folder, packages)
    assert {path.name.partition("-py3")[0] for path in chosen} == {"probe_one-2.0", "probe_two-1.5"}
    wheels.install(chosen, packages)
    assert {path.stem for path in packages.glob("*.py")} == {"probe_one", "probe_two"}
    assert wheels.choose(["probe-one>=1", "probe-two"], folder, packages) == []

    wheel(folder, "probe_one", "3.0", "probe-four>=7")
    wheel(folder, "torch", "99.0")
    with pytest.raises(wheels.Missing, match="probe-four>=7, torch>=50"):
        wheels.choose(["probe-one>=3", "torch>=50"], folder, packages)
    assert "PyTorch 2.10 or newer" in wheels.advice(["torch>=50"], folder)


def test_figures_survive_a_stopped_call(module: object, tmp_path: Path) -> None:
    figures: ModuleType = module("gpu.figures")  # type: ignore[operator]
    file = tmp_path / "figures.jsonl"
    one = figures.Figures(file, "head")
    one.add("loss", milliseconds=1.0)
    with file.open("a", encoding="utf-8") as cut_off:
        cut_off.write('{"part": "head", "fig')
    one.fail("products", "stopped at the part's limit", 3.0)
    one.finish("loss", 2.0)
    again = figures.Figures(file, "head")
    assert again.get("loss") == {"part": "head", "figure": "loss", "milliseconds": 1.0}
    assert again.get("products") is None
    assert (again.is_done("loss"), again.is_done("products")) == (True, False)
    assert figures.Figures(file, "training").lines() == []


def test_a_job_ends_at_its_limit(module: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")]))
    script: ModuleType = module("gpu.__main__")  # type: ignore[operator]
    figures: ModuleType = module("gpu.figures")  # type: ignore[operator]
    setup = figures.Setup(tmp_path, tmp_path, rehearse=True)
    one = figures.Figures(setup.file, "head")
    start = time.monotonic()
    assert not script.run_job("loss", start + 0.2, setup, one)  # importing PyTorch takes longer
    assert time.monotonic() - start < 5
    assert one.lines()[-1]["error"] == "stopped at the part's limit"
    assert not script.run_job("products", start, setup, one)
    assert one.lines()[-1]["error"] == "not started: the part's time is used up"
    limits = [module(f"gpu.{part}").LIMIT for part in ("machine", *script.PARTS)]  # type: ignore[operator]
    assert sum(limits) <= script.BUDGET


@pytest.mark.slow
def test_a_rehearsal_gives_figures_and_another_call_repeats_none(tmp_path: Path) -> None:
    arguments = ["--rehearse", "--only", "head", "--only", "training"]
    done = call(tmp_path, *arguments)
    log = tmp_path / "out" / "log.txt"
    assert done.returncode == 0, log.read_text(encoding="utf-8")
    printed = lines(done.stdout)
    assert {line["part"] for line in printed} == {"machine", "head", "training"}
    figures = {line["figure"]: line for line in printed if "figure" in line}
    assert {"machine", "square product", "loss, 256 rows a chunk", "small: auto"} <= figures.keys()
    assert figures["small: Atlas, 8 x 32"]["tokens_per_second"] > 0
    assert figures["small: Atlas, auto"]["sequences"] == 32
    left_out = [line["job"] for line in printed if "left_out" in line]
    assert left_out == ["small: nanoGPT, 8", "small: nanoGPT, 16", "small: nanoGPT, 32"]
    kept = (tmp_path / "out" / "rehearsal.jsonl").read_text(encoding="utf-8")
    assert lines(kept) == [line for line in printed if "left_out" not in line]

    again = call(tmp_path, *arguments)
    assert again.returncode == 0
    assert [line["job"] for line in lines(again.stdout)] == left_out
    assert (tmp_path / "out" / "rehearsal.jsonl").read_text(encoding="utf-8") == kept


def test_without_a_gpu_only_a_rehearsal_runs(tmp_path: Path) -> None:
    done = call(tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    [line] = lines(done.stdout)
    assert line["part"] == "machine"
    assert "sees no CUDA device" in line["error"]


@pytest.mark.slow
def test_a_rehearsal_of_everything(tmp_path: Path) -> None:
    folder = tmp_path / "nanoGPT"
    folder.mkdir()
    (folder / "model.py").write_text(NANOGPT, encoding="utf-8")
    done = call(tmp_path, "--rehearse", "--nanogpt", str(folder))
    assert done.returncode == 0, (tmp_path / "out" / "log.txt").read_text(encoding="utf-8")
    printed = lines(done.stdout)
    assert {line["part"] for line in printed} == {
        "machine", "tests", "training", "head", "peaks", "writing", "runs"
    }  # fmt: skip
    figures = {line["figure"]: line for line in printed if "figure" in line}
    assert figures["resumed beside not killed"]["largest_difference"] == 0
    assert figures["resumed beside not killed"]["same_number_of_sequences"]
    assert figures["resumed"]["killed_at"] > figures["resumed"]["resumed_from"]
    assert "small: nanoGPT, 8 x 32 of 32" in figures
    assert [line["ratio"] for line in printed if "ratio" in line] == [
        "small, equal micro-batch",
        "small, auto",
    ]


ON_FAKE_CUDA = """
import sys, time
from pathlib import Path
from fake_cuda import FakeCuda, waits

card = FakeCuda()
import torch
from gpu import head, machine, timing, training
from gpu.figures import Figures, Setup

class OnCard(Setup):
    device = "cuda"

timing._mark = lambda device: time.perf_counter()
torch.cuda.reset_peak_memory_stats = lambda: None
torch.cuda.memory_allocated = lambda: 0
setup = OnCard(Path(sys.argv[1]), Path(sys.argv[1]), rehearse=True)
jobs = {"machine": machine, "products": head, "loss": head, "small: Atlas, 8": training}
with card, waits():
    for job, part in jobs.items():
        part.JOBS[job](setup, Figures(setup.file, part.__name__))
"""


@pytest.mark.slow
def test_the_parts_call_only_what_a_gpu_accepts(module: object, tmp_path: Path) -> None:
    """On fake tensors of the device cuda: mixed devices and wrong dtypes fail."""
    if reason := module("fake_cuda").why_not():  # type: ignore[operator]
        pytest.skip(reason)
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    done = subprocess.run(
        [sys.executable, "-c", ON_FAKE_CUDA, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    names = [line["figure"] for line in lines(done.stdout)]
    assert {"machine", "loss, 8192 rows a chunk", "small: Atlas, 8 x 32"} <= set(names)
