"""The position-wise feed-forward network of a block."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
        inside = self.up(x)
        if not (self.training and torch.is_grad_enabled()):
            return self._down(inside)
        # GELU's output, a quarter of what a block would keep for its gradients, is made again from its input:
        # the recomputation ends where `down` asks for it, before its product.
        recomputed: Any = checkpoint(self._down, inside, use_reentrant=False, preserve_rng_state=False)
        return recomputed  # type: ignore[no-any-return]

    def _down(self, inside: Tensor) -> Tensor:
        return self.down(F.gelu(inside, approximate="tanh"))  # type: ignore[no-any-return]
