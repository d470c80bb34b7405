"""Updates of weights in bf16, rounded at random."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def step_rounding_weights(optimizer: torch.optim.Optimizer, generator: torch.Generator) -> None:
    """`optimizer.step()` for weights in bf16: taken in fp32, by one parameter after the other, and rounded at random.

    Rounded to the nearest, a weight would stay where it is in nearly every update, which moves it by less than half of
    bf16's last digit (a 256th of its size). Up or down by chance, it moves as far as it should on average (Gupta et al.
    2015, arXiv:1502.02551). A gradient is freed as soon as its parameter is done.
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
    """fp32 → bf16: one of its two neighbours, the nearer one the likelier, so that the mean is the number itself.

    bf16 is the upper half of fp32's bits: to add a random lower half and cut it off rounds up as often as it should.
    """
    bits = numbers.view(torch.int32)
    chance = torch.randint(1 << 16, bits.shape, generator=generator, dtype=torch.int32, device=bits.device)
    return chance.add_(bits).bitwise_and_(-1 << 16).view(torch.float32).bfloat16()
