"""The language-model loss, and the door for a custom one.

Contract: what is minimised is the sum over valid tokens divided by the number of valid tokens of the
whole accumulated update. A mean of micro-batch means would weigh a token by the padding around it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from atlas.data.dataset import IGNORE_INDEX
from atlas.errors import AtlasError
from atlas.tokenizer.custom import import_object
from atlas.tokenizer.tokenizer import DOTTED_NAME

LossFunction = Callable[..., Tensor]
"""`(logits (B, T, V), targets (B, T), mask=None) → mean loss over the tokens given`, a scalar."""


def compute_lm_loss(
    logits: Tensor, targets: Tensor, mask: Tensor | None = None, *, reduction: str = "mean"
) -> Tensor:
    """Cross entropy in nats of `logits` (B, T, V) against `targets` (B, T).

    Nothing is shifted: `targets[b, t]` is the token that `logits[b, t]` predicts. Targets equal to
    `IGNORE_INDEX`, and those where `mask` (B, T) is zero, do not count. `reduction` is `mean` over the
    tokens that count (0 when there are none, never NaN) or `sum`.
    """
    if mask is not None:
        targets = targets.masked_fill(mask == 0, IGNORE_INDEX)
    total = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(),
        targets.reshape(-1),
        ignore_index=IGNORE_INDEX,
        reduction="sum",
    )
    if reduction == "sum":
        return total
    if reduction != "mean":
        raise ValueError(f"reduction must be mean or sum, not {reduction!r}")
    return total / (targets != IGNORE_INDEX).sum().clamp(min=1)


def load_loss(dotted: str) -> LossFunction:
    """The function that `training.loss: package.module:function` names; found in the working folder, too."""
    if not DOTTED_NAME.fullmatch(dotted):
        raise AtlasError(f"training.loss: {dotted}: write it as package.module:function")
    try:
        function = import_object(dotted)
    except AtlasError as error:
        raise AtlasError(f"training.loss: {error}") from None
    if not callable(function):
        raise AtlasError(f"training.loss: {dotted} is not a function")
    return function  # type: ignore[no-any-return]
