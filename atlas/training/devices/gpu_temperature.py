"""Read the temperature of an NVIDIA GPU, and wait while it is too hot.

The readings come from NVML, the library behind `nvidia-smi` (https://docs.nvidia.com/deploy/nvml-api/), through the
package nvidia-ml-py. `torch.cuda.temperature` and similar functions also use NVML. But these functions return neither
the power limit nor the reasons for throttling, and they do not find the card of a MIG slice. On other devices, this
module reads nothing.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from atlas.config import GuardConfig
from atlas.errors import AtlasError

COOLING = 5
"""The number of °C below `guard.max_gpu_temp` at which training resumes. Without this gap, training would stop and
resume all the time."""
TOO_HOT = 85
"""The temperature (°C) at and above which Atlas advises better cooling or less load."""

_SECONDS_BETWEEN_READINGS = 1.0
_SECONDS_BETWEEN_CHECKS = 0.2  # between two checks for a stop request during a wait
_SECONDS_BETWEEN_REMINDERS = 600.0

# NVML's bits for the reasons why clocks are lower than they could be. Three reasons are left out: an idle card, clocks
# that a user set, and clocks that a display needs.
_THROTTLE_REASONS = {
    0x04: "power limit",
    0x08: "hardware slowdown",
    0x20: "thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
_QUERIES: dict[str, tuple[tuple[str, ...], Callable[[Any], Any]]] = {
    "temperature": (("nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature"), int),
    "power": (("nvmlDeviceGetPowerUsage",), lambda milliwatts: milliwatts / 1000),
    "power_limit": (("nvmlDeviceGetEnforcedPowerLimit",), lambda milliwatts: milliwatts / 1000),
    "utilization": (("nvmlDeviceGetUtilizationRates",), lambda rates: rates.gpu),
    "throttle": (
        ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"),
        lambda reasons: [word for bit, word in _THROTTLE_REASONS.items() if reasons & bit],
    ),
}
"""For each field of a `Reading`: the NVML functions that return the value, the newest first, and a function that
converts the value."""


@dataclass(frozen=True)
class Reading:
    """The values that the sensors of a GPU report. A value that the GPU does not report is None."""

    temperature: int | None = None  # °C
    power: float | None = None  # W
    power_limit: float | None = None  # W
    utilization: int | None = None  # % of the time in which the GPU ran any kernel
    throttle: list[str] | None = None

    def metrics(self) -> dict[str, Any]:
        """The known values, as entries of a record of `metrics.jsonl`."""
        return {f"gpu_{name}": value for name, value in vars(self).items() if value is not None}


class GpuSensor:
    """Reads the sensors of one NVIDIA GPU, at most once per second.

    `failure` is NVML's error message after NVML has stopped answering, for example after a driver update. From then on,
    every reading is empty. `cool_down` sets `reported_failure` and `advised`, so that it reports a failure only once,
    and a hot GPU only once. `clock` has the functions `monotonic` and `sleep`, like the module `time`.
    """

    def __init__(self, nvml: Any, handle: Any, *, clock: Any = time) -> None:
        self.failure: str | None = None
        self.reported_failure = False
        self.advised = False
        self.clock = clock
        self._error: type[Exception] = nvml.NVMLError
        self._read_at = float("-inf")
        self._reading = Reading()
        self._queries = {
            field: (query, convert)
            for field, (names, convert) in _QUERIES.items()
            if (query := _first_available(nvml, handle, names))
        }

    @classmethod
    def open(cls, device: torch.device) -> GpuSensor:
        """Open the sensor of PyTorch's CUDA `device`.

        Raises `AtlasError` if the NVIDIA GPU, its driver or nvidia-ml-py is missing.
        """
        if torch.version.hip:
            raise AtlasError("only the sensors of NVIDIA GPUs can be read, and this PyTorch is for AMD GPUs")
        try:
            import pynvml
        except ImportError:
            raise AtlasError(
                "reading the GPU's sensors needs nvidia-ml-py: pip install nvidia-ml-py"
            ) from None
        try:
            pynvml.nvmlInit()
            return cls(pynvml, _handle(pynvml, device))
        except pynvml.NVMLError as error:
            raise AtlasError(
                f"the GPU's sensors cannot be read (NVML: {error}): check the GPU with nvidia-smi"
            ) from None

    def read(self) -> Reading:
        """Return the last reading, or a new reading if the last one is at least a second old."""
        now = self.clock.monotonic()
        if self.failure is None and now - self._read_at >= _SECONDS_BETWEEN_READINGS:
            self._read_at = now
            try:
                answers = {field: convert(query()) for field, (query, convert) in self._queries.items()}
                self._reading = Reading(**answers)
            except self._error as error:
                self.failure, self._reading = str(error), Reading()
        return self._reading


def _first_available(nvml: Any, handle: Any, names: tuple[str, ...]) -> Callable[[], Any] | None:
    """Return the first NVML function in `names` that the package, the driver and the card support, with its arguments
    bound. Return None if there is no such function."""
    for name in names:
        sensor = (nvml.NVML_TEMPERATURE_GPU,) if "Temperature" in name else ()
        try:
            query = functools.partial(getattr(nvml, name), handle, *sensor)
            query()
        except (AttributeError, nvml.NVMLError):
            continue
        return query
    return None


def _handle(nvml: Any, device: torch.device) -> Any:
    """Return NVML's handle of PyTorch's `device`. NVML ignores CUDA_VISIBLE_DEVICES and CUDA's order of cards, so the
    index of a card in NVML may differ from its index in PyTorch."""
    properties: Any = torch.cuda.get_device_properties(device)
    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
    except nvml.NVMLError:
        # A MIG slice has its own UUID and no sensors. If PyTorch reports the card's PCI address, Atlas finds the card
        # by that address.
        if not hasattr(properties, "pci_bus_id"):
            raise
        place = f"{properties.pci_domain_id:08x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
        return nvml.nvmlDeviceGetHandleByPciBusId(place)


def open_sensor(device: torch.device, guard: GuardConfig, *, say: Callable[[str], None]) -> GpuSensor | None:
    """Open the sensor of the run's GPU. Return None if there is no sensor.

    If `guard.max_gpu_temp` is set, the function raises `AtlasError` for an NVIDIA GPU whose temperature cannot be read.
    On a CPU or an Apple GPU, the function logs a line instead.
    """
    limit = guard.max_gpu_temp
    if device.type != "cuda":
        if limit is not None:
            say(f"guard.max_gpu_temp {limit} has no effect: this run uses {device.type}, not an NVIDIA GPU")
        return None
    try:
        sensor = GpuSensor.open(device)
        if limit is not None and sensor.read().temperature is None:
            raise AtlasError("this GPU does not report its temperature: check the GPU with nvidia-smi")
    except AtlasError as reason:
        if limit is None:
            return None
        raise AtlasError(f"guard.max_gpu_temp: {limit}: {reason}; or leave the setting out") from None
    return sensor


def cool_down(
    sensor: GpuSensor, *, limit: int | None, should_stop: Callable[[], bool], say: Callable[[str], None]
) -> None:
    """If the GPU is at `limit` °C or above, wait until the GPU is `COOLING` °C below the limit. The training loop calls
    this function between updates.

    A stop request ends the wait. Without a limit there is no wait, but the function logs once that the GPU is at
    `TOO_HOT` °C or above. The function also logs once that a sensor has stopped answering.
    """
    temperature = sensor.read().temperature
    if limit is not None and temperature is not None and temperature >= limit and not should_stop():
        target, start, reminders = limit - COOLING, sensor.clock.monotonic(), 0
        say(f"GPU at {temperature} °C, limit {limit} (guard.max_gpu_temp): waiting until {target} °C")
        while temperature is not None and temperature > target:
            if should_stop():
                return
            waited = sensor.clock.monotonic() - start
            if waited >= _SECONDS_BETWEEN_REMINDERS * (reminders + 1):
                reminders += 1
                say(
                    f"GPU still at {temperature} °C after {waited:.0f} s without work from this run: another program "
                    "or poor cooling keeps the GPU warm. Ctrl-C saves and ends the run. With a higher "
                    "guard.max_gpu_temp, training can resume"
                )
            sensor.clock.sleep(_SECONDS_BETWEEN_CHECKS)
            temperature = sensor.read().temperature
        if temperature is not None:
            say(f"GPU at {temperature} °C after {sensor.clock.monotonic() - start:.0f} s: training resumes")
    elif limit is None and (temperature or 0) >= TOO_HOT and not sensor.advised:
        sensor.advised = True
        say(
            f"GPU at {temperature} °C: 50–75 is normal, up to {TOO_HOT} high but acceptable. This GPU is hotter: clean "
            "the fans, improve the air flow, or lower the load: a smaller training.micro_batch_size, "
            "training.gradient_checkpointing, a shorter model.max_seq_len; guard.max_gpu_temp makes training wait"
        )
    if sensor.failure is not None and not sensor.reported_failure:
        sensor.reported_failure = True
        unwatched = "" if limit is None else f", and guard.max_gpu_temp {limit} is no longer watched"
        reason = f"the GPU's sensors no longer answer (NVML: {sensor.failure})"
        say(f"warning: {reason}: training continues{unwatched}")
