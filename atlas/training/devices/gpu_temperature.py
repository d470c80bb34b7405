"""The temperature of an NVIDIA GPU: read, explained, and waited for.

NVML, the library behind `nvidia-smi`, gives the readings (https://docs.nvidia.com/deploy/nvml-api/). On any other
device nothing is opened and nothing is asked.
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
"""°C below `guard.max_gpu_temp` at which training goes on: without the gap it would stop and go."""
TOO_HOT = 85
"""°C from which on better cooling or less load is advised."""

_SECONDS_BETWEEN_READINGS = 1.0
_SECONDS_BETWEEN_LOOKS = 0.2  # at a stop request, while waiting
_SECONDS_BETWEEN_REMINDERS = 600.0

# NVML's bits for "the clocks are lower than they could be, because of"; an idle card, clocks that somebody chose and
# those of a display are no such reason.
_THROTTLE_REASONS = {
    0x04: "power limit",
    0x08: "hardware slowdown",
    0x20: "thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}


@dataclass(frozen=True)
class Reading:
    """What a GPU says of itself; None where it does not say."""

    temperature: int | None = None  # °C
    power: float | None = None  # W
    power_limit: float | None = None  # W
    utilization: int | None = None  # % of the time in which anything ran
    throttle: tuple[str, ...] | None = None

    def metrics(self) -> dict[str, Any]:
        """What is known, as entries of a line of `metrics.jsonl`."""
        entries = {
            "gpu_temperature": self.temperature,
            "gpu_power": self.power,
            "gpu_power_limit": self.power_limit,
            "gpu_utilization": self.utilization,
            "gpu_throttle": None if self.throttle is None else list(self.throttle),
        }
        return {name: value for name, value in entries.items() if value is not None}


class NoSensor(Exception):
    """Why a GPU cannot be read, and what to do about it."""


class GpuSensor:
    """One NVIDIA GPU's readings, asked for at most once a second.

    `failure` is what NVML said when it stopped answering (as after a change of drivers); from then on every reading
    is empty. `failure_said` and `advised` are of `cool_down`, which says such things once.
    """

    def __init__(self, nvml: Any, handle: Any, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.failure: str | None = None
        self.failure_said = False
        self.advised = False
        self._error: type[Exception] = nvml.NVMLError
        self._clock = clock
        self._read_at: float | None = None
        self._reading = Reading()

        die = (nvml.NVML_TEMPERATURE_GPU,)
        self._temperature = _first_known(
            nvml, handle, "nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature", more=die
        )
        self._power = _first_known(nvml, handle, "nvmlDeviceGetPowerUsage")
        self._power_limit = _first_known(nvml, handle, "nvmlDeviceGetEnforcedPowerLimit")
        self._utilization = _first_known(nvml, handle, "nvmlDeviceGetUtilizationRates")
        self._throttle = _first_known(
            nvml,
            handle,
            "nvmlDeviceGetCurrentClocksEventReasons",
            "nvmlDeviceGetCurrentClocksThrottleReasons",
        )

    @classmethod
    def open(cls, device: torch.device) -> GpuSensor:
        """The sensor of PyTorch's CUDA `device`; `NoSensor` without an NVIDIA GPU, nvidia-ml-py or its driver."""
        if torch.version.hip:
            raise NoSensor("only NVIDIA GPUs can be read, and this PyTorch is for AMD's")
        try:
            import pynvml
        except ImportError:
            raise NoSensor("reading the GPU needs nvidia-ml-py: pip install nvidia-ml-py") from None
        try:
            pynvml.nvmlInit()
            return cls(pynvml, _handle(pynvml, device))
        except pynvml.NVMLError as error:
            raise NoSensor(f"the GPU cannot be read (NVML: {error}): check it with nvidia-smi") from None

    @property
    def has_temperature(self) -> bool:
        return self._temperature is not None

    def read(self) -> Reading:
        """The last reading, or a new one if that is a second old."""
        now = self._clock()
        if self.failure is None and (
            self._read_at is None or now - self._read_at >= _SECONDS_BETWEEN_READINGS
        ):
            self._read_at = now
            try:
                self._reading = self._ask()
            except self._error as error:
                self.failure, self._reading = str(error), Reading()
        return self._reading

    def _ask(self) -> Reading:
        reasons = self._throttle and self._throttle()
        return Reading(
            temperature=self._temperature and self._temperature(),
            power=self._power and self._power() / 1000,  # NVML counts milliwatts
            power_limit=self._power_limit and self._power_limit() / 1000,
            utilization=self._utilization and self._utilization().gpu,
            throttle=None
            if reasons is None
            else tuple(word for bit, word in _THROTTLE_REASONS.items() if reasons & bit),
        )


def _first_known(nvml: Any, handle: Any, *names: str, more: tuple[int, ...] = ()) -> Callable[[], Any] | None:
    """The first of NVML's functions that this package, driver and card all know, ready to be called."""
    for name in names:
        try:
            ask = functools.partial(getattr(nvml, name), handle, *more)
            ask()
        except (AttributeError, nvml.NVMLError):
            continue
        return ask
    return None


def _handle(nvml: Any, device: torch.device) -> Any:
    """NVML's handle of PyTorch's `device`, whose number means nothing to NVML (CUDA_VISIBLE_DEVICES, CUDA's order)."""
    properties: Any = torch.cuda.get_device_properties(device)
    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
    except nvml.NVMLError:
        # A slice of a card (MIG) has a UUID of its own, and no sensors; the card is found by its place on the bus,
        # where PyTorch tells it.
        if not hasattr(properties, "pci_bus_id"):
            raise
        place = f"{properties.pci_domain_id:08x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
        return nvml.nvmlDeviceGetHandleByPciBusId(place)


def open_sensor(device: torch.device, guard: GuardConfig, *, say: Callable[[str], None]) -> GpuSensor | None:
    """The sensor of the run's GPU; None where there is none.

    A limit that cannot be watched on a GPU is refused with `AtlasError`; on a CPU or an Apple GPU, `say` is told.
    """
    limit = guard.max_gpu_temp
    if device.type != "cuda":
        if limit is not None:
            say(f"guard.max_gpu_temp {limit} has no effect: this run uses no NVIDIA GPU but {device.type}")
        return None
    try:
        sensor = GpuSensor.open(device)
        if limit is not None and not sensor.has_temperature:
            raise NoSensor("this GPU does not tell its temperature: check it with nvidia-smi")
    except NoSensor as reason:
        if limit is None:
            return None
        raise AtlasError(f"guard.max_gpu_temp: {limit}: {reason}; or leave the setting out") from None
    return sensor


def cool_down(
    sensor: GpuSensor,
    *,
    limit: int | None,
    should_stop: Callable[[], bool],
    say: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """To be called between two updates: wait if the GPU is at `limit` °C, until it is `COOLING` °C below.

    A stop request ends the wait. Without a limit nothing waits, and a card at `TOO_HOT` is told of, once. So is a
    sensor that has stopped answering.
    """
    temperature = sensor.read().temperature
    if limit is not None and temperature is not None and temperature >= limit and not should_stop():
        _wait(sensor, temperature, limit, should_stop=should_stop, say=say, sleep=sleep, clock=clock)
    elif limit is None and temperature is not None and temperature >= TOO_HOT and not sensor.advised:
        sensor.advised = True
        say(
            f"GPU at {temperature} °C: 50–75 is normal, up to {TOO_HOT} high but acceptable; this is more: clean the "
            "fans, improve the air flow, or lower the load: a smaller training.micro_batch_size, "
            "training.gradient_checkpointing, a shorter model.max_seq_len; guard.max_gpu_temp makes training wait"
        )
    if sensor.failure is not None and not sensor.failure_said:
        sensor.failure_said = True
        unwatched = "" if limit is None else f", and guard.max_gpu_temp {limit} is no longer watched"
        say(
            f"warning: the GPU's sensors no longer answer (NVML: {sensor.failure}): training goes on{unwatched}"
        )


def _wait(
    sensor: GpuSensor,
    temperature: int | None,
    limit: int,
    *,
    should_stop: Callable[[], bool],
    say: Callable[[str], None],
    sleep: Callable[[float], None],
    clock: Callable[[], float],
) -> None:
    """Return when the GPU has cooled, a stop is requested, or the sensor fails."""
    target = limit - COOLING
    say(f"GPU at {temperature} °C, limit {limit} (guard.max_gpu_temp): waiting until {target} °C")
    start = clock()
    remind_at = start + _SECONDS_BETWEEN_REMINDERS
    while temperature is not None and temperature > target:
        if should_stop():
            return
        if clock() >= remind_at:
            remind_at += _SECONDS_BETWEEN_REMINDERS
            say(
                f"GPU still at {temperature} °C after {clock() - start:.0f} s without work from this run: another "
                "program or poor cooling keeps it warm; Ctrl-C saves, and a higher guard.max_gpu_temp goes on"
            )
        sleep(_SECONDS_BETWEEN_LOOKS)
        temperature = sensor.read().temperature
    if temperature is not None:
        say(f"GPU at {temperature} °C after {clock() - start:.0f} s: training goes on")
