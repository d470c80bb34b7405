"""Best-fit packing against its definition: nothing lost, nothing twice, and hardly any padding."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atlas.data import IGNORE_INDEX, open_dataset, prepare
from atlas.data.sequences.packing import PackedDataset, best_fit_decreasing, pieces_of
from atlas.data.shards import TokenStream
from atlas.tokenizer import Tokenizer
from tests.data.test_mixture import mixed
from tests.model.test_documents import corpus
from tests.runs import assert_same_run, stopped_and_resumed, trained


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATLAS_CACHE_DIR", str(tmp_path / "cache"))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=120), st.integers(40, 60))
def test_pieces_are_packed_as_by_the_plain_algorithm(lengths: list[int], capacity: int) -> None:
    rooms: list[int] = []  # best-fit decreasing as the textbook has it
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(capacity - length)
    bin_of = best_fit_decreasing(np.array(lengths), capacity)
    filled = np.bincount(bin_of, weights=lengths)
    assert sorted(capacity - filled) == sorted(rooms)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(1, 12))
def test_each_token_of_a_cut_document_except_its_first_is_predicted_once(
    lengths: list[int], context: int
) -> None:
    ends = np.cumsum(lengths)
    predicted: Counter[int] = Counter()
    held: set[int] = set()
    for start, length in zip(*pieces_of(ends - lengths, ends, context), strict=True):
        assert 1 <= length <= context + 1
        held |= set(range(start, start + length))
        predicted.update(range(start + 1, start + length))
    assert held == set(range(ends[-1]))
    assert predicted == Counter(set(range(ends[-1])) - set((ends - lengths).tolist()))


@pytest.mark.parametrize("context", [512, 1024])
def test_a_realistic_corpus_has_less_than_one_percent_padding(context: int) -> None:
    lengths = np.maximum(1, np.random.default_rng(0).lognormal(np.log(200), 1.0, 20_000)).astype(np.int64)
    ends = np.cumsum(lengths)
    _, pieces = pieces_of(ends - lengths, ends, context)
    filled = np.bincount(best_fit_decreasing(pieces, context + 1), weights=pieces)
    assert filled.max() <= context + 1
    assert 1 - filled.sum() / (len(filled) * (context + 1)) < 0.01


@pytest.fixture
def stream(tmp_path: Path) -> TokenStream:
    """Documents over several shards."""
    toy = Tokenizer.resolve("tests.toy:tokenizer")
    prepare([corpus(tmp_path)], tmp_path / "data", toy, val_fraction=0.0, shard_tokens=300)
    found = open_dataset(tmp_path / "data").split("train")
    assert found is not None
    assert len(found.record.shards) > 2
    return found


@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(context=st.integers(4, 60))
def test_every_token_of_a_stream_is_predicted_once(stream: TokenStream, context: int) -> None:
    dataset = PackedDataset(stream, context, with_documents=True)
    tokens = stream.read(0, stream.num_tokens)
    starts = set(stream.document_starts().tolist())
    seen: Counter[int] = Counter()
    for window in range(len(dataset)):
        inputs, targets, documents = (column.numpy() for column in dataset[window])
        assert len(inputs) == len(targets) == context
        valid = targets != IGNORE_INDEX
        inside = valid[:-1] & (documents[:-1] == documents[1:])
        assert (targets[:-1][inside] == inputs[1:][inside]).all()
        seen.update(targets[valid].tolist())
    everything = Counter(tokens.tolist())
    firsts = Counter(tokens[sorted(starts)].tolist())  # not predicted where they begin a window
    assert not seen - everything
    assert not (everything - seen) - firsts


def test_a_plan_is_made_once_and_a_shorter_window_has_its_own(
    stream: TokenStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = PackedDataset(stream, 32)
    monkeypatch.setattr("atlas.data.sequences.packing.best_fit_decreasing", None)
    again = PackedDataset(replace(stream), 32)
    assert [first[w][0].tolist() for w in range(len(first))] == [
        again[w][0].tolist() for w in range(len(again))
    ]
    with pytest.raises(TypeError):
        PackedDataset(stream, 31)


def test_mixture_packing_and_mask_together_resume_bit_for_bit(tmp_path: Path) -> None:
    first, second = corpus(tmp_path), tmp_path / "second.txt"
    second.write_text("other words " * 60, encoding="utf-8")
    both = {"data__document_mask": True, "data__packing": "best_fit", "training__eval_interval": 3}
    trained(mixed(tmp_path / "whole", first, second, **both))
    assert "of positions are padding" in (tmp_path / "whole/training.log").read_text(encoding="utf-8")
    explicit = mixed(tmp_path / "parts", first, second, **both)
    stopped_and_resumed(explicit)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", steps=6)
