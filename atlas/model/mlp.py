"""The position-wise feed-forward network of a block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from atlas.config import ModelConfig
from atlas.model.recompute import recomputed


class MLP(nn.Module):
    """C → 4C → C with GELU between (Hendrycks & Gimpel 2016, arXiv:1606.08415), in the tanh form.

    GPT-2 was trained with the tanh form and llama.cpp computes it, so no other is offered.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, 4 * config.hidden_size, bias=config.bias)
        self.down = nn.Linear(4 * config.hidden_size, config.hidden_size, bias=config.bias)

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        """(B, T, C) → (B, T, C), of norm(x). Neither the norm's output nor GELU's is kept."""
        inside = recomputed(lambda x: self.up(norm(x)), x)
        return recomputed(lambda x: self.down(F.gelu(x, approximate="tanh")), inside)
