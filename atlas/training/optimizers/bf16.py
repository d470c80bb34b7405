"""Stochastic rounding of weights in bf16."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def step_rounding_weights(optimizer: torch.optim.Optimizer, generator: torch.Generator) -> None:
    """Apply `optimizer.step()` to bf16 weights: in fp32, one parameter after the other, with stochastic rounding of the
    result.

    Rounding to the nearest value would leave a weight unchanged in nearly every update, since an update is smaller than
    half of bf16's last digit (1/256 of the weight). With stochastic rounding, a weight changes by the right amount on
    average (Gupta et al. 2015, arXiv:1502.02551). Each gradient is freed as soon as its parameter is updated.
    """
    groups = optimizer.param_groups
    try:
        for group in groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                weights, gradient = parameter.data, parameter.grad.float()
                parameter.grad = None
                try:
                    parameter.data = weights.float()
                    parameter.grad = gradient
                    optimizer.param_groups = [{**group, "params": [parameter]}]
                    optimizer.step()
                    weights.copy_(round_to_bf16(parameter.data, generator))
                finally:
                    parameter.grad = None
                    parameter.data = weights
    finally:
        optimizer.param_groups = groups


def round_to_bf16(numbers: Tensor, generator: torch.Generator) -> Tensor:
    """Round fp32 numbers to bf16 at random, up or down. The nearer value is more likely, so that the mean is the number
    itself.

    bf16 is the upper 16 bits of fp32. Adding 16 random bits and then dropping the lower 16 bits rounds up with the
    right probability.
    """
    bits = numbers.view(torch.int32)
    noise = torch.randint(1 << 16, bits.shape, generator=generator, dtype=torch.int32, device=bits.device)
    return noise.add_(bits).bitwise_and_(-1 << 16).view(torch.float32).bfloat16()
