"""The language-model loss, and custom losses.

Training minimizes the mean loss of all valid tokens in an update: the sum over all micro-batches, divided by the number
of valid tokens. If Atlas averaged the means of micro-batches instead, the weight of a token would depend on the padding
in the token's micro-batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atlas.config.config import LOSS_CACHED_ROWS, LOSS_CHUNK_TOKENS
from atlas.config.user_code import names_code
from atlas.data.sequences.dataset import IGNORE_INDEX
from atlas.errors import AtlasError
from atlas.model import AtlasLM
from atlas.tokenizer.custom import import_object
from atlas.training.loss_cuda import LossAndGradients, linear_cross_entropy_on_cuda, loss_with_gradients

LossFunction = Callable[..., Tensor]
"""`(logits (B, T, V), targets (B, T), mask=None) → loss`, a scalar: the mean over the tokens whose `mask` (B, T) is not
zero."""
_PRODUCT_ROWS = 2048
"""In half precision, this number of rows of the LM head's gradient is computed at a time."""


def compute_lm_loss(
    logits: Tensor, targets: Tensor, mask: Tensor | None = None, *, reduction: str = "mean"
) -> Tensor:
    """Return the cross entropy, in nats, of `logits` (B, T, V) against `targets` (B, T).

    The function does not shift the targets: `targets[b, t]` is the token that `logits[b, t]` predicts. Targets equal to
    `IGNORE_INDEX`, and targets whose `mask` (B, T) is zero, do not count. `reduction` is `sum`, or `mean` over the
    tokens that count. If no token counts, the mean is 0 and not NaN.
    """
    if mask is not None:
        targets = targets.masked_fill(mask == 0, IGNORE_INDEX)
    rows = logits.reshape(-1, logits.shape[-1]).float()
    total = F.cross_entropy(rows, targets.reshape(-1), ignore_index=IGNORE_INDEX, reduction="sum")
    if reduction == "sum":
        return total
    if reduction != "mean":
        raise ValueError(f"reduction must be mean or sum, not {reduction!r}")
    return total / (targets != IGNORE_INDEX).sum().clamp(min=1)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, vocabulary: int | None = None, compiled: bool = False
) -> Tensor:
    """Return `compute_lm_loss(F.linear(hidden, weight), targets, reduction="sum")` without all logits in memory.

    The shapes are `hidden` (B, T, C), `weight` (V, C) and `targets` (B, T). If `weight` has padding rows, the function
    uses only the first `vocabulary` rows. If the caller sliced `weight` instead, autograd would copy the gradient once
    more. The (B × T, V) logits of a language model are its largest tensor. Here only `LOSS_CHUNK_TOKENS` rows of logits
    exist at a time. The forward pass already computes the gradient of each chunk (as in Liger Kernel, Hsu et al. 2024,
    arXiv:2410.10989). The result supports only one backward pass. On CUDA, `loss_cuda` implements this function;
    `compiled` selects the compiled kernel there.
    """
    device, num_tokens = hidden.device.type, vocabulary or len(weight)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    if device == "cuda":
        with torch.autocast(device, enabled=False):
            return linear_cross_entropy_on_cuda(
                hidden, weight, targets, vocabulary=num_tokens, dtype=dtype, compiled=compiled
            )
    with torch.autocast(device, enabled=False):
        compute = functools.partial(_loss_and_gradients, targets=targets, vocabulary=num_tokens)
        return loss_with_gradients(compute, hidden.to(dtype), weight)


def _loss_and_gradients(
    hidden: Tensor, table: Tensor, needed: Sequence[bool], *, targets: Tensor, vocabulary: int
) -> LossAndGradients:
    """Return the sum of the losses, and its gradients with respect to `hidden` and `table`. `needed` has a boolean for
    each gradient: whether to compute it. The shapes are `hidden` (N, C), `table` (V or more, C) and `targets` (N,).
    Matrix products are computed in the dtype of `hidden`."""
    rounded = table[:vocabulary].to(hidden.dtype)
    total = hidden.new_zeros((), dtype=torch.float32)
    needs_hidden, needs_table = needed
    hidden_grad = torch.empty_like(hidden) if needs_hidden else None
    table_grad = torch.zeros_like(table, dtype=torch.float32) if needs_table else None
    # Allocate the logits once. An allocation for each chunk would take a quarter of the time of the chunk's matrix
    # product.
    buffer = hidden.new_empty(min(LOSS_CHUNK_TOKENS, len(hidden)), vocabulary)
    for start in range(0, len(hidden), LOSS_CHUNK_TOKENS):
        chunk = slice(start, start + LOSS_CHUNK_TOKENS)
        rows, goals = hidden[chunk], targets[chunk]
        counts = (goals != IGNORE_INDEX).to(torch.float32)[:, None]
        logits = buffer[: len(rows)]
        torch.mm(rows, rounded.T, out=logits)
        losses = _softmax_gradient_(logits, goals.masked_fill(goals == IGNORE_INDEX, 0)[:, None])
        total += (losses * counts).sum()
        # The gradient must be zero for ignored rows. The code below sets those rows of smaller (N, C) matrices to zero
        # instead: the effect is the same, and the cost is lower.
        counts = counts.to(hidden.dtype)
        if hidden_grad is not None:
            torch.mul(logits @ rounded, counts, out=hidden_grad[chunk])
        if table_grad is not None:
            _add_product_(table_grad[:vocabulary], logits, rows * counts)
    return total, hidden_grad, None if table_grad is None else table_grad.to(table.dtype)


def _softmax_gradient_(logits: Tensor, goals: Tensor) -> Tensor:
    """Return the losses (N, 1), in fp32, of `logits` (N, V) against the token ids `goals` (N, 1). Replace the logits by
    their gradient: the probabilities, minus 1 at the goal."""
    losses = []
    fp32_rows = logits.new_empty(LOSS_CACHED_ROWS, logits.shape[1], dtype=torch.float32)
    parts = (torch.split(tensor, LOSS_CACHED_ROWS) for tensor in (logits, goals))
    for some, some_goals in zip(*parts, strict=True):
        rows = some if logits.dtype == torch.float32 else fp32_rows[: len(some)].copy_(some)
        # A loss is the largest logit, minus the goal's logit, minus the logarithm of the largest probability. The
        # goal's own probability can be too small for fp32.
        loss = rows.amax(dim=-1, keepdim=True) - rows.gather(1, some_goals)
        torch.softmax(rows, dim=-1, out=rows)
        losses.append(loss.sub_(rows.amax(dim=-1, keepdim=True).log_()))
        rows.scatter_add_(1, some_goals, torch.full_like(loss, -1.0))
        if rows is not some:
            some.copy_(rows)
    return torch.cat(losses)


def _add_product_(total: Tensor, grad: Tensor, rows: Tensor) -> None:
    """Add `grad.T @ rows` to `total`, which is fp32. The shapes are `total` (V, C), `grad` (N, V) and `rows` (N, C)."""
    if grad.dtype == torch.float32:
        total.addmm_(grad.T, rows)
        return
    # A product in half precision that is as large as `total` would leave the processor's cache before it is added.
    for start in range(0, len(total), _PRODUCT_ROWS):
        part = slice(start, start + _PRODUCT_ROWS)
        total[part] += grad[:, part].T @ rows


class SummedLoss(nn.Module):
    """A module that computes the model's loss, summed over valid tokens. DDP or FSDP can wrap this module.

    A `custom_loss` is used in training only. Evaluation always computes the cross entropy in nats. With `compiled`, the
    CUDA implementation of the loss is compiled, like the blocks.
    """

    def __init__(
        self, model: AtlasLM, custom_loss: LossFunction | None = None, *, compiled: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.custom_loss = custom_loss
        self.compiled = compiled

    def forward(
        self, inputs: Tensor, targets: Tensor, documents: Tensor | None = None, *, num_valid: int = 0
    ) -> Tensor:
        """Return the summed loss, a scalar. Token ids, targets and document numbers have shape (B, T). Only a custom
        loss needs `num_valid`, the number of valid targets."""
        if self.custom_loss is None or not self.training:
            of_embedding, of_head = self.model.tables()
            hidden = self.model.hidden_states(inputs, documents=documents, table=of_embedding)
            vocabulary = self.model.config.vocabulary
            return linear_cross_entropy(
                hidden, of_head, targets, vocabulary=vocabulary, compiled=self.compiled
            )
        logits = self.model(inputs, documents=documents)
        if num_valid == 0:  # a mean over no tokens is undefined
            return logits.sum() * 0.0  # type: ignore[no-any-return]
        return self.custom_loss(logits, targets, mask=targets != IGNORE_INDEX) * num_valid


def load_loss(dotted: str) -> LossFunction:
    """Import and return the function that `training.loss` names as `package.module:function`. Python also searches the
    current directory."""
    if not names_code(dotted):
        raise AtlasError(f"training.loss: {dotted}: write it as package.module:function")
    try:
        function = import_object(dotted)
    except AtlasError as error:
        raise AtlasError(f"training.loss: {error}") from None
    if not callable(function):
        raise AtlasError(f"training.loss: {dotted} is not a function")
    return function  # type: ignore[no-any-return]
