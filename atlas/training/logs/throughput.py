"""Measure a run's speed, the ratio of this speed to the machine's peak speed, and the peak memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from atlas.config import AtlasConfig
from atlas.machine import measure_matrix_products, peak_resident
from atlas.model.cost import training_flops_per_token
from atlas.training.devices.device import Runtime
from atlas.training.devices.memory import is_out_of_memory, remember_peak_rate, remembered_peak_rate

_SECONDS = 0.2
"""The duration of a measurement of the peak rate, in seconds."""
_SIZE = {"cpu": 1024, "cuda": 4096, "mps": 2048}
"""The number of rows and columns of the matrices in this measurement, by device. The matrices are small, since the run
needs the rest of the memory."""


class Throughput:
    """Measures steps and tokens per second since the last call of `metrics`, and the share of this time in which
    training waited for data. The time of evaluations and saves does not count."""

    def __init__(self, config: AtlasConfig, runtime: Runtime) -> None:
        self._runtime = runtime
        self._flops_per_token = training_flops_per_token(config)
        self._peak_rate = 0.0  # unknown
        self._reset()

    def _reset(self) -> None:
        self._steps, self._tokens, self._waited, self._start = 0, 0, 0.0, time.perf_counter()

    def count(self, tokens: int) -> None:
        """Count an update of `tokens` tokens."""
        self._steps += 1
        self._tokens += tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time does not count in the rates."""
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """A context whose time counts as waiting for data."""
        before = time.perf_counter()
        yield
        self._waited += time.perf_counter() - before

    def metrics(self) -> dict[str, float | int]:
        """The rates since the last call, under the names that `metrics.jsonl` uses.

        `utilisation` is the FLOP/s of training, divided by the FLOP/s that the same devices reach with matrix products
        alone. The FLOP/s of matrix products are measured once, and stored for later runs on this machine. `memory` is
        the peak so far, in bytes: on CUDA, the peak of PyTorch's allocator, otherwise of the process.
        """
        seconds = max(1e-9, time.perf_counter() - self._start)
        rate, device = self._tokens / seconds, self._runtime.device
        metrics: dict[str, float | int] = {
            "steps_per_second": self._steps / seconds,
            "tokens_per_second": rate,
            "data_wait": min(1.0, self._waited / seconds),
            "memory": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident(),
        }
        if self._runtime.world.is_first:
            metrics["utilisation"] = self._utilisation(rate)
        self._reset()
        return metrics

    def _utilisation(self, tokens_per_second: float) -> float:
        flops = tokens_per_second * self._flops_per_token / self._runtime.world.size
        self._peak_rate = self._peak_rate or remembered_peak_rate(self._runtime) or 0.0
        if flops > self._peak_rate:  # not measured yet, or measured on a busy machine
            self._peak_rate = max(self._peak_rate, _measured_peak_rate(self._runtime))
            remember_peak_rate(self._runtime, self._peak_rate)
        return flops / self._peak_rate if self._peak_rate else float("nan")


def _measured_peak_rate(runtime: Runtime) -> float:
    """The measured FLOP/s of matrix products in the run's precision; 0 if there is too little memory for the
    measurement."""
    device = runtime.device
    try:
        return measure_matrix_products(device, runtime.dtype, size=_SIZE[device.type], seconds=_SECONDS)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return 0.0
