"""Build one `torch.optim.Optimizer` for all parameters of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from atlas.config import TrainingConfig
from atlas.training.optimizers.adafactor import build_adafactor, variance_shapes
from atlas.training.optimizers.adamw import build_adamw
from atlas.training.optimizers.adamw8bit import build_adamw8bit, shapes_8bit
from atlas.training.optimizers.muon import MuonWithAdamW

_BUILDERS: dict[str, Callable[[list[dict[str, Any]], TrainingConfig], torch.optim.Optimizer]] = {
    "adamw": build_adamw,
    "adamw8bit": build_adamw8bit,
    "adafactor": build_adafactor,
}


def build_optimizer(
    model: nn.Module, config: TrainingConfig, dtype: torch.dtype = torch.float32
) -> torch.optim.Optimizer:
    """Build the optimizer that `training.optimizer` names. On a CPU, Muon's matrix products are in `dtype`.

    Matrices and embeddings have weight decay; biases and norms have none. All optimizers are scaled so that the same
    learning rates suit them. The training loop sets the learning rate before each update.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    vectors = {"params": [p for _, p in named if p.dim() < 2], "weight_decay": 0.0}
    matrices = {"params": [p for _, p in named if p.dim() >= 2], "weight_decay": config.weight_decay}
    if config.optimizer == "muon":  # Muon selects its matrices by name
        return MuonWithAdamW(model, config, dtype)
    return _BUILDERS[config.optimizer]([matrices, vectors], config)


def state_shapes(group: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    """Return the shape of each tensor in the saved state of `parameter`, which is in `group`, after the first update.
    An entry is a shape or a dict of shapes."""
    if "is_8bit" in group:
        return shapes_8bit(parameter)
    if "is_qkv" in group:
        return {"momentum_buffer": parameter.shape}
    if "beta2_decay" not in group:
        return {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
    return {"step": torch.Size(), **variance_shapes(parameter)}
