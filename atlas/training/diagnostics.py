"""Check whether the model can overfit one batch, and profile an update."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from atlas.config import AtlasConfig
from atlas.config.loader import Layer, resolve
from atlas.data import ResolvedData, training_sequences
from atlas.data.sequences.loader import batches
from atlas.data.sequences.mixture import order_of
from atlas.files import explain_failed_write, local_path, replacing
from atlas.training.devices.compile import choose_compile
from atlas.training.devices.device import setup_runtime
from atlas.training.devices.signals import StopRequest
from atlas.training.micro_batch import gradient_within_memory
from atlas.training.run import Learner
from atlas.training.run_config import with_data
from atlas.training.state import TrainState
from atlas.training.step import Batch, Update, apply_gradient, fresh_learner

OVERFIT_UPDATES = 300
LEARNED = 0.05
"""If the mean loss of a batch is below this value (nats per token), the model has memorized the batch."""
WARM_UP = 3


@dataclass(frozen=True)
class Profile:
    """The result of `profile_update`.

    `seconds` is the time of an update without the profiler. `tokens` is the number of tokens of an update. `operations`
    lists the operations of the profiled update, the slowest first. Each entry is (name, number of calls, seconds on the
    training device without nested operations). `trace` is the path of the Chrome trace.
    """

    seconds: float
    tokens: int
    operations: list[tuple[str, int, float]]
    trace: Path


def overfit_one_batch(explicit: Layer, *, say: Callable[[str], None], updates: int = OVERFIT_UPDATES) -> bool:
    """Perform at most `updates` updates on one batch, the run's first sequences. Return whether the model memorized the
    batch.

    The learning rate is constant, and dropout and weight decay are off. Use this check first if the loss of a run does
    not decrease. If the check fails, the fault is in the settings, the loss function or the code. If the check
    succeeds, look for the fault in the data or the schedule.
    """
    config, data = with_data(resolve(explicit), explicit, None)
    config = config.replace("model", dropout=0.0).replace("training", weight_decay=0.0)
    config = config.replace("guard", spikes="off")
    learner = fresh_learner(config, setup_runtime(config))
    batch = next(_batches(data, config, num_updates=1, most=config.training.batch_size))
    size, rate = len(batch[0]), config.training.learning_rate
    state = TrainState(updates, min(config.training.sequences_at_once, size))
    say(
        f"one batch of {size} × {config.model.max_seq_len} tokens, up to {updates} updates at learning rate {rate:g}"
    )
    best = math.inf
    for number in range(1, updates + 1):
        loss = _update(learner, batch, state, say).loss
        best = min(best, loss)
        if number % 20 == 0 or loss < LEARNED:
            say(f"update {number}: loss {loss:.4f}")
        if loss < LEARNED:
            say(
                "the loss goes to zero: the model, the loss and the optimizer work. Check the data, the schedule and "
                "the length of the run"
            )
            return True
    say(
        f"the loss does not go to zero (lowest loss {best:.3f} in {updates} updates): try another --learning-rate, and "
        "check a custom loss. A model that cannot learn one batch cannot learn a larger text"
    )
    return False


def profile_update(explicit: Layer, *, say: Callable[[str], None]) -> Profile:
    """Run a few updates with the settings in `explicit`. Return a profile of the last update, and write the Chrome
    trace of this update to `profile.json` in the output folder.

    To view the trace, open `profile.json` in chrome://tracing or ui.perfetto.dev. The function writes no other file.
    Raises `AtlasError` in the same cases as training, and if the folder is not writable.
    """
    config, data = with_data(resolve(explicit), explicit, None)
    trace = local_path("checkpoint.output_dir", config.checkpoint.output_dir) / "profile.json"
    with explain_failed_write(trace, "choose another --output-dir"):
        trace.parent.mkdir(parents=True, exist_ok=True)
        with replacing(trace) as temporary:
            temporary.touch()
    runtime = setup_runtime(config)
    runtime = replace(runtime, compiles=choose_compile(config, runtime.device, say=say))
    on_gpu = runtime.device.type == "cuda"
    most = config.training.sequences_per_update
    stream = _batches(data, config, num_updates=WARM_UP + 2, most=most, pin_memory=on_gpu)
    learner = fresh_learner(config, runtime)
    state = TrainState(WARM_UP + 2, config.training.sequences_at_once)
    for _ in range(WARM_UP):
        _update(learner, next(stream), state, say)
    start = time.perf_counter()
    batch = next(stream)
    _update(learner, batch, state, say)  # waits for the device, since the update reads the loss
    seconds = time.perf_counter() - start

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities, record_shapes=True) as recorded:
        _update(learner, next(stream), state, say)
    with replacing(trace) as temporary:
        recorded.export_chrome_trace(str(temporary))
    rows = [
        (row.key, row.count, (row.self_device_time_total if on_gpu else row.self_cpu_time_total) / 1e6)
        for row in recorded.key_averages()
    ]
    rows.sort(key=lambda row: -row[2])
    return Profile(seconds, batch[0].numel(), rows, trace)


def _batches(
    data: ResolvedData, config: AtlasConfig, *, num_updates: int, most: int, pin_memory: bool = False
) -> Iterator[tuple[Tensor, ...]]:
    """Yield the batches of the run's first `num_updates` updates, with `most` sequences each. If `num_updates` is 1 and
    the dataset has fewer sequences, the batch has all of them."""
    dataset = training_sequences(data, config)
    return batches(
        dataset,
        order_of(dataset, config.seed),
        start=0,
        num_updates=num_updates,
        sequences_per_update=min(most, len(dataset)) if num_updates == 1 else most,
        pin_memory=pin_memory,
    )


def _update(learner: Learner, batch: Batch, state: TrainState, say: Callable[[str], None]) -> Update:
    stop = StopRequest(say)  # not used as a context manager, so Ctrl-C ends the command immediately
    gradient = gradient_within_memory(learner, batch, state, stop=stop, say=say)
    assert gradient is not None
    update = apply_gradient(learner, gradient, state, rate=learner.config.training.learning_rate)
    state.step += 1
    return update
