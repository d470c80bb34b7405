"""The position-wise feed-forward network of a block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from atlas.config import ModelConfig
from atlas.model.recompute import Linear, checkpointed


class MLP(nn.Module):
    """Two linear layers, C → M → C with M = `mlp_width`. The activation between them is GELU (Hendrycks & Gimpel 2016,
    arXiv:1606.08415) or SwiGLU (Shazeer 2020, arXiv:2002.05202). With SwiGLU, `up` computes both the gates and the
    values that are multiplied by the gates.

    The default is GELU's tanh form, as in GPT-2 and llama.cpp. Atlas 1.x used the exact form, which differs by at most
    5e-4.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.is_gated = config.mlp == "swiglu"
        self.gelu_form = "none" if config.mlp == "gelu_exact" else "tanh"
        inside = 2 * config.mlp_width if self.is_gated else config.mlp_width
        self.up = Linear(config.hidden_size, inside, bias=config.bias)
        self.down = nn.Linear(config.mlp_width, config.hidden_size, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) → (B, T, C). The backward pass recomputes the activation's output."""
        return checkpointed(lambda inside: self.down(self._activate(inside)), self.up(x))

    def _activate(self, inside: Tensor) -> Tensor:
        if not self.is_gated:
            return F.gelu(inside, approximate=self.gelu_form)
        gates, values = inside.chunk(2, dim=-1)
        return F.silu(gates) * values
