"""Causal multi-head self-attention.

Shapes: B batch, T new tokens, S earlier and new tokens together, H query heads, K key and value heads, D head_dim, C
hidden_size.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from atlas.config import ModelConfig
from atlas.model.attention_cpu import attend_in_blocks, pays_in_blocks
from atlas.model.documents import attend_sparsely
from atlas.model.kv_cache import KVCache
from atlas.model.norm import RMSNorm
from atlas.model.recompute import Linear, checkpointed
from atlas.model.rope import Rotation, rotate


class Context(NamedTuple):
    """The inputs of every block's attention, in addition to the residual stream."""

    positions: Tensor
    """The positions of the new tokens: (T,), or (B, T) if the rows have different positions."""
    mask: Tensor | BlockMask | None = None
    """(B, 1, T, S): the tokens to which each query attends. With None, each token attends to itself and all earlier
    tokens."""
    rotation: Rotation | None = None
    """The rotation of queries and keys, or None without RoPE."""
    cache: KVCache | None = None
    """The cache with the keys and values of earlier tokens, or None."""


class CausalSelfAttention(nn.Module):
    """Scaled dot-product attention over earlier tokens (Vaswani et al. 2017, arXiv:1706.03762)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_size = config.head_size
        heads = config.num_heads, config.kv_heads, config.kv_heads
        self.widths = [number * config.head_size for number in heads]
        self.shares_keys = config.kv_heads != config.num_heads
        self.dropout = config.dropout
        self.has_rope = config.has_rope(layer)
        self.qkv = Linear(config.hidden_size, sum(self.widths), bias=config.has_qkv_bias)
        self.output = nn.Linear(self.widths[0], config.hidden_size, bias=config.bias)
        # QK-norm bounds the products of queries and keys (Henry et al. 2020, arXiv:2010.04245).
        self.q_norm = RMSNorm(config.head_size, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_size, eps=config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, T, C) → (B, T, C).

        If K < H, H / K query heads share one key and value head: grouped-query attention (Ainslie et al. 2023,
        arXiv:2305.13245).
        """
        positions, mask, rotation, cache = context
        B, T, _ = x.shape
        dropout = self.dropout if self.training and cache is None else 0.0
        q_BHTD, k_BKTD, v_BKTD = self._project(x, rotation)
        if isinstance(mask, BlockMask):
            assert cache is None
            out_BHTD = attend_sparsely(q_BHTD, k_BKTD, v_BKTD, mask)
        elif mask is None and cache is None and not dropout and pays_in_blocks(q_BHTD):
            out_BHTD = attend_in_blocks(q_BHTD, k_BKTD, v_BKTD)
        else:
            if cache is not None:
                k_BKTD, v_BKTD = cache.update(self.layer, positions, k_BKTD, v_BKTD)  # the first S slots
            # If each sequence has one query, the query heads that share a key head become rows of one head. The reason:
            # on CUDA, no fused kernel supports both a mask and shared key heads.
            as_rows = self.shares_keys and cache is not None and T == 1
            if as_rows:
                q_BHTD = q_BHTD.reshape(B, k_BKTD.shape[1], -1, self.head_size)
            out_BHTD = F.scaled_dot_product_attention(
                q_BHTD,
                k_BKTD,
                v_BKTD,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None and (cache is None or T > 1),
                enable_gqa=self.shares_keys and not as_rows,
            ).reshape(B, -1, T, self.head_size)
        return self.output(out_BHTD.transpose(1, 2).reshape(B, T, -1))  # type: ignore[no-any-return]

    def weights(self, x: Tensor, context: Context) -> Tensor:
        """Return the attention weights (B, H, T, T) of `x` (B, T, C) in fp32. Row t has the weights of token t over
        itself and all earlier tokens. Use this method for inspection only. `forward` never computes this tensor,
        because its memory grows with T²."""
        q_BHTD, k_BKTD, _ = self._project(x, context.rotation)
        k_BHTD = k_BKTD.repeat_interleave(q_BHTD.shape[1] // k_BKTD.shape[1], dim=1)
        scores = q_BHTD.float() @ k_BHTD.float().mT / math.sqrt(self.head_size)
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        return scores.masked_fill(later, -torch.inf).softmax(dim=-1)

    def _project(self, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, H, T, D), keys and values (B, K, T, D) of `x` (B, T, C). Norms and rotation are applied to
        queries and keys."""
        B, T, _ = x.shape
        qkv = self.qkv(x)
        q_BTHD, k_BTKD, v_BTKD = (
            split.view(B, T, -1, self.head_size) for split in qkv.split(self.widths, dim=-1)
        )
        rotation = rotation if self.has_rope else None
        q_BHTD = _norm_and_rope(q_BTHD, self.q_norm, rotation).transpose(1, 2)
        k_BKTD = _norm_and_rope(k_BTKD, self.k_norm, rotation).transpose(1, 2)
        return q_BHTD, k_BKTD, v_BTKD.transpose(1, 2)


def _norm_and_rope(x: Tensor, norm: nn.Module | None, rotation: Rotation | None) -> Tensor:
    """Return queries or keys (B, T, H, D), normalized and rotated. For the backward pass, only `x` and the result are
    kept."""

    def apply(x: Tensor) -> Tensor:
        x = x if norm is None else norm(x)
        return x if rotation is None else rotate(x, rotation)

    return apply(x) if norm is None else checkpointed(apply, x)
