"""The loss of `atlas.training.loss.linear_cross_entropy`, as CUDA computes it fastest.

The logits are the largest tensor of a language model, and most of their cost is memory traffic. Here the product writes
each logit once. Then it is read for the sum of its row's exponentials, and read and written once more as its own
gradient, which the next two products read.

- The table is multiplied with its padding rows. Without them a row of logits has 50,257 numbers, and all rows but the
  first begin at an address that tensor cores cannot load from.
- One compiled kernel computes the softmax, the loss and the gradient. Without a compiler, PyTorch's own kernels do.
- The product itself sums the table's gradient in fp32.
- Each chunk reads the table and its gradient again, so chunks are large.

benchmarks/roofline.py counts the bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from atlas.config.config import CUDA_LOSS_BYTES
from atlas.data.sequences.dataset import IGNORE_INDEX

Kernel = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""(logits (N, padded V), targets (N, 1), whether they count (N, 1), V) → the sum of the losses, a scalar. The logits
become their gradient."""

LossAndGradients = tuple[Tensor, Tensor | None, Tensor | None]
"""The loss, a scalar, and its gradients by the hidden states and by the head's table, if they are needed."""

_EAGER_BYTES = 8
"""The bytes of a logit in fp32, before and after the log-softmax, if no kernel is compiled."""


def linear_cross_entropy_on_cuda(
    hidden: Tensor, table: Tensor, targets: Tensor, *, vocabulary: int, dtype: torch.dtype, compiled: bool
) -> Tensor:
    """`hidden` (N, C), `table` (padded V, C), `targets` (N,) → the sum of the losses, a scalar in fp32. Products are
    computed in `dtype`. Differentiable once."""
    compute = functools.partial(
        _loss_and_gradients, targets=targets, vocabulary=vocabulary, compiled=compiled
    )
    return loss_with_gradients(compute, hidden.to(dtype), table)


def loss_with_gradients(
    compute: Callable[[Tensor, Tensor, Sequence[bool]], LossAndGradients], hidden: Tensor, table: Tensor
) -> Tensor:
    """The loss of `compute(hidden, table, needed)`, which computes the gradients that are `needed` in the forward pass.

    Differentiable once: raises `RuntimeError` in a second backward pass.
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
    """One chunk of rows at a time."""
    rounded = table.to(hidden.dtype)
    kernel = _compiled_kernel() if compiled else softmax_gradient_eagerly_
    row_bytes = len(table) * (rounded.element_size() + (0 if compiled else _EAGER_BYTES))
    chunk_size = _chunk_size(len(hidden), row_bytes)
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


def _chunk_size(num_rows: int, row_bytes: int) -> int:
    """The rows of a chunk: as many as `CUDA_LOSS_BYTES` allow, with all chunks of nearly the same size."""
    chunks = max(1, -(-num_rows * row_bytes // CUDA_LOSS_BYTES))
    return -(-num_rows // chunks)


def softmax_gradient_(logits: Tensor, goals: Tensor, counts: Tensor, vocabulary: int) -> Tensor:
    """A `Kernel` to compile: one pass over the logits for the reduction, one to replace them."""
    # The compiler recognises `log_softmax` and computes maximum and sum in one pass.
    column = torch.arange(logits.shape[1], device=logits.device)
    log_probs = torch.where(column < vocabulary, logits.float(), -torch.inf).log_softmax(-1)
    loss = -(log_probs.gather(1, goals) * counts).sum()
    logits.copy_((log_probs.exp() - (column == goals).float()) * counts)
    return loss


def softmax_gradient_eagerly_(logits: Tensor, goals: Tensor, counts: Tensor, vocabulary: int) -> Tensor:
    """The same `Kernel` with as few of PyTorch's own kernels as possible, in place if possible."""
    logits[:, vocabulary:] = -torch.inf
    log_probs = logits.log_softmax(-1, dtype=torch.float32)
    loss = -(log_probs.gather(1, goals) * counts).sum()
    logits.copy_(log_probs.exp_().scatter_add_(1, goals, torch.full_like(counts, -1.0)).mul_(counts))
    return loss


@functools.cache
def _compiled_kernel() -> Kernel:
    compiled = torch.compile(softmax_gradient_)

    def kernel(logits: Tensor, goals: Tensor, counts: Tensor, vocabulary: int) -> Tensor:
        # One kernel for any number of rows: an evaluation's chunks and an update's differ.
        for tensor in (logits, goals, counts):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(logits, goals, counts, vocabulary)

    return kernel


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """`total` + `left` @ `right` in fp32, in `total`'s memory."""
    if left.dtype == torch.float32:
        return left @ right if total is None else total.addmm_(left, right)
    if not left.is_cuda or torch.version.hip:  # only CUDA has products of bf16 with sums in fp32
        product = (left @ right).float()
        return product if total is None else total.add_(product)
    if total is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
