"""The modern shapes, Llama's and Qwen3's and what lies between, against transformers and against themselves."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from atlas.config import ModelConfig, TrainingConfig
from atlas.inference.layout import lay_out_for_decoding
from atlas.model import AtlasLM, KVCache, build_model
from atlas.model.cost import count_parameters
from atlas.model.norm import RMSNorm
from atlas.model.rope import rotate, rotation_at
from atlas.training.loss import IGNORE_INDEX, compute_lm_loss
from atlas.training.optimizers.build import build_optimizer
from tests.test_model import difference, sharp_model

LLAMA = ModelConfig(
    hidden_size=48,
    num_layers=3,
    num_heads=4,
    vocab_size=101,
    max_seq_len=32,
    position="rope",
    norm="rmsnorm",
    norm_eps=1e-6,
    mlp="swiglu",
    bias=False,
)
SHAPES = {
    "llama": {},
    "llama-gqa": {"num_kv_heads": 2, "rope_theta": 500.0},
    "llama-untied": {"tie_embeddings": False, "mlp_size": 80},
    "llama-wide-heads": {"head_dim": 20, "num_kv_heads": 1},
    "qwen3": {"qk_norm": True, "norm_eps": 1e-5},
    "qwen3-gqa": {"qk_norm": True, "num_kv_heads": 2, "head_dim": 16, "tie_embeddings": False},
}


def shape(name: str) -> ModelConfig:
    return ModelConfig(**(LLAMA.model_dump() | SHAPES[name]))


def their_names(config: ModelConfig) -> dict[str, list[str]]:
    """Atlas's name → the names in transformers of the tensors that it holds one below the other."""
    table = {
        "token_embedding.weight": ["model.embed_tokens.weight"],
        "final_norm.weight": ["model.norm.weight"],
    }
    for layer in range(config.num_layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        table |= {
            f"{ours}.attention_norm.weight": [f"{theirs}.input_layernorm.weight"],
            f"{ours}.attention.qkv.weight": [f"{theirs}.self_attn.{part}_proj.weight" for part in "qkv"],
            f"{ours}.attention.output.weight": [f"{theirs}.self_attn.o_proj.weight"],
            f"{ours}.mlp_norm.weight": [f"{theirs}.post_attention_layernorm.weight"],
            f"{ours}.mlp.up.weight": [f"{theirs}.mlp.{part}_proj.weight" for part in ("gate", "up")],
            f"{ours}.mlp.down.weight": [f"{theirs}.mlp.down_proj.weight"],
        }
        if config.qk_norm:
            table |= {
                f"{ours}.attention.{part}_norm.weight": [f"{theirs}.self_attn.{part}_norm.weight"]
                for part in "qk"
            }
    if not config.tie_embeddings:
        table["lm_head.weight"] = ["lm_head.weight"]
    return table


def twin_of(model: AtlasLM) -> LlamaForCausalLM | Qwen3ForCausalLM:
    config = model.config
    kind, build = (Qwen3Config, Qwen3ForCausalLM) if config.qk_norm else (LlamaConfig, LlamaForCausalLM)
    twin = build(
        kind(
            vocab_size=config.vocabulary,
            hidden_size=config.hidden_size,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_size,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_embeddings,
            attn_implementation="eager",
        )
    ).eval()
    theirs, ours = dict(twin.named_parameters()), dict(model.named_parameters())
    table = their_names(config)
    assert set(ours) == set(table)
    assert set(theirs) == {name for names in table.values() for name in names}
    with torch.no_grad():
        for name, parts in table.items():
            rows = ours[name]
            for part in parts:
                theirs[part].copy_(rows[: len(theirs[part])])
                rows = rows[len(theirs[part]) :]
    return twin


@pytest.mark.parametrize("name", SHAPES)
def test_logits_and_all_gradients_equal_transformers(name: str) -> None:
    model = sharp_model(shape(name))
    twin = twin_of(model)
    tokens = torch.randint(101, (3, 32), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[0, 20:] = IGNORE_INDEX
    expected = twin(input_ids=tokens, labels=labels)
    logits = model(tokens)
    loss = compute_lm_loss(logits[:, :-1], labels[:, 1:])
    assert difference(logits, expected.logits) <= 1e-5
    assert float(loss.detach()) == pytest.approx(float(expected.loss.detach()), rel=1e-6)
    loss.backward()
    expected.loss.backward()
    theirs = dict(twin.named_parameters())
    for ours, parts in their_names(model.config).items():
        gradient = torch.cat([theirs[part].grad for part in parts])
        mine = model.get_parameter(ours).grad
        assert mine is not None
        assert difference(mine[: len(gradient)], gradient) <= 1e-5, ours


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.integers(1, 5), st.floats(1e-8, 0.1), st.floats(1e-4, 1e4), st.integers(0, 9))
def test_rmsnorm_on_a_cpu_is_pytorchs(width: int, rows: int, eps: float, scale: float, seed: int) -> None:
    """Values and both gradients, in double where ours is not used."""
    generator = torch.Generator().manual_seed(seed)
    x, upstream = (torch.randn(2, rows, width, generator=generator) for _ in range(2))
    norm = RMSNorm(width, eps=eps)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(width, generator=generator))
    inputs = [(x * scale).requires_grad_(), (x * scale).double().requires_grad_()]
    outputs = [norm(inputs[0]), F.rms_norm(inputs[1], (width,), norm.weight.double(), eps)]
    gradients = [
        torch.autograd.grad(out, (x, norm.weight), upstream.to(out.dtype))
        for out, x in zip(outputs, inputs, strict=True)
    ]
    # What the gradient by x is a difference of; for one number a row it is nothing.
    rstd = (inputs[1].detach().square().mean(-1) + eps).rsqrt().max()
    sizes = [
        1.0,
        float(rstd * (upstream * norm.weight).abs().max()) * width**0.5,
        float(rows * 2 * width**0.5),
    ]
    pairs = zip((outputs[0], *gradients[0]), (outputs[1], *gradients[1]), sizes, strict=True)
    for ours, theirs, size in pairs:
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-6 * size)


def test_norm_and_rotation_of_bf16_are_those_of_fp32_rounded() -> None:
    """Queries and keys are bf16 under autocast. Values and gradients have the dtype of their tensors."""
    x, upstream = (torch.randn(2, 5, 3, 8).bfloat16() for _ in range(2))
    norm, rotation = RMSNorm(8, eps=1e-5), rotation_at(torch.arange(5), 8, 1e4)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(8))
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        leaf = x.to(dtype).requires_grad_()
        normed = norm(leaf)
        rotated = rotate(normed, rotation)
        grads = torch.autograd.grad(rotated, (leaf, norm.weight), upstream.to(dtype))
        assert [tensor.dtype for tensor in (normed, rotated, *grads)] == [dtype] * 3 + [torch.float32]
        results.append([normed, rotated, *grads])
    for ours, exact in zip(*results, strict=True):
        assert (ours.float() - exact).norm() < 6e-3 * exact.norm()


MIXED = {
    **{name: shape(name) for name in SHAPES},
    "gpt2-rope": ModelConfig(**(LLAMA.model_dump() | {"norm": "layernorm", "mlp": "gelu", "bias": True})),
    "gpt2-qk-norm": ModelConfig(
        **(LLAMA.model_dump() | {"position": "learned", "qk_norm": True, "num_kv_heads": 1})
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("parts", [0, 2, 3])
@pytest.mark.parametrize("name", MIXED)
def test_cached_logits_equal_uncached_ones(name: str, parts: int) -> None:
    config = MIXED[name]
    model = sharp_model(config)
    rows = torch.randint(101, (3, 12), generator=torch.Generator().manual_seed(3))
    uncached = model(rows)
    if parts:
        lay_out_for_decoding(model, parts=parts)
    cache = KVCache(config, batch_size=3, max_len=20)
    assert cache.keys.shape == (3, 3, config.kv_heads, 20, config.head_size)
    pieces = [model(piece, cache) for piece in rows[:, :6].split([4, 1, 1], dim=1)]
    cache.truncate([6, 3, 5])
    again = torch.stack([row[start : start + 3] for row, start in zip(rows, (6, 3, 5), strict=True)])
    assert difference(torch.cat(pieces, dim=1), uncached[:, :6]) <= 1e-5
    for row, (logits, start) in enumerate(zip(model(again, cache), (6, 3, 5), strict=True)):
        assert difference(logits, uncached[row, start : start + 3]) <= 1e-5


@pytest.mark.parametrize("name", ["qwen3-gqa", "gpt2-rope"])
def test_a_document_is_computed_as_if_it_were_alone(name: str) -> None:
    """Turned from its own beginning on."""
    model = sharp_model(MIXED[name])
    tokens = torch.randint(101, (2, 20), generator=torch.Generator().manual_seed(4))
    documents = torch.tensor([[0] * 7 + [1] * 13, [0] * 12 + [1] * 2 + [2] * 6])
    together = model(tokens, documents=documents)
    for row in range(2):
        for number in documents[row].unique():
            own = documents[row] == number
            assert difference(together[row, own], model(tokens[row, own][None])[0]) <= 1e-5


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()  # on a CPU it has no backward pass
def test_flex_attention_shares_keys_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sharp_model(shape("qwen3-gqa"))
    tokens = torch.randint(101, (1, 20), generator=torch.Generator().manual_seed(4))
    documents = torch.tensor([[0] * 7 + [1] * 13])
    dense = model(tokens, documents=documents)
    monkeypatch.setattr("atlas.model.documents.takes_flex_attention", lambda device, **shape: True)
    torch.testing.assert_close(model(tokens, documents=documents), dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3-gqa", "gpt2-qk-norm"])
def test_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    model = sharp_model(MIXED[name]).train()
    tokens = torch.randint(101, (2, 20), generator=torch.Generator().manual_seed(5))
    documents = torch.tensor([[0] * 7 + [1] * 13, [0] * 12 + [1] * 8])

    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model.gradient_checkpointing = checkpointing
        model.zero_grad()
        compute_lm_loss(model(tokens, documents=documents)[:, :-1], tokens[:, 1:]).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    kept, checkpointed = gradients(False), gradients(True)
    assert kept.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(kept[name], checkpointed[name]) for name in kept)


@pytest.mark.parametrize("name", MIXED)
def test_parameters_are_counted_and_initial_loss_is_a_uniform_guess(name: str) -> None:
    config = MIXED[name].model_copy(update={"vocab_size": 1000})
    model = build_model(config, seed=1)
    assert count_parameters(config).total == model.num_parameters()
    tokens = torch.randint(1000, (4, 32), generator=torch.Generator().manual_seed(6))
    loss = float(compute_lm_loss(model(tokens[:, :-1]), tokens[:, 1:]).detach())
    assert loss == pytest.approx(math.log(1000), rel=0.02)


def test_scaled_initialisation_begins_as_the_identity_at_any_width() -> None:
    """Whatever the width, a matrix in the blocks gives numbers of one size, and the stream is the embedding."""
    sizes = []
    for width in (64, 512):
        config = ModelConfig(**(LLAMA.model_dump() | {"hidden_size": width, "init": "scaled"}))
        model = build_model(config, seed=0)
        tokens = torch.arange(32)[None]
        expected = model.final_norm(model.token_embedding(tokens))
        assert torch.equal(model.hidden_states(tokens), expected)
        block = model.blocks[1]
        sizes.append(float(block.attention.qkv(block.attention_norm(expected)).detach().std()))
        loss = float(compute_lm_loss(model(tokens[:, :-1]), tokens[:, 1:]).detach())
        assert loss == pytest.approx(math.log(101), rel=0.25)  # an echo would be twice that at 512
        assert float(block.mlp.up.weight.detach().std()) == pytest.approx(0.5 / math.sqrt(width), rel=0.05)
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)


@pytest.mark.parametrize("name", ["llama-gqa", "qwen3-gqa"])
def test_muon_takes_the_parts_of_a_tensor_for_matrices_of_their_own(name: str) -> None:
    """Every part's update is orthogonal by itself: its singular values are near 1, however large its gradient."""
    model = sharp_model(shape(name))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, TrainingConfig(optimizer="muon", learning_rate=0.01, weight_decay=0))
    tokens = torch.randint(101, (4, 33), generator=torch.Generator().manual_seed(7))
    compute_lm_loss(model(tokens[:, :-1]), tokens[:, 1:]).backward()
    optimizer.step()
    config = model.config
    queries, keys = config.num_heads * config.head_size, config.kv_heads * config.head_size
    for room, rows in {
        "attention.qkv": (queries, keys, keys),
        "mlp.up": (config.mlp_width, config.mlp_width),
        "mlp.down": (config.hidden_size,),
    }.items():
        moved = model.get_parameter(f"blocks.1.{room}.weight").detach() - before[f"blocks.1.{room}.weight"]
        for part in moved.split(rows):
            scale = 0.2 * math.sqrt(768 * max(1, part.shape[0] / part.shape[1]))
            values = torch.linalg.svdvals(part) / (0.01 * scale)
            assert 0.6 < values.median() < values.max() < 1.4, room


# What is accepted, and what llama.cpp makes of it


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_kv_heads": 3}, "num_heads 4 is not divisible by num_kv_heads 3: use one of 1, 2, 4"),
        ({"head_dim": 15}, "head_dim 15 is odd, and position rope rotates pairs: use head_dim 16"),
        ({"position": "learned", "rope_theta": 500}, "rope_theta 500 has no effect with position learned"),
        ({"position": "alibi"}, "Input should be 'learned' or 'rope'"),
        ({"rope_theta": 0.5}, "greater than 1"),
        ({"position": "learned", "nope_interval": 4}, "nope_interval 4 has no effect with position learned"),
        ({"position": "learned", "rope_scaling": {}}, "rope_scaling has no effect with position learned"),
        ({"rope_scaling": {"low_freq_factor": 4}}, "low_freq_factor 4 must be less than high_freq_factor 4"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        ModelConfig(**(LLAMA.model_dump() | changes))


@pytest.mark.parametrize("name", SHAPES)
def test_each_shape_has_its_architecture(name: str) -> None:
    assert shape(name).gguf_architecture == name.split("-")[0]
    assert shape(name).train_only is None


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"bias": True}, "for llama, set model.bias to false"),
        ({"mlp": "gelu", "qk_norm": True}, "for qwen3, set model.mlp to swiglu"),
        ({"mlp": "gelu", "norm": "layernorm", "bias": True}, "for gpt2, set model.position to learned"),
        (
            {"mlp": "gelu", "norm": "layernorm", "position": "learned", "num_kv_heads": 2},
            "for gpt2, set model.num_kv_heads to 4",
        ),
        (
            {"mlp": "gelu", "norm": "layernorm", "position": "learned", "head_dim": 16},
            "for gpt2, set model.head_dim to null",
        ),
    ],
)
def test_what_llama_cpp_lacks_is_train_only_and_the_reason_names_what_to_change(
    changes: dict[str, object], remedy: str
) -> None:
    config = ModelConfig(**(LLAMA.model_dump() | changes))
    assert config.gguf_architecture is None
    assert config.train_only is not None
    assert config.train_only.endswith(remedy)
