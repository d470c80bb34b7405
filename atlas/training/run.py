"""The parts of a training run. `step.py` updates the `Learner`; `train.py` is the loop over the updates of a `Run`."""

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
    """A model, its loss and a new optimizer on one device: the objects that an update computes with."""

    def __init__(
        self, model: AtlasLM, config: AtlasConfig, runtime: Runtime, custom_loss: LossFunction | None = None
    ) -> None:
        self.config, self.runtime = config, runtime
        self.model = model.to(runtime.device, runtime.weights_dtype)
        self.model.gradient_checkpointing = config.training.gradient_checkpointing
        self.objective = SummedLoss(model, custom_loss, compiled=runtime.compiles)
        self.wrapped = wrap(self.objective, config, runtime.world, runtime.parallel, runtime.device)
        """`objective` wrapped by DDP. With FSDP2 and in a run of one process, `objective` itself."""
        self.optimizer = build_optimizer(model, config.training)
        self.scaler = runtime.grad_scaler()
        self.proven = (0, 0)
        """A micro-batch size, and how many updates with this size have fitted into memory; used by `micro_batch`."""

    def load_optimizer_state(self, saved: dict[str, Any]) -> None:
        """Load an optimizer's state dict of full tensors.

        PyTorch casts the state to the dtype of its parameter. Atlas keeps the state of bf16 weights in fp32, so the
        weights become fp32 while the state is loaded.
        """
        self.model.float()
        self.optimizer.load_state_dict(sharded_state(saved, self.optimizer))
        self.model.to(self.runtime.weights_dtype)


Sampler = Callable[[AtlasLM, Tokenizer, TrackingConfig, int, Callable[[], bool]], list[str]]
"""`(model, tokenizer, config.tracking, seed, should_stop)` → `tracking.samples` generated texts. The model is in
evaluation mode. A sampler uses its own random generator. `atlas.inference` has a sampler, which is passed in by the
code that starts a run."""


@dataclass
class RunData:
    """The data of a run as sequences. Every checkpoint stores `identity`, which identifies the data."""

    tokenizer: Tokenizer
    train: SequenceSource
    val: SequenceSource | None
    identity: dict[str, Any]


@dataclass
class Run:
    """One training run: its learner, its data, its state, its log and its checkpoints.

    Only `state` decides how the run continues, and every checkpoint holds this state. The sequences, the learning rate
    and the dropout of an update are functions of the state. So k updates, a kill, a resume and N − k updates give
    exactly the same numbers as N updates.
    """

    learner: Learner
    data: RunData
    state: TrainState
    log: RunLog
    saver: BackgroundSaver
    initialized_from: str | None = None
    """The checkpoint whose weights the run began with."""
    sampler: Sampler | None = None
    """Generates samples at each evaluation; None: the run has no samples."""
    sensor: GpuSensor | None = None
    """Reads the GPU's temperature; None if the run does not need it."""
    lock: FolderLock | None = None
    """The lock of the output folder, held until the run ends."""
    is_amid_update: bool = False
    """Whether an update is being applied: the weights may have changed, but `state` does not count the update yet."""
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
        """The settings, including those that depend on the data."""
        return self.learner.config

    @property
    def runtime(self) -> Runtime:
        """The device, its precision and how the ranks share the model."""
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
        """The number of updates of the run, or None while it is unknown."""
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
        """Whether the run has nothing left to do."""
        return self.state.step >= self.state.horizon and not self.owes_evaluation

    @property
    def num_bytes(self) -> int:
        """The bytes of a checkpoint's tensors."""
        return tensor_bytes([self.model.state_dict(), self.optimizer.state_dict()])

    @cached_property
    def val_windows(self) -> list[int]:
        """The indices of the validation windows that every evaluation reads."""
        return fixed_subset(len(self.data.val), self.config.training.eval_sequences) if self.data.val else []

    def batches(self) -> Iterator[tuple[Tensor, ...]]:
        """Iterate over the batches of all updates from the current step to the horizon. Each batch has columns of shape
        (N, T)."""
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
        """Return everything that a checkpoint holds: plain values and tensors only. Every rank must call this method.

        If the model is sharded, only the first rank returns the full tensors. With `as_shards`, each rank returns its
        shards instead.
        """
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
        """Write one checkpoint under the names of `kinds`. With `wait`, return when the checkpoint is on the disk.
        Without `wait`, return as soon as a copy is in memory."""
        self.state.seconds = self.clock.elapsed
        with self.throughput.paused():
            contents = self.contents(as_shards=self.saver.is_sharded)
            if self.world.is_first or self.saver.is_sharded:
                self.saver.save(contents, kinds, wait=wait)

    def keep_snapshot(self) -> None:
        """Keep a copy of the current state in memory, for a rollback before the first save."""
        if self.saver.is_sharded:
            return
        contents = self.contents()
        if self.world.is_first:
            self.saver.keep_snapshot(contents)
