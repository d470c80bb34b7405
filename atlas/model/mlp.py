"""The position-wise feed-forward network of a block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from atlas.config import ModelConfig


class MLP(nn.Module):
    """C → 4C → C with GELU between (Hendrycks & Gimpel 2016, arXiv:1606.08415), in the tanh form.

    GPT-2 was trained with the tanh form and llama.cpp computes it, so no other is offered.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, 4 * config.hidden_size, bias=config.bias)
        self.down = nn.Linear(4 * config.hidden_size, config.hidden_size, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        return self.down(F.gelu(self.up(x), approximate="tanh"))  # type: ignore[no-any-return]
