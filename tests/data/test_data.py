"""Shards, sequences, the order of a run, batches, and the data that `--train-data` accepts."""

from __future__ import annotations

import collections
import json
import os
import pickle
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atlas.data import (
    IGNORE_INDEX,
    SequenceDataset,
    SequenceOrder,
    TextDataset,
    TokenStream,
    batches,
    open_dataset,
    prepare,
    resolve_data,
)
from atlas.data.shards import MANIFEST
from atlas.errors import AtlasError
from atlas.tokenizer import Tokenizer
from tests.toy import CharacterTokenizer

EOS = CharacterTokenizer.eos_id


def characters() -> Tokenizer:
    return Tokenizer.wrap(CharacterTokenizer())


def stream_of(folder: Path, text: str, **options: Any) -> TokenStream:
    """The training stream of one text, a token per byte."""
    source = folder / "text.txt"
    source.write_text(text, encoding="utf-8")
    summary = prepare([source], folder / "dataset", characters(), val_fraction=0.0, **options)
    stream = summary.dataset.split("train")
    assert stream is not None
    return stream


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A prepared dataset of 30 documents with a validation part, in several shards."""
    lines = [json.dumps({"text": f"Document {number}: " + "word " * number}) for number in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    summary = prepare(
        [tmp_path / "rows.jsonl"], tmp_path / "dataset", characters(), val_fraction=0.3, shard_tokens=500
    )
    return summary.dataset.folder


# Shards


@pytest.mark.parametrize("shard_tokens", [1, 2, 7, 10_000])
def test_a_stream_reads_across_shards(shard_tokens: int, tmp_path: Path) -> None:
    text = "the quick brown fox jumps"
    expected = [*text.encode(), EOS]
    stream = stream_of(tmp_path, text, shard_tokens=shard_tokens)
    assert (stream.num_tokens, stream.num_bytes, stream.num_documents) == (len(text) + 1, len(text), 1)
    for start in range(len(expected) + 1):
        for stop in range(start, len(expected) + 1):
            assert stream.read(start, stop).tolist() == expected[start:stop]
    with pytest.raises(IndexError):
        stream.read(0, len(expected) + 1)


def test_document_starts_point_behind_each_end_of_text(folder: Path) -> None:
    for name in ("train", "val"):
        stream = open_dataset(folder).split(name)
        assert stream is not None
        tokens = stream.read(0, stream.num_tokens)
        starts = stream.document_starts()
        assert len(starts) == stream.num_documents
        assert starts.tolist() == [0, *(np.flatnonzero(tokens[:-1] == EOS) + 1)]
        assert tokens[-1] == EOS


def test_a_pickled_stream_carries_no_data(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, "0123456789" * 10_000)
    before = stream.read(0, stream.num_tokens)
    pickled = pickle.dumps(stream)
    assert len(pickled) < 3000
    again = pickle.loads(pickled)  # noqa: S301
    assert np.array_equal(again.read(0, again.num_tokens), before)


def test_ids_are_stored_as_wide_as_the_vocabulary_needs(tmp_path: Path) -> None:
    class Wide(CharacterTokenizer):
        vocab_size = 2**16 + 1
        eos_id = 2**16

    source = tmp_path / "a.txt"
    source.write_text("abc", encoding="utf-8")
    wide = prepare([source], tmp_path / "wide", Tokenizer.wrap(Wide()), val_fraction=0).dataset.split("train")
    narrow = prepare([source], tmp_path / "narrow", characters(), val_fraction=0).dataset.split("train")
    assert wide is not None
    assert narrow is not None
    assert (wide.read(0, 4).dtype, narrow.read(0, 4).dtype) == (np.uint32, np.uint16)
    assert wide.read(0, 4).tolist() == [97, 98, 99, 2**16]


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    change(content)
    (folder / MANIFEST).write_text(json.dumps(content), encoding="utf-8")


def set_shard(content: dict[str, Any], **values: Any) -> None:
    content["splits"]["train"]["shards"][0].update(values)


def overwrite(path: Path, array: np.ndarray[Any, Any]) -> None:
    np.save(path, array, allow_pickle=array.dtype == object)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "is not a prepared dataset"),
    "manifest is no JSON": (lambda f: (f / MANIFEST).write_text("{"), "cannot be read"),
    "manifest of something else": (
        lambda f: (f / MANIFEST).write_text("[1]"),
        "does not describe an Atlas dataset",
    ),
    "later version": (lambda f: edit_manifest(f, lambda c: c.update(version=99)), "format version 99"),
    "field missing": (lambda f: edit_manifest(f, lambda c: c.pop("splits")), "splits"),
    "counts that do not add up": (
        lambda f: edit_manifest(f, lambda c: c["splits"]["train"].update(tokens=7)),
        "not the sum of its shards",
    ),
    "absurd count": (
        lambda f: edit_manifest(f, lambda c: set_shard(c, tokens=2**60)),
        "splits.train.shards.0.tokens",
    ),
    "file outside the folder": (
        lambda f: edit_manifest(f, lambda c: set_shard(c, file="../train-00000.npy")),
        "splits.train.shards.0.file",
    ),
    "eos outside the vocabulary": (
        lambda f: edit_manifest(f, lambda c: c["tokenizer"].update(eos_id=5000)),
        "do not make a vocabulary",
    ),
    "tokenizer of no kind": (
        lambda f: edit_manifest(f, lambda c: c["tokenizer"].pop("kind")),
        "has no kind, name and fingerprint",
    ),
    "dtype that does not fit": (lambda f: edit_manifest(f, lambda c: c.update(dtype="<u4")), "does not fit"),
    "shard missing": (lambda f: (f / "train-00001.npy").unlink(), "missing from the dataset"),
    "shard cut short": (lambda f: os.truncate(f / "train-00000.npy", 300), "bytes instead of"),
    "shard of another type": (
        lambda f: overwrite(f / "train-00000.npy", np.zeros(500, dtype=np.float64)),
        "says (500,) of uint16",
    ),
    "shard of another length": (
        lambda f: overwrite(f / "train-00000.npy", np.zeros(10, dtype=np.uint16)),
        "says (500,) of uint16",
    ),
    "a pickle in place of a shard": (
        lambda f: overwrite(f / "train-00000.npy", np.array([{}], dtype=object)),
        "train-00000.npy",
    ),
    "no array at all": (lambda f: (f / "train-00000.npy").write_bytes(b"text"), "is not a token shard"),
    "id beyond the vocabulary": (
        lambda f: overwrite(f / "train-00000.npy", np.full(500, 257, dtype=np.uint16)),
        "token id 257, but the tokenizer has 257 tokens",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_dataset_is_refused_by_name(name: str, folder: Path) -> None:
    damage, reason = DAMAGE[name]
    damage(folder)
    with pytest.raises(AtlasError) as caught:
        open_dataset(folder)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_verify_notices_a_flipped_bit(folder: Path) -> None:
    path = folder / "val-00000.npy"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    open_dataset(folder)
    with pytest.raises(AtlasError, match=r"val-00000\.npy: its content changed"):
        open_dataset(folder, verify=True)


def test_the_fingerprint_identifies_the_training_data(tmp_path: Path) -> None:
    a = stream_of(tmp_path, "some text").folder
    first = open_dataset(a).fingerprint
    same = prepare([tmp_path / "text.txt"], tmp_path / "copy", characters(), val_fraction=0.0)
    assert same.dataset.fingerprint == first
    (tmp_path / "text.txt").write_text("some texT", encoding="utf-8")
    other = prepare([tmp_path / "text.txt"], tmp_path / "other", characters(), val_fraction=0.0)
    assert other.dataset.fingerprint != first


# Sequences


@given(length=st.integers(2, 60), context=st.integers(1, 20), pad=st.booleans())
@settings(deadline=None, max_examples=60)
def test_windows_cover_every_target_once(
    length: int, context: int, pad: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = "".join(chr(33 + i) for i in range(length - 1))
    tokens = [*text.encode(), EOS]
    stream = stream_of(tmp_path_factory.mktemp("stream"), text, shard_tokens=13)
    if length <= context and not pad:
        with pytest.raises(AtlasError, match=f"{length} tokens are too few.*max_seq_len {context}"):
            SequenceDataset(stream, context)
        return
    dataset = SequenceDataset(stream, context, pad_last=pad)
    seen: list[int] = []
    for window in range(len(dataset)):
        inputs, targets = dataset[window]
        assert inputs.shape == targets.shape == (context,)
        assert inputs.dtype == targets.dtype == torch.int64
        valid = targets != IGNORE_INDEX
        start = window * context
        assert inputs[valid].tolist() == tokens[start : start + int(valid.sum())]
        assert (inputs[~valid] == EOS).all()
        seen += targets[valid].tolist()
    assert seen == tokens[1 : 1 + len(seen)]
    assert len(seen) == length - 1 if pad else (length - 1) // context * context
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_text_dataset_accepts_any_tokenizer(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 40, encoding="utf-8")
    dataset = TextDataset(
        [tmp_path / "a.txt", tmp_path / "b.txt"], tokenizer=CharacterTokenizer(), max_seq_len=16
    )
    assert len(dataset) == 81 // 16
    assert dataset[0][0].tolist() == [97] * 16
    assert dataset[2][0].tolist() == [97] * 8 + [EOS] + [98] * 7
    assert len(TextDataset(tmp_path / "a.txt", max_seq_len=4)) > 0
    with pytest.raises(AtlasError, match="41 tokens are too few for one sequence of max_seq_len 1024"):
        TextDataset(tmp_path / "a.txt", tokenizer=CharacterTokenizer())


# Order


@given(seed=st.integers(0, 2**63 - 1), windows=st.integers(1, 10_000), epoch=st.integers(0, 10**6))
@settings(deadline=None, max_examples=100)
def test_every_window_once_per_epoch(seed: int, windows: int, epoch: int) -> None:
    order = SequenceOrder(seed, windows)
    sequences = np.arange(epoch * windows, (epoch + 1) * windows)
    drawn = order(sequences)
    assert sorted(drawn.tolist()) == list(range(windows))
    assert order(sequences[::-1]).tolist() == drawn.tolist()[::-1]
    assert int(order(np.array(int(sequences[-1])))) == drawn[-1]


def chi_square_excess(counts: np.ndarray[Any, Any]) -> float:
    """The number of standard deviations by which the statistic exceeds its mean, for equal expectations."""
    expected, freedom = counts.mean(), counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("windows", [3, 4, 5])
def test_all_permutations_of_a_few_windows_are_equally_likely(windows: int) -> None:
    epochs = SequenceOrder(1, windows)(np.arange(windows * 20_000)).reshape(-1, windows)
    counts = collections.Counter(map(tuple, epochs.tolist()))
    possible = {3: 6, 4: 24, 5: 120}[windows]
    assert len(counts) == possible
    assert abs(chi_square_excess(np.array(list(counts.values())))) < 4


@pytest.mark.parametrize("windows", [6, 16, 17, 100, pytest.param(300, marks=pytest.mark.slow)])
def test_order_is_uniform_within_and_between_epochs(windows: int) -> None:
    epochs = SequenceOrder(2, windows)(np.arange(windows * 10_000)).reshape(-1, windows)
    first = np.bincount(epochs[:, 0], minlength=windows)
    step = np.bincount((epochs[:, 1] - epochs[:, 0]) % windows, minlength=windows)[1:]
    moved = np.bincount((epochs[1:, 3] - epochs[:-1, 3]) % windows, minlength=windows)
    for counts in (first, step, moved):
        assert abs(chi_square_excess(counts)) < 4


def test_order_of_ten_thousand_million_windows() -> None:
    windows = 10**10
    drawn = SequenceOrder(3, windows)(np.arange(10**9, 10**9 + 200_000))
    assert len(np.unique(drawn)) == len(drawn)
    assert 0 <= drawn.min() <= drawn.max() < windows
    assert abs(chi_square_excess(np.bincount(drawn // 10**8, minlength=100))) < 4
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.01


def test_the_order_never_changes() -> None:
    """A count of sequences resumes a run, so these numbers may never change."""
    expected = [3, 0, 8, 9, 5, 2, 1, 6, 7, 4, 5, 3, 9, 4, 2, 8, 7, 6, 1, 0]
    assert SequenceOrder(1337, 10)(np.arange(20)).tolist() == expected
    assert SequenceOrder(1338, 10)(np.arange(20)).tolist() != expected


# Batches


@pytest.fixture
def dataset(tmp_path: Path) -> SequenceDataset:
    return SequenceDataset(stream_of(tmp_path, "".join(chr(32 + i % 90) for i in range(1000))), 16)


def flat(iterator: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> list[list[int]]:
    return [row.tolist() for inputs, targets in iterator for row in torch.cat([inputs, targets], dim=1)]


def test_batches_follow_the_order_from_any_start_at_any_size(dataset: SequenceDataset) -> None:
    order = SequenceOrder(5, len(dataset))
    all_rows = flat(batches(dataset, order, start=0, sequences_per_update=1, num_updates=150))
    windows = order(np.arange(150))
    assert all_rows == [torch.cat(dataset[int(window)]).tolist() for window in windows]
    for start, size in ((0, 7), (11, 4), (60, 10)):
        updates = (150 - start) // size
        rows = flat(batches(dataset, order, start=start, sequences_per_update=size, num_updates=updates))
        assert rows == all_rows[start : start + updates * size]


def test_workers_give_the_same_batches_and_leave_random_state_alone(dataset: SequenceDataset) -> None:
    order = SequenceOrder(5, len(dataset))
    state = torch.get_rng_state()
    options: dict[str, Any] = {"start": 55, "sequences_per_update": 4, "num_updates": 6}
    assert flat(batches(dataset, order, num_workers=2, **options)) == flat(batches(dataset, order, **options))
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_without_end(dataset: SequenceDataset) -> None:
    iterator = batches(dataset, SequenceOrder(5, len(dataset)), start=0, sequences_per_update=30)
    assert len([next(iterator) for _ in range(10)]) == 10


class Failing:
    """Returns rows slowly, and fails from the tenth on."""

    def __init__(self, error: Exception) -> None:
        self.error, self.read = error, 0

    def __len__(self) -> int:
        return 100

    def __getitem__(self, window: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.read += 1
        time.sleep(0.002)
        if self.read > 10:
            raise self.error
        return torch.tensor([window]), torch.tensor([window])


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_error_in_a_reading_thread_is_raised_unchanged(workers: int) -> None:
    failing: Any = Failing(AtlasError("train-00000.npy: gone"))
    stream = batches(failing, SequenceOrder(5, 100), start=0, sequences_per_update=2, num_workers=workers)
    with pytest.raises(AtlasError, match=r"^train-00000\.npy: gone$"):
        list(stream)


def test_threads_stop_when_their_batches_are_no_longer_needed(dataset: SequenceDataset) -> None:
    before = threading.active_count()
    for end in ("close", "drop"):
        stream = batches(
            dataset, SequenceOrder(5, len(dataset)), start=0, sequences_per_update=4, num_workers=2
        )
        next(stream)
        assert threading.active_count() > before
        if end == "close":
            stream.close()  # type: ignore[attr-defined]
        del stream
        deadline = time.monotonic() + 10
        while threading.active_count() > before:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_threads_read_a_limited_number_of_batches_ahead() -> None:
    slow: Any = Failing(AtlasError("never"))
    slow.read = -(10**6)
    stream = batches(slow, SequenceOrder(5, 100), start=0, sequences_per_update=2, num_workers=2)
    next(stream)
    time.sleep(0.2)
    assert slow.read + 10**6 <= 2 * 2 * 2 + 2


def test_a_thread_that_hangs_does_not_delay_the_exit(dataset: SequenceDataset) -> None:
    release = threading.Event()

    class Hanging(SequenceDataset):
        def __getitem__(self, window: int) -> tuple[torch.Tensor, torch.Tensor]:
            if window != first:
                release.wait(30)
            return super().__getitem__(window)

    order = SequenceOrder(5, len(dataset))
    first = int(order(np.array(0)))
    hanging = Hanging(dataset.stream, 16)
    iterator = batches(hanging, order, start=0, sequences_per_update=1, num_workers=1)
    next(iterator)
    start = time.monotonic()
    del iterator
    assert time.monotonic() - start < 1
    release.set()


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals and forks")
def test_signals_forks_and_exit_while_threads_read(dataset: SequenceDataset) -> None:
    program = f"""
import os, signal
from atlas.data import SequenceDataset, SequenceOrder, batches, open_dataset
heard = []
dataset = SequenceDataset(open_dataset({str(dataset.stream.folder)!r}).split("train"), 16)
order = SequenceOrder(5, len(dataset))
iterator = batches(dataset, order, start=0, sequences_per_update=4, num_workers=2, num_updates=50)
next(iterator)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: heard.append(1))
    os.killpg(0, number)
child = os.fork()
if child == 0:
    raise SystemExit(7)  # as an ordinary program ends
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(len(list(iterator)), len(heard), status)
left_reading = batches(dataset, order, start=0, sequences_per_update=4, num_workers=2)
next(left_reading)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, start_new_session=True, timeout=60
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "49 2 7\n")


@given(
    share=st.integers(1, 5),
    world_size=st.integers(1, 6),
    start=st.integers(0, 500),
    workers=st.integers(0, 2),
)
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ranks_share_each_update(
    share: int, world_size: int, start: int, workers: int, dataset: SequenceDataset
) -> None:
    options: dict[str, Any] = {"start": start, "sequences_per_update": share * world_size, "num_updates": 3}
    order = SequenceOrder(5, len(dataset))
    alone = list(batches(dataset, order, **options))
    ranks = [
        list(batches(dataset, order, rank=rank, world_size=world_size, num_workers=workers, **options))
        for rank in range(world_size)
    ]
    for update, (inputs, targets) in enumerate(alone):
        assert torch.equal(torch.cat([rank[update][0] for rank in ranks]), inputs)
        assert torch.equal(torch.cat([rank[update][1] for rank in ranks]), targets)


def test_an_update_that_cannot_be_shared_evenly_is_refused(dataset: SequenceDataset) -> None:
    with pytest.raises(AtlasError, match="an update of 8 sequences cannot be split evenly over 3 processes"):
        batches(dataset, SequenceOrder(5, len(dataset)), start=0, sequences_per_update=8, world_size=3)


# At scale


def sparse_dataset(folder: Path, tokens: int, *, last: int = 0) -> Path:
    """A prepared dataset of so many zeros, which use no space on the disk, and one more token."""
    tokenizer = Tokenizer.gpt2()
    folder.mkdir()
    for name, kind, count in (("train-00000.npy", "<u2", tokens), ("train-00000.docs.npy", "<i8", 1)):
        with (folder / name).open("wb") as file:
            np.lib.format.write_array_header_1_0(
                file, {"descr": kind, "fortran_order": False, "shape": (count,)}
            )
            file.truncate(file.tell() + count * np.dtype(kind).itemsize)
    if last:
        np.load(folder / "train-00000.npy", mmap_mode="r+")[-1] = last
    shard = {
        "file": "train-00000.npy",
        "tokens": tokens,
        "sha256": "",
        "documents": 1,
        "documents_sha256": "",
    }
    content = {
        "format": "atlas-dataset",
        "version": 1,
        "key": "",
        "tokenizer": tokenizer.state(),
        "dtype": "<u2",
        "splits": {"train": {"documents": 1, "tokens": tokens, "bytes": tokens, "shards": [shard]}},
        "options": {},
        "source": {},
        "notes": [],
    }
    (folder / MANIFEST).write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_seeking_in_ten_thousand_million_tokens_costs_nothing(tmp_path: Path) -> None:
    """Step 10⁷ of eight sequences. A dataset of format version 1 is read as well."""
    folder = sparse_dataset(tmp_path / "sparse", 10**10)
    tracemalloc.start()
    stream = open_dataset(folder).split("train")
    assert stream is not None
    dataset = SequenceDataset(stream, 1024)
    seconds = []
    for step in (10**7, 10**7 + 1, 3 * 10**8):
        start = time.perf_counter()
        order = SequenceOrder(1, len(dataset))
        inputs, _ = next(batches(dataset, order, start=8 * step, sequences_per_update=8))
        seconds.append(time.perf_counter() - start)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert inputs.shape == (8, 1024)
    assert min(seconds) < 0.1, "10 ms are measured by benchmarks/loader.py; this machine may be busy"
    assert peak < 50e6


def test_a_wrong_id_is_refused_at_the_latest_when_it_is_read(tmp_path: Path) -> None:
    """Not every id of a large dataset is checked when it is opened."""
    stream = open_dataset(sparse_dataset(tmp_path / "sparse", 10**9, last=50_300)).split("train")
    assert stream is not None
    assert stream.read(0, 1000).max() == 0
    with pytest.raises(AtlasError, match="train contains token id 50300, but the tokenizer has 50257 tokens"):
        stream.read(10**9 - 10, 10**9)
    small = sparse_dataset(tmp_path / "small", 10**6, last=50_300)
    with pytest.raises(AtlasError, match="train contains token id 50300"):
        open_dataset(small)


# The data that --train-data and --val-data accept


def test_a_prepared_folder_has_its_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("many words, few tokens. " * 200, encoding="utf-8")
    folder = tmp_path / "own"
    prepare([tmp_path / "a.txt"], folder, train_tokenizer=280, val_fraction=0.1)
    data = resolve_data(folder)
    assert data.val is not None
    assert data.tokenizer.fingerprint == Tokenizer.load(folder).fingerprint
    text = data.tokenizer.decode(
        [*data.train.read(0, data.train.num_tokens), *data.val.read(0, data.val.num_tokens)]
    )
    assert text == "many words, few tokens. " * 200 + "<|endoftext|>"
    with pytest.raises(AtlasError, match=f"bpe .{data.tokenizer.fingerprint[:16]}.*gpt2 .22c33a209a65b11e"):
        resolve_data(folder, tokenizer=Tokenizer.gpt2())


def test_plain_text_is_prepared_once(text_file: Path) -> None:
    data = resolve_data(text_file, val_fraction=0.1)
    assert data.val is not None
    assert data.tokenizer.name == "gpt2"
    assert 0.08 < data.val.num_tokens / (data.train.num_tokens + data.val.num_tokens) < 0.12
    assert any("1 document: too few" in note for note in data.notes)
    made = (data.train.folder / MANIFEST).stat().st_mtime_ns
    again = resolve_data(text_file, val_fraction=0.1)
    assert again.train.folder == data.train.folder
    assert (again.train.folder / MANIFEST).stat().st_mtime_ns == made
    text_file.write_text("Something else. " * 100, encoding="utf-8")
    assert resolve_data(text_file, val_fraction=0.1).fingerprint != data.fingerprint


def test_with_other_validation_text_nothing_is_held_out(text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text("Held out. " * 50, encoding="utf-8")
    data = resolve_data(text_file, tmp_path / "val.txt")
    assert data.val is not None
    assert data.train.num_bytes == text_file.stat().st_size
    assert data.val.num_bytes == 500


def test_a_prepared_folder_validates_on_its_validation_split(folder: Path, tmp_path: Path) -> None:
    val = open_dataset(folder).split("val")
    (tmp_path / "a.txt").write_text("text " * 100, encoding="utf-8")
    data = resolve_data(tmp_path / "a.txt", folder, tokenizer=characters())
    assert val is not None
    assert data.val is not None
    assert data.val.num_tokens == val.num_tokens


def test_validation_data_of_another_tokenizer_is_refused(folder: Path, text_file: Path) -> None:
    with pytest.raises(
        AtlasError, match=r"was prepared with tokenizer tests.*not with gpt2 \(22c33a209a65b11e\)"
    ):
        resolve_data(text_file, folder)


def test_a_custom_tokenizer_must_be_named_again(folder: Path) -> None:
    with pytest.raises(AtlasError, match="is custom code"):
        resolve_data(folder)
    assert resolve_data(folder, tokenizer=characters()).train.num_documents > 0


def test_missing_and_empty_data_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").touch()
    for path, reason in {
        "missing": "no such file or folder",
        "empty": "nothing to read",
        "empty.txt": "no text",
    }.items():
        with pytest.raises(AtlasError, match=reason):
            resolve_data(tmp_path / path)
