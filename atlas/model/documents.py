"""Attention that stays inside a document, where several lie in one sequence.

Shapes: B batch, T tokens. `documents` (B, T) int says which document of its row a token belongs to; it starts at 0
and never falls.
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
    """(B, T): how many tokens of its own document come before each token."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - torch.where(begins, index, 0).cummax(dim=1).values


def dense_mask(documents: Tensor) -> Tensor:
    """(B, 1, T, T) bool: a query sees the tokens up to itself in its own document."""
    return (documents[:, :, None] == documents[:, None, :]).tril()[:, None]


def sparse_mask(documents: Tensor) -> BlockMask:
    """The same for FlexAttention (Dong et al. 2024, arXiv:2412.05496), which skips blocks that hold nothing to see."""
    B, T = documents.shape

    def visible(b: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents[b, query] == documents[b, key])

    return create_block_mask(visible, B, None, T, T, device=documents.device)


def document_mask(documents: Tensor, *, head_size: int, dropout: float) -> Tensor | BlockMask:
    """The mask in the form that attention computes best here: sparse for FlexAttention, else dense."""
    if takes_flex_attention(documents.device, head_size=head_size, dropout=dropout):
        return sparse_mask(documents)
    # Added to the scores, in the one form that every layer shares: of a bool mask each would keep a copy like this.
    return torch.zeros((), device=documents.device).where(dense_mask(documents), -torch.inf)


def takes_flex_attention(device: torch.device, *, head_size: int, dropout: float) -> bool:
    """Whether a model computes attention inside documents by FlexAttention, whose kernel has no dropout."""
    return head_size >= FLEX_HEAD_SIZE and not dropout and has_flex_attention(device)


def has_flex_attention(device: torch.device) -> bool:
    """Whether FlexAttention has a fused kernel here. (Without one it would make all T × T weights.)"""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def attend_sparsely(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """(B, H, T, D), and keys and values of as many heads or fewer → (B, H, T, D)."""
    attend: Any = _compiled() if q.is_cuda else flex_attention
    return attend(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])  # type: ignore[no-any-return]


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)
