"""The first check when "the loss is not decreasing": can the model learn one batch by heart?

If it cannot, the fault is in the settings, the loss or the code; if it can, look at the data or the schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from atlas.config.loader import Layer, resolve
from atlas.data import training_sequences
from atlas.data.loader import batches
from atlas.data.mixture import order_of
from atlas.model import build_model
from atlas.training.loss import compute_lm_loss, load_loss
from atlas.training.optimizer import build_optimizer
from atlas.training.runtime import setup_runtime
from atlas.training.start import with_data

UPDATES = 300
LEARNED = 0.05
"""A mean loss below this many nats counts as learned by heart."""


def overfit_one_batch(explicit: Layer, *, say: Callable[[str], None], updates: int = UPDATES) -> bool:
    """Train on the run's first micro-batch at a constant rate, dropout off; whether its loss went to zero."""
    config, data = with_data(resolve(explicit), explicit, None)
    runtime = setup_runtime(config)
    dataset = training_sequences(data, config)
    order = order_of(dataset, config.seed)
    size = min(config.training.batch_size, len(dataset))
    batch = next(batches(dataset, order, start=0, num_updates=1, sequences_per_update=size))
    inputs, targets, *documents = (column.to(runtime.device) for column in batch)
    model = (
        build_model(config.model.model_copy(update={"dropout": 0.0}), seed=config.seed)
        .to(runtime.device)
        .train()
    )
    optimizer = build_optimizer(model, config.training.model_copy(update={"weight_decay": 0.0}))
    scaler = runtime.grad_scaler()
    loss_function = load_loss(config.training.loss) if config.training.loss else compute_lm_loss
    say(
        f"one batch of {size} × {config.model.max_seq_len} tokens, up to {updates} updates at a rate of "
        f"{config.training.learning_rate:g}"
    )
    best = math.inf
    for update in range(1, updates + 1):
        with runtime.autocast():
            logits = model(inputs, documents=documents[0] if documents else None)
            loss = loss_function(logits, targets)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.training.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        value = float(loss.detach())
        best = min(best, value)
        if update % 20 == 0 or value < LEARNED:
            say(f"update {update}: loss {value:.4f}")
        if value < LEARNED:
            say(
                "the loss goes to zero: model, loss and optimizer work; look at the data, the schedule "
                "or the length of the run"
            )
            return True
    say(
        f"the loss does not go to zero ({best:.3f} after {updates} updates): try another --learning-rate and check a "
        "custom loss; a model that cannot learn one batch learns nothing"
    )
    return False
