"""Sampling, the sliding window and streaming, each against its definition or a plain rerun."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas.errors import AtlasError
from atlas.inference.generate import generate
from atlas.inference.sampling import (
    Sampling,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    probabilities,
    row_generators,
)
from atlas.inference.text import TextStream
from atlas.model import AtlasLM
from atlas.tokenizer import Tokenizer

GREEDY = Sampling(temperature=0)

logit_rows = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=40).map(
    lambda row: torch.tensor([row])
)


def ids(model: AtlasLM, prompts: list[list[int]], sampling: Sampling = GREEDY, **options) -> list[list[int]]:
    steps = list(generate(model, prompts, sampling, **{"max_tokens": 60, **options}))
    return [[step[row] for step in steps if step[row] is not None] for row in range(len(prompts))]


# The definition of each filter, in plain Python over sorted probabilities.


@given(logit_rows, st.integers(1, 45))
def test_top_k_keeps_the_k_likeliest(logits: torch.Tensor, k: int) -> None:
    kept = keep_top_k(logits, k)[0].isfinite()
    values = logits[0].tolist()
    threshold = sorted(values, reverse=True)[min(k, len(values)) - 1]
    assert kept.tolist() == [value >= threshold for value in values]


@given(logit_rows, st.floats(0.01, 0.999), st.integers(1, 50))
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits: torch.Tensor, p: float, few: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("atlas.inference.sampling._FEW", few)
        kept = keep_top_p(logits, p)[0].isfinite()
    probs = logits.double().softmax(-1)[0]
    inside, outside = probs[kept], probs[~kept]
    assert inside.sum() >= p - 1e-5
    assert inside.sum() - inside.min() < p + 1e-5  # without its least likely token the sum is below p
    assert not len(outside) or outside.max() <= inside.min()


@given(logit_rows, st.floats(0.01, 0.99))
def test_min_p_keeps_tokens_nearly_as_likely_as_the_likeliest(logits: torch.Tensor, p: float) -> None:
    kept = keep_min_p(logits, p)[0].isfinite()
    values = logits[0].double()
    ratio = (values - values.max()).exp()
    clear = (ratio - p).abs() > 1e-6
    assert torch.equal(kept[clear], (ratio >= p)[clear])


def test_filters_that_are_off_change_nothing() -> None:
    logits = torch.randn(3, 17)
    for filtered in (keep_top_k(logits, 0), keep_top_p(logits, 1.0), keep_min_p(logits, 0.0)):
        assert torch.equal(filtered, logits)


def test_repetition_penalty_equals_transformers() -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits, seen = torch.randn(2, 30), [[1, 5, 5, 9], [2, 3, 4, 4]]
    expected = processors.RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor(seen), logits.clone())
    torch.testing.assert_close(penalize_repetition(logits, seen, 1.7), expected)


def test_top_p_after_top_k_equals_transformers() -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(4, 50) * 3
    expected = processors.TopPLogitsWarper(0.8)(None, processors.TopKLogitsWarper(12)(None, logits))
    assert torch.equal(keep_top_p(keep_top_k(logits, 12), 0.8), expected)


@settings(deadline=None)
@given(
    logit_rows,
    st.builds(
        Sampling,
        temperature=st.floats(5e-324, 1e308),
        top_k=st.integers(0, 50),
        top_p=st.floats(0, 1, exclude_min=True),
        min_p=st.floats(0, 1, exclude_max=True),
        repetition_penalty=st.floats(0.01, 100),
    ),
)
def test_all_settings_leave_a_token_to_draw(logits: torch.Tensor, sampling: Sampling) -> None:
    """Even if the temperature is the smallest float."""
    seen = [list(range(0, logits.shape[-1], 2))]
    probs = probabilities(penalize_repetition(logits, seen, sampling.repetition_penalty), sampling)
    assert probs.isfinite().all()
    assert probs.min() >= 0
    assert float(probs.sum()) == pytest.approx(1, abs=1e-4)


def test_draws_follow_the_distribution() -> None:
    probs = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    generator = torch.Generator().manual_seed(3)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[draw(probs, [generator])] += 1
    chi_square = ((counts - 4000 * probs[0]) ** 2 / (4000 * probs[0])).sum()
    assert chi_square < 16.27  # the 0.999 quantile at 3 degrees of freedom


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"top_k": -1},
        {"top_p": -0.1},
        {"top_p": 1.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0},
    ],
)
def test_invalid_settings_are_refused_with_their_flag(wrong: dict) -> None:
    with pytest.raises(AtlasError, match="--" + next(iter(wrong)).replace("_", "-")):
        Sampling(**wrong)


# Generation.


def test_greedy_equals_the_argmax_of_plain_forward_passes(tiny_model: AtlasLM) -> None:
    row = [5, 17, 3]
    for _ in range(20):
        row.append(int(tiny_model(torch.tensor([row]))[0, -1].argmax()))
    assert ids(tiny_model, [[5, 17, 3]], max_tokens=20) == [row[3:]]


def test_half_precision_weights_use_a_cache_of_their_dtype(tiny_model: AtlasLM) -> None:
    """Only the model's own tensors decide the precision. In f16, since this CPU may lack bf16 arithmetic."""
    half = copy.deepcopy(tiny_model).half()
    prompts = [[1, 2, 3], [4]]
    for use_cache in (True, False):
        rows = ids(half, prompts, Sampling(temperature=0), use_cache=use_cache)
        assert all(len(row) == 60 for row in rows)
    logits = half(torch.tensor([[1, 2, 3]])).float().log_softmax(-1)
    torch.testing.assert_close(
        logits, tiny_model(torch.tensor([[1, 2, 3]])).log_softmax(-1), atol=0.02, rtol=0
    )


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, top_k=0, top_p=1.0)])
def test_cache_changes_nothing_even_far_beyond_the_context(tiny_model: AtlasLM, sampling: Sampling) -> None:
    prompts = [[1, 2, 3], [7] * 20, [9], list(range(24)), list(range(40))]
    with_cache = ids(tiny_model, prompts, sampling, generators=row_generators(1, 5))
    without = ids(tiny_model, prompts, sampling, use_cache=False, generators=row_generators(1, 5))
    assert with_cache == without
    assert all(len(row) == 60 for row in with_cache)  # context is 24: the window slid


def test_a_row_does_not_depend_on_the_other_rows(tiny_model: AtlasLM) -> None:
    sampling = Sampling(temperature=1.0)
    together = ids(tiny_model, [[1, 2], [3, 4, 5, 6], [8]], sampling, generators=row_generators(5, 3))
    alone = [
        ids(tiny_model, [prompt], sampling, generators=row_generators(5, 1, first_row=row))[0]
        for row, prompt in enumerate([[1, 2], [3, 4, 5, 6], [8]])
    ]
    assert together == alone


def test_generation_ends_at_the_end_of_text_token_and_leaves_it_out(tiny_model: AtlasLM) -> None:
    endless = ids(tiny_model, [[5, 17, 3]])[0]
    eos = endless[7]
    ended = ids(tiny_model, [[5, 17, 3], [9]], eos_id=eos)[0]
    assert ended == endless[: endless.index(eos)]


def test_padding_rows_of_the_vocabulary_are_never_produced(tiny_model: AtlasLM) -> None:
    hot = Sampling(temperature=50.0, top_k=0, top_p=1.0)
    produced = ids(tiny_model, [[1]] * 8, hot, max_tokens=200)
    assert max(map(max, produced)) <= 100  # vocab_size 101, padded to 128
    assert tiny_model.token_embedding.weight.shape[0] == 128


# Streaming.

TEXT = st.text(st.characters(codec="utf-8"), max_size=30)


@settings(deadline=None)
@given(TEXT)
def test_streamed_text_is_the_text(text: str) -> None:
    tokenizer = Tokenizer.gpt2()
    stream = TextStream(tokenizer)
    shown = "".join([stream.add(token) for token in tokenizer.encode(text)] + [stream.finish()])
    assert shown == text


@settings(deadline=None)
@given(st.lists(st.integers(0, 255), max_size=20))
def test_streamed_garbage_equals_the_decoding_of_all_tokens(tokens: list[int]) -> None:
    tokenizer = Tokenizer.gpt2()  # ids 0 to 255 are single bytes
    stream = TextStream(tokenizer)
    shown = "".join([stream.add(token) for token in tokens] + [stream.finish()])
    assert shown == tokenizer.decode(tokens)


def test_half_a_character_is_held_back() -> None:
    tokenizer = Tokenizer.gpt2()
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in tokenizer.encode("né→🙂")]
    assert not any("\ufffd" in piece for piece in pieces)


@settings(deadline=None)
@given(st.text("ab ", max_size=40), st.lists(st.text("ab ", min_size=1, max_size=4), min_size=1, max_size=3))
def test_the_text_ends_before_the_stop_string_that_is_complete_first(text: str, stop: list[str]) -> None:
    tokenizer = Tokenizer.gpt2()
    stream = TextStream(tokenizer, stop)
    shown = "".join([stream.add(token) for token in tokenizer.encode(text)] + [stream.finish()])
    ends = [(end, -len(s)) for s in stop for end in range(len(text) + 1) if text[:end].endswith(s)]
    first_end, length = min(ends, default=(len(text), 0))
    assert shown == text[: first_end + length]


def test_perplexity_of_an_absurd_loss_is_infinite_not_an_error() -> None:
    from atlas.training.logs.run_log import perplexity

    assert perplexity(1e9) == math.inf
