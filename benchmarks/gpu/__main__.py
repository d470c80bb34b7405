"""Run the GPU tests and benchmarks in one call, in at most 400 seconds and without a network.

    benchmarks/gpu.sh --nanogpt ../nanoGPT
    benchmarks/gpu.sh --wheels wheels               installs missing packages from a folder, beside the system's
    benchmarks/gpu.sh --only training --only head
    benchmarks/gpu.sh --rehearse                    every part on the CPU with tiny models, to test the script

The script needs Linux, Python 3.11 or newer, PyTorch 2.10 or newer with CUDA, and the packages that Atlas requires.
Each result is a line of JSON. As soon as the script has a result, it prints this line and appends it to `figures.jsonl`
in the output folder (to `rehearsal.jsonl` in a rehearsal). All other output goes to `log.txt` in the same folder.
Another call with the same folder measures only the results that this file lacks. If a part exceeds its time limit, the
script stops this part and starts the next part. Each job of a part is a separate process, so that only one model is on
the device at a time. All jobs share a cache of compiled kernels.

The parts: `tests` runs the tests with the marker `gpu`. `training` measures tokens per second of training, compared
with compiled nanoGPT. `head` measures the matrix products of the LM head and the loss. `peaks` measures the peak memory
of the largest presets. `writing` measures tokens per second of generation, compared with transformers. `runs` trains a
model, kills the run and resumes it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpu import training
from gpu.child import LEFT_OUT
from gpu.figures import Figures, Setup
from gpu.wheels import Missing, advice, choose, install, missing, needed

PARTS = ("tests", "training", "head", "peaks", "writing", "runs")
BUDGET = 400
"""Seconds of all limits together, including the check of the machine."""


def main() -> int:
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running job ends, too
    packages = arguments.scratch / "packages"
    with contextlib.suppress(FileExistsError):
        arguments.output.mkdir(parents=True)
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    setup = Setup(
        arguments.output.resolve(),
        arguments.scratch.resolve(),
        arguments.nanogpt and arguments.nanogpt.resolve(),
        arguments.rehearse,
    )
    if not provide(arguments.wheels, packages):
        return 2
    before = setup.file.read_bytes() if setup.file.exists() else b""
    if not run_part("machine", setup):
        return 1
    results = [run_part(part, setup) for part in arguments.only or PARTS]
    for name, ratio in training.ratios(Figures(setup.file, "training")).items():
        print(json.dumps({"part": "training", "ratio": name, "atlas_by_nanogpt": ratio}))
    if setup.file.read_bytes() == before:
        print(f"{setup.file} already has all figures; --output DIR measures them again", file=sys.stderr)
    return 0 if all(results) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", action="append", choices=PARTS, metavar="PART", help="may be given several times"
    )
    parser.add_argument("--output", type=Path, default=Path("gpu-results"), help="default: gpu-results")
    parser.add_argument(
        "--scratch",
        type=Path,
        default=Path(tempfile.gettempdir()) / "atlas-gpu",
        help="folder of caches, runs and installed wheels; default: in the system's temporary folder",
    )
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="folder with nanoGPT's model.py")
    parser.add_argument(
        "--wheels", type=Path, metavar="DIR", help="install missing packages from this folder"
    )
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny models")
    arguments = parser.parse_args()
    if sys.version_info < (3, 11):
        parser.error(f"needs Python 3.11 or newer, and this is {sys.version.split()[0]}")
    if arguments.nanogpt and not (arguments.nanogpt / "model.py").is_file():
        parser.error(f"--nanogpt {arguments.nanogpt}: has no model.py")
    if arguments.wheels and not arguments.wheels.is_dir():
        parser.error(f"--wheels {arguments.wheels}: is not a folder")
    return arguments


def provide(wheels: Path | None, packages: Path) -> bool:
    """Whether all packages are here or could be installed from `wheels`. Prints what is missing."""
    try:
        if wheels is None:
            if names := missing(needed(), packages):
                raise Missing(names)
        elif chosen := choose(needed(), wheels, packages):
            install(chosen, packages)
    except Missing as absent:
        print(advice(absent.names, wheels or Path("wheels")), file=sys.stderr)
        return False
    return True


def run_part(part: str, setup: Setup) -> bool:
    """Run the jobs of a part, up to its limit. False if one failed or the time was too short."""
    module = importlib.import_module(f"gpu.{part}")
    figures = Figures(setup.file, part)
    end = time.monotonic() + module.LIMIT
    passed = True
    for job in module.JOBS:
        if not figures.is_done(job):
            passed = run_job(job, end, setup, figures) and passed
    return passed


def run_job(job: str, end: float, setup: Setup, figures: Figures) -> bool:
    start = time.monotonic()
    if start >= end:
        figures.fail(job, "not started: the part's time is used up", 0)
        return False
    command = [sys.executable, "-m", "gpu.child", figures.part, job, setup.as_json()]
    with setup.log.open("a", encoding="utf-8") as log:
        print(f"\n== {figures.part}: {job}", file=log, flush=True)
        process = subprocess.Popen(command, stderr=log, env=environment(setup), process_group=0)
        try:
            code = process.wait(timeout=end - start)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):  # the processes that the job started end with it
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = time.monotonic() - start
    if code == 0:
        figures.finish(job, seconds)
    elif code == LEFT_OUT:
        print(json.dumps({"part": figures.part, "job": job, "left_out": last_line(setup.log)}), flush=True)
    else:
        figures.fail(job, "stopped at the part's limit" if code is None else last_line(setup.log), seconds)
    return code in (0, LEFT_OUT)


def last_line(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace").rstrip().rpartition("\n")[2][:300]


def environment(setup: Setup) -> dict[str, str]:
    caches = {
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "TRITON_CACHE_DIR": "triton",
        "ATLAS_CACHE_DIR": "atlas",
    }
    path = [str(setup.scratch / "packages"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        **{name: str(setup.scratch / folder) for name, folder in caches.items()},
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTHONUNBUFFERED": "1",  # output before the limit is kept
    }


if __name__ == "__main__":
    sys.exit(main())
