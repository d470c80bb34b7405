"""A model's weights laid out for a CPU that writes: each thread reads its own part of a matrix, in the order of memory.

A product of one row with a matrix reads every weight once, and takes as long as reading it does. PyTorch's product of a
row with a matrix stored by rows reads it in one thread.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atlas.model import AtlasLM


@torch.no_grad()
def lay_out_for_decoding(model: AtlasLM, *, parts: int | None = None) -> None:
    """Replace the matrices of `model` by their parts, one a thread (`parts`; default: PyTorch's number of threads).

    It computes the same, and is good for writing only: its state dict is no longer a checkpoint's.
    """
    parts = parts or torch.get_num_threads()
    for block in model.blocks:
        for room, name in (
            (block.attention, "qkv"),
            (block.attention, "output"),
            (block.mlp, "up"),
            (block.mlp, "down"),
        ):
            linear = getattr(room, name)
            setattr(room, name, SplitLinear(linear.weight, linear.bias, parts))
    head = SplitLinear(model.head_weight, None, parts)
    if model.config.tie_embeddings:
        model.token_embedding = _SplitEmbedding(head)  # type: ignore[assignment]
    else:
        del model.lm_head
    # The instance's own, in place of the class's.
    model.head = head.forward  # type: ignore[method-assign, assignment]


class SplitLinear(nn.Module):
    """`F.linear` with a (N, K) weight kept as `weight` (parts, K, ⌈N / parts⌉): a batch of products, of which each
    thread takes one."""

    def __init__(self, weight: Tensor, bias: Tensor | None, parts: int) -> None:
        super().__init__()
        self.num_out = len(weight)
        missing = -self.num_out % parts
        rows = F.pad(weight, (0, 0, 0, missing))
        self.weight = rows.view(parts, -1, rows.shape[1]).mT.contiguous()
        self.bias = None if bias is None else F.pad(bias, (0, missing)).view(parts, 1, -1)

    def forward(self, x: Tensor) -> Tensor:
        """(…, K) → (…, N)."""
        rows = x.reshape(1, -1, x.shape[-1]).expand(len(self.weight), -1, -1)
        parts = (
            torch.bmm(rows, self.weight) if self.bias is None else torch.baddbmm(self.bias, rows, self.weight)
        )
        if rows.shape[1] > 1:  # the parts of a single row lie one after the other
            parts = parts.transpose(0, 1)
        out = parts.reshape(*x.shape[:-1], -1)
        return out if out.shape[-1] == self.num_out else out[..., : self.num_out]


class _SplitEmbedding(nn.Module):
    """Rows of the table that a tied head keeps in parts."""

    def __init__(self, head: SplitLinear) -> None:
        super().__init__()
        self.head = head

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) → (B, T, C)."""
        weight = self.head.weight
        width = weight.shape[-1]
        return weight[tokens // width, :, tokens % width]
