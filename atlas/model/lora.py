"""Low-rank updates, LoRA (Hu et al. 2021, arXiv:2106.09685): a trained model rests, and beside each chosen matrix W a
product of two narrow ones learns what is added to it: W + α/r · B A.

Shapes: r rank, A (r, in), B (out, r). A begins at random and B at zero, so that training begins at the model itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from atlas.config import LoraConfig
from atlas.model.recompute import linear
from atlas.model.transformer import AtlasLM

_ROOMS = {"qkv": "attention", "output": "attention", "up": "mlp", "down": "mlp"}
_A, _B = ".lora_a", ".lora_b"


class LoraLinear(nn.Module):
    """A linear layer that rests, under the names that it had, and its update."""

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
    """Let only the updates of `config.targets` learn, in every block; `seed` decides where they begin."""
    if seed is not None:
        torch.manual_seed(seed)
    model.requires_grad_(False)
    for block in model.blocks:
        for target in config.targets:
            room = getattr(block, _ROOMS[target])
            setattr(room, target, LoraLinear(getattr(room, target), config))


def is_lora(name: str) -> bool:
    """Whether a parameter of this name is one of a low-rank update's two."""
    return name.endswith((_A, _B))


def has_lora(model: nn.Module) -> bool:
    return any(isinstance(module, LoraLinear) for module in model.modules())


def merged(weights: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """A state dict with its updates added to the matrices that they belong to."""
    result = {name: tensor for name, tensor in weights.items() if not name.endswith((_A, _B))}
    for name, a in weights.items():
        if name.endswith(_A):
            place = name.removesuffix(_A)
            weight, update = result[f"{place}.weight"], weights[place + _B].float() @ a.float()
            result[f"{place}.weight"] = (weight.float() + config.alpha / config.rank * update).to(
                weight.dtype
            )
    return result
