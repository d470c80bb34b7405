"""Stochastic rounding of weights in bf16."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def step_rounding_weights(optimizer: torch.optim.Optimizer, generator: torch.Generator) -> None:
    """Apply the optimizer step to bf16 weights. One parameter at a time is converted to fp32, updated, and rounded to
    bf16 stochastically.

    An update is usually smaller than 1/256 of the weight, which is about half of the distance to the next bf16 number.
    Rounding to the nearest number would therefore leave a weight unchanged in nearly every update. With stochastic
    rounding, a weight changes by the right amount on average (Gupta et al. 2015, arXiv:1502.02551). Each gradient is
    freed as soon as its parameter is updated.
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
    """Round each fp32 number at random to one of the two neighbouring bf16 numbers. The nearer one is more likely, so
    that the mean result is the fp32 number itself.

    A bf16 number has the upper 16 bits of an fp32 number. Adding 16 random bits and then dropping the lower 16 bits
    selects each neighbour with the right probability.
    """
    bits = numbers.view(torch.int32)
    noise = torch.randint(1 << 16, bits.shape, generator=generator, dtype=torch.int32, device=bits.device)
    return noise.add_(bits).bitwise_and_(-1 << 16).view(torch.float32).bfloat16()
