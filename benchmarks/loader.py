"""Compare ways to read batches: in the training thread, in threads that prefetch, and in processes of
`torch.utils.data.DataLoader`.

    python benchmarks/loader.py

The data is 1 GB of memory-mapped uint16, read as sequences of 1,024 tokens in random order. "Reading alone" is the time
to read a batch when nothing else runs. "Waiting beside a step" is the time that a training loop waits for a batch. This
loop computes matrix products in one thread for 50 ms between two batches. "Cold" means that the file is dropped from
the page cache before each run. Another line shows the time to seek to step 10⁷ in a sparse file of 10¹⁰ tokens. The
runs are interleaved, and the figures are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import add_record_option, recorded
from torch.utils.data import DataLoader

from atlas.data import SequenceDataset, SequenceOrder, batches, open_dataset
from atlas.data.shards import FORMAT_VERSION, token_dtype
from atlas.tokenizer import Tokenizer

CONTEXT, SIZES, ROUNDS, BATCHES = 1024, (8, 64, 512), 3, 12
STEP_SECONDS = 0.05

Batches = Iterator[Any]


def sparse_dataset(folder: Path, *, tokens: int) -> Path:
    """Create a prepared dataset of `tokens` zeros, which uses no disk space until numbers are written to the file."""
    tokenizer = Tokenizer.gpt2()
    dtype = token_dtype(tokenizer.vocab_size)
    folder.mkdir()
    for file, kind, count in (
        ("train-00000.npy", dtype, tokens),
        ("train-00000.docs.npy", np.dtype("<i8"), 1),
    ):
        with (folder / file).open("wb") as out:
            header = {"descr": kind.str, "fortran_order": False, "shape": (count,)}
            np.lib.format.write_array_header_1_0(out, header)
            out.truncate(out.tell() + count * kind.itemsize)
    shard = {"file": "train-00000.npy", "tokens": tokens, "sha256": "0" * 64}
    shard |= {"documents": 1, "documents_sha256": "0" * 64, "largest_id": 0}
    manifest = {
        "format": "atlas-dataset",
        "version": FORMAT_VERSION,
        "key": "sparse",
        "tokenizer": tokenizer.state(),
        "dtype": dtype.str,
        "splits": {"train": {"documents": 1, "tokens": tokens, "bytes": tokens, "shards": [shard]}},
        "options": {},
        "source": {},
        "notes": [],
    }
    (folder / "dataset.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def random_dataset(folder: Path, *, tokens: int) -> Path:
    sparse_dataset(folder, tokens=tokens)
    array = np.load(folder / "train-00000.npy", mmap_mode="r+")
    rng = np.random.default_rng(0)
    for start in range(0, tokens, 2**24):
        piece = array[start : start + 2**24]
        piece[:] = rng.integers(0, 50_257, len(piece), dtype=np.uint16)
    array.flush()
    return folder


def sequences(folder: Path) -> SequenceDataset:
    stream = open_dataset(folder).split("train")
    assert stream is not None
    return SequenceDataset(stream, CONTEXT)


def with_processes(dataset: SequenceDataset, size: int, workers: int) -> Batches:
    order = SequenceOrder(0, len(dataset))
    sampler = [order(np.arange(i * size, (i + 1) * size)).tolist() for i in range(BATCHES + 2)]
    return iter(DataLoader(dataset, batch_sampler=sampler, num_workers=workers))


def with_threads(dataset: SequenceDataset, size: int, workers: int) -> Batches:
    order = SequenceOrder(0, len(dataset))
    return batches(
        dataset, order, start=0, sequences_per_update=size, num_workers=workers, num_updates=BATCHES + 2
    )


WAYS: dict[str, Callable[[SequenceDataset, int], Batches]] = {
    "in the training thread": lambda dataset, size: with_threads(dataset, size, 0),
    "1 thread": lambda dataset, size: with_threads(dataset, size, 1),
    "2 threads": lambda dataset, size: with_threads(dataset, size, 2),
    "1 process": lambda dataset, size: with_processes(dataset, size, 1),
    "2 processes": lambda dataset, size: with_processes(dataset, size, 2),
}


def waits(stream: Batches, *, compute: Callable[[], None]) -> float:
    """Return the median seconds of `next`, without the first two batches, during which the reader starts and fills its
    buffers."""
    times = []
    for _ in range(BATCHES + 2):
        start = time.perf_counter()
        next(stream)
        times.append(time.perf_counter() - start)
        compute()
    return statistics.median(times[2:])


def step() -> None:
    end = time.perf_counter() + STEP_SECONDS
    matrix = torch.ones(256, 256)
    while time.perf_counter() < end:
        matrix @ matrix


def drop_from_cache(folder: Path) -> None:
    descriptor = os.open(folder / "train-00000.npy", os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def compare(folder: Path) -> None:
    conditions = {
        "reading alone, warm": (False, lambda: None),
        "waiting beside a step, warm": (False, step),
        "waiting beside a step, cold": (True, step),
    }
    for size in SIZES:
        print(f"\n{size} × {CONTEXT:,}, ms".ljust(26) + "".join(f"{name:>30}" for name in conditions))
        taken: dict[tuple[str, str], list[float]] = {}
        for _ in range(ROUNDS):
            for name, (cold, compute) in conditions.items():
                for way, read in WAYS.items():
                    dataset = sequences(folder)
                    if cold:
                        drop_from_cache(folder)
                    taken.setdefault((way, name), []).append(waits(read(dataset, size), compute=compute))
        for way in WAYS:
            cells = (f"{statistics.median(taken[way, name]) * 1000:>30.2f}" for name in conditions)
            print(f"{way:<25}" + "".join(cells))


def seek(folder: Path) -> None:
    """Measure the time, then the memory, from step 10⁷ on with 8 sequences per step, in a file that was not read
    before."""
    sparse_dataset(folder, tokens=10**10)
    opened, sought = [], []
    for number in range(10**7, 10**7 + 20):
        start = time.perf_counter()
        dataset = sequences(folder)
        opened.append(time.perf_counter() - start)
        sought.append(first_batch(dataset, step_number=number))
    tracemalloc.start()
    first_batch(sequences(folder), step_number=10**7 + 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(
        f"\n10^10 tokens: opened in {statistics.median(opened) * 1000:.1f} ms; step 10^7 sought and its batch read in "
        f"{statistics.median(sought) * 1000:.1f} ms (longest {max(sought) * 1000:.1f}); {peak / 1e6:.1f} MB"
    )


def first_batch(dataset: SequenceDataset, *, step_number: int) -> float:
    start = time.perf_counter()
    order = SequenceOrder(0, len(dataset))
    next(batches(dataset, order, start=8 * step_number, sequences_per_update=8))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=500_000_000, help="number of tokens of 2 bytes")
    add_record_option(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary, recorded("Reading batches", arguments):
        seek(Path(temporary) / "sparse")
        compare(random_dataset(Path(temporary) / "random", tokens=arguments.tokens))


if __name__ == "__main__":
    main()
