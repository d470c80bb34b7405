"""The state of a run: plain numbers, which every checkpoint stores."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atlas.config import TrainingConfig

MAX_ROLLBACKS = 3
ROLLBACK_RATE = 0.5
"""Each rollback multiplies the learning rate by this factor."""


@dataclass
class Result:
    """The result of `train`. `outcome` is `finished`, `stopped early`, `stopped in time` or `interrupted`."""

    outcome: str
    step: int
    loss: float | None
    val_loss: float | None
    saved: list[Path]


@dataclass
class RunningMean:
    """The mean of some values."""

    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        """Add a value."""
        self.total += value
        self.count += 1

    @property
    def mean(self) -> float:
        """The mean, or NaN without values."""
        return self.total / self.count if self.count else math.nan


@dataclass
class TrainState:
    """Everything that decides how a run continues, besides the weights and the optimizer's state. The sequences and the
    learning rate of a step are functions of this state.

    So on a CPU, k steps, a kill, a resume and N − k steps give exactly the same numbers as N steps.
    """

    horizon: int
    """The number of updates after which the run ends."""
    micro_batch_size: int
    eval_batch_size: int = 1
    is_planned: bool = True
    """Whether `horizon` is final. With `training.max_hours`, Atlas computes the final horizon after it has measured the
    speed."""
    step: int = 0
    sequences_consumed: int = 0
    seconds: float = 0.0
    """The training time in seconds, including the time before the run was resumed."""

    loss: float | None = None
    """The loss of the last update that was applied, or None before the first update."""
    first_loss: float | None = None
    """The loss of the first update that was applied."""
    best_loss: float = math.inf
    evaluations_since_best: int = 0
    val_loss: float | None = None
    evaluated_at: int = 0
    train_loss_at_evaluation: float = math.inf
    val_rises: int = 0
    loss_since_save: RunningMean = field(default_factory=RunningMean)
    """The mean training loss since the last save. Without validation data, this mean selects the best checkpoint."""
    loss_since_evaluation: RunningMean = field(default_factory=RunningMean)

    skipped: int = 0
    """The number of updates that were not applied (see `guard.py`)."""
    bad_in_a_row: int = 0
    """The number of faulty updates since the last update that was applied. Spikes and normal fp16 overflows do not
    count."""
    rollbacks: int = 0
    """The number of rollbacks since the run last passed step `trouble_at`."""
    trouble_at: int = 0
    """The latest step from which the run was rolled back."""
    went_back_to: int = 0
    """The step that the last rollback returned to."""
    rate_scale: float = 1.0
    recent_losses: list[float] = field(default_factory=list)
    recent_norms: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, contents: dict[str, Any]) -> TrainState:
        """Return the state that a checkpoint stores. Older checkpoints store no `eval_batch_size`, so the state uses
        their `micro_batch_size` instead."""
        known = {name: contents[name] for name in cls.__dataclass_fields__ if name in contents}
        for name in ("loss_since_save", "loss_since_evaluation"):
            known[name] = RunningMean(**known.get(name, {}))
        return cls(**{"eval_batch_size": contents["micro_batch_size"], **known})

    def note_evaluation(self, val_loss: float) -> None:
        """Store a validation loss. Count in `val_rises` the consecutive evaluations in which this loss rose while the
        training loss fell."""
        train_loss = self.loss_since_evaluation.mean
        memorizes = val_loss > (self.val_loss or math.inf) and train_loss < self.train_loss_at_evaluation
        self.val_rises = self.val_rises + 1 if memorizes else 0
        self.val_loss, self.train_loss_at_evaluation = val_loss, train_loss
        self.evaluated_at = self.step
        self.loss_since_evaluation = RunningMean()

    def update_best(self, loss: float) -> bool:
        """Record the loss that selects the best checkpoint: the validation loss or, without validation data, the mean
        training loss. Return whether `loss` is the lowest so far."""
        if loss < self.best_loss:
            self.best_loss, self.evaluations_since_best = loss, 0
            return True
        self.evaluations_since_best += 1
        return False

    def is_out_of_patience(self, training: TrainingConfig) -> bool:
        """Whether none of the last `training.early_stopping_patience` evaluations had a new lowest loss."""
        patience = training.early_stopping_patience
        return patience is not None and self.evaluations_since_best >= patience

    def end_save_interval(self, *, is_final: bool, has_validation: bool) -> list[str]:
        """Return the kinds of checkpoint to save at this step.

        After a faulty update, only the final save is due. Any other save would become the target of the next rollback.
        """
        kinds = ["step"] if is_final or not self.bad_in_a_row else []
        if self.step > self.trouble_at:
            self.rollbacks = 0
        if not has_validation and self.loss_since_save.count and not self.bad_in_a_row:
            kinds += ["best"] if self.update_best(self.loss_since_save.mean) else []
            self.loss_since_save = RunningMean()
        return kinds

    def owes_evaluation(self, interval: int) -> bool:
        """Whether an evaluation is due at the current step and has not happened yet."""
        return (self.step == self.horizon or self.step % interval == 0) and self.evaluated_at < self.step

    def roll_back_to(self, contents: dict[str, Any]) -> None:
        """Restore the state of an earlier checkpoint, but skip the data used since then, and lower the learning
        rate."""
        past = TrainState.of(contents)
        past.horizon, past.is_planned = self.horizon, self.is_planned
        past.micro_batch_size, past.eval_batch_size = self.micro_batch_size, self.eval_batch_size
        past.sequences_consumed, past.skipped = self.sequences_consumed, self.skipped
        past.seconds = self.seconds
        past.rollbacks, past.rate_scale = self.rollbacks + 1, self.rate_scale * ROLLBACK_RATE
        past.trouble_at, past.went_back_to = max(self.trouble_at, self.step), past.step
        past.bad_in_a_row = 0
        vars(self).update(vars(past))
