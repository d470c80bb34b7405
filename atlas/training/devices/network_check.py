"""Test the connection between ranks before a run: list the hosts, check the sums of all-reduces, and measure the
bandwidth.

If the test fails, the error message names settings of gloo or NCCL that may help.
"""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Iterator
from queue import Empty, Queue
from threading import Thread
from typing import Any

import psutil
import torch
import torch.distributed as dist

from atlas.errors import AtlasError, first_line
from atlas.training.devices.device import choose_device
from atlas.training.devices.world import World, join_world, together

Facts = dict[str, Any]

DEFAULT_TIMEOUT = 60.0
"""The default of `--timeout`, in seconds."""
ROUNDS = {1_000: 20, 1_000_000: 10, 64_000_000: 5}
"""The size of a tensor in bytes → the number of timed all-reduces of this size. An untimed all-reduce precedes the
timed ones."""

_BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
_HOST_NAME = 255
_MARGIN = 5.0
"""Extra seconds after the timeout, in which a backend may raise its own timeout error."""


def try_connection(device_name: str = "auto", timeout: float = DEFAULT_TIMEOUT) -> Facts | None:
    """Join the ranks that torchrun started, and sum numbers over the ranks: with gloo on the CPU, and with NCCL if each
    rank has its own GPU. Return the results (seconds, bytes and bytes/s) on the first rank, and None on the other
    ranks.

    Raises `AtlasError` if a sum is wrong, or if another rank does not answer within `timeout` seconds.
    """
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        raise AtlasError(
            "--distributed: tests the connection between several processes, but this process is alone: start it with "
            "torchrun --nproc-per-node=2 -m atlas doctor --distributed; on several machines, add the torchrun options "
            "of your training command"
        )
    # Without this setting, NCCL ends the process after the timeout and prints a page of its own messages.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    try:
        world = join_world(timeout)
    except AtlasError as error:
        reason = f"the other ranks could not be reached within {timeout:g} s ({first_line(error.__context__ or error)})"
        raise _refusal("gloo", reason) from None
    with together(world):
        hosts = _hosts(world)
        with world.in_step():
            device = choose_device(device_name)
        has_own = device.type == "cuda" and world.local_rank < torch.cuda.device_count()
        facts: Facts = {
            "ranks": world.size,
            "hosts": hosts,
            "all_reduce": _measure(world, torch.device("cpu")),
            "left_out": {},
        }
        if world.all_min(int(has_own)) == 1:
            facts["all_reduce"] += _measure(world, torch.device("cuda", world.local_rank))
        else:
            no_gpu = "not every rank has a GPU of its own"
            facts["left_out"]["nccl"] = "--device cpu" if device_name == "cpu" else no_gpu
    return facts if world.is_first else None


def _hosts(world: World) -> list[str]:
    """Return the host name of each rank."""
    name = socket.gethostname().encode()[:_HOST_NAME]
    own = torch.frombuffer(bytearray(name.ljust(_HOST_NAME, b"\0")), dtype=torch.uint8)
    gathered = [torch.empty_like(own) for _ in range(world.size)]
    dist.all_gather(gathered, own)
    return [row.numpy().tobytes().rstrip(b"\0").decode(errors="replace") for row in gathered]


def _measure(world: World, device: torch.device) -> list[Facts]:
    """Return the median time in seconds and the bus bandwidth in bytes/s of the all-reduces on `device`, for each size
    in `ROUNDS`."""
    backend = _BACKENDS[device.type]
    try:
        answers = list(_answers(_all_reduces(world, device), world.timeout))
    except (RuntimeError, Empty) as error:
        reason = first_line(error) if str(error) else f"no answer within {world.timeout:g} s"
        raise _refusal(backend, f"{backend}: {reason}") from None
    # The bytes that each rank of a ring sends, per byte of the tensor.
    traffic = 2 * (world.size - 1) / world.size
    medians = {size: statistics.median(took for of, took in answers if of == size) for size in ROUNDS}
    common = {"backend": backend, "device": device.type}
    return [
        {**common, "bytes": size, "seconds": median, "bus_bandwidth": traffic * size / median}
        for size, median in medians.items()
    ]


def _answers(work: Iterator[Any], timeout: float) -> Iterator[Any]:
    """Yield the values of `work`. Raises `queue.Empty` if a value takes longer than `timeout + _MARGIN` seconds.

    `work` runs in a thread, since NCCL connects without a timeout, and ignores Ctrl-C while it waits.
    """
    found: Queue[Any] = Queue()

    def run() -> None:
        try:
            for answer in work:
                found.put(answer)
            found.put(None)
        except Exception as error:  # raised again below
            found.put(error)

    Thread(target=run, daemon=True).start()
    while (answer := found.get(timeout=timeout + _MARGIN)) is not None:
        if isinstance(answer, Exception):
            raise answer
        yield answer


def _all_reduces(world: World, device: torch.device) -> Iterator[tuple[int, float]]:
    """Run the all-reduces one after the other. Yield (bytes, seconds) for each timed all-reduce."""
    one = torch.empty(1, device=device)
    for size, rounds in ROUNDS.items():
        numbers = torch.empty(size // 4, device=device)
        _sum_and_check(world, numbers)
        for _ in range(rounds):
            _sum_and_check(world, one)  # makes all ranks begin the timed all-reduce together
            yield size, _sum_and_check(world, numbers)


def _sum_and_check(world: World, numbers: torch.Tensor) -> float:
    """Fill `numbers` with this rank's index + 1, sum the numbers over the ranks, and check the sums. Return the seconds
    of the all-reduce."""
    numbers.fill_(world.rank + 1)
    start = _now(numbers.device)
    world.all_reduce_async(numbers)()
    took = _now(numbers.device) - start
    expected = world.size * (world.size + 1) // 2
    with world.in_step():
        wrong = numbers[numbers != expected]
        if len(wrong):
            backend = _BACKENDS[numbers.device.type]
            found = f"{len(wrong)} of {len(numbers)} sums are wrong, {wrong[0]:g} instead of {expected}"
            raise _refusal(backend, f"{backend}: {found}")
    return took


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _refusal(backend: str, reason: str) -> AtlasError:
    """Return the error for a failed connection. The message names settings that may help, and the first address of each
    network interface."""
    rank, size, host, port = map(os.environ.get, ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    first = {
        "gloo": f"every rank must be running, and must reach MASTER_ADDR:MASTER_PORT, {host}:{port}",
        "nccl": "NCCL_P2P_DISABLE=1 helps with consumer cards whose peer-to-peer is broken, NCCL_IB_DISABLE=1 without "
        "InfiniBand, and NCCL_DEBUG=INFO logs more",
    }[backend]
    interfaces = {
        name: [entry.address for entry in entries if entry.family in (socket.AF_INET, socket.AF_INET6)]
        for name, entries in psutil.net_if_addrs().items()
    }
    here = ", ".join(f"{name} ({addresses[0]})" for name, addresses in interfaces.items() if addresses)
    return AtlasError(
        f"rank {rank} of {size} on {socket.gethostname()}: {reason}: {first}; a firewall must let the ranks' "
        f"connections through; {backend.upper()}_SOCKET_IFNAME=<interface> selects one of several network interfaces; "
        f"this machine has {here}"
    )
