"""Muon for the matrices inside the blocks, and AdamW for all other parameters."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from atlas.config import TrainingConfig
from atlas.config.config import MUON_STACK_NUMBERS
from atlas.model import is_lora
from atlas.training.devices.parallel import gather_full, is_sharded, shard_like
from atlas.training.optimizers.adamw import build_adamw

_MUON_MOMENTUM = 0.95
_LARGEST_FACTOR = torch.finfo(torch.bfloat16).max
"""PyTorch raises an error for a larger factor. `guard.py` detects what such a learning rate does to the weights."""


_WIDTH = 768
"""The width (`hidden_size`) at which Muon's learning rate equals AdamW's, see `_muon_update`. AdamW updates the
embedding tables and the LM head. Their learning rate grows as the model gets narrower, since each logit then sums fewer
products. Their weight decay per step does not depend on the width."""


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) for the matrices inside the blocks, and
    AdamW for all other parameters: embeddings, LM head, biases, norms and low-rank updates.

    Muon keeps one moment, 4 bytes, per parameter. AdamW uses the parameter groups and the state of this optimizer. So
    there is one state dict, and one place to set learning rates. Muon's matrix products are in bf16, but on a CPU they
    are in `dtype_on_cpu`.
    """

    def __init__(
        self, model: nn.Module, config: TrainingConfig, dtype_on_cpu: torch.dtype = torch.float32
    ) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        inside = _matrices_of_blocks(model)
        tables = [
            p for name, p in named if not name.startswith("blocks.") and p.dim() >= 2 and not is_lora(name)
        ]
        vectors = [p for name, p in named if p.dim() < 2 or is_lora(name)]
        matrices = [
            {"params": [p for name, p in inside if name.endswith("qkv.weight") == is_qkv], "is_qkv": is_qkv}
            for is_qkv in (True, False)
        ]
        self._splits = {p: _rows_of_splits(name, model) for name, p in inside}
        self._tables = set(tables)
        self._dtype_on_cpu = dtype_on_cpu
        others = [
            {"params": tables, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self._adamw = build_adamw(others, config)
        defaults = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
        super().__init__([*matrices, *self._adamw.param_groups], defaults)
        self.__setstate__({})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set new parameter groups and state, and pass AdamW its part of both. `load_state_dict` calls this method."""
        super().__setstate__(state)
        share = {"state": self.state, "param_groups": self.param_groups[2:]}
        self._adamw.__setstate__(share)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Apply one update to all parameters.

        The weights of q, k and v are parts of one tensor, and those of SwiGLU's values and gates are parts of another
        tensor. Each of these parts is orthogonalized separately. Otherwise the part with the largest gradients would
        get most of the update.
        """
        for group in self.param_groups:
            same_shape: dict[torch.Size, list[tuple[Tensor, ...]]] = defaultdict(list)
            for weight in group["params"] if "is_qkv" in group else ():
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                if is_sharded(weight):
                    _sharded_muon_update(
                        weight, state["momentum_buffer"], self._splits[weight], group, self._dtype_of(weight)
                    )
                    continue
                tensors = (weight, weight.grad, state["momentum_buffer"])
                for matrix in zip(*(tensor.split(self._splits[weight]) for tensor in tensors), strict=True):
                    same_shape[matrix[0].shape].append(matrix)
            for shape, matrices in same_shape.items():
                stack = max(1, MUON_STACK_NUMBERS[matrices[0][0].device.type] // shape.numel())
                for start in range(0, len(matrices), stack):
                    some = matrices[start : start + stack]
                    dtype = self._dtype_of(some[0][0])
                    _muon_update(some, rate=group["lr"], decay=group["weight_decay"], dtype=dtype)
        others = [group for group in self.param_groups if "is_qkv" not in group]
        self._adamw.param_groups = [*map(self._for_width, others)]
        self._adamw.step()

    def _dtype_of(self, weight: Tensor) -> torch.dtype:
        return self._dtype_on_cpu if weight.device.type == "cpu" else torch.bfloat16

    def _for_width(self, group: dict[str, Any]) -> dict[str, Any]:
        """Return a parameter group of AdamW with its effective learning rate and weight decay. For the embedding tables
        and the LM head, both values depend on the width."""
        if not self._tables.issuperset(group["params"]) or not group["params"]:
            return group
        factor = _WIDTH / group["params"][0].shape[1]
        return group | {"lr": group["lr"] * factor, "weight_decay": group["weight_decay"] / factor}


def _matrices_of_blocks(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [
        (name, p)
        for name, p in model.named_parameters()
        if p.requires_grad and name.startswith("blocks.") and p.dim() == 2 and not is_lora(name)
    ]


def count_matrices(model: nn.Module) -> Counter[tuple[bool, int, int]]:
    """Return how many matrices of each kind Muon updates: (whether the matrix is q, k or v; rows; columns) → number."""
    return Counter(
        (name.endswith("qkv.weight"), rows, p.shape[1])
        for name, p in _matrices_of_blocks(model)
        for rows in _rows_of_splits(name, model)
    )


def _rows_of_splits(name: str, model: nn.Module) -> list[int]:
    """Return the number of rows of each matrix in the parameter `name`."""
    module = model.get_submodule(name.rsplit(".", 2)[0])
    rows = len(model.get_parameter(name))
    if name.endswith("qkv.weight"):
        return list(module.widths)  # type: ignore[arg-type]
    return [rows // 2] * 2 if name.endswith("up.weight") and module.is_gated else [rows]


def _muon_update(
    matrices: Sequence[tuple[Tensor, ...]], *, rate: float, decay: float, dtype: torch.dtype
) -> None:
    """Update matrices of one shape by their orthogonalized mean gradients, with Nesterov momentum. Each entry of
    `matrices` is (weight, gradient, momentum). Matrix products are in `dtype`.

    The outputs of a layer should change by the same amount at any width. Therefore, the largest singular value of the
    update is proportional to √(outputs / inputs), if a matrix has more outputs than inputs (Yang et al. 2023,
    arXiv:2310.17813). With `_WIDTH` inputs, the update has an RMS of 0.2, like a usual update of AdamW. So AdamW's
    learning rates suit Muon at this width (Liu et al. 2025, arXiv:2502.16982).
    """
    weights, gradients, momenta = ([*tensors] for tensors in zip(*matrices, strict=True))
    torch._foreach_lerp_(momenta, gradients, 1 - _MUON_MOMENTUM)
    means = torch.stack([*torch._foreach_lerp(gradients, momenta, _MUON_MOMENTUM)])
    updates = _orthogonalized(means, dtype)
    if updates.is_cuda or updates.dtype != weights[0].dtype:
        # If the updates had another dtype or layout than the weights, `_foreach_add_` would launch one kernel per
        # weight.
        updates = updates.to(weights[0].dtype, memory_format=torch.contiguous_format)
    torch._foreach_mul_(weights, 1 - rate * decay)
    step_size = min(rate * _muon_scale(weights[0]), _LARGEST_FACTOR)
    torch._foreach_add_(weights, updates.unbind(), alpha=-step_size)


def _sharded_muon_update(
    weight: Tensor, momentum: Tensor, rows: list[int], group: dict[str, Any], dtype: torch.dtype
) -> None:
    """Update one weight, of which each rank holds only some rows, like `_muon_update`.

    Only a full matrix can be orthogonalized. So every rank gathers the full gradient, computes the full update, and
    applies its own rows of the update.
    """
    assert weight.grad is not None
    momentum.lerp_(weight.grad, 1 - _MUON_MOMENTUM)
    mean = gather_full(weight.grad.lerp(momentum, _MUON_MOMENTUM), to_cpu=False)
    updates = [_orthogonalized(matrix[None], dtype)[0] * _muon_scale(matrix) for matrix in mean.split(rows)]
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    step_size = min(group["lr"], _LARGEST_FACTOR)
    weight.add_(shard_like(torch.cat(updates).to(weight.dtype), weight), alpha=-step_size)


def _muon_scale(matrix: Tensor) -> float:
    return 0.2 * math.sqrt(_WIDTH * max(1, matrix.shape[0] / matrix.shape[1]))


def _orthogonalized(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, R, C) → approximately U Vᵀ for each matrix U S Vᵀ. The singular values of the result are between 0.7 and 1.2,
    so that all directions change by about the same amount.

    The method is five steps of a Newton–Schulz iteration with Jordan's coefficients, in `dtype`.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.to(dtype)
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
