"""LoRA, low-rank adaptation (Hu et al. 2021, arXiv:2106.09685). The base weights are frozen. Each target matrix W gets
two small trainable matrices A and B: the layer computes with W + α/r · B A.

Shapes: r rank, A (r, in), B (out, r). At first, A is random and B is zero, so training starts at the base model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from atlas.config import LoraConfig
from atlas.model.recompute import linear
from atlas.model.transformer import AtlasLM

_MODULES = {"qkv": "attention", "output": "attention", "up": "mlp", "down": "mlp"}
_A, _B = ".lora_a", ".lora_b"


class LoraLinear(nn.Module):
    """A frozen linear layer with a trainable low-rank update. The frozen parameters keep their names."""

    def __init__(self, base: nn.Linear, config: LoraConfig) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.scale = config.alpha / config.rank
        rows, columns = base.weight.shape
        self.lora_a = nn.Parameter(base.weight.new_empty(config.rank, columns))
        self.lora_b = nn.Parameter(base.weight.new_zeros(rows, config.rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        update = linear(linear(x, self.lora_a), self.lora_b)
        return linear(x, self.weight, self.bias) + self.scale * update


def add_lora(model: AtlasLM, config: LoraConfig, *, seed: int | None = None) -> None:
    """Freeze `model`, and add trainable low-rank updates to the matrices `config.targets` of every block. `seed`
    determines the initial weights of the updates."""
    if seed is not None:
        torch.manual_seed(seed)
    model.requires_grad_(False)
    for block in model.blocks:
        for target in config.targets:
            module = getattr(block, _MODULES[target])
            setattr(module, target, LoraLinear(getattr(module, target), config))


def is_lora(name: str) -> bool:
    """Whether the parameter `name` belongs to a low-rank update."""
    return name.endswith((_A, _B))


def has_lora(model: nn.Module) -> bool:
    """Whether `model` has low-rank updates."""
    return any(isinstance(module, LoraLinear) for module in model.modules())


def merged(weights: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """Return a state dict in which the low-rank updates are added to their matrices."""
    result = {name: tensor for name, tensor in weights.items() if not is_lora(name)}
    for name, a in weights.items():
        if name.endswith(_A):
            module = name.removesuffix(_A)
            weight, update = result[f"{module}.weight"], weights[module + _B].float() @ a.float()
            total = weight.float() + config.alpha / config.rank * update
            result[f"{module}.weight"] = total.to(weight.dtype)
    return result
