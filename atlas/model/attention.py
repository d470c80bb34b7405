"""Causal multi-head self-attention.

Shapes: B batch, T new tokens, S tokens seen, H heads, D head_dim, C hidden_size = H × D.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from atlas.config import ModelConfig
from atlas.model.documents import attend_sparsely
from atlas.model.kv_cache import KVCache
from atlas.model.recompute import recomputed


class CausalSelfAttention(nn.Module):
    """Scaled dot-product attention over earlier tokens (Vaswani et al. 2017, arXiv:1706.03762)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = config.num_heads
        self.head_dim = config.head_dim
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.bias)
        self.output = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)

    def forward(
        self,
        x: Tensor,
        norm: nn.Module,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | BlockMask | None = None,
    ) -> Tensor:
        """(B, T, C) → (B, T, C), of norm(x), which is not kept. `mask` (B, 1, T, S) says what is seen, all that came
        before where it is left out; with a cache `positions` (B, T) says where the tokens stand."""
        B, T, C = x.shape
        qkv: Tensor = recomputed(lambda x: self.qkv(norm(x)), x)
        q_BHTD, k_BHTD, v_BHTD = (
            part.view(B, T, self.num_heads, self.head_dim).transpose(1, 2)
            for part in qkv.split(C, dim=-1)  # type: ignore[no-untyped-call]
        )
        dropout = self.dropout if self.training else 0.0
        if cache is not None:
            assert positions is not None
            assert not isinstance(mask, BlockMask)
            k_BHSD, v_BHSD = cache.update(self.layer, positions, k_BHTD, v_BHTD)
            out_BHTD = F.scaled_dot_product_attention(
                q_BHTD, k_BHSD, v_BHSD, attn_mask=mask, is_causal=mask is None and T > 1
            )
        elif isinstance(mask, BlockMask):
            out_BHTD = attend_sparsely(q_BHTD, k_BHTD, v_BHTD, mask)
        else:
            out_BHTD = F.scaled_dot_product_attention(
                q_BHTD, k_BHTD, v_BHTD, attn_mask=mask, dropout_p=dropout, is_causal=mask is None
            )
        return self.output(out_BHTD.transpose(1, 2).reshape(B, T, C))  # type: ignore[no-any-return]
