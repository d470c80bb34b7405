"""Attention in blocks of queries: PyTorch's numbers, in less time, for training on a CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from atlas.config import ModelConfig
from atlas.model import attention_cpu, build_model
from atlas.model.attention_cpu import attend_in_blocks, pays_in_blocks

SHAPES = [(2, 4, 4, 200, 16), (1, 6, 2, 129, 8), (2, 3, 1, 64, 32), (1, 2, 2, 1, 4)]
"""(B, H, K, T, D): several blocks, a last block of one token, shared keys, one token."""


def attended(attend: object, dtype: torch.dtype, shape: tuple[int, ...], *, seed: int = 0) -> list[Tensor]:
    """The result and the gradients of queries, keys and values."""
    B, H, K, T, D = shape
    generator = torch.Generator().manual_seed(seed)
    numbers = [torch.randn(B, T, heads, D, generator=generator).bfloat16() for heads in (H, K, K, H)]
    *inputs, grad = (tensor.to(dtype).transpose(1, 2) for tensor in numbers)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    out = attend(*leaves)  # type: ignore[operator]
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def by_pytorch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
def test_blocks_give_pytorchs_numbers(shape: tuple[int, ...], dtype: torch.dtype, off: float) -> None:
    """The reference is PyTorch's function in fp64. The inputs are numbers of bf16, so that all have the same."""
    exact = attended(by_pytorch, torch.float64, shape)
    for ours, right in zip(attended(attend_in_blocks, dtype, shape), exact, strict=True):
        assert ours.dtype == dtype
        assert (ours - right).norm() <= off * right.norm() + 1e-12


def test_scores_far_apart_stay_finite() -> None:
    q, k, v = (torch.randn(1, 1, 70, 8) * size for size in (1e3, 1e3, 1))
    ours, right = attend_in_blocks(q, k, v), by_pytorch(q, k, v)
    torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)


def test_a_model_has_the_same_gradients_with_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        vocab_size=50,
        max_seq_len=150,
        position="rope",
    )
    tokens = torch.randint(0, 50, (2, 150))
    gradients = []
    for least in (1, 10**9):
        monkeypatch.setattr(attention_cpu, "_FROM_TOKENS", {torch.float32: least})
        model = build_model(config, seed=0)
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten()).backward()
        gradients.append([p.grad for p in model.parameters()])
    for ours, right in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-7)


def test_blocks_are_for_plain_tensors_of_a_cpu() -> None:
    """A short context in fp32 is faster in PyTorch's function; fake tensors stand for another device."""
    short, long = torch.zeros(1, 1, 64, 8), torch.zeros(1, 1, 512, 8)
    assert [pays_in_blocks(tensor) for tensor in (short, long, long.double())] == [False, True, False]
    assert pays_in_blocks(short.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert pays_in_blocks(short)
        assert attend_in_blocks(short, short, short).dtype == torch.bfloat16
    with FakeTensorMode():
        assert not pays_in_blocks(torch.zeros(1, 1, 512, 8))
    assert not pays_in_blocks(long.to("meta"))
