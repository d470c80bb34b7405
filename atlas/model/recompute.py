"""Recompute cheap outputs in the backward pass, instead of keeping them (Chen et al. 2016, arXiv:1604.06174)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def checkpointed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return `function(x)`, but keep only `x` for the backward pass.

    Use this function for a cheap operation before a matrix product: recomputation stops at the product's input and does
    not repeat the product. `function` must be deterministic, so it must not contain dropout.

    Under torch.compile, only `function` is called, and the compiler decides which tensors to keep (`training.compile`).
    A checkpoint inside compiled code would make the compiler repeat the matrix product too.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(x)
    result: Any = checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)
    return result  # type: ignore[no-any-return]


def recomputable(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return `function(x)`, marked so that `linear` keeps `x` instead of the result. `function` must be cheap and
    deterministic."""
    result = function(x)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        result.recompute_from = (function, x)  # type: ignore[attr-defined]
    return result


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `F.linear(x, weight, bias)`, (…, in) → (…, out). If `x` came from `recomputable`, keep the tensor from
    which `x` was computed, instead of `x`."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not hasattr(x, "recompute_from"):
        return F.linear(x, weight, bias)
    result: Tensor = _LinearOfRecomputed.apply(x, weight, bias, *x.recompute_from)  # type: ignore[no-untyped-call]
    return result


class Linear(nn.Linear):
    """An `nn.Linear` that calls this module's `linear`, for layers whose input is the output of a norm."""

    def forward(self, input: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        return linear(input, self.weight, self.bias)


class _LinearOfRecomputed(torch.autograd.Function):
    """PyTorch's linear layer and its gradients. The backward pass recomputes x as `function(source)`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, function: Callable[..., Any], source: Tensor
    ) -> Tensor:
        device = x.device.type
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        ctx.autocast = {"device_type": device, "enabled": enabled, "dtype": dtype}
        ctx.function = function
        ctx.save_for_backward(source, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        source, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        rows = gradient.flatten(0, -2)
        by_x = by_weight = None
        if needs_x:
            by_x = (rows @ weight.to(rows.dtype)).view(*gradient.shape[:-1], -1)
        if needs_weight:
            with torch.autocast(**ctx.autocast):
                x = ctx.function(source)
            by_weight = rows.t() @ x.flatten(0, -2).to(rows.dtype)
        return by_x, by_weight, rows.sum(0) if needs_bias else None, None, None
