"""PyTorch's AdamW."""

from __future__ import annotations

from typing import Any

import torch

from atlas.config import TrainingConfig


def build_adamw(groups: list[dict[str, Any]], config: TrainingConfig) -> torch.optim.AdamW:
    """Build AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101). For each parameter, AdamW keeps two fp32 moments: 8
    bytes."""
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)
