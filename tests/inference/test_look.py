"""Looks inside a model, against transformers' attentions and hidden states, hooks, and definitions."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atlas.config import LoraConfig, ModelConfig
from atlas.errors import AtlasError
from atlas.inference.layout import lay_out_for_decoding
from atlas.inference.load import LoadedModel
from atlas.inference.look import attention, encode, expectations, lens, next_token, token_text
from atlas.inference.sampling import Sampling, penalize_repetition, probabilities
from atlas.model import AtlasLM, add_lora, merged
from atlas.tokenizer import Tokenizer
from atlas.tokenizer.foreign import ForeignTokenizer
from atlas.training.loss import compute_lm_loss
from tests.conftest import corpus
from tests.model.test_llama_qwen import MIXED, SHAPES, twin_of
from tests.test_model import CONFIG, UNTIED, difference, sharp_model, transformers_twin
from tests.toy import CharacterTokenizer

GPT2 = {"gpt2": CONFIG, "gpt2-untied": UNTIED}
ALL = {**GPT2, **MIXED}
IDS = torch.randint(101, (24,), generator=torch.Generator().manual_seed(2)).tolist()


def loaded_with(model: AtlasLM) -> LoadedModel:
    tokenizer = Tokenizer.wrap(CharacterTokenizer())  # the model's 101 tokens are its first
    return LoadedModel(model, tokenizer, SimpleNamespace(model=model.config), Path("river.pt"), {})


# Attention and lens against other implementations


@pytest.mark.parametrize("name", [*GPT2, *SHAPES])
def test_attention_and_lens_equal_those_of_transformers(name: str) -> None:
    model = sharp_model(ALL[name])
    twin = transformers_twin(model) if name in GPT2 else twin_of(model)
    with torch.no_grad():
        theirs = twin(torch.tensor([IDS]), output_attentions=True, output_hidden_states=True)
    patterns = attention(loaded_with(model), IDS)
    assert difference(patterns, torch.cat(theirs.attentions)) <= 1e-5
    assert_patterns(patterns, model.config)
    norm = twin.transformer.ln_f if name in GPT2 else twin.model.norm
    for position in (0, 11, 23):
        with torch.no_grad():  # their last hidden state is normalised already
            streams = [norm(states[0, position]) for states in theirs.hidden_states[:-1]]
            expected = twin.lm_head(torch.stack([*streams, theirs.hidden_states[-1][0, position]]))
        check_lens(loaded_with(model), position, expected)


@torch.no_grad()
@pytest.mark.parametrize("parts", [0, 2, 3])
@pytest.mark.parametrize("name", ALL)
def test_attention_and_lens_equal_what_hooks_see(name: str, parts: int) -> None:
    """Also for a model with the weight layout for decoding."""
    model = sharp_model(ALL[name])
    if parts:
        lay_out_for_decoding(model, parts=parts)
    projected: list[Tensor] = []
    streams: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda block, inputs: streams.append(inputs[0][0]))
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, output: streams.append(output[0]))
        block.attention.qkv.register_forward_hook(lambda part, inputs, output: projected.append(output[0]))
    model(torch.tensor([IDS]))
    seen, steps = projected.copy(), torch.stack(streams)  # before the hooks see more
    patterns = attention(loaded_with(model), IDS)
    for layer, qkv in enumerate(seen):
        assert difference(patterns[layer], weights_of(model, layer, qkv)) <= 1e-5
    assert_patterns(patterns, model.config)
    check_lens(loaded_with(model), 7, model.head(model.final_norm(steps[:, 7])))
    some = attention(loaded_with(model), IDS, layers=[2, 0])
    assert torch.equal(some, patterns[[2, 0]])


def weights_of(model: AtlasLM, layer: int, qkv: Tensor) -> Tensor:
    """By the definition, head by head; pairs of numbers rotate as complex numbers."""
    config, module = model.config, model.blocks[layer].attention
    size, sharing = config.head_size, config.num_heads // config.kv_heads
    heads = []
    for head in range(config.num_heads):
        key = config.num_heads + head // sharing
        vectors = []
        for start, norm in ((head, module.q_norm), (key, module.k_norm)):
            vector = qkv[:, start * size : (start + 1) * size].double()
            if norm is not None:
                vector = vector / (vector.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
                vector = vector * norm.weight.double()
            if config.position == "rope":
                speeds = config.rope_theta ** (-torch.arange(0, size, 2).double() / size)
                angles = torch.arange(len(qkv)).double()[:, None] * speeds
                pairs = torch.complex(vector[:, : size // 2], vector[:, size // 2 :])
                turned = pairs * torch.polar(torch.ones_like(angles), angles)
                vector = torch.cat((turned.real, turned.imag), dim=-1)
            vectors.append(vector)
        scores = (vectors[0] @ vectors[1].T / math.sqrt(size)).exp().tril()
        heads.append(scores / scores.sum(-1, keepdim=True))
    return torch.stack(heads).float()


def assert_patterns(patterns: Tensor, config: ModelConfig) -> None:
    assert patterns.shape == (config.num_layers, config.num_heads, len(IDS), len(IDS))
    assert patterns.dtype == torch.float32
    torch.testing.assert_close(patterns.sum(-1), torch.ones(patterns.shape[:-1]))
    assert not patterns.triu(1).any()


def check_lens(loaded: LoadedModel, position: int, expected: Tensor) -> None:
    """`expected` (layers + 1, V) are the logits after the embedding and each layer."""
    probs = expected.double().softmax(-1)
    depths = lens(loaded, IDS, position=position, alternatives=4)
    assert [depth.layer for depth in depths] == [None, *range(len(expected) - 1)]
    for depth, row in zip(depths, probs, strict=True):
        best = row.topk(4)
        assert [choice.id for choice in depth.likeliest] == best.indices.tolist()
        assert [choice.probability for choice in depth.likeliest] == pytest.approx(
            best.values.tolist(), rel=1e-4
        )
        assert depth.entropy == pytest.approx(float(-(row * row.log2()).sum()), rel=1e-4)
        if position + 1 == len(IDS):
            assert (depth.probability, depth.rank) == (None, None)
        else:
            own = row[IDS[position + 1]]
            assert depth.probability == pytest.approx(float(own), rel=1e-4)
            assert depth.rank == 1 + int((row > own).sum())


def test_the_last_layer_of_the_lens_is_the_models_prediction() -> None:
    loaded = loaded_with(sharp_model(MIXED["qwen3-gqa"]))
    last = lens(loaded, IDS, position=-3)[-1]
    place = expectations(loaded, IDS)[-2]
    assert [c.id for c in last.likeliest] == [c.id for c in place.alternatives]
    assert (last.rank, last.probability) == (place.rank, pytest.approx(place.probability))
    assert lens(loaded, IDS, position=-3) == lens(loaded, IDS, position=len(IDS) - 3)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_layer_has_the_same_number_in_the_lens_and_in_attention(layer: int) -> None:
    """Block `layer` is changed: its attention changes, and the lens from its row on."""
    model = sharp_model(MIXED["qwen3-gqa"])
    loaded = loaded_with(model)
    patterns, depths = attention(loaded, IDS), lens(loaded, IDS)
    with torch.no_grad():
        model.blocks[layer].attention.qkv.weight.mul_(-2)
    changed = [not torch.equal(*pair) for pair in zip(patterns, attention(loaded, IDS), strict=True)]
    assert changed.index(True) == layer
    pairs = zip(depths, lens(loaded, IDS), strict=True)
    assert [before.layer for before, after in pairs if before != after] == list(range(layer, 3))


def test_a_lora_model_gives_the_attention_of_the_merged_model() -> None:
    config = MIXED["llama-gqa"]
    tuned, plain = sharp_model(config), sharp_model(config)
    update = LoraConfig(rank=3, targets=["qkv", "output", "up"])
    add_lora(tuned, update, seed=1)
    before = attention(loaded_with(tuned), IDS)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_(std=0.3)
    plain.load_state_dict(merged(tuned.state_dict(), update))
    patterns = attention(loaded_with(tuned), IDS)
    assert difference(before, patterns) > 0.01
    assert difference(attention(loaded_with(plain), IDS), patterns) <= 1e-5
    check_lens(loaded_with(plain), 5, logits_by_depth(tuned, 5))


@torch.no_grad()
def logits_by_depth(model: AtlasLM, position: int) -> Tensor:
    """The logits of models without their last blocks."""
    blocks, rows = model.blocks, []
    for depth in range(len(blocks) + 1):
        model.blocks = blocks[:depth]
        rows.append(model(torch.tensor([IDS]))[0, position])
    model.blocks = blocks
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_give_fp32_numbers(dtype: torch.dtype) -> None:
    """The weights are rounded, the probabilities are not."""
    model = sharp_model(MIXED["qwen3-gqa"])
    exact = loaded_with(sharp_model(MIXED["qwen3-gqa"]))
    half = loaded_with(model.to(dtype))
    patterns = attention(half, IDS)
    assert_patterns(patterns, model.config)
    assert half.logits(IDS).dtype == torch.float32
    assert float((patterns - attention(exact, IDS)).abs().max()) < 0.1
    for place, other in zip(expectations(half, IDS), expectations(exact, IDS), strict=True):
        assert place.id == other.id
        if place.entropy is not None:
            assert place.entropy == pytest.approx(other.entropy, abs=0.5)
    for depth in lens(half, IDS, alternatives=101):
        assert math.fsum(choice.probability for choice in depth.likeliest) == pytest.approx(1, abs=1e-5)


# The prediction at each position


@pytest.mark.parametrize("rows_at_once", [5, 128])
def test_expectations_follow_from_the_logits(monkeypatch: pytest.MonkeyPatch, rows_at_once: int) -> None:
    monkeypatch.setattr("atlas.inference.look._ROWS_AT_ONCE", rows_at_once)
    model = sharp_model(MIXED["llama"])
    with torch.no_grad():
        whole = model(torch.tensor([IDS]))[0]
    places = expectations(loaded_with(model), IDS, alternatives=3)
    first = places[0]
    assert (first.id, first.probability, first.rank, first.alternatives) == (IDS[0], None, None, ())
    assert [place.id for place in places] == IDS
    for place, row in zip(places[1:], whole.double(), strict=False):
        probs = [math.exp(value) for value in (row - row.logsumexp(0)).tolist()]
        ranked = sorted(range(101), key=lambda id: -probs[id])
        assert place.probability == pytest.approx(probs[place.id], rel=1e-4)
        assert place.log_probability == pytest.approx(math.log(probs[place.id]), rel=1e-4)
        assert place.rank == 1 + ranked.index(place.id)
        assert place.entropy == pytest.approx(-sum(p * math.log2(p) for p in probs), rel=1e-4)
        assert [choice.id for choice in place.alternatives] == ranked[:3]
        assert [choice.probability for choice in place.alternatives] == pytest.approx(
            [probs[id] for id in ranked[:3]], rel=1e-4
        )
    loss = compute_lm_loss(whole[None, :-1], torch.tensor([IDS[1:]]))
    assert -sum(place.log_probability for place in places[1:]) / 23 == pytest.approx(float(loss), rel=1e-5)
    assert torch.equal(loaded_with(model).logits(IDS), whole)


def test_all_alternatives_sum_to_one() -> None:
    for place in expectations(loaded_with(sharp_model(CONFIG)), IDS, alternatives=1000)[1:]:
        assert len(place.alternatives) == 101
        assert math.fsum(choice.probability for choice in place.alternatives) == pytest.approx(1, abs=1e-5)


# How the next token is chosen

SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 4, 30, 200]),
    top_p=st.sampled_from([0.1, 0.6, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    repetition_penalty=st.sampled_from([0.8, 1.0, 1.3]),
)


@settings(deadline=None)
@given(st.lists(st.integers(0, 100), min_size=1, max_size=12), SAMPLINGS)
def test_the_last_step_is_the_distribution_that_is_sampled(ids: list[int], sampling: Sampling) -> None:
    loaded = LOADED
    result = next_token(loaded, ids, sampling, candidates=101)
    with torch.no_grad():
        raw = loaded.model.head(loaded.model.hidden_states(torch.tensor([ids]))[:, -1])
    penalized = penalize_repetition(raw, [ids], sampling.repetition_penalty)
    final = probabilities(penalized, sampling)[0]
    order = ["model", "repetition_penalty", "temperature", "top_k", "top_p", "min_p"]
    assert list(result.remaining) == list(result.entropy) == order
    assert {c.id for c in result.candidates} == set(range(101))
    assert [c.probabilities["model"] for c in result.candidates] == raw[0].softmax(-1).sort(
        descending=True
    ).values.tolist()
    for candidate in result.candidates:
        assert list(candidate.probabilities) == order
        assert candidate.probabilities["min_p"] == final[candidate.id]
        if candidate.removed_by is not None:  # from then on
            gone = order[order.index(candidate.removed_by) :]
            assert not any(candidate.probabilities[step] for step in gone)
    for step in order:
        probs = [c.probabilities[step] for c in result.candidates]
        assert math.fsum(probs) == pytest.approx(1, abs=1e-5)
        struck = [c for c in result.candidates if c.removed_by in order[: order.index(step) + 1]]
        assert result.remaining[step] == 101 - len(struck)
        assert result.entropy[step] == pytest.approx(-sum(p * math.log2(p) for p in probs if p), abs=1e-4)


LOADED = loaded_with(sharp_model(MIXED["llama-gqa"]))


def test_temperature_zero_leaves_the_likeliest() -> None:
    result = next_token(LOADED, IDS, Sampling(temperature=0), candidates=3)
    assert [c.removed_by for c in result.candidates] == [None, "temperature", "temperature"]
    assert result.candidates[0].probabilities["min_p"] == 1
    assert result.remaining["temperature"] == 1
    assert result.entropy["min_p"] == 0


# The text of a token


def byte_fallback() -> ForeignTokenizer:
    """As in Llama 2: a space is ▁, and characters without a token become bytes."""
    alphabet = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"therivn", "▁t", "▁th"]
    vocabulary = {token: id for id, token in enumerate(alphabet)}
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocabulary, [("▁", "t"), ("▁t", "h")], unk_token="<unk>", byte_fallback=True, fuse_unk=True
        )
    )
    made.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    made.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    return ForeignTokenizer(made.to_str(), eos_id=1, vocab_size=300, origin="a test")


TOKENIZERS = {
    "gpt2": Tokenizer.gpt2(),
    "bpe": Tokenizer.train([corpus(400)], 300),
    "custom": Tokenizer.wrap(CharacterTokenizer()),
    "foreign": ForeignTokenizer(
        Tokenizer.gpt2().hf.to_str(), eos_id=50256, vocab_size=50257, origin="a test"
    ),
    "byte fallback": byte_fallback(),
}


@settings(deadline=None)
@pytest.mark.parametrize("name", TOKENIZERS)
@given(
    text=st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=12) | st.just(" the  river")
)
def test_the_bytes_of_the_tokens_equal_those_of_the_text(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    whole = b"".join(map(tokenizer.token_bytes, tokenizer.encode(text)))
    if name == "custom" and not text.isascii():  # it decodes them to U+FFFD
        assert "\ufffd" in whole.decode("utf-8")
    else:
        assert whole == text.encode("utf-8")


def test_an_incomplete_character_is_shown_in_bytes() -> None:
    for name in ("gpt2", "bpe", "foreign", "byte fallback"):
        tokenizer = TOKENIZERS[name]
        texts = [token_text(tokenizer, id) for id in tokenizer.encode("漢")]
        assert len(texts) > 1
        assert "".join(texts) == r"\xe6\xbc\xa2"
    assert token_text(TOKENIZERS["gpt2"], 50256) == "<|endoftext|>"
    assert token_text(TOKENIZERS["gpt2"], TOKENIZERS["gpt2"].encode(" the")[0]) == " the"
    assert token_text(TOKENIZERS["byte fallback"], 299) == ""  # a padding row, which no text contains


# Invalid input


def test_an_empty_text_begins_a_document() -> None:
    assert encode(LOADED, "") == [256]
    assert encode(LOADED, "ab") == [97, 98]


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        ([5] * 33, "33 tokens: the model's context is 32"),
        ([], "0 tokens: give at least one id"),
        ([5, 101], r"token id 101: the model's vocabulary has 0 to 100"),
        ([-1, 5], "token id -1"),
    ],
)
def test_ids_that_the_model_cannot_read_are_refused(ids: list[int], reason: str) -> None:
    for look in (LoadedModel.logits, expectations, attention, lens):
        if look is expectations and len(ids) > 32:  # it reads a long text in windows
            continue
        with pytest.raises(AtlasError, match=reason if look is not lens or ids else "position -1"):
            look(LOADED, ids)
    with pytest.raises(AtlasError, match=reason):
        next_token(LOADED, ids, Sampling())


def test_positions_and_layers_out_of_range_are_refused() -> None:
    with pytest.raises(AtlasError, match="position 24: the text has tokens 0 to 23"):
        lens(LOADED, IDS, position=24)
    with pytest.raises(AtlasError, match="layer 3: the model has layers 0 to 2"):
        attention(LOADED, IDS, layers=[0, 3])
