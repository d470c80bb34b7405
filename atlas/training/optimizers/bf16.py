"""Stochastic rounding of weights in bf16."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def step_rounding_weights(optimizer: torch.optim.Optimizer, generator: torch.Generator) -> None:
    """`optimizer.step()` for weights in bf16: computed in fp32, one parameter after the other, and rounded at random.

    Rounded to the nearest value, a weight would stay as it is in nearly every update, which moves it by less than half
    of bf16's last digit (a 256th of its size). Rounded up or down at random, it moves as far as it should on average
    (Gupta et al. 2015, arXiv:1502.02551). A gradient is freed as soon as its parameter is updated.
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
    """fp32 → bf16: one of the two neighbours, the nearer one with the higher probability, so that the mean is the
    number.

    bf16 is the upper half of fp32's bits. Adding a random lower half and cutting it off rounds up with that
    probability.
    """
    bits = numbers.view(torch.int32)
    noise = torch.randint(1 << 16, bits.shape, generator=generator, dtype=torch.int32, device=bits.device)
    return noise.add_(bits).bitwise_and_(-1 << 16).view(torch.float32).bfloat16()
