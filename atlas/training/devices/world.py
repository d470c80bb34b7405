"""Several processes (ranks) in one run: the rank of each process, and the values that they exchange.

torchrun starts the processes and sets their ranks in the environment. All ranks have the same numbers in `TrainState`
and make the same decisions. Before a decision, the ranks sum the values that determine the decision, or the first rank
broadcasts these values. The code in `atlas/model` does not depend on ranks.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from atlas.errors import AtlasError, EndedElsewhere, first_line

DEFAULT_TIMEOUT = 600.0
"""Seconds that ranks wait for one another by default."""
_GRACE = 30.0
"""Seconds that torchrun gets to end the other ranks after one rank has ended."""
_LOST = ("connection closed", "connection reset", "broken pipe", "connection refused", "socket", "nccl")


@dataclass(frozen=True)
class World:
    """The processes of a run, and the rank of this process. In a run of one process, every method returns its argument
    without communication."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    timeout: float = DEFAULT_TIMEOUT

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes the files."""
        return self.rank == 0

    def sums(self, *numbers: float) -> tuple[float, ...]:
        """Return the sum of each number over the ranks, in fp64."""
        return self.sums_async(*numbers)()

    def sums_async(self, *numbers: float) -> Callable[[], tuple[float, ...]]:
        """Start `sums`, and return a function that waits for the sums and returns them. This rank can continue until it
        calls that function."""
        together = torch.tensor(numbers, dtype=torch.float64)
        wait = self.all_reduce_async(together)

        def sums() -> tuple[float, ...]:
            wait()
            return tuple(together.tolist())

        return sums if self.size > 1 else lambda: numbers

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on some rank."""
        return self.sums(flag)[0] > 0

    def all_min(self, number: int) -> int:
        """Return the smallest of the ranks' numbers."""
        if self.size == 1:
            return number
        smallest = torch.tensor(number)
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
        return int(smallest)

    def broadcast(self, value: Any = None) -> Any:
        """Send the first rank's `value` to every rank, and return this value. The value must be serializable as
        JSON."""
        if self.size == 1:
            return value
        message = json.dumps(value).encode() if self.is_first else b""
        length = torch.tensor(len(message))
        dist.broadcast(length, src=0)
        data = torch.frombuffer(bytearray(message.ljust(int(length))), dtype=torch.uint8)
        dist.broadcast(data, src=0)
        return json.loads(data.numpy().tobytes())

    def all_reduce_async(self, tensor: Tensor) -> Callable[[], Any]:
        """Start to sum `tensor` over the ranks, in place on its device. Return a function that waits for the result."""
        work = dist.all_reduce(tensor, async_op=True) if self.size > 1 else None
        return work.wait if work else lambda: None

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """A context for work that every rank does by itself. If some ranks raise `AtlasError`, only the lowest of these
        ranks raises it at the end of the context. All other ranks raise `EndedElsewhere`, which logs nothing."""
        error: AtlasError | None = None
        try:
            yield
        except AtlasError as refused:
            error = refused
        speaker = self.all_min(self.rank if error else self.size)
        if error and speaker == self.rank:
            raise error
        if speaker < self.size:
            raise EndedElsewhere


ALONE = World()
"""A run of one process."""


def join_world(timeout: float = DEFAULT_TIMEOUT) -> World:
    """Join the ranks that torchrun, or Slurm, describes in environment variables. Without these variables, the run has
    one process.

    `timeout` is the number of seconds that ranks wait for one another. Raises `AtlasError` if the other ranks cannot be
    reached.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return World(timeout=timeout)
    if not dist.is_available():
        raise AtlasError(
            "several processes: this PyTorch was built without torch.distributed: install another build"
        )
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    has_gpus = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if has_gpus and local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)
    patience = timedelta(seconds=timeout)
    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=patience)))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # When torchrun restarts the ranks, it may keep its store, with the addresses of the ranks that died. So
            # each restart uses its own prefix. Several machines count their restarts separately. For several machines,
            # torchrun makes a new store with --rdzv-backend c10d.
            store = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        backend = "cpu:gloo,cuda:nccl" if has_gpus else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
    except (RuntimeError, ValueError) as error:
        raise AtlasError(
            f"the other ranks could not be reached at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} "
            f"({first_line(error)}): check the address and the firewall; atlas doctor --distributed tests both"
        ) from None
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return World(dist.get_rank(), dist.get_world_size(), local_rank, local_size, timeout)


def has_joined() -> bool:
    """Whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized()


@contextmanager
def together(world: World) -> Iterator[None]:
    """A context in which this rank ends if another rank fails or no longer answers. If the connection to a failed rank
    is lost, this rank logs nothing, since the failed rank logs its error. If another rank only stops answering, this
    rank logs one line."""
    if not has_joined():
        yield
        return
    try:
        yield
    except AtlasError as error:
        _record(error)
        raise
    except RuntimeError as error:
        text = str(error).lower()
        if "timed out" in text or "timeout" in text:
            silence = AtlasError(
                f"rank {world.rank}: no answer from another rank within {world.timeout:g} s: that rank hangs or is "
                "slow; its own log shows how far it came. --timeout sets a longer limit; atlas doctor --distributed "
                "tests the connection"
            )
            _record(silence)
            raise silence from None
        if not any(sign in text for sign in _LOST):
            raise
        if dist.is_torchelastic_launched():
            with suppress(KeyboardInterrupt):
                # Wait for torchrun, which reports the first failure and then ends this rank.
                time.sleep(_GRACE)
        raise EndedElsewhere from None
    with suppress(RuntimeError):
        dist.destroy_process_group()


def _record(error: AtlasError) -> None:
    """Record the error for torchrun's report. The report names the rank that failed first, with its error message."""
    if dist.is_torchelastic_launched():
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
