"""Weight layouts for decoding on a CPU.

Decoding multiplies a single row by each matrix. This product reads every weight once, so memory bandwidth limits its
speed. If an fp32 matrix is row-major, PyTorch reads it in only one thread; here, each thread reads its own part of the
matrix, in memory order. A bf16 matrix has to be in the layout of the processor's instructions. PyTorch would convert it
for each product, which takes longer than the product of a few rows; here, it is converted once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atlas.model import AtlasLM


@torch.no_grad()
def lay_out_for_decoding(model: AtlasLM, *, parts: int | None = None) -> None:
    """Change the layout of each weight matrix of `model`. A matrix that is not in bf16 is split into `parts` parts, one
    per thread. The default is PyTorch's number of threads.

    The model still computes the same function. Use the model only for decoding, since its state dict no longer matches
    a checkpoint.
    """
    if model.head_weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        _pack(model)
        return
    parts = parts or torch.get_num_threads()
    for block in model.blocks:
        for module, names in ((block.attention, ("qkv", "output")), (block.mlp, ("up", "down"))):
            for name in names:
                linear = getattr(module, name)
                setattr(module, name, SplitLinear(linear.weight, linear.bias, parts))
    head = SplitLinear(model.head_weight, None, parts)
    if model.config.tie_embeddings:
        model.token_embedding = _SplitEmbedding(head)  # type: ignore[assignment]
    else:
        del model.lm_head
    # The attribute `head` of the instance overrides the method `head` of the class.
    model.head = head.forward  # type: ignore[method-assign, assignment]


def _pack(model: AtlasLM) -> None:
    for block in model.blocks:
        for module, names in ((block.attention, ("qkv", "output")), (block.mlp, ("up", "down"))):
            for name in names:
                linear = getattr(module, name)
                setattr(module, name, PackedLinear(linear.weight, linear.bias))
    head = PackedLinear(model.head_weight, None)
    if not model.config.tie_embeddings:
        del model.lm_head
    model.head = head.forward  # type: ignore[method-assign, assignment]


class PackedLinear(nn.Module):
    """A linear layer in bf16, whose weight (N, K) has oneDNN's layout for products of a few rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, K) to (…, N)."""
        packed: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return packed


class SplitLinear(nn.Module):
    """A linear layer whose (N, K) weight is stored as (parts, K, ⌈N / parts⌉). In a batched product, each thread
    computes one part."""

    def __init__(self, weight: Tensor, bias: Tensor | None, parts: int) -> None:
        super().__init__()
        self.num_out = len(weight)
        missing = -self.num_out % parts
        rows = F.pad(weight, (0, 0, 0, missing))
        self.weight = rows.view(parts, -1, rows.shape[1]).mT.contiguous()
        self.bias = None if bias is None else F.pad(bias, (0, missing)).view(parts, 1, -1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, K) to (…, N)."""
        rows = x.reshape(1, -1, x.shape[-1]).expand(len(self.weight), -1, -1)
        parts = (
            torch.bmm(rows, self.weight) if self.bias is None else torch.baddbmm(self.bias, rows, self.weight)
        )
        if rows.shape[1] > 1:  # the parts of a single row are in the right order already
            parts = parts.transpose(0, 1)
        out = parts.reshape(*x.shape[:-1], -1)
        return out if out.shape[-1] == self.num_out else out[..., : self.num_out]


class _SplitEmbedding(nn.Module):
    """An embedding that takes its rows from the tied LM head `head`, which stores the matrix in parts."""

    def __init__(self, head: SplitLinear) -> None:
        super().__init__()
        self.head = head

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token ids (B, T) to embeddings (B, T, C)."""
        weight = self.head.weight
        width = weight.shape[-1]
        return weight[tokens // width, :, tokens % width]
