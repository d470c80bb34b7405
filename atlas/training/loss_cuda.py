"""The implementation of `atlas.training.loss.linear_cross_entropy` for CUDA.

The logits are the largest tensor of a language model, and most of their cost is memory traffic. Here a matrix product
writes each logit once. A kernel then reads the logits twice: first to sum the exponentials of each row, then to replace
each logit by its gradient. The next two matrix products read this gradient.

- The matrix product includes the padding rows of the table, the weight of the LM head. Without padding, a row of
  GPT-2's logits would have 50,257 numbers, and most rows would begin at an address that tensor cores cannot load from.
- One compiled kernel computes the softmax, the loss and the gradient of the logits. Without a compiler, several of
  PyTorch's own kernels do this work.
- The matrix product for the table's gradient also adds the gradients of the earlier chunks, in fp32.
- Each chunk reads the table and the table's gradient again. Chunks are therefore as large as `CUDA_LOSS_BYTES` allows.

benchmarks/roofline.py counts the bytes that these kernels read and write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from atlas.config.config import CUDA_LOSS_BYTES
from atlas.data.sequences.dataset import IGNORE_INDEX

Kernel = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""(logits (N, padded V), targets (N, 1), counts (N, 1), V) → the sum of the losses, a scalar. `counts` is 1 for a
target that counts, and 0 for an ignored target. The kernel replaces the logits by their gradient."""

LossAndGradients = tuple[Tensor, Tensor | None, Tensor | None]
"""The loss, a scalar, and its gradients with respect to the hidden states and to the table (the weight of the LM head).
A gradient that is not needed is None."""

_EAGER_BYTES = 8
"""The bytes per logit of the two fp32 copies that exist without a compiled kernel: before and after the log-softmax."""


def linear_cross_entropy_on_cuda(
    hidden: Tensor, table: Tensor, targets: Tensor, *, vocabulary: int, dtype: torch.dtype, compiled: bool
) -> Tensor:
    """Return the sum of the losses, a scalar in fp32. The shapes are `hidden` (N, C), `table` (padded V, C) and
    `targets` (N,). Matrix products are computed in `dtype`. The result supports only one backward pass."""
    compute = partial(_loss_and_gradients, targets=targets, vocabulary=vocabulary, compiled=compiled)
    return loss_with_gradients(compute, hidden.to(dtype), table)


def loss_with_gradients(
    compute: Callable[[Tensor, Tensor, Sequence[bool]], LossAndGradients], hidden: Tensor, table: Tensor
) -> Tensor:
    """Return the loss that `compute(hidden, table, needed)` returns. In the forward pass, `compute` already computes
    the `needed` gradients.

    A second backward pass raises `RuntimeError`.
    """
    if not torch.is_grad_enabled():
        hidden, table = hidden.detach(), table.detach()
    loss: Tensor = _LossWithGradients.apply(compute, hidden, table)  # type: ignore[no-untyped-call]
    return loss


class _LossWithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compute: Any, hidden: Tensor, table: Tensor) -> Tensor:
        loss, *ctx.grads = compute(hidden, table, ctx.needs_input_grad[1:])
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *factors: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("linear_cross_entropy keeps its gradients for one backward pass only")
        grads, ctx.grads = ctx.grads, None
        return None, *(grad if grad is None else grad.mul_(factors[0]) for grad in grads)


def _loss_and_gradients(
    hidden: Tensor, table: Tensor, needed: Sequence[bool], *, targets: Tensor, vocabulary: int, compiled: bool
) -> LossAndGradients:
    """Compute the loss and its gradients, one chunk of rows after the other."""
    rounded = table.to(hidden.dtype)
    kernel = _compiled_kernel() if compiled else softmax_gradient_eagerly_
    row_bytes = len(table) * (rounded.element_size() + (0 if compiled else _EAGER_BYTES))
    # Use as few chunks as `CUDA_LOSS_BYTES` allows, of nearly equal size.
    num_chunks = max(1, -(-len(hidden) * row_bytes // CUDA_LOSS_BYTES))
    chunk_size = -(-len(hidden) // num_chunks)
    buffer = rounded.new_empty(chunk_size, len(table))
    total = hidden.new_zeros((), dtype=torch.float32)
    needs_hidden, needs_table = needed
    hidden_grad = torch.empty_like(hidden) if needs_hidden else None
    table_grad = None
    for start in range(0, len(hidden), chunk_size):
        rows, goals = hidden[start : start + chunk_size], targets[start : start + chunk_size, None]
        logits = buffer[: len(rows)]
        torch.mm(rows, rounded.T, out=logits)
        total += kernel(logits, goals.clamp(min=0), (goals != IGNORE_INDEX).float(), vocabulary)
        if hidden_grad is not None:
            torch.mm(logits, rounded, out=hidden_grad[start : start + chunk_size])
        if needs_table:
            table_grad = _add_product(table_grad, logits.T, rows)
    return total, hidden_grad, None if table_grad is None else table_grad.to(table.dtype)


def softmax_gradient_(logits: Tensor, goals: Tensor, counts: Tensor, vocabulary: int) -> Tensor:
    """The `Kernel` for torch.compile. It reads the logits twice: first to sum the exponentials of the softmax, then to
    write the gradient."""
    # The compiler recognizes `log_softmax` and computes the maximum and the sum of each row in one pass.
    column = torch.arange(logits.shape[1], device=logits.device)
    log_probs = torch.where(column < vocabulary, logits.float(), -torch.inf).log_softmax(-1)
    loss = -(log_probs.gather(1, goals) * counts).sum()
    logits.copy_((log_probs.exp() - (column == goals).float()) * counts)
    return loss


def softmax_gradient_eagerly_(logits: Tensor, goals: Tensor, counts: Tensor, vocabulary: int) -> Tensor:
    """The same `Kernel` without compilation. It uses as few PyTorch kernels as possible, in place where possible."""
    logits[:, vocabulary:] = -torch.inf
    log_probs = logits.log_softmax(-1, dtype=torch.float32)
    loss = -(log_probs.gather(1, goals) * counts).sum()
    logits.copy_(log_probs.exp_().scatter_add_(1, goals, torch.full_like(counts, -1.0)).mul_(counts))
    return loss


@cache
def _compiled_kernel() -> Kernel:
    compiled = torch.compile(softmax_gradient_)

    def kernel(logits: Tensor, goals: Tensor, counts: Tensor, vocabulary: int) -> Tensor:
        # Compile one kernel for any number of rows: chunks of an evaluation and of an update differ in size.
        for tensor in (logits, goals, counts):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(logits, goals, counts, vocabulary)

    return kernel


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Return `total + left @ right` in fp32, and overwrite `total` with the result. A `total` of None counts as 0."""
    if left.dtype == torch.float32:
        return left @ right if total is None else total.addmm_(left, right)
    if not left.is_cuda or torch.version.hip:  # only CUDA has 16-bit matrix products with an fp32 result
        product = (left @ right).float()
        return product if total is None else total.add_(product)
    if total is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
