"""The parts of a run. `step.py` does one update of the `Learner`. `train.py` is the training loop of a `Run`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from atlas.config import AtlasConfig, TrackingConfig
from atlas.data.sequences.build import SequenceSource
from atlas.data.sequences.conversations import ChatDataset
from atlas.data.sequences.loader import batches
from atlas.data.sequences.mixture import order_of
from atlas.data.sequences.verify import DatasetVerifier
from atlas.model import AtlasLM
from atlas.tokenizer import Tokenizer
from atlas.training.checkpoint.async_saver import BackgroundSaver
from atlas.training.checkpoint.atomic_write import tensor_bytes
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

_SECONDS_BETWEEN_EPOCHS = 60.0


class Learner:
    """The objects that an update uses: a model, its loss function and a new optimizer on one device."""

    def __init__(
        self, model: AtlasLM, config: AtlasConfig, runtime: Runtime, custom_loss: LossFunction | None = None
    ) -> None:
        self.config, self.runtime = config, runtime
        self.model = model.to(runtime.device, runtime.weights_dtype)
        self.model.gradient_checkpointing = config.training.gradient_checkpointing
        self.objective = SummedLoss(model, custom_loss, compiled=runtime.compiles)
        self.wrapped = wrap(self.objective, config, runtime.world, runtime.parallel, runtime.device)
        """`objective` wrapped by DDP. With FSDP2, or in a run of one process, this is `objective` itself."""
        self.optimizer = build_optimizer(model, config.training, runtime.dtype)
        self.scaler = runtime.grad_scaler()
        self.has_computed = False
        """Whether a micro-batch was computed."""
        self.proven = (0, 0)
        """A micro-batch size, and the number of updates (at most 3) with this size that fitted into memory.
        `micro_batch.py` uses this pair."""

    def load_optimizer_state(self, saved: dict[str, Any]) -> None:
        """Load an optimizer's state dict, whose tensors may be full or sharded.

        PyTorch casts the state of a parameter to the parameter's dtype. Atlas keeps the state of bf16 weights in fp32,
        so the weights become fp32 while the state is loaded.
        """
        self.model.float()
        self.optimizer.load_state_dict(sharded_state(saved, self.optimizer))
        self.model.to(self.runtime.weights_dtype)


Sampler = Callable[[AtlasLM, Tokenizer, TrackingConfig, int, Callable[[], bool]], list[str]]
"""`(model, tokenizer, config.tracking, seed, should_stop)` → `tracking.samples` generated texts. The model is in
evaluation mode. A sampler uses its own random generator. The code that starts a run passes in the sampler of
`atlas.inference`."""


@dataclass
class RunData:
    """The data of a run: its tokenizer and its sequences. Every checkpoint stores `identity`, which identifies the
    data. `verifier` compares the bytes of the data with those that were prepared."""

    tokenizer: Tokenizer
    train: SequenceSource
    val: SequenceSource | None
    identity: dict[str, Any]
    verifier: DatasetVerifier


@dataclass
class Run:
    """One training run: its learner, its data, its state, its log and its checkpoints.

    Besides the weights and the optimizer's state, only `state` decides how the run continues. Every checkpoint stores
    all three. The sequences, the learning rate and the dropout of an update are functions of `state`. So on a CPU, k
    updates, a kill, a resume and N − k updates give exactly the same numbers as N updates.
    """

    learner: Learner
    data: RunData
    state: TrainState
    log: RunLog
    saver: BackgroundSaver
    initialized_from: str | None = None
    """The checkpoint whose weights the run began with."""
    sampler: Sampler | None = None
    """The function that generates samples at each evaluation, or None if the run logs no samples."""
    sensor: GpuSensor | None = None
    """The sensor of the run's NVIDIA GPU, or None if there is no sensor."""
    is_amid_update: bool = False
    """Whether an update is being applied: the weights may have changed, but `state` does not count the update yet."""
    saved_at: float = 0.0
    """The seconds of training before the last save, or before this start of the run."""
    stops_early: bool = False
    """Whether the run ends after this step because the validation loss no longer falls."""
    stop: StopRequest = field(init=False)
    clock: RunClock = field(init=False)
    throughput: Throughput = field(init=False)

    def __post_init__(self) -> None:
        self.stop = StopRequest(self.log.say, is_alone=self.world.size == 1)
        self.clock = RunClock(self.config.training.max_hours, before=self.state.seconds)
        self.saved_at = self.state.seconds
        self.throughput = Throughput(self.config, self.runtime)

    @property
    def config(self) -> AtlasConfig:
        """The settings of the run, including the settings that depend on the data."""
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
        """The number of updates of the run, or None while this number is not planned yet."""
        return self.state.horizon if self.state.is_planned else None

    @property
    def epoch(self) -> int:
        """The number of complete passes over the training data so far."""
        return self.state.sequences_consumed // len(self.data.train)

    @property
    def has_ended_epoch(self) -> bool:
        """Whether the last update reached the end of a pass over the training data."""
        before = self.state.sequences_consumed - self.config.training.sequences_per_update
        return self.epoch > before // len(self.data.train)

    @property
    def saves_epoch(self) -> bool:
        """Whether to save at the end of an epoch. An epoch of a few conversations takes a second, so such a run saves
        no epoch within `_SECONDS_BETWEEN_EPOCHS` of its last save. Every rank must read this property."""
        if not isinstance(self.data.train, ChatDataset):
            return True
        is_due: bool = self.world.broadcast(self.clock.elapsed - self.saved_at >= _SECONDS_BETWEEN_EPOCHS)
        return is_due

    @property
    def owes_evaluation(self) -> bool:
        """Whether an evaluation is due at the current step and has not happened yet."""
        return self.data.val is not None and self.state.owes_evaluation(self.config.training.eval_interval)

    @property
    def is_complete(self) -> bool:
        """Whether the run has nothing left to do."""
        return self.state.step >= self.state.horizon and not self.owes_evaluation

    @property
    def num_bytes(self) -> int:
        """The size of a checkpoint's tensors, in bytes."""
        return tensor_bytes([self.model.state_dict(), self.optimizer.state_dict()])

    @cached_property
    def val_windows(self) -> list[int]:
        """The indices of the validation windows that every evaluation reads."""
        return fixed_subset(len(self.data.val), self.config.training.eval_sequences) if self.data.val else []

    def batches(self) -> Iterator[tuple[Tensor, ...]]:
        """Iterate over this rank's batches of all updates from the current step to the horizon. A batch is a tuple of
        (N, T) tensors: inputs, targets and, with document masks, document numbers."""
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
        own shards instead.
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
        """Save one checkpoint under the names of all `kinds`. With `wait`, or without background saves, return when the
        checkpoint is on the disk. Otherwise return as soon as a copy is in memory."""
        self.state.seconds = self.saved_at = self.clock.elapsed
        with self.throughput.paused():
            if self.world.size > self.world.local_size:  # each machine verifies its own copy of the dataset
                with self.world.in_step():
                    self.data.verifier.confirm(self.log.say)
            contents = self.contents(as_shards=self.saver.is_sharded)
            if self.world.is_first or self.saver.is_sharded:
                self.saver.save(contents, kinds, wait=wait)

    def check_files(self) -> None:
        """Raise `AtlasError` if another run has taken the output folder, or if a file of the dataset is known to have
        changed."""
        self.checkpoints.check_lock()
        self.data.verifier.check()

    def keep_snapshot(self) -> None:
        """Keep a copy of the current state in memory, for a rollback before the first save. Runs that save shards, or
        do not save in the background, keep no copy."""
        if self.saver.is_sharded:
            return
        contents = self.contents()
        if self.world.is_first:
            self.saver.keep_snapshot(contents)
