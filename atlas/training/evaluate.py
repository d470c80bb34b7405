"""Compute the loss of a model on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atlas.data.sequences.build import SequenceSource
from atlas.data.sequences.dataset import IGNORE_INDEX
from atlas.model import AtlasLM
from atlas.training.devices.compile import filled_up
from atlas.training.devices.device import Runtime
from atlas.training.logs.run_log import perplexity


@dataclass(frozen=True)
class Evaluation:
    """The mean loss, in nats per token, over `tokens` tokens. These tokens encode about `num_bytes` bytes of UTF-8
    text."""

    loss: float
    tokens: int
    num_bytes: float

    @property
    def perplexity(self) -> float:
        """e to the power of the loss."""
        return perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits per byte of text. Unlike the loss and the perplexity, this value is comparable between
        tokenizers."""
        return self.loss * self.tokens / (math.log(2) * self.num_bytes)


def fixed_subset(num_sequences: int, size: int) -> list[int]:
    """Return the indices of at most `size` windows, spread evenly over a dataset of `num_sequences` windows. Every
    evaluation uses the same windows."""
    return [int(i) for i in np.unique(np.linspace(0, num_sequences - 1, min(size, num_sequences)).round())]


@torch.no_grad()
def evaluate(
    objective: nn.Module,
    dataset: SequenceSource,
    windows: Sequence[int],
    *,
    batch_size: int,
    runtime: Runtime,
    should_stop: Callable[[], bool] = lambda: False,
    track: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> Evaluation | None:
    """Return the mean loss of `objective`, a `SummedLoss`, without dropout. `windows` are the indices of the windows of
    `dataset` to evaluate. Return None if `should_stop` returns true before a batch.

    Only the loss of each batch stays in memory. The logits of a batch are freed before the next batch is read. `track`
    iterates over the batches and may draw a progress bar. On a GPU, the bar may be ahead of the computation. With R
    ranks, each rank evaluates every R-th window.
    """
    was_training = objective.training
    objective.eval()
    losses: list[Tensor] = []
    tokens, world, is_cuda = 0, runtime.world, runtime.device.type == "cuda"
    mine, longest = windows[world.rank :: world.size], -(-len(windows) // world.size)
    try:
        for start in track(range(0, longest, batch_size)):
            if should_stop():
                return None
            own = mine[start : start + batch_size]
            # A rank without remaining windows still runs the model, since other ranks may need the weights that this
            # rank holds.
            rows = [dataset[window] for window in own or windows[:1]]
            columns = [torch.stack(column) for column in zip(*rows, strict=True)]
            if runtime.compiles:
                columns = filled_up(columns, min(batch_size, longest))
            on_device = [column.to(runtime.device, non_blocking=is_cuda) for column in columns]
            with runtime.autocast():
                loss = objective(*on_device)
            if own:
                tokens += int((columns[1] != IGNORE_INDEX).sum())
                losses.append(loss)
    finally:
        objective.train(was_training)
    total = 0.0
    # One copy to the host, so that the host waits for the device only once.
    for loss_value in torch.stack(losses).tolist() if losses else ():
        total += loss_value
    nats, of_all = world.sums(total, tokens)
    return Evaluation(nats / max(1, of_all), int(of_all), of_all * dataset.bytes_per_token)


@torch.no_grad()
def token_losses(model: AtlasLM, dataset: SequenceSource, window: int, *, runtime: Runtime) -> Tensor:
    """Return the loss of each target of a window, in nats: a tensor of shape (T,) on the CPU. The loss is NaN for
    targets equal to `IGNORE_INDEX`."""
    inputs, targets, *documents = (column[None].to(runtime.device) for column in dataset[window])
    with runtime.autocast():
        logits = model(inputs, documents=documents[0] if documents else None)
    losses = F.cross_entropy(logits[0].float(), targets[0], ignore_index=IGNORE_INDEX, reduction="none")
    return losses.masked_fill(targets[0] == IGNORE_INDEX, math.nan).cpu()
