"""Loss of a model on held-out text, with everything but the sums thrown away."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from atlas.data.dataset import IGNORE_INDEX
from atlas.data.sequences import Sequences
from atlas.errors import AtlasError
from atlas.model import AtlasLM
from atlas.training.compilation import refuse_failed_compilation
from atlas.training.interrupt import Stopped, StopRequest
from atlas.training.loss import linear_cross_entropy
from atlas.training.memory import is_out_of_memory, release_memory
from atlas.training.metrics import perplexity
from atlas.training.runtime import Runtime
from atlas.training.state import TrainState


@dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats per token over `tokens` tokens that stand for `num_bytes` bytes of UTF-8."""

    loss: float
    tokens: int
    num_bytes: float

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, which loss and perplexity are not."""
        return self.loss * self.tokens / (math.log(2) * self.num_bytes)


def fixed_subset(num_sequences: int, size: int) -> list[int]:
    """`size` window numbers spread evenly over a dataset: the same ones at every evaluation."""
    return [int(i) for i in np.unique(np.linspace(0, num_sequences - 1, min(size, num_sequences)).round())]


@torch.no_grad()
def evaluate(
    model: AtlasLM,
    dataset: Sequences,
    windows: Sequence[int],
    *,
    batch_size: int,
    runtime: Runtime,
    should_stop: Callable[[], bool] = lambda: False,
    track: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> Evaluation | None:
    """The loss on `windows` of `dataset`, dropout off; None if `should_stop` said so between batches.

    Only sums are kept: the logits of a batch are gone before the next is read. `track` may draw a
    progress bar around the batches.
    """
    was_training = model.training
    model.eval()
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    try:
        for start in track(range(0, len(windows), batch_size)):
            if should_stop():
                return None
            rows = [dataset[window] for window in windows[start : start + batch_size]]
            columns = [torch.stack(column) for column in zip(*rows, strict=True)]
            tokens += int((columns[1] != IGNORE_INDEX).sum())
            inputs, targets, *documents = (column.to(runtime.device) for column in columns)
            with runtime.autocast():
                hidden = model.hidden_states(inputs, documents=documents[0] if documents else None)
                loss = linear_cross_entropy(hidden, model.head_weight, targets)
            total += loss.cpu().double()
    finally:
        model.train(was_training)
    return Evaluation(float(total) / max(1, tokens), tokens, tokens * dataset.bytes_per_token)


@torch.no_grad()
def token_losses(model: AtlasLM, dataset: Sequences, window: int, *, runtime: Runtime) -> Tensor:
    """(T,) nats of each target of a window, on the CPU; NaN where there is none."""
    inputs, targets, *documents = (column[None].to(runtime.device) for column in dataset[window])
    with runtime.autocast():
        logits = model(inputs, documents=documents[0] if documents else None)
    losses = F.cross_entropy(logits[0].float(), targets[0], ignore_index=IGNORE_INDEX, reduction="none")
    return losses.masked_fill(targets[0] == IGNORE_INDEX, math.nan).cpu()


def evaluate_within_memory(
    model: AtlasLM,
    dataset: Sequences,
    windows: Sequence[int],
    *,
    state: TrainState,
    runtime: Runtime,
    stop: StopRequest,
    say: Callable[[str], None],
) -> Evaluation | None:
    """`evaluate` by `state.eval_batch_size`, which is halved where memory runs out; None on a stop."""
    asked = min(state.eval_batch_size, len(windows))
    while True:
        try:
            with stop.at_once(enabled=runtime.compiles):
                evaluation = evaluate(
                    model,
                    dataset,
                    windows,
                    batch_size=state.eval_batch_size,
                    runtime=runtime,
                    should_stop=lambda: stop.requested,
                )
            break
        except Stopped:
            return None
        except (RuntimeError, MemoryError) as error:
            refuse_failed_compilation(error)
            if not is_out_of_memory(error):
                raise
        # Here and not above: the exception holds on to the tensors of what failed.
        release_memory(runtime.device)
        running = min(state.eval_batch_size, len(windows))
        if running == 1:
            raise AtlasError(
                f"step {state.step}: out of memory while evaluating one sequence: a shorter model.max_seq_len or a "
                "smaller model helps"
            )
        state.eval_batch_size = running // 2
    if state.eval_batch_size < asked:
        say(
            f"step {state.step}: out of memory while evaluating {asked} sequences at once: {state.eval_batch_size} "
            "from now on (training.eval_batch_size)"
        )
    return evaluation
