"""The GPU's temperature, with a fake NVML: what is read, what is reported, and when training waits."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from atlas.config import GuardConfig
from atlas.errors import AtlasError
from atlas.training.devices.gpu_temperature import COOLING, GpuSensor, Reading, cool_down, open_sensor

CUDA = torch.device("cuda")


class NVMLError(Exception):
    """As NVML's own."""


class FakeNvml:
    """NVML's functions for one card. Those in `missing` raise, and all of them do once the card is `gone`."""

    NVMLError = NVMLError
    NVML_TEMPERATURE_GPU = 0

    def __init__(self, *, missing: tuple[str, ...] = (), gone: bool = False) -> None:
        self.missing, self.gone, self.calls = missing, gone, 0
        self.temperature, self.reasons = 71, 0
        self.cards = {"GPU-1b2c": "card by UUID", "0000000a:3b:00.0": "card by place"}
        self.handle: Any = None

    def _answer(self, name: str, value: Any) -> Any:
        self.calls += 1
        if self.gone:
            raise NVMLError("Uninitialized")
        if name in self.missing:
            raise NVMLError("Not Supported")
        return value

    def _find(self, key: str) -> str:
        if key not in self.cards:
            raise NVMLError("Not Found")
        self.handle = self.cards[key]
        return self.handle

    def nvmlInit(self) -> None:
        self._answer("init", None)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return self._find(uuid)

    def nvmlDeviceGetHandleByPciBusId(self, place: str) -> str:
        return self._find(place)

    def nvmlDeviceGetTemperatureV(self, handle: Any, sensor: int) -> int:
        return self._answer("temperatureV", self.temperature)

    def nvmlDeviceGetTemperature(self, handle: Any, sensor: int) -> int:
        return self._answer("temperature", self.temperature)

    def nvmlDeviceGetPowerUsage(self, handle: Any) -> int:
        return self._answer("power", 215_300)

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: Any) -> int:
        return self._answer("power limit", 350_000)

    def nvmlDeviceGetUtilizationRates(self, handle: Any) -> Any:
        return self._answer("utilization", SimpleNamespace(gpu=97, memory=60))

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: Any) -> int:
        return self._answer("event reasons", self.reasons)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: Any) -> int:
        return self._answer("throttle reasons", self.reasons)


class Clock:
    """Time that passes only in `sleep`; `each` is called whenever it does."""

    def __init__(self, each: Callable[[], None] = lambda: None) -> None:
        self.now, self.each = 0.0, each

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        assert self.now < 10_000, "this wait has no end"
        self.each()


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """An NVML that `open` finds, and a card in PyTorch to look for in it."""
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    card = SimpleNamespace(uuid="1b2c", pci_domain_id=10, pci_bus_id=0x3B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.version, "hip", None)
    return fake


def never(line: str) -> None:
    raise AssertionError(f"nothing should be reported, not {line!r}")


# Reading


def test_a_reading_has_degrees_watts_and_reasons() -> None:
    fake = FakeNvml()
    fake.reasons = 0x20 | 0x04
    assert GpuSensor(fake, "card").read().metrics() == {
        "gpu_temperature": 71,
        "gpu_power": 215.3,
        "gpu_power_limit": 350.0,
        "gpu_utilization": 97,
        "gpu_throttle": ["power limit", "thermal slowdown"],
    }


def test_throttle_reasons_match_nvidias_constants() -> None:
    """An idle card, chosen clocks, a group's clocks and a display's are not reported."""
    pynvml = pytest.importorskip("pynvml")
    words = {
        "SwPowerCap": "power limit",
        "HwSlowdown": "hardware slowdown",
        "SwThermalSlowdown": "thermal slowdown",
        "HwThermalSlowdown": "hardware thermal slowdown",
        "HwPowerBrakeSlowdown": "power brake",
    }
    for name in (
        *("GpuIdle", "ApplicationsClocksSetting", "SyncBoost", "DisplayClockSetting", "None"),
        *words,
    ):
        fake = FakeNvml()
        fake.reasons = getattr(pynvml, f"nvmlClocksThrottleReason{name}")
        assert GpuSensor(fake, "card").read().throttle == ([words[name]] if name in words else [])


def test_the_functions_exist_in_nvidias_package() -> None:
    pynvml = pytest.importorskip("pynvml")
    functions = [name for name in vars(FakeNvml) if name.startswith("nvml")]
    assert len(functions) == 10
    assert [name for name in functions if not callable(getattr(pynvml, name, None))] == []
    assert pynvml.NVML_TEMPERATURE_GPU == FakeNvml.NVML_TEMPERATURE_GPU
    assert issubclass(pynvml.NVMLError, Exception)


@pytest.mark.parametrize(
    ("missing", "lost"),
    [
        (("power",), {"gpu_power"}),
        (("power limit", "utilization"), {"gpu_power_limit", "gpu_utilization"}),
        (("temperatureV",), set()),
        (("temperatureV", "temperature"), {"gpu_temperature"}),
        (("event reasons",), set()),
        (("event reasons", "throttle reasons"), {"gpu_throttle"}),
    ],
)
def test_a_missing_reading_leaves_the_others(missing: tuple[str, ...], lost: set[str]) -> None:
    everything = set(GpuSensor(FakeNvml(), "card").read().metrics())
    sensor = GpuSensor(FakeNvml(missing=missing), "card")
    assert set(sensor.read().metrics()) == everything - lost
    assert sensor.failure is None


def test_an_older_package_without_the_newer_functions_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(FakeNvml, "nvmlDeviceGetTemperatureV")
    monkeypatch.delattr(FakeNvml, "nvmlDeviceGetCurrentClocksEventReasons")
    reading = GpuSensor(FakeNvml(), "card").read()
    assert (reading.temperature, reading.throttle) == (71, [])


def test_a_card_is_read_at_most_once_a_second() -> None:
    fake, clock = FakeNvml(), Clock()
    sensor = GpuSensor(fake, "card", clock=clock)
    before = fake.calls
    for _ in range(1000):
        sensor.read()
    assert fake.calls - before == 5  # one call for each kind of reading
    clock.now = 1.0
    fake.temperature = 60
    assert sensor.read().temperature == 60
    assert fake.calls - before == 10


def test_nvml_that_stops_answering_is_reported_once_and_not_called_again() -> None:
    fake, clock, said = FakeNvml(), Clock(), []
    sensor = GpuSensor(fake, "card", clock=clock)
    fake.gone = True
    for _ in range(5):
        cool_down(sensor, limit=70, should_stop=lambda: False, say=said.append)
        clock.now += 10
    assert said == [
        "warning: the GPU's sensors no longer answer (NVML: Uninitialized): training continues, "
        "and guard.max_gpu_temp 70 is no longer watched"
    ]
    assert sensor.read() == Reading()
    assert sensor.read().metrics() == {}
    calls = fake.calls
    clock.now += 10
    sensor.read()
    assert fake.calls == calls


# Opening


def test_the_card_is_found_by_its_uuid_and_a_slice_of_it_by_its_place(nvml: FakeNvml) -> None:
    assert open_sensor(CUDA, GuardConfig(max_gpu_temp=83), say=never) is not None
    assert nvml.handle == "card by UUID"
    del nvml.cards["GPU-1b2c"]
    assert open_sensor(CUDA, GuardConfig(), say=never) is not None
    assert nvml.handle == "card by place"


def no_package(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)


def no_driver(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.gone = True


def no_card(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.cards.clear()


def no_place(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PyTorch that does not report where a card is."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="slice"))


def no_nvidia(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (no_package, "reading the GPU's sensors needs nvidia-ml-py: pip install nvidia-ml-py"),
        (no_driver, "the GPU's sensors cannot be read (NVML: Uninitialized): check the GPU with nvidia-smi"),
        (no_card, "the GPU's sensors cannot be read (NVML: Not Found): check the GPU with nvidia-smi"),
        (no_place, "the GPU's sensors cannot be read (NVML: Not Found): check the GPU with nvidia-smi"),
        (no_nvidia, "only the sensors of NVIDIA GPUs can be read, and this PyTorch is for AMD GPUs"),
    ],
)
def test_without_a_sensor_a_limit_is_refused_and_no_limit_is_fine(
    nvml: FakeNvml,
    monkeypatch: pytest.MonkeyPatch,
    break_it: Callable[[FakeNvml, pytest.MonkeyPatch], None],
    reason: str,
) -> None:
    break_it(nvml, monkeypatch)
    assert open_sensor(CUDA, GuardConfig(), say=never) is None
    with pytest.raises(AtlasError) as refused:
        open_sensor(CUDA, GuardConfig(max_gpu_temp=83), say=never)
    assert str(refused.value) == f"guard.max_gpu_temp: 83: {reason}; or leave the setting out"


def test_a_limit_needs_a_temperature(nvml: FakeNvml) -> None:
    nvml.missing = ("temperatureV", "temperature")
    sensor = open_sensor(CUDA, GuardConfig(), say=never)
    assert sensor is not None
    assert sensor.read().power == 215.3
    cool_down(sensor, limit=None, should_stop=lambda: False, say=never)
    with pytest.raises(AtlasError, match="83: this GPU does not report its temperature"):
        open_sensor(CUDA, GuardConfig(max_gpu_temp=83), say=never)


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_on_other_devices_nothing_is_opened_and_a_limit_has_no_effect(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without_nvml(name: str, *rest: Any, **more: Any) -> Any:
        assert name != "pynvml"
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_nvml)
    said: list[str] = []
    assert open_sensor(torch.device(device), GuardConfig(), say=never) is None
    assert open_sensor(torch.device(device), GuardConfig(max_gpu_temp=83), say=said.append) is None
    assert said == [f"guard.max_gpu_temp 83 has no effect: this run uses {device}, not an NVIDIA GPU"]


# Waiting


def test_training_waits_for_a_hot_card_and_reports_both_ends() -> None:
    fake, said = FakeNvml(), []
    fake.temperature = 84
    clock = Clock()
    clock.each = lambda: setattr(fake, "temperature", 84 - int(clock.now / 7))
    sensor = GpuSensor(fake, "card", clock=clock)
    cool_down(sensor, limit=83, should_stop=lambda: False, say=said.append)
    assert said == [
        "GPU at 84 °C, limit 83 (guard.max_gpu_temp): waiting until 78 °C",
        f"GPU at 78 °C after {clock.now:.0f} s: training resumes",
    ]
    assert 42 <= clock.now <= 43.3  # it cools to 78 °C at 42 s and is read once a second


@given(
    limit=st.integers(40, 110),
    temperatures=st.lists(st.integers(20, 120), min_size=1, max_size=30),
    stop_at=st.none() | st.integers(0, 200),
)
@example(limit=83, temperatures=[90], stop_at=0)
def test_it_waits_only_at_the_limit_and_resumes_only_well_below_or_at_a_stop(
    limit: int, temperatures: list[int], stop_at: int | None
) -> None:
    """Against the definition, on any course of temperatures (a second each, then the card cools down)."""
    course = [*temperatures, 20]
    fake, said, looks = FakeNvml(), [], 0
    clock = Clock()

    def pass_time() -> None:
        nonlocal looks
        looks += 1
        fake.temperature = course[min(int(clock.now + 1e-9), len(course) - 1)]

    clock.each = pass_time
    fake.temperature = course[0]
    sensor = GpuSensor(fake, "card", clock=clock)
    cool_down(
        sensor,
        limit=limit,
        should_stop=lambda: stop_at is not None and looks >= stop_at,
        say=said.append,
    )
    if course[0] < limit or stop_at == 0:
        assert (clock.now, said) == (0, [])
        return
    cool = next(second for second, value in enumerate(course) if value <= limit - COOLING)
    if stop_at is not None and looks == stop_at and len(said) == 1:
        assert clock.now <= cool + 1.3
        return
    assert len(said) == 2
    temperature = sensor.read().temperature
    assert temperature is not None
    assert temperature <= limit - COOLING
    assert clock.now >= cool - 1e-9


def test_a_stop_ends_the_wait_within_one_check() -> None:
    fake, clock, said = FakeNvml(), Clock(), []
    fake.temperature = 90
    sensor = GpuSensor(fake, "card", clock=clock)
    cool_down(
        sensor,
        limit=83,
        should_stop=lambda: clock.now >= 20,
        say=said.append,
    )
    assert 20 <= clock.now <= 20.5
    assert len(said) == 1  # whoever requested the stop has reported it


def test_a_card_that_stays_warm_is_reported_every_ten_minutes() -> None:
    fake, clock, said = FakeNvml(), Clock(), []
    fake.temperature = 90
    sensor = GpuSensor(fake, "card", clock=clock)
    cool_down(
        sensor,
        limit=83,
        should_stop=lambda: clock.now >= 1900,
        say=said.append,
    )
    assert [line[:25] for line in said[1:]] == ["GPU still at 90 °C after "] * 3
    assert "after 600 s" in said[1]


def test_a_sensor_lost_while_waiting_ends_the_wait() -> None:
    fake, said = FakeNvml(), []
    fake.temperature = 90
    clock = Clock(each=lambda: setattr(fake, "gone", True))
    sensor = GpuSensor(fake, "card", clock=clock)
    cool_down(sensor, limit=83, should_stop=lambda: False, say=said.append)
    assert clock.now < 2
    assert [line.split(" ")[0] for line in said] == ["GPU", "warning:"]
    assert "guard.max_gpu_temp 83 is no longer watched" in said[1]


@pytest.mark.parametrize(("temperature", "times"), [(84, 0), (85, 1), (97, 1)])
def test_a_card_that_is_too_hot_is_reported_once_without_a_limit(temperature: int, times: int) -> None:
    fake, clock, said = FakeNvml(), Clock(), []
    fake.temperature = temperature
    sensor = GpuSensor(fake, "card", clock=clock)
    for _ in range(4):
        cool_down(sensor, limit=None, should_stop=lambda: False, say=said.append)
        clock.now += 5
    assert len(said) == times
    assert all(f"GPU at {temperature} °C" in line and "guard.max_gpu_temp" in line for line in said)
