"""The step that a CUDA graph captures, run eagerly: its logits equal those of the plain forward pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from atlas.config import ModelConfig
from atlas.errors import AtlasError
from atlas.inference import decoder
from atlas.inference.decoder import Decoder
from atlas.inference.generate import generate
from atlas.inference.sampling import Sampling, filters, keep_top_p, row_generators, sample
from atlas.model import AtlasLM, KVCache, build_model

MODERN = {
    "position": "rope",
    "norm": "rmsnorm",
    "mlp": "swiglu",
    "bias": False,
    "qk_norm": True,
    "num_kv_heads": 2,
}


def model_of(**shape: object) -> AtlasLM:
    config = ModelConfig(hidden_size=32, num_layers=2, num_heads=4, vocab_size=101, max_seq_len=24, **shape)
    model = build_model(config, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model.eval()


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Decoders on a CPU that capture: a captured step runs again eagerly. Holds the rows of each capture."""
    seen: list[int] = []

    def graph(self: Decoder, one_pass: Callable[[], Tensor]) -> Callable[[], Tensor]:
        one_pass()
        seen.append(len(self.cache.lengths))
        return one_pass

    prepare = Decoder.__init__

    def prepared(self: Decoder, model: AtlasLM, cache: KVCache) -> None:
        prepare(self, model, cache)
        self._uses_graphs = True

    monkeypatch.setattr(Decoder, "__init__", prepared)
    monkeypatch.setattr(Decoder, "_capture", graph)
    monkeypatch.setattr(decoder, "_FEWEST_SLOTS", 4)
    return seen


@pytest.mark.parametrize("shape", [{}, MODERN], ids=["gpt2", "modern"])
@torch.inference_mode()
def test_logits_equal_those_of_the_plain_pass(shape: dict, recording: list[int]) -> None:
    """Three sequences of different lengths, beyond two sizes of the window."""
    model = model_of(**shape)
    caches = [KVCache(model.config, 3) for _ in range(2)]
    prompts = torch.randint(0, 101, (3, 5), generator=torch.Generator().manual_seed(1))
    for cache in caches:
        model(prompts, cache)
        cache.truncate([5, 2, 3])
    recorded = Decoder(model, caches[0])
    for step in range(12):
        newest = [(7 * step + row) % 101 for row in range(3)]
        expected = model(torch.tensor(newest)[:, None], caches[1])[:, -1]
        torch.testing.assert_close(recorded.next_logits(newest), expected, rtol=1e-5, atol=1e-5)
    assert recorded.cache.lengths.tolist() == [17, 14, 15]
    assert list(recorded._graphs) == [(3, 8), (3, 16), (3, 24)]


@torch.inference_mode()
def test_sequences_may_leave_and_join(recording: list[int]) -> None:
    model = model_of()
    caches = [KVCache(model.config, 3) for _ in range(2)]
    decoders = [Decoder(model, cache) for cache in caches]
    decoders[1]._uses_graphs = False
    for cache in caches:
        model(torch.arange(12).view(3, 4), cache)
    for change in (
        lambda cache: None,
        lambda cache: cache.remove(0),
        lambda cache: _add_one(model, cache),
        lambda cache: cache.truncate([2] * len(cache.lengths)),  # after a full context
    ):
        for cache in caches:
            change(cache)
        newest = list(range(len(caches[0].lengths)))
        for _ in range(3):
            one, other = (each.next_logits(newest) for each in decoders)
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert {rows for rows, _ in decoders[0]._graphs} == {2, 3}


def _add_one(model: AtlasLM, cache: KVCache) -> None:
    row = cache.free_rows([0])
    model(torch.arange(6)[None], row)
    cache.truncate([*cache.row_lengths, *row.row_lengths])


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(), Sampling(repetition_penalty=1.3)])
def test_the_text_is_the_same(sampling: Sampling, recording: list[int]) -> None:
    """Also beyond the context, where its newest half is prefilled again."""
    model = model_of(**MODERN)
    texts = [
        list(
            generate(
                model,
                [[1, 2, 3], [4]],
                sampling,
                max_tokens=40,
                generators=row_generators(3, 2),
                use_cache=use_cache,
            )
        )
        for use_cache in (True, False)
    ]
    assert texts[0] == texts[1]
    assert recording


@torch.inference_mode()
def test_a_failed_capture_warns_once(recording: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Decoder, one_pass: Callable[[], Tensor]) -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(Decoder, "_capture", fails)
    model = model_of()
    cache = KVCache(model.config, 1)
    model(torch.tensor([[1, 2]]), cache)
    one = Decoder(model, cache)
    with pytest.warns(
        UserWarning, match="cannot capture CUDA graphs, so generation is slower: CUDA e"
    ) as said:
        one.next_logits([3])
    assert len(said) == 1
    assert "more" not in str(said[0].message).split("capturing")[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one.next_logits([3])
    assert cache.lengths.tolist() == [4]


# Sampling without a host-device sync


def test_non_finite_logits_are_reported(tiny_model: AtlasLM) -> None:
    logits = torch.randn(3, 20)
    logits[1, 4] = float("nan")
    for sampling in (Sampling(), Sampling(temperature=0)):
        tokens = sample(logits, sampling, [[]] * 3, row_generators(0, 3)).tolist()
        assert [token < 0 for token in tokens] == [False, True, False]
    with torch.no_grad():
        tiny_model.final_norm.weight.fill_(float("nan"))
    with pytest.raises(AtlasError, match="logits are not finite"):
        next(generate(tiny_model, [[1]], Sampling(), max_tokens=1))


def test_a_row_draws_the_same_in_any_batch() -> None:
    logits = torch.randn(4, 50)
    together = sample(logits, Sampling(), [[]] * 4, row_generators(7, 4)).tolist()
    alone = [
        sample(logits[row : row + 1], Sampling(), [[]], row_generators(7, 1, first_row=row)).item()
        for row in range(4)
    ]
    assert together == alone


def test_top_p_over_all_tokens_equals_top_p_over_the_likeliest() -> None:
    """As on CUDA, which does not check whether few tokens are enough."""
    logits = 3 * torch.randn(5, 3000)
    for p in (0.3, 0.95):
        assert torch.equal(keep_top_p(logits, p, most=3000), keep_top_p(logits, p))
    steps = dict(filters(logits, Sampling(top_k=40, top_p=0.7)))
    assert torch.equal(steps["top_p"], keep_top_p(steps["top_k"], 0.7, most=1024))
