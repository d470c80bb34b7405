"""Attention that stays inside a document, for sequences that hold several documents.

Shapes: B batch, T tokens. `documents` (B, T) int gives the number of each token's document. In each row, the documents
are numbered 0, 1, 2, …
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from atlas.config.model import FLEX_HEAD_SIZE


def document_positions(documents: Tensor) -> Tensor:
    """Return the position of each token in its document, (B, T)."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - torch.where(begins, index, 0).cummax(dim=1).values


def dense_mask(documents: Tensor) -> Tensor:
    """Return the mask (B, 1, T, T) bool: each token attends to itself and to the earlier tokens of its document."""
    return (documents[:, :, None] == documents[:, None, :]).tril()[:, None]


def sparse_mask(documents: Tensor) -> BlockMask:
    """Return the mask of `dense_mask` for FlexAttention (Dong et al. 2024, arXiv:2412.05496), which skips fully masked
    blocks."""
    B, T = documents.shape

    def visible(b: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents[b, query] == documents[b, key])

    return create_block_mask(visible, B, None, T, T, device=documents.device)


def document_mask(documents: Tensor, *, head_size: int, dropout: float) -> Tensor | BlockMask:
    """Return the mask with which attention is fastest on this device: sparse for FlexAttention, else dense."""
    if takes_flex_attention(documents.device, head_size=head_size, dropout=dropout):
        return sparse_mask(documents)
    # All layers share this float mask. If the mask were bool, or of another dtype than the queries, each layer would
    # convert it to its own copy and keep that copy.
    device = documents.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return torch.zeros((), device=documents.device, dtype=dtype).where(dense_mask(documents), -torch.inf)


def takes_flex_attention(device: torch.device, *, head_size: int, dropout: float) -> bool:
    """Whether attention inside documents uses FlexAttention, whose kernel has no dropout and needs a minimum head
    size."""
    return head_size >= FLEX_HEAD_SIZE and not dropout and has_flex_attention(device)


def has_flex_attention(device: torch.device) -> bool:
    """Whether FlexAttention has a fused kernel on `device`. Without such a kernel, FlexAttention computes all T × T
    attention weights."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def attend_sparsely(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """Return attention's output (B, H, T, D) for queries (B, H, T, D), keys and values (B, K, T, D), with K ≤ H."""
    attend: Any = _compiled() if q.is_cuda else flex_attention
    return attend(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])  # type: ignore[no-any-return]


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)
