"""Settings before PyTorch computes: memory that is kept, threads that leave a busy core."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import REPOSITORY

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asked of Linux's C libraries")

FAULTS = """
import resource, sys
from atlas.process import keep_memory
if sys.argv[1] == "kept":
    keep_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytes(bytearray(30_000_000))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""

HEAP = """
from atlas.process import keep_memory, lasting_blocks_apart
heap = next(line for line in open("/proc/self/maps") if "[heap]" in line)
begin = int(heap.split("-")[0], 16)
def is_in_heap():
    block = bytearray(258_376)
    kept.append(block)
    end = next(line for line in open("/proc/self/maps") if "[heap]" in line).split("-")[1].split()[0]
    return begin <= id_of(block) < int(end, 16)
import ctypes
id_of = lambda block: ctypes.addressof(ctypes.c_char.from_buffer(block))
kept = []
keep_memory()
print(is_in_heap(), end=" ")
with lasting_blocks_apart():
    print(is_in_heap(), end=" ")
print(is_in_heap())
"""

LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

TENSOR = """
import resource
from atlas.process import set_up_process
set_up_process()
import torch
torch.ones(4)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(16_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

SETTING = """
import os, psutil
psutil.cpu_percent = lambda interval: {percent}
psutil.cpu_count = lambda: 8
os.getloadavg = lambda: ({load}, 0, 0)
from atlas.process import set_up_process
set_up_process()
print(os.environ.get("GOMP_SPINCOUNT"))
"""


ALLOCATOR = """
import os
os.path.exists = lambda path: path == "{there}"
from atlas.process import set_up_process
set_up_process()
print(os.environ.get("PYTORCH_ALLOC_CONF"), os.environ.get("PYTORCH_CUDA_ALLOC_CONF"))
"""


def printed(code: str, *arguments: str, **variables: str) -> str:
    unset = {"GOMP_SPINCOUNT", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    environment |= {"PYTHONPATH": str(REPOSITORY), **variables}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()


def test_freed_memory_is_used_again() -> None:
    """60 MB are 14,600 pages."""
    assert int(printed(FAULTS, "given back")) > 10_000
    assert int(printed(FAULTS, "kept")) < 2_000


def test_blocks_that_last_are_not_in_the_heap() -> None:
    assert printed(HEAP) == "True False True"


@pytest.mark.skipif(
    not LARGE_PAGES.exists() or "[never]" in LARGE_PAGES.read_text(),
    reason="this system gives no large pages",
)
@pytest.mark.slow
def test_large_tensors_are_in_large_pages() -> None:
    """64 MB are 15,600 pages, or 31 large ones."""
    assert int(printed(TENSOR, THP_MEM_ALLOC_ENABLE="0")) > 10_000
    assert int(printed(TENSOR)) < 2_000


@pytest.mark.parametrize(
    ("percent", "load", "set_to"), [(0.9, 1, "None"), (12.5, 0.1, "None"), (12.5, 1, "1000")]
)
def test_threads_sleep_where_another_program_has_half_a_core(
    percent: float, load: float, set_to: str
) -> None:
    """Not for a short moment of another program, nor after one that has ended."""
    assert printed(SETTING.format(percent=percent, load=load)) == set_to


def test_the_users_settings_stay() -> None:
    assert printed(SETTING.format(percent=100, load=2), GOMP_SPINCOUNT="77") == "77"
    assert printed(SETTING.format(percent=100, load=2), OMP_WAIT_POLICY="active") == "None"


@pytest.mark.parametrize(
    ("there", "variables", "set_to"),
    [
        ("/dev/nvidiactl", {}, "expandable_segments:True None"),
        ("/dev/dxg", {}, "None None"),  # WSL 2
        ("/dev/nvidiactl", {"PYTORCH_ALLOC_CONF": ""}, " None"),
        ("/dev/nvidiactl", {"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native None"),
        (
            "/dev/nvidiactl",
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"},
            "None max_split_size_mb:64",
        ),
    ],
)
def test_gpu_memory_grows_in_segments_unless_the_user_sets_it(
    there: str, variables: dict[str, str], set_to: str
) -> None:
    assert printed(ALLOCATOR.format(there=there), **variables) == set_to.strip()


def test_a_process_ends_with_its_code_while_compiled_code_runs_in_an_abandoned_thread() -> None:
    """CPython before 3.14 would unwind the thread through Rust, on which the process aborts with signal 6."""
    program = """if True:
        import sys, threading, time
        from atlas.process import abandon
        from atlas.tokenizer import Tokenizer

        def texts():
            while True:
                time.sleep(0.0005)
                yield "abc def " * 50

        thread = threading.Thread(target=Tokenizer.train, args=(texts(), 300), daemon=True)
        thread.start()
        time.sleep(0.3)
        abandon(thread, 130)
        print("written")
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "written\n", "")
