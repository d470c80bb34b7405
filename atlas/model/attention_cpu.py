"""Causal attention for training on a CPU, in blocks of queries, as in FlashAttention (Dao et al. 2022,
arXiv:2205.14135).

The scores of all pairs of tokens never exist at once. The forward pass computes the scores of one block of queries and
the earlier keys, and the backward pass computes them again. Unlike FlashAttention, a block sees all of its keys at
once, so the softmax needs no correction. In bf16, scores and attention weights are rounded to bf16, and the products
run on the CPU's instructions for bf16. PyTorch's own function keeps scores in fp32, and is slower: on an AMD EPYC with
AVX-512, this code needs 0.5 of its time in bf16, and 0.75 in fp32 (4 × 512 tokens, 6 heads of 64, one thread).

Shapes: B batch, T tokens, H query heads, K key and value heads, G = H / K, D head_dim, N = B · K. A block has R queries
and sees S keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_BLOCK = {torch.float32: 64, torch.bfloat16: 128}
"""Tokens per block. Larger blocks compute more scores of later tokens, which are then masked."""
_FROM_TOKENS = {torch.float32: 512, torch.bfloat16: 1}
"""The number of tokens from which this code is faster than PyTorch's function."""


def pays_in_blocks(q_BHTD: Tensor) -> bool:
    """Whether `attend_in_blocks` is faster than PyTorch's function."""
    if q_BHTD.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    # A subclass, such as the fake tensors of `cost`, stands for a tensor of another device.
    least = _FROM_TOKENS.get(_computed_in(q_BHTD), math.inf)
    return type(q_BHTD) is Tensor and q_BHTD.shape[2] >= least


def attend_in_blocks(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
    """Return the attention (B, H, T, D) of each query to its own token and all earlier tokens. With autocast, the
    products are computed in its dtype."""
    q_BHTD, k_BKTD, v_BKTD = (tensor.to(_computed_in(tensor)) for tensor in (q_BHTD, k_BKTD, v_BKTD))
    with torch.autocast("cpu", enabled=False):
        out_BHTD: Tensor = _CausalAttention.apply(q_BHTD, k_BKTD, v_BKTD)  # type: ignore[no-untyped-call]
    return out_BHTD


def _computed_in(tensor: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else tensor.dtype


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
        q_NGTD, k_NTD, v_NTD = _by_key_head(q_BHTD, k_BKTD, v_BKTD)
        out_NGTD = torch.empty_like(q_NGTD)
        for block, weights_NRS, _ in _weights_of_blocks(q_NGTD, k_NTD):
            out_NRD = weights_NRS @ v_NTD[:, : block.stop]
            out_NGTD[:, :, block] = out_NRD.view_as(out_NGTD[:, :, block])
        ctx.save_for_backward(q_BHTD, k_BKTD, v_BKTD)
        # In memory, the heads of a token are neighbours, as the next matrix product needs them.
        return out_NGTD.view(q_BHTD.shape).transpose(1, 2).contiguous().transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        q_BHTD, k_BKTD, v_BKTD = ctx.saved_tensors
        q_NGTD, k_NTD, v_NTD = _by_key_head(q_BHTD, k_BKTD, v_BKTD)
        grad_NGTD = gradients[0].reshape(q_NGTD.shape)
        q_grad_NGTD = torch.empty_like(q_NGTD)
        k_grad_NTD, v_grad_NTD = (torch.zeros_like(tensor, dtype=torch.float32) for tensor in (k_NTD, v_NTD))
        for block, weights_NRS, q_NRD in _weights_of_blocks(q_NGTD, k_NTD):
            keys, grad_NRD = slice(block.stop), grad_NGTD[:, :, block].flatten(1, 2)
            _add_product_(v_grad_NTD[:, keys], weights_NRS.mT, grad_NRD)
            weights_grad_NRS = grad_NRD @ v_NTD[:, keys].mT
            scores_grad_NRS = torch._softmax_backward_data(
                weights_grad_NRS, weights_NRS, -1, weights_NRS.dtype
            )
            _add_product_(k_grad_NTD[:, keys], scores_grad_NRS.mT, q_NRD)
            by_q_NRD = scores_grad_NRS @ k_NTD[:, keys]
            q_grad_NGTD[:, :, block] = by_q_NRD.view_as(q_grad_NGTD[:, :, block])
        q_grad_NGTD.mul_(_scale(q_BHTD))
        k_grad_NTD, v_grad_NTD = k_grad_NTD.to(k_NTD.dtype), v_grad_NTD.to(v_NTD.dtype)
        return q_grad_NGTD.view(q_BHTD.shape), k_grad_NTD.view(k_BKTD.shape), v_grad_NTD.view(v_BKTD.shape)


def _by_key_head(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return scaled queries (N, G, T, D), keys and values (N, T, D), contiguous."""
    B, K, T, D = k_BKTD.shape
    return (
        (q_BHTD * _scale(q_BHTD)).reshape(B * K, -1, T, D),
        k_BKTD.reshape(B * K, T, D),
        v_BKTD.reshape(B * K, T, D),
    )


def _scale(q_BHTD: Tensor) -> float:
    return 1 / math.sqrt(q_BHTD.shape[-1])


def _weights_of_blocks(q_NGTD: Tensor, k_NTD: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield for each block of tokens: its tokens, the attention weights (N, R, S) of its queries, and the queries (N,
    R, D). A block's queries are those of all query heads that share a key head."""
    tokens, size = q_NGTD.shape[2], _BLOCK[q_NGTD.dtype]
    later = q_NGTD.new_full((size, size), -torch.inf).triu(1)
    for start in range(0, tokens, size):
        block = slice(start, min(start + size, tokens))
        q_NRD = q_NGTD[:, :, block].flatten(1, 2)
        scores_NRS = q_NRD @ k_NTD[:, : block.stop].mT
        among_block = scores_NRS.view(*q_NGTD.shape[:2], -1, block.stop)[..., start:]
        among_block += later[: among_block.shape[-1], : among_block.shape[-1]]
        yield block, torch.softmax(scores_NRS, dim=-1, out=scores_NRS), q_NRD


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right` to `total`, which is fp32."""
    if left.dtype == torch.float32:
        total.baddbmm_(left, right)
    else:
        total += left @ right
