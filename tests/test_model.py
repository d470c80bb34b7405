"""The network against an independent implementation, against itself with a cache, and against causality."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atlas.config import ModelConfig, TrainingConfig
from atlas.inference.layout import lay_out_for_decoding
from atlas.model import AtlasLM, KVCache, build_model
from atlas.training.loss import IGNORE_INDEX, compute_lm_loss
from atlas.training.optimizers.build import build_optimizer

CONFIG = ModelConfig(hidden_size=48, num_layers=3, num_heads=4, vocab_size=101, max_seq_len=32)
UNTIED = CONFIG.model_copy(update={"tie_embeddings": False})

# Atlas's name → the name in transformers' GPT-2, and whether that one (a Conv1D) is stored transposed.
BLOCK_NAMES = {
    "attention_norm.weight": ("ln_1.weight", False),
    "attention_norm.bias": ("ln_1.bias", False),
    "attention.qkv.weight": ("attn.c_attn.weight", True),
    "attention.qkv.bias": ("attn.c_attn.bias", False),
    "attention.output.weight": ("attn.c_proj.weight", True),
    "attention.output.bias": ("attn.c_proj.bias", False),
    "mlp_norm.weight": ("ln_2.weight", False),
    "mlp_norm.bias": ("ln_2.bias", False),
    "mlp.up.weight": ("mlp.c_fc.weight", True),
    "mlp.up.bias": ("mlp.c_fc.bias", False),
    "mlp.down.weight": ("mlp.c_proj.weight", True),
    "mlp.down.bias": ("mlp.c_proj.bias", False),
}


def names(config: ModelConfig) -> dict[str, tuple[str, bool]]:
    table = {
        "token_embedding.weight": ("transformer.wte.weight", False),
        "position_embedding.weight": ("transformer.wpe.weight", False),
        "final_norm.weight": ("transformer.ln_f.weight", False),
        "final_norm.bias": ("transformer.ln_f.bias", False),
    }
    for layer in range(config.num_layers):
        for ours, (theirs, transposed) in BLOCK_NAMES.items():
            table[f"blocks.{layer}.{ours}"] = (f"transformer.h.{layer}.{theirs}", transposed)
    if not config.tie_embeddings:
        table["lm_head.weight"] = ("lm_head.weight", False)
    return table


def sharp_model(config: ModelConfig, seed: int = 0) -> AtlasLM:
    """Large random weights, biases and norms too, so that no part can be wrong unseen."""
    model = build_model(config, seed=seed).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += torch.randn_like(parameter) * (0.1 if "norm" in name else 0.2)
        for name, parameter in model.named_parameters():
            if name in ("token_embedding.weight", "lm_head.weight"):
                parameter[config.vocabulary :] = 0
    return model


def transformers_twin(model: AtlasLM) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    """transformers' GPT-2 with the same weights."""
    config = model.config
    twin = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocabulary,
            n_positions=config.max_seq_len,
            n_embd=config.hidden_size,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            activation_function="gelu_new",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            tie_word_embeddings=config.tie_embeddings,
            attn_implementation="eager",
        )
    ).eval()
    theirs, ours = dict(twin.named_parameters()), dict(model.named_parameters())
    table = names(config)
    assert set(ours) == set(table)
    assert set(theirs) == {name for name, _ in table.values()}
    with torch.no_grad():
        for name, (their_name, transposed) in table.items():
            value = (
                ours[name][: config.vocabulary]
                if name in ("token_embedding.weight", "lm_head.weight")
                else ours[name]
            )
            theirs[their_name].copy_(value.T if transposed else value)
    return twin


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference as a part of the largest entry."""
    assert ours.shape == theirs.shape
    ours, theirs = ours.detach(), theirs.detach()
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_logits_and_all_gradients_equal_transformers_gpt2(config: ModelConfig) -> None:
    model = sharp_model(config)
    twin = transformers_twin(model)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocabulary, (3, config.max_seq_len), generator=generator)
    labels = tokens.clone()
    labels[0, 20:] = IGNORE_INDEX  # a padded row
    labels[1, 5] = IGNORE_INDEX

    expected = twin(input_ids=tokens, labels=labels)  # shifts the labels itself
    logits = model(tokens)
    loss = compute_lm_loss(logits[:, :-1], labels[:, 1:])
    assert difference(logits, expected.logits) <= 1e-5
    assert float(loss.detach()) == pytest.approx(float(expected.loss), rel=1e-6)

    loss.backward()
    expected.loss.backward()
    theirs = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        their_name, transposed = names(config)[name]
        gradient = theirs[their_name].grad
        assert parameter.grad is not None
        assert gradient is not None
        mine = parameter.grad
        if name in ("token_embedding.weight", "lm_head.weight"):
            assert not mine[config.vocabulary :].any()
            mine = mine[: config.vocabulary]
        assert difference(mine, gradient.T if transposed else gradient) <= 1e-5, name


def test_without_biases_is_the_same_network_with_biases_of_zero() -> None:
    with_bias = sharp_model(CONFIG)
    without = AtlasLM(CONFIG.model_copy(update={"bias": False})).eval()
    assert not [name for name, _ in without.named_parameters() if "bias" in name]
    state = with_bias.state_dict()
    without.load_state_dict({name: value for name, value in state.items() if "bias" not in name})
    with torch.no_grad():
        for name, parameter in with_bias.named_parameters():
            if "bias" in name:
                parameter.zero_()
    tokens = torch.arange(20)[None]
    assert difference(without(tokens), with_bias(tokens)) <= 1e-6


# The cache


@torch.no_grad()
def test_cached_logits_equal_uncached_ones_with_ragged_prompts_in_one_batch() -> None:
    model = sharp_model(CONFIG)
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(101, (length,), generator=generator) for length in (5, 1, 9, 8)]
    chunks = [1, 1, 3, 1, 2]  # what each row is given after its prompt, one call each
    continued = [torch.cat([row, torch.randint(101, (sum(chunks),), generator=generator)]) for row in rows]
    uncached = [model(row[None])[0] for row in continued]

    cache = KVCache(CONFIG, batch_size=len(rows), max_len=20)
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    logits = model(padded, cache)
    for row, prompt in enumerate(rows):
        assert difference(logits[row, : len(prompt)], uncached[row][: len(prompt)]) <= 1e-5
    cache.truncate([len(row) for row in rows])
    done = 0
    for chunk in chunks:
        new = torch.stack(
            [c[len(r) + done : len(r) + done + chunk] for c, r in zip(continued, rows, strict=True)]
        )
        logits = model(new, cache)
        for row, prompt in enumerate(rows):
            start = len(prompt) + done
            assert difference(logits[row], uncached[row][start : start + chunk]) <= 1e-5
        done += chunk
    assert cache.lengths.tolist() == [len(row) for row in continued]


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("parts", [0, 1, 2, 3])
def test_cached_logits_equal_uncached_ones_with_prompts_of_one_length(
    parts: int, tied: bool, bias: bool
) -> None:
    """Then no mask is needed but in a later call of several tokens; with the weights laid out for decoding, too, in
    parts that the 101 rows of the vocabulary do not divide by."""
    model = sharp_model(CONFIG.model_copy(update={"tie_embeddings": tied, "bias": bias}))
    rows = torch.randint(101, (3, 12), generator=torch.Generator().manual_seed(3))
    uncached = model(rows)
    if parts:
        lay_out_for_decoding(model, parts=parts)
        assert not any(isinstance(module, torch.nn.Linear) for module in model.modules())
    cache = KVCache(CONFIG, batch_size=3, max_len=20)
    pieces = [model(piece, cache) for piece in rows.split([5, 1, 1, 3, 2], dim=1)]
    assert difference(torch.cat(pieces, dim=1), uncached) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_weights_of_bf16_give_the_same_logits_in_the_layout_for_decoding(tied: bool) -> None:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no matrix products in bf16")
    config = CONFIG.model_copy(update={"tie_embeddings": tied})
    exact, model = (sharp_model(config).to(dtype) for dtype in (torch.float32, torch.bfloat16))
    rows = torch.randint(101, (3, 12), generator=torch.Generator().manual_seed(3))
    right, plain = exact(rows), model(rows).float()
    lay_out_for_decoding(model)
    assert not any(isinstance(module, torch.nn.Linear) for module in model.modules())
    cache = KVCache(config, batch_size=3, max_len=20, dtype=torch.bfloat16)
    packed = torch.cat([model(piece, cache) for piece in rows.split([5, 1, 1, 3, 2], dim=1)], dim=1)
    assert packed.dtype == torch.bfloat16
    assert 0 < (packed.float() - right).norm() < 1.2 * (plain - right).norm()


@torch.no_grad()
def test_a_truncated_cache_has_forgotten_what_was_cut() -> None:
    model = sharp_model(CONFIG)
    cache = KVCache(CONFIG, batch_size=1)
    model(torch.tensor([[1, 2, 3, 4, 5, 6]]), cache)
    cache.truncate([2])
    assert (
        difference(model(torch.tensor([[9]]), cache)[0, -1], model(torch.tensor([[1, 2, 9]]))[0, -1]) <= 1e-5
    )


def test_more_tokens_than_fit_are_refused() -> None:
    model = sharp_model(CONFIG)
    with pytest.raises(ValueError, match="33 tokens do not fit a context of 32"):
        model(torch.zeros(1, 33, dtype=torch.long))
    cache = KVCache(CONFIG, batch_size=1, max_len=4)
    with pytest.raises(ValueError, match="5 tokens after 0 do not fit a cache of 4"):
        model(torch.zeros(1, 5, dtype=torch.long), cache)


# Causality

_CAUSAL_MODEL = sharp_model(CONFIG)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 100), min_size=2, max_size=32), st.data())
def test_a_later_token_never_changes_an_earlier_logit(tokens: list[int], data: st.DataObject) -> None:
    model = _CAUSAL_MODEL
    position = data.draw(st.integers(1, len(tokens) - 1))
    other = data.draw(
        st.lists(st.integers(0, 100), min_size=len(tokens) - position, max_size=len(tokens) - position)
    )
    with torch.no_grad():
        before = model(torch.tensor([tokens]))
        after = model(torch.tensor([tokens[:position] + other]))
    assert torch.equal(before[:, :position], after[:, :position])
    if other[0] != tokens[position]:
        assert not torch.equal(before[:, position], after[:, position])


# Initialisation


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_initial_loss_is_that_of_a_uniform_guess(config: ModelConfig) -> None:
    config = config.model_copy(update={"vocab_size": 1000})
    model = build_model(config, seed=0)
    tokens = torch.randint(1000, (8, 33), generator=torch.Generator().manual_seed(3))
    loss = F.cross_entropy(model(tokens[:, :-1]).reshape(-1, 1000), tokens[:, 1:].reshape(-1))
    assert float(loss.detach()) == pytest.approx(math.log(1000), abs=0.05)


def test_initialisation_is_gpt2s() -> None:
    config = ModelConfig(hidden_size=256, num_layers=8, num_heads=4, vocab_size=1024, max_seq_len=64)
    for name, parameter in build_model(config, seed=0).named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            expected = 0.02 / 4 if name.endswith(("output.weight", "down.weight")) else 0.02
            assert float(parameter.detach().std()) == pytest.approx(expected, rel=0.03), name


def test_seed_decides_the_weights() -> None:
    first, again, other = (build_model(CONFIG, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["token_embedding.weight"], other["token_embedding.weight"])


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_padding_rows_are_zero_and_stay_zero(config: ModelConfig) -> None:
    model = build_model(config, seed=0)
    assert model(torch.zeros(1, 1, dtype=torch.long)).shape == (1, 1, config.vocabulary)
    optimizer = build_optimizer(model, TrainingConfig(learning_rate=0.1, weight_decay=0.5))
    tokens = torch.randint(config.vocabulary, (4, 17), generator=torch.Generator().manual_seed(4))
    tables = [model.token_embedding.weight] + ([] if config.tie_embeddings else [model.lm_head.weight])
    before = [table.detach().clone() for table in tables]
    for _ in range(3):
        compute_lm_loss(model(tokens[:, :-1]), tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    for table, old in zip(tables, before, strict=True):
        assert table.shape[0] == 128
        assert not table[config.vocabulary :].any()
        assert not torch.equal(table[: config.vocabulary], old[: config.vocabulary])


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_embeddings": False}, {"bias": False}, {"vocab_size": 128}, {"max_seq_len": 7}],
    ids=str,
)
def test_num_parameters_is_the_closed_formula(changes: dict[str, int]) -> None:
    config = CONFIG.model_copy(update=changes)
    C, L, V, T, b = (
        config.hidden_size,
        config.num_layers,
        config.vocabulary,
        config.max_seq_len,
        int(config.bias),
    )
    block = (4 + 8) * C * C + b * (3 + 1 + 4 + 1) * C + 2 * (1 + b) * C
    heads = 1 if config.tie_embeddings else 2
    assert build_model(config).num_parameters() == heads * V * C + T * C + L * block + (1 + b) * C


# Training


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_no_gradient(dropout: float) -> None:
    model = sharp_model(CONFIG.model_copy(update={"dropout": dropout})).train()
    tokens = torch.randint(101, (2, 33), generator=torch.Generator().manual_seed(5))

    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model.gradient_checkpointing = checkpointing
        model.zero_grad()
        torch.manual_seed(6)
        compute_lm_loss(model(tokens[:, :-1]), tokens[:, 1:]).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    kept, checkpointed = gradients(False), gradients(True)
    assert kept.keys() == checkpointed.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(kept[name], checkpointed[name]) for name in kept)


def test_gradient_checkpointing_keeps_fewer_activations() -> None:
    model = build_model(CONFIG, seed=0).train()
    tokens = torch.zeros(2, 32, dtype=torch.long)

    def kept_bytes(checkpointing: bool) -> int:
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        model.gradient_checkpointing = checkpointing
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(tokens).sum()
        assert loss.requires_grad
        return sum(kept.values())

    weights = sum(p.untyped_storage().nbytes() for p in model.parameters())
    assert kept_bytes(True) - weights < (kept_bytes(False) - weights) / 2


def test_dropout_is_for_training_only() -> None:
    model = sharp_model(CONFIG.model_copy(update={"dropout": 0.5}))
    tokens = torch.arange(10)[None]
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))
