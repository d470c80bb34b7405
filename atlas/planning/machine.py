"""The machine that a run is planned for: this machine, a known card, or a GPU with a given memory size."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from atlas.config import AtlasConfig
from atlas.errors import AtlasError
from atlas.machine import measure_copy, measure_matrix_products, measure_memory
from atlas.planning.cards import Card, card_named, find_card
from atlas.planning.speed import Speed, card_speed
from atlas.training.devices.device import setup_runtime


@dataclass(frozen=True)
class Machine:
    """The memory and speed of a machine; None for unknown values."""

    name: str
    device: str
    """`cpu`, `cuda` or `mps`."""
    memory: int
    """Memory in bytes."""
    flops_per_second: float | None = None
    """FLOP/s of large matrix products in the precision of training."""
    rate_is: str | None = None
    """The source of `flops_per_second`, as text."""
    bytes_per_second: float | None = None
    """Memory bandwidth in bytes/s."""
    watts: int | None = None
    """Power in watts at full load."""
    speed: Speed | None = None
    """The speed that an NVIDIA or AMD GPU reaches; None for other devices, and for unknown speeds."""

    @property
    def time_is(self) -> str:
        """The source of the estimated time of an update: `measured`, `simulated` or `stated`."""
        return "measured" if self.device == "cpu" else "simulated" if self.speed else "stated"


def choose_machine(config: AtlasConfig, gpu: str | None = None, memory: str | None = None) -> Machine:
    """Return a machine with the card `gpu`. Without `gpu`, return a machine with `memory` (such as `8GB`). Without
    both, return this machine. Raises `AtlasError` for an unknown card, an invalid size or an unsupported precision."""
    size = None if memory is None else _parse_memory(memory)
    if gpu is not None:
        return machine_with(find_card(gpu), precision=config.training.precision, memory=size)
    if size is None:
        return this_machine(config)
    device = "cuda" if config.device == "auto" else config.device.partition(":")[0]
    return Machine(f"{memory} ({device})", device, size)


def _parse_memory(text: str) -> int:
    """Return a memory size in bytes. As is usual for graphics cards, 8GB, 8 GiB and 8 are all 8 · 2³⁰ bytes."""
    match = re.fullmatch(r"\s*(\d{1,6}(?:\.\d+)?)\s*(?:g|gb|gib)?\s*", text, re.IGNORECASE)
    if match is None:
        raise AtlasError(f"--memory {text}: is not a size; write it as 8GB")
    return int(float(match[1]) * 2**30)


def machine_with(card: Card, *, precision: str = "auto", memory: int | None = None) -> Machine:
    """Return a machine with this card that trains in `precision`. If `memory` is given, it replaces the card's bytes.

    Raises `AtlasError` if the card does not compute in that precision.
    """
    if precision.startswith("bf16") and card.precision != "bf16":
        raise AtlasError(
            f"training.precision: {precision}: the {card.name} does not compute in bf16; use fp16 or auto"
        )
    return Machine(
        name=card.name,
        device="cuda",
        memory=card.memory if memory is None else memory,
        flops_per_second=None if precision == "fp32" else card.tflops * 1e12,
        rate_is=f"its peak in {card.precision if precision == 'auto' else precision} by Atlas's table of cards",
        bytes_per_second=card.bandwidth * 1e9,
        watts=card.watts,
        speed=None if precision == "fp32" else card_speed(card),
    )


def this_machine(config: AtlasConfig) -> Machine:
    """Return this machine, with the device and the precision of `config`. Measuring the speed takes about a second."""
    # This process plans alone, and `setup_runtime` would refuse ddp and fsdp in a single process.
    runtime = setup_runtime(config.replace("training", parallel="auto"))
    device = runtime.device.type
    memory, rate = measure_memory(device), measure_matrix_products(runtime.device, runtime.dtype)
    card = bandwidth = speed = None
    if device == "cuda":
        card, bandwidth = card_named(torch.cuda.get_device_name()), measure_copy(runtime.device)
        if runtime.dtype != torch.float32:
            speed = card_speed(card, products=rate, bandwidth=bandwidth) if card else Speed(rate, bandwidth)
    return Machine(
        name=f"this machine ({device})",
        device=device,
        memory=memory,
        flops_per_second=rate,
        rate_is=f"measured here in {runtime.precision}",
        bytes_per_second=bandwidth,
        watts=card.watts if card else None,
        speed=speed,
    )
