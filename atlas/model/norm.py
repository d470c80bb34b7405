"""The norms of a block."""

from __future__ import annotations

from torch import nn

from atlas.config import ModelConfig


def build_norm(config: ModelConfig) -> nn.Module:
    """Over the width of the model: LayerNorm (Ba et al. 2016, arXiv:1607.06450), or RMSNorm (Zhang & Sennrich 2019,
    arXiv:1910.07467), which neither subtracts the mean nor adds a bias."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.bias)
