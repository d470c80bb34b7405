"""Where the time of one update goes: `atlas train --profile`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from atlas.config import AtlasConfig
from atlas.config.loader import Layer, resolve
from atlas.data import training_sequences
from atlas.data.sequences.loader import batches
from atlas.data.sequences.mixture import order_of
from atlas.errors import AtlasError
from atlas.training.devices.compile import choose_compile
from atlas.training.devices.device import Runtime, setup_runtime
from atlas.training.devices.signals import StopRequest
from atlas.training.run import with_data
from atlas.training.state import TrainState
from atlas.training.step import fresh_updater

WARM_UP = 3


@dataclass(frozen=True)
class Profile:
    """`seconds` of an update while nothing was recorded; `operations` of the one recorded: (name, calls, seconds of
    its own), the longest first, on the device that computes."""

    seconds: float
    tokens: int
    operations: list[tuple[str, int, float]]
    trace: Path


def profile_update(explicit: Layer, *, say: Callable[[str], None]) -> Profile:
    """Take some updates of the run that `explicit` describes, the last one recorded, and write what was recorded as a
    Chrome trace (chrome://tracing, ui.perfetto.dev) to `profile.json` in the output folder. Saves nothing else.

    Raises `AtlasError` as training does, and where the folder cannot be written.
    """
    config, data = with_data(resolve(explicit), explicit, None)
    trace = Path(config.checkpoint.output_dir) / "profile.json"
    _refuse_unwritable(trace)
    runtime = setup_runtime(config)
    compiles = choose_compile(config, runtime.device, say=say)
    dataset = training_sequences(data, config)
    stream = batches(
        dataset,
        order_of(dataset, config.seed),
        start=0,
        num_updates=WARM_UP + 2,
        sequences_per_update=config.training.sequences_per_update,
        pin_memory=runtime.device.type == "cuda",
    )
    update = _updater(config, replace(runtime, compiles=compiles), say)
    for _ in range(WARM_UP):
        update(*next(stream))
    start = time.perf_counter()
    batch = next(stream)
    update(*batch)
    seconds = time.perf_counter() - start

    on_gpu = runtime.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities, record_shapes=True) as recorded:
        update(*next(stream))
    recorded.export_chrome_trace(str(trace))
    rows = [
        (row.key, row.count, (row.self_device_time_total if on_gpu else row.self_cpu_time_total) / 1e6)
        for row in recorded.key_averages()
    ]
    rows.sort(key=lambda row: -row[2])
    return Profile(seconds, batch[0].numel(), rows, trace)


def _updater(config: AtlasConfig, runtime: Runtime, say: Callable[[str], None]) -> Callable[..., None]:
    """Batch → one whole update, as in a run: the device is waited for, since the numbers are read."""
    updater = fresh_updater(config, runtime, say=say)
    size = config.training.sequences_at_once
    state = TrainState(horizon=WARM_UP + 2, micro_batch_size=size, eval_batch_size=size)
    stop = StopRequest()

    def update(inputs: torch.Tensor, targets: torch.Tensor, documents: torch.Tensor | None = None) -> None:
        loss = updater.gradient(inputs, targets, state, stop=stop, documents=documents)
        assert loss is not None
        updater.apply(loss, state, rate=config.training.learning_rate)
        state.step += 1

    return update


def _refuse_unwritable(trace: Path) -> None:
    try:
        trace.parent.mkdir(parents=True, exist_ok=True)
        trace.touch()
    except OSError as error:
        raise AtlasError(
            f"{trace}: cannot be written ({error.strerror}): choose another --output-dir"
        ) from None
