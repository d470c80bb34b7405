"""The first check when "the loss is not decreasing": can the model learn one batch by heart?

If it cannot, the fault is in the settings, the loss or the code; if it can, look at the data or the schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from atlas.config.loader import Layer, resolve
from atlas.data import training_sequences
from atlas.data.sequences.loader import batches
from atlas.data.sequences.mixture import order_of
from atlas.training.devices.device import setup_runtime
from atlas.training.devices.signals import StopRequest
from atlas.training.run import with_data
from atlas.training.state import TrainState
from atlas.training.step import fresh_updater

UPDATES = 300
LEARNED = 0.05
"""A mean loss below this many nats counts as learned by heart."""


def overfit_one_batch(explicit: Layer, *, say: Callable[[str], None], updates: int = UPDATES) -> bool:
    """Train on the run's first sequences at a constant rate, dropout off; whether their loss went to zero."""
    config, data = with_data(resolve(explicit), explicit, None)
    config = config.model_copy(
        update={
            "model": config.model.model_copy(update={"dropout": 0.0}),
            "training": config.training.model_copy(update={"weight_decay": 0.0}),
            "guard": config.guard.model_copy(update={"spikes": "off"}),
        }
    )
    runtime = setup_runtime(config)
    dataset = training_sequences(data, config)
    order = order_of(dataset, config.seed)
    size = min(config.training.batch_size, len(dataset))
    batch = next(batches(dataset, order, start=0, num_updates=1, sequences_per_update=size))
    inputs, targets, *documents = batch
    rate = config.training.learning_rate
    updater = fresh_updater(config, runtime, say=say)
    asked = config.training.micro_batch_size
    micro_batch = size if asked == "auto" else min(asked, size)
    state = TrainState(horizon=updates, micro_batch_size=micro_batch, eval_batch_size=micro_batch)
    say(
        f"one batch of {size} × {config.model.max_seq_len} tokens, up to {updates} updates at a rate of {rate:g}"
    )
    best, stop = math.inf, StopRequest(say)  # not entered: Ctrl-C ends it at once
    for step in range(updates):
        state.step = step
        loss = updater.gradient(
            inputs, targets, state, stop=stop, documents=documents[0] if documents else None
        )
        assert loss is not None
        value = updater.apply(loss, state, rate=rate).loss
        best = min(best, value)
        if (step + 1) % 20 == 0 or value < LEARNED:
            say(f"update {step + 1}: loss {value:.4f}")
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
