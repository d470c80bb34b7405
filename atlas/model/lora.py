"""LoRA, low-rank adaptation (Hu et al. 2021, arXiv:2106.09685). The base weights are frozen. Each target matrix W gets
two small trainable matrices A and B: the layer computes with W + α/r · B A. W may also be the embedding table.

Shapes: r rank, A (r, in), B (out, r). At first, A is random and B is zero, so training starts at the base model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atlas.config import LoraConfig
from atlas.model.recompute import linear
from atlas.model.transformer import AtlasLM

_IN_BLOCK = {"qkv": "attention", "output": "attention", "up": "mlp", "down": "mlp"}
_A, _B = ".lora_a", ".lora_b"


class _LowRank(nn.Module):
    """A frozen matrix with a trainable low-rank update. The frozen parameters keep their names."""

    def __init__(self, base: nn.Linear | nn.Embedding, config: LoraConfig) -> None:
        super().__init__()
        self.weight = base.weight
        self.scale = config.alpha / config.rank
        rows, columns = base.weight.shape
        self.lora_a = nn.Parameter(base.weight.new_empty(config.rank, columns))
        self.lora_b = nn.Parameter(base.weight.new_zeros(rows, config.rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    @property
    def updated_weight(self) -> Tensor:
        """(out, in): the matrix with its update. Computing it costs less than a product with a batch of tokens."""
        return self.weight + self.scale * (self.lora_b @ self.lora_a)


class LoraLinear(_LowRank):
    """A frozen linear layer with a trainable low-rank update."""

    def __init__(self, base: nn.Linear, config: LoraConfig) -> None:
        super().__init__(base, config)
        self.bias = base.bias

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        update = linear(linear(x, self.lora_a), self.lora_b)
        return linear(x, self.weight, self.bias) + self.scale * update


class LoraEmbedding(_LowRank):
    """A frozen embedding table with a trainable low-rank update. A row of B belongs to each token."""

    def forward(self, tokens: Tensor) -> Tensor:
        """(…) → (…, in)."""
        update = F.embedding(tokens, self.lora_b) @ self.lora_a
        return F.embedding(tokens, self.weight) + self.scale * update


def add_lora(model: AtlasLM, config: LoraConfig, *, seed: int | None = None) -> None:
    """Freeze `model`, and add trainable low-rank updates to the matrices `config.targets`. `seed` determines the
    initial weights of the updates."""
    if seed is not None:
        torch.manual_seed(seed)
    model.requires_grad_(False)
    for block in model.blocks:
        for target in config.targets:
            if target in _IN_BLOCK:
                module = getattr(block, _IN_BLOCK[target])
                setattr(module, target, LoraLinear(getattr(module, target), config))
    is_tied = model.config.tie_embeddings
    if "embedding" in config.targets or (is_tied and "head" in config.targets):
        model.token_embedding = LoraEmbedding(model.token_embedding, config)  # type: ignore[assignment]
    if "head" in config.targets and not is_tied:
        model.lm_head = LoraLinear(model.lm_head, config)  # type: ignore[assignment]


def is_lora(name: str) -> bool:
    """Whether the parameter `name` belongs to a low-rank update."""
    return name.endswith((_A, _B))


def has_lora(model: nn.Module) -> bool:
    """Whether `model` has low-rank updates."""
    return any(isinstance(module, _LowRank) for module in model.modules())


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
