"""What is cheap to make again is not kept for the gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def checkpointed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function(x)`, of which only `x` is kept for the gradients (Chen et al. 2016, arXiv:1604.06174).

    For a cheap operation before a matrix product: recomputing ends where the product would keep its input, before it is
    multiplied again. `function` must be the same each time: no dropout.

    Compiled it is `function` alone: what is kept, the compiler decides (`training.compilation`). Told to recompute, it
    would take the matrix product a second time as well.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(x)
    result: Any = checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)
    return result  # type: ignore[no-any-return]
