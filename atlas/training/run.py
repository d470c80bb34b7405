"""What a training run is made of. `step.py` computes with the learner, `train.py` moves the run along."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from atlas.config import AtlasConfig, TrackingConfig
from atlas.data.sequences.build import SequenceSource
from atlas.data.sequences.loader import batches
from atlas.data.sequences.mixture import order_of
from atlas.model import AtlasLM
from atlas.tokenizer import Tokenizer
from atlas.training.checkpoint.async_saver import BackgroundSaver
from atlas.training.checkpoint.atomic_write import tensor_bytes
from atlas.training.checkpoint.lock import FolderLock
from atlas.training.checkpoint.manager import CheckpointManager
from atlas.training.checkpoint.manifest import FORMAT_VERSION
from atlas.training.devices.device import Runtime, describe_machine
from atlas.training.devices.gpu_temperature import GpuSensor
from atlas.training.devices.parallel import gather_full, sharded_state, wrap
from atlas.training.devices.signals import StopRequest
from atlas.training.devices.world import World
from atlas.training.evaluate import fixed_subset
from atlas.training.logs.run_log import RunLog
from atlas.training.logs.throughput import Throughput
from atlas.training.loss import LossFunction, SummedLoss
from atlas.training.optimizers.build import build_optimizer
from atlas.training.schedule import RunClock
from atlas.training.state import TrainState


class Learner:
    """A model, its loss and a new optimizer on one device: what an update computes with."""

    def __init__(
        self, model: AtlasLM, config: AtlasConfig, runtime: Runtime, custom_loss: LossFunction | None = None
    ) -> None:
        self.config, self.runtime = config, runtime
        self.model = model.to(runtime.device, runtime.weights_dtype)
        self.model.gradient_checkpointing = config.training.gradient_checkpointing
        self.objective = SummedLoss(model, custom_loss, compiled=runtime.compiles)
        self.wrapped = wrap(self.objective, config, runtime.world, runtime.parallel, runtime.device)
        """`objective` as the ranks share it (DDP); with FSDP2 and in a run of one process the objective itself."""
        self.optimizer = build_optimizer(model, config.training)
        self.scaler = runtime.grad_scaler()
        self.proven = (0, 0)
        """Sequences per micro-batch, and how many updates of that size have fitted into memory (`micro_batch`)."""

    def load_optimizer_state(self, saved: dict[str, Any]) -> None:
        """Load an optimizer's state dict of full tensors. PyTorch casts a state to the dtype of its parameter; the
        state of bf16 weights is fp32 here, so the weights are fp32 while it is loaded."""
        self.model.float()
        self.optimizer.load_state_dict(sharded_state(saved, self.optimizer))
        self.model.to(self.runtime.weights_dtype)


Sampler = Callable[[AtlasLM, Tokenizer, TrackingConfig, int, Callable[[], bool]], list[str]]
"""`(model, tokenizer, config.tracking, seed, should_stop)` → `tracking.samples` texts, generated with a model in
evaluation mode, by random numbers of its own. Inference has one; the code that starts a run passes it in."""


@dataclass
class RunData:
    """The text of a run as sequences. `identity` names the shards that were read, for every checkpoint."""

    tokenizer: Tokenizer
    train: SequenceSource
    val: SequenceSource | None
    identity: dict[str, Any]


@dataclass
class Run:
    """One training run: what it computes with, what it reads, where it stands and where it writes.

    Only `state` decides what comes next, and every checkpoint holds it: an update's sequences, rate and dropout are
    functions of it. That is why k updates, a kill and N − k updates equal N.
    """

    learner: Learner
    data: RunData
    state: TrainState
    log: RunLog
    saver: BackgroundSaver
    initialized_from: str | None = None
    """The checkpoint whose weights the run began with."""
    sampler: Sampler | None = None
    """Writes samples at each evaluation; None for none."""
    sensor: GpuSensor | None = None
    """Reads the GPU's temperature, if training watches it."""
    lock: FolderLock | None = None
    """The claim on the output folder, held as long as the run lives."""
    is_amid_update: bool = False
    """Whether an update is being applied: the weights may have changed, and `state` does not count it yet."""
    stops_early: bool = False
    """Whether the run ends after this step, since the validation loss no longer falls."""
    stop: StopRequest = field(init=False)
    clock: RunClock = field(init=False)
    throughput: Throughput = field(init=False)

    def __post_init__(self) -> None:
        self.stop = StopRequest(self.log.say, is_alone=self.world.size == 1)
        self.clock = RunClock(self.config.training.max_hours, before=self.state.seconds)
        self.throughput = Throughput(self.config, self.runtime)

    @property
    def config(self) -> AtlasConfig:
        """The settings, with those that the data decides."""
        return self.learner.config

    @property
    def runtime(self) -> Runtime:
        """The device and its arithmetic."""
        return self.learner.runtime

    @property
    def world(self) -> World:
        """The processes of the run."""
        return self.learner.runtime.world

    @property
    def model(self) -> AtlasLM:
        """The model that is trained."""
        return self.learner.model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of the model."""
        return self.learner.optimizer

    @property
    def checkpoints(self) -> CheckpointManager:
        """The checkpoints in the output folder."""
        return self.saver.checkpoints

    @property
    def num_updates(self) -> int | None:
        """The updates of the run, once they are known."""
        return self.state.horizon if self.state.is_planned else None

    @property
    def epoch(self) -> int:
        """Complete passes over the training data so far."""
        return self.state.sequences_consumed // len(self.data.train)

    @property
    def has_ended_epoch(self) -> bool:
        """Whether the last update reached the end of a pass over the training data."""
        before = self.state.sequences_consumed - self.config.training.sequences_per_update
        return self.epoch > before // len(self.data.train)

    @property
    def owes_evaluation(self) -> bool:
        """Whether the current step should have been evaluated and was not."""
        return self.data.val is not None and self.state.owes_evaluation(self.config.training.eval_interval)

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.state.step >= self.state.horizon and not self.owes_evaluation

    @property
    def num_bytes(self) -> int:
        """Bytes of a checkpoint's tensors."""
        return tensor_bytes([self.model.state_dict(), self.optimizer.state_dict()])

    @cached_property
    def val_windows(self) -> list[int]:
        """The windows of the validation data that every evaluation reads."""
        return fixed_subset(len(self.data.val), self.config.training.eval_sequences) if self.data.val else []

    def batches(self) -> Iterator[tuple[Tensor, ...]]:
        """The sequences of each update, (N, T) a column, from the current step to the horizon."""
        return batches(
            self.data.train,
            order_of(self.data.train, self.config.seed),
            start=self.state.sequences_consumed,
            num_updates=self.state.horizon - self.state.step,
            sequences_per_update=self.config.training.sequences_per_update,
            num_workers=self.config.data.num_workers,
            pin_memory=self.runtime.device.type == "cuda",
            rank=self.world.rank,
            world_size=self.world.size,
        )

    def contents(self, *, as_shards: bool = False) -> dict[str, Any]:
        """Everything that a checkpoint holds: plain values and tensors only. Every rank must call it. Of a sharded
        model only the first rank returns full tensors; with `as_shards` each rank returns its shards."""
        tensors = {
            "model_state_dict": dict(self.model.state_dict()),
            "optimizer_state_dict": self.optimizer.state_dict(),
        }
        return {
            "format_version": FORMAT_VERSION,
            **(tensors if as_shards else gather_full(tensors, keep=self.world.is_first)),
            "scaler_state_dict": self.learner.scaler.state_dict(),
            **asdict(self.state),
            "epoch": self.epoch,
            "config": self.config.model_dump(mode="json"),
            "tokenizer": self.data.tokenizer.state(),
            "data": self.data.identity,
            "initialized_from": self.initialized_from,
            "machine": describe_machine(self.runtime),
        }

    def save(self, kinds: list[str], *, wait: bool) -> None:
        """Write one checkpoint under the names of `kinds`. Return when it is on the disk; without `wait`, when its copy
        is in memory."""
        self.state.seconds = self.clock.elapsed
        with self.throughput.paused():
            contents = self.contents(as_shards=self.saver.is_sharded)
            if self.world.is_first or self.saver.is_sharded:
                self.saver.save(contents, kinds, wait=wait)

    def keep_snapshot(self) -> None:
        """Keep the current state in memory, to roll back to before the first save."""
        if self.saver.is_sharded:
            return
        contents = self.contents()
        if self.world.is_first:
            self.saver.keep_snapshot(contents)
