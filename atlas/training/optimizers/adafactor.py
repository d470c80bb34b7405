"""Adafactor, an optimizer whose state is one number per row and one per column of a matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from atlas.config import TrainingConfig

_EPS = (1e-15, 1.0)


def build_adafactor(groups: list[dict[str, Any]], config: TrainingConfig) -> torch.optim.Adafactor:
    """Build Adafactor (Shazeer & Stern 2018, arXiv:1804.04235) without momentum.

    For a matrix, Adafactor keeps the mean squared gradient of each row and of each column. An update whose root mean
    square (RMS) exceeds 1 is scaled down to an RMS of 1.

    PyTorch multiplies the update by max(ε₂, RMS of the parameter) · min(learning rate, 1 / √t) in step t. With the
    paper's ε₂ = 10⁻³, an update would be proportional to the RMS of the weights. Such an update would be about 50 times
    smaller than AdamW's update at the same learning rate. With ε₂ = 1, the product equals the learning rate for every
    parameter whose RMS is below 1. Only the gains of the norms have a larger RMS, which stays near 1. The bound 1 / √t
    has no effect at usual learning rates: it falls to 1e-3 only after a million steps.

    ε₁ is a lower bound for the mean squared gradient of a matrix. ε₁², which is 10⁻³⁰ as in the paper, is a lower bound
    for the estimated square of each gradient. PyTorch's default ε₁ is about 10⁻⁷. This value exceeds the mean squared
    gradient of a large model whose gradient norm is clipped to 1.
    """
    on_cuda = any(parameter.is_cuda for group in groups for parameter in group["params"])
    kind = AdafactorWithoutWaits if on_cuda else torch.optim.Adafactor
    # Update one parameter after the other. With `foreach`, the step would need additional memory of the size of the
    # weights.
    return kind(groups, lr=config.learning_rate, eps=_EPS, foreach=False)


class AdafactorWithoutWaits(torch.optim.Adafactor):
    """PyTorch's Adafactor, but the host does not wait for the device. The state is the same, and the updates are the
    same up to rounding.

    PyTorch reads two norms of every parameter on the host, so the host waits for the device each time. Here the norms
    stay on the device.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if not state:
                        state["step"] = torch.tensor(0.0)  # on the CPU, so that reading it needs no wait
                        for name, shape in variance_shapes(parameter).items():
                            state[name] = parameter.grad.new_zeros(shape)
                    _update(parameter, parameter.grad, state, group)


def variance_shapes(parameter: Tensor) -> dict[str, torch.Size]:
    """Return the name and the shape of each tensor of mean squared gradients that Adafactor keeps for a parameter."""
    if parameter.dim() < 2:
        return {"variance": parameter.shape}
    rows, columns = parameter.shape
    return {"row_var": torch.Size((rows, 1)), "col_var": torch.Size((1, columns))}


def _update(parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    """Update one parameter like `torch.optim.Adafactor`.

    An RMS is a norm divided by the square root of the number of elements. The host includes this division in a scalar
    factor. On the device, each division would be a separate kernel.
    """
    (eps1, eps2), rate, root = group["eps"], group["lr"], math.sqrt(parameter.numel())
    state["step"] += 1
    step = state["step"].item()
    new = step ** group["beta2_decay"]  # 1 - β₂, the weight of the new squared gradients
    size = parameter.norm().clamp_(min=eps2 * root)
    if group["weight_decay"]:
        parameter.mul_(1 - rate * group["weight_decay"])
    if gradient.dim() < 2:
        variance = state["variance"].lerp_(gradient * gradient, new).clamp(min=eps1 * eps1)
    else:
        row_var, col_var = state["row_var"], state["col_var"]
        for mean, dim in ((row_var, 1), (col_var, 0)):
            norm = gradient.norm(dim=dim, keepdim=True)
            mean.mul_(1 - new).addcmul_(norm, norm, value=new / gradient.shape[dim])
        scaled_rows = row_var / row_var.mean().clamp_(min=eps1)
        variance = (scaled_rows @ col_var).clamp_(min=eps1 * eps1)
    update = variance.rsqrt_().mul_(gradient)
    size.div_(update.norm().clamp_(min=root * group["d"]))
    parameter.addcmul_(update, size, value=-min(rate, 1 / math.sqrt(step)) * group["d"])
