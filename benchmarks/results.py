"""Print the output of a benchmark and, with `--record`, append this output to RESULTS.md.

    python benchmarks/decode.py                 prints
    python benchmarks/decode.py --record        prints, and appends its output to benchmarks/RESULTS.md

Each appended section has the date, the machine, the versions, the command, and the unchanged output of the command.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import psutil

RESULTS = Path(__file__).with_name("RESULTS.md")
PEERS = ("transformers", "xllamacpp")


def add_record_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--record",
        action="store_true",
        help="append the output to benchmarks/RESULTS.md; without it nothing in the checkout changes",
    )


@contextlib.contextmanager
def recorded(title: str, arguments: argparse.Namespace) -> Iterator[None]:
    """With `--record`, append the standard output of this block to RESULTS.md as a section, unless the block fails."""
    machine = describe_machine(getattr(arguments, "device", "cpu"))
    print(f"{machine}\n")
    printed = io.StringIO()
    with contextlib.redirect_stdout(_Both(sys.stdout, printed)):
        yield
    if arguments.record:
        record = f"```bash\n{command()}\n```\n\n```text\n{printed.getvalue().strip()}\n```"
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(f"\n## {title}\n\n{machine}\n\n{record}\n")
        print(f"appended to {RESULTS.parent.name}/{RESULTS.name}", file=sys.stderr)


class _Both(io.TextIOBase):
    def __init__(self, *streams: TextIO) -> None:
        self.streams = streams

    def write(self, text: str) -> int:
        for stream in self.streams:
            stream.write(text)
        return len(text)

    def flush(self) -> None:
        for stream in self.streams:
            stream.flush()


def describe_machine(device: str = "cpu") -> str:
    """Return one line with the date, and with everything on which the figures depend."""
    parts = [
        time.strftime("%Y-%m-%d"),
        f"{os.cpu_count()} cores ({_cpu_name()})",
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        *([_gpu_name()] if device == "cuda" else []),
        platform.system(),
        f"Python {platform.python_version()}",
        f"PyTorch {version('torch')}",
        *(f"{peer} {found}" for peer in PEERS if (found := version(peer))),
    ]
    return ", ".join(parts)


def version(package: str) -> str | None:
    """Return the version of an installed package, without an import: the import of PyTorch takes seconds."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _cpu_name() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def _gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"


def command() -> str:
    """Return the command as typed, without the folders of this machine: a peer in /somewhere/nanoGPT becomes
    ../nanoGPT."""
    words = [re.sub(r"(^|=)/.*?([^/]+)/?$", r"\1../\2", word) for word in sys.argv[1:]]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])
