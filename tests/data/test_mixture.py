"""Several datasets as one: exact shares, every window once per pass, the same from any place."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas.config.loader import parse_overrides, resolve
from atlas.data import resolve_mixture
from atlas.data.sequences.mixture import BLOCK, MixtureOrder, order_of, quotas
from atlas.errors import AtlasError
from atlas.tokenizer import Tokenizer
from tests.model.test_documents import corpus
from tests.runs import assert_same_run, layer, stopped_and_resumed, trained

parts_of_a_mixture = st.lists(st.tuples(st.integers(1, 3000), st.floats(0.05, 20)), min_size=1, max_size=4)


@given(st.lists(st.floats(0.05, 20), min_size=1, max_size=6))
def test_a_blocks_quotas_are_the_weights_to_less_than_one_sequence(weights: list[float]) -> None:
    counts = quotas(weights)
    assert sum(counts) == BLOCK
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - BLOCK * weight / sum(weights)) < 1 + 1e-6


@settings(deadline=None, max_examples=25)
@given(parts_of_a_mixture, st.integers(0, 2**62))
def test_shares_hold_in_each_block_and_each_part_is_read_in_complete_passes(
    parts: list[tuple[int, float]], seed: int
) -> None:
    lengths, weights = zip(*parts, strict=True)
    windows = MixtureOrder(seed, lengths, weights)(np.arange(2 * BLOCK))
    bounds = np.cumsum([0, *lengths])
    for part, quota in enumerate(quotas(weights)):
        mine = (windows >= bounds[part]) & (windows < bounds[part + 1])
        assert mine[:BLOCK].sum() == mine[BLOCK:].sum() == quota
        own, length = windows[mine] - bounds[part], lengths[part]
        for begin in range(0, len(own), length):
            one_pass = own[begin : begin + length]
            assert len(set(one_pass.tolist())) == len(one_pass)


@settings(deadline=None, max_examples=25)
@given(parts_of_a_mixture, st.integers(0, 3 * BLOCK), st.integers(1, 50), st.integers(1, 50))
def test_any_place_at_any_batch_size_gives_the_same_sequences(
    parts: list[tuple[int, float]], start: int, one: int, other: int
) -> None:
    order = MixtureOrder(7, *zip(*parts, strict=True))
    numbers = np.arange(start, start + 100)
    whole = order(numbers).tolist()
    assert [w for at in range(0, 100, one) for w in order(numbers[at : at + one]).tolist()] == whole
    assert [w for at in range(0, 100, other) for w in order(numbers[at : at + other]).tolist()] == whole
    assert MixtureOrder(8, *zip(*parts, strict=True))(np.arange(100)).shape == (100,)


def test_a_distant_place_costs_the_same_as_the_first() -> None:
    order = MixtureOrder(0, [10**10, 10**9], [3, 1])
    begin = time.perf_counter()
    windows = order(np.arange(10**12, 10**12 + 8))
    assert time.perf_counter() - begin < 0.5
    assert len(set(windows.tolist())) == 8


def test_a_weight_too_small_to_be_sampled_is_refused() -> None:
    with pytest.raises(AtlasError, match="weight 1e-06"):
        quotas([1.0, 1e-6])


def test_train_data_and_a_mixture_are_refused_together_and_mistakes_are_one_line() -> None:
    mixed = "data.mixture=[{path: a, weight: 0.7}, {path: b, weight: 3e-1}]"
    mixture = resolve(parse_overrides([mixed])).data.mixture
    assert mixture is not None
    assert [(part.path, part.weight) for part in mixture] == [("a", 0.7), ("b", 0.3)]
    with pytest.raises(AtlasError, match="exclude each other"):
        resolve(parse_overrides([mixed, "data.train_data=c"]))
    for wrong in ("[]", "[{path: a, weight: 0}]", "[{path: a}]", "[{path: a, weigth: 1, weight: 1}]"):
        with pytest.raises(AtlasError, match=r"data\.mixture"):
            resolve(parse_overrides([f"data.mixture={wrong}"]))


def mixed(folder: Path, text: Path, other: Path, **settings_: object) -> dict:
    explicit = layer(folder, text, **settings_)
    del explicit["data"]["train_data"]
    explicit["data"]["mixture"] = [{"path": str(text), "weight": 3}, {"path": str(other), "weight": 1}]
    return explicit


def test_a_run_on_a_mixture_logs_its_shares_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    first = corpus(tmp_path)
    second = tmp_path / "second.txt"
    second.write_text("other words " * 60, encoding="utf-8")
    settings_ = {"data__document_mask": True, "training__eval_interval": 3, "checkpoint__save_interval": 4}
    whole, _ = trained(mixed(tmp_path / "whole", first, second, **settings_))
    said = (tmp_path / "whole/training.log").read_text(encoding="utf-8")
    assert f"mixture: {first}: 75.00% of the sequences" in said
    assert f"mixture: {second}: 25.00% of the sequences" in said
    drawn = Counter(
        order_of(whole.data.train, whole.config.seed)(np.arange(BLOCK)) < len(whole.data.train.parts[0])
    )
    assert drawn == {True: 3 * BLOCK // 4, False: BLOCK // 4}

    explicit = mixed(tmp_path / "parts", first, second, **settings_)
    stopped_and_resumed(explicit)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", steps=6)


def test_parts_of_different_tokenizers_are_refused(tmp_path: Path) -> None:
    from atlas.config.config import MixturePart
    from atlas.data import prepare

    text = tmp_path / "a.txt"
    text.write_text("one two three " * 50, encoding="utf-8")
    toy = Tokenizer.resolve("tests.toy:tokenizer")
    for name, tokenizer in (("toy", toy), ("gpt2", Tokenizer.gpt2())):
        prepare([text], tmp_path / name, tokenizer)
    parts = [MixturePart(path=str(tmp_path / name), weight=1) for name in ("gpt2", "toy")]
    with pytest.raises(AtlasError, match=r"toy: was prepared with tokenizer"):
        resolve_mixture(parts)
