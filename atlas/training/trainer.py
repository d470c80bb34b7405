"""The loop: read it from top to bottom, nothing happens elsewhere.

State that decides what comes next is in `TrainState` and in every checkpoint; everything else about a step
(its sequences, rate, dropout) is a function of it. That is why k steps, a kill and N − k steps equal N.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atlas.config import AtlasConfig
from atlas.data.dataset import IGNORE_INDEX, SequenceDataset
from atlas.data.loader import SequenceOrder, batches
from atlas.errors import AtlasError
from atlas.model import AtlasLM
from atlas.tokenizer import Tokenizer
from atlas.training.checkpoint import CheckpointManager
from atlas.training.evaluate import Evaluation, evaluate, fixed_subset
from atlas.training.guard import require_finite
from atlas.training.interrupt import StopRequest
from atlas.training.loss import LossFunction, compute_lm_loss
from atlas.training.manifest import FORMAT_VERSION
from atlas.training.metrics import RunLog, RunningMean, Throughput, perplexity
from atlas.training.optimizer import build_optimizer
from atlas.training.runtime import Runtime, describe_machine, seed_micro_step
from atlas.training.schedule import learning_rate_at


@dataclass
class TrainState:
    """Where a run stands. Plain numbers, all of them in the checkpoint."""

    horizon: int
    micro_batch_size: int
    step: int = 0
    sequences_consumed: int = 0
    best_loss: float = math.inf
    evaluations_since_best: int = 0
    val_loss: float | None = None
    evaluated_at: int = 0
    train_loss_at_evaluation: float = math.inf
    val_rises: int = 0

    @classmethod
    def of(cls, contents: dict[str, Any]) -> TrainState:
        return cls(**{name: contents[name] for name in cls.__dataclass_fields__ if name in contents})


@dataclass
class Result:
    """What a call of `train` came to. `outcome` is `finished`, `stopped early` or `interrupted`."""

    outcome: str
    step: int
    loss: float | None
    val_loss: float | None
    saved: list[Path]


class Trainer:
    """One run on one device: model, data, optimizer, output folder, and where it stands."""

    def __init__(
        self,
        config: AtlasConfig,
        model: AtlasLM,
        tokenizer: Tokenizer,
        train_data: SequenceDataset,
        val_data: SequenceDataset | None,
        *,
        data_identity: dict[str, Any],
        runtime: Runtime,
        state: TrainState,
        checkpoints: CheckpointManager,
        log: RunLog,
        custom_loss: LossFunction | None = None,
        initialized_from: str | None = None,
    ) -> None:
        self.config = config
        self.model = model.to(runtime.device)
        self.model.gradient_checkpointing = config.training.gradient_checkpointing
        self.tokenizer = tokenizer
        self.train_data = train_data
        self.val_data = val_data
        self.val_windows = fixed_subset(len(val_data), config.training.eval_sequences) if val_data else []
        self.order = SequenceOrder(config.seed, len(train_data))
        self.data_identity = data_identity
        self.runtime = runtime
        self.state = state
        self.checkpoints = checkpoints
        self.log = log
        self.initialized_from = initialized_from
        self.optimizer = build_optimizer(self.model, config.training)
        self.scaler = runtime.grad_scaler()
        self.custom_loss = custom_loss
        self.stop = StopRequest(log.say)
        self.last_saved: list[Path] = []
        self._last_loss: Tensor | None = None
        self._last_grad_norm: Tensor | float = math.nan
        # The mean training loss since the last save judges the best where there is no validation data.
        self._loss_since_save, self._loss_since_evaluation = (
            RunningMean(runtime.device),
            RunningMean(runtime.device),
        )
        self._timer = Throughput()

    def restore(self, contents: dict[str, Any]) -> None:
        """Take optimizer and scaler state from a checkpoint; the weights were there before."""
        try:
            self.optimizer.load_state_dict(contents["optimizer_state_dict"])
        except (KeyError, ValueError) as error:
            raise AtlasError(
                f"the checkpoint's optimizer state does not fit ({error}): start from its weights with --init-from"
            ) from None
        if self.scaler.is_enabled() and contents.get("scaler_state_dict"):
            self.scaler.load_state_dict(contents["scaler_state_dict"])
        if contents.get("loss") is not None:
            self._last_loss = torch.tensor(contents["loss"], device=self.runtime.device)
            self._loss_since_evaluation.add(self._last_loss)

    # The loop

    def train(self) -> Result:
        """Train to the horizon, an early stop or an interrupt, and leave a checkpoint of the last step."""
        config, state = self.config, self.state
        outcome = "finished"
        self.model.train()
        with self.stop, self.log.progress(done=state.step, total=state.horizon):
            self._catch_up()
            for inputs, targets in self._batches():
                epoch_before = self.epoch
                if not self.train_step(inputs, targets):
                    break
                last = state.step == state.horizon
                if last or state.step % config.training.log_interval == 0:
                    self.log.train(self._metrics(), total=state.horizon)

                kinds = ["epoch"] if self.epoch > epoch_before else []
                if self.val_data and (last or state.step % config.training.eval_interval == 0):
                    evaluation = self._evaluate()
                    if evaluation is None:
                        break
                    kinds += self._judge(evaluation.loss)
                stops_early = self._out_of_patience() and not last
                if last or stops_early or state.step % config.checkpoint.save_interval == 0:
                    kinds.append("step")
                    if not self.val_data:
                        kinds += self._judge(self._loss_since_save.mean())
                if kinds:
                    self.save(kinds)
                if stops_early:
                    self.log.say(
                        f"step {state.step}: {state.evaluations_since_best} evaluations without a better one"
                    )
                    outcome = "stopped early"
                    break
            if self.stop.requested:
                outcome = "interrupted"
                self.save(["interrupt"])
        return Result(outcome, state.step, self.loss, state.val_loss, self.last_saved)

    def train_step(self, inputs: Tensor, targets: Tensor) -> bool:
        """One update from (N, T) sequences; False, and no update, when a stop was requested meanwhile.

        The loss is summed over valid tokens and divided by their number in the whole update, so that
        the split into micro-batches changes nothing.
        """
        state, device = self.state, self.runtime.device
        total_valid = max(1, int((targets != IGNORE_INDEX).sum()))
        total_loss = torch.zeros((), device=device)
        for start in range(0, len(inputs), state.micro_batch_size):
            if self.stop.requested:
                self.optimizer.zero_grad()
                return False
            micro = slice(start, start + state.micro_batch_size)
            seed_micro_step(self.config.seed, state.step, 0, start)
            with self.runtime.autocast():
                loss = self._loss(inputs[micro], targets[micro], total_valid)
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total_loss += loss.detach()
        self.scaler.unscale_(self.optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), self.config.training.grad_clip or math.inf
        )
        if not self.scaler.is_enabled():  # the scaler skips such an update itself and lowers its scale
            first = state.sequences_consumed
            require_finite(
                float(total_loss),
                float(grad_norm),
                step=state.step + 1,
                first=first,
                last=first + len(inputs) - 1,
            )
        rate = learning_rate_at(state.step, self.config.training, state.horizon)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

        state.step += 1
        state.sequences_consumed += len(inputs)
        self._last_loss, self._last_grad_norm = total_loss, grad_norm
        self._loss_since_save.add(total_loss)
        self._loss_since_evaluation.add(total_loss)
        self._timer.count(inputs.numel())
        self.log.advance(state.step)
        return True

    def _loss(self, inputs: Tensor, targets: Tensor, total_valid: int) -> Tensor:
        """This micro-batch's share of the update's loss."""
        num_valid = int((targets != IGNORE_INDEX).sum())
        inputs = inputs.to(self.runtime.device, non_blocking=True)
        targets = targets.to(self.runtime.device, non_blocking=True)
        logits = self.model(inputs)
        if self.custom_loss is None:
            return compute_lm_loss(logits, targets, reduction="sum") / total_valid
        return self.custom_loss(logits, targets, mask=targets != IGNORE_INDEX) * (num_valid / total_valid)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The updates' sequences, from where the run stands to its horizon."""
        per_update = self.config.training.sequences_per_update
        return batches(
            self.train_data,
            self.order,
            start=self.state.sequences_consumed,
            num_updates=self.state.horizon - self.state.step,
            sequences_per_update=per_update,
            num_workers=self.config.data.num_workers,
            pin_memory=self.runtime.device.type == "cuda",
        )

    # Judging and keeping

    @property
    def epoch(self) -> int:
        """Whole passes over the training data so far."""
        return self.state.sequences_consumed // len(self.train_data)

    @property
    def loss(self) -> float | None:
        """The loss of the last update; None before the first."""
        return None if self._last_loss is None else float(self._last_loss)

    def _metrics(self) -> dict[str, Any]:
        state, loss = self.state, float(self._last_loss)  # type: ignore[arg-type]
        steps_per_second, tokens_per_second = self._timer.rates()
        return {
            "step": state.step,
            "epoch": self.epoch,
            "loss": loss,
            "perplexity": perplexity(loss),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "grad_norm": float(self._last_grad_norm),
            "steps_per_second": steps_per_second,
            "tokens_per_second": tokens_per_second,
            "sequences_consumed": state.sequences_consumed,
        }

    def _catch_up(self) -> None:
        """Do the evaluation that an interrupt cut short, so that the run is the one without the interrupt."""
        if not self.owes_evaluation:
            return
        if evaluation := self._evaluate():
            last = ["step"] if self.state.step == self.state.horizon else []
            if kinds := self._judge(evaluation.loss) + last:
                self.save(kinds)

    @property
    def owes_evaluation(self) -> bool:
        """Whether the step that the run stands at should have been evaluated, and was not."""
        state = self.state
        due = state.step == state.horizon or state.step % self.config.training.eval_interval == 0
        return self.val_data is not None and due and state.evaluated_at < state.step

    @property
    def is_complete(self) -> bool:
        return self.state.step >= self.state.horizon and not self.owes_evaluation

    def _evaluate(self) -> Evaluation | None:
        """Validation loss on the fixed subset, logged; None if a stop was requested meanwhile."""
        assert self.val_data is not None
        state = self.state
        with self._timer.paused():
            evaluation = evaluate(
                self.model,
                self.val_data,
                self.val_windows,
                batch_size=state.micro_batch_size,
                runtime=self.runtime,
                should_stop=lambda: self.stop.requested,
            )
        if evaluation is None:
            return None
        train_loss = self._loss_since_evaluation.mean()
        learns_by_heart = (
            evaluation.loss > (state.val_loss or math.inf) and train_loss < state.train_loss_at_evaluation
        )
        state.val_rises = state.val_rises + 1 if learns_by_heart else 0
        state.val_loss, state.train_loss_at_evaluation = evaluation.loss, train_loss
        state.evaluated_at = state.step
        self._loss_since_evaluation.reset()
        self.log.validation(
            {
                "step": state.step,
                "val_loss": evaluation.loss,
                "val_perplexity": evaluation.perplexity,
                "bits_per_byte": evaluation.bits_per_byte,
            },
            note=" (best)" if evaluation.loss < state.best_loss else "",
        )
        if state.val_rises == 2:
            self.log.say(
                "warning: validation loss rises while training loss falls: the model is learning its text by heart; "
                "more text, a smaller model, dropout or an earlier stop (training.early_stopping_patience) help"
            )
        return evaluation

    def _judge(self, loss: float) -> list[str]:
        """["best"] if `loss` is the lowest so far."""
        if loss < self.state.best_loss:
            self.state.best_loss, self.state.evaluations_since_best = loss, 0
            return ["best"]
        self.state.evaluations_since_best += 1
        return []

    def _out_of_patience(self) -> bool:
        patience = self.config.training.early_stopping_patience
        return patience is not None and self.state.evaluations_since_best >= patience

    def save(self, kinds: list[str]) -> None:
        """Write one checkpoint under the names of `kinds`."""
        state, loss = self.state, self.loss
        facts = {
            "step": state.step,
            "epoch": self.epoch,
            "loss": loss,
            "val_loss": state.val_loss,
            "perplexity": None if loss is None else perplexity(loss),
            "sequences_consumed": state.sequences_consumed,
            "model": self.config.model.model_dump(mode="json"),
            "data_fingerprint": self.data_identity["fingerprint"],
            "initialized_from": self.initialized_from,
        }
        with self._timer.paused():
            self.last_saved = self.checkpoints.save(self.contents(), kinds, facts)
        self._loss_since_save.reset()

    def contents(self) -> dict[str, Any]:
        """Everything a checkpoint holds: plain values and tensors only."""
        return {
            "format_version": FORMAT_VERSION,
            "model_state_dict": dict(self.model.state_dict()),
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scaler_state_dict": self.scaler.state_dict(),
            **asdict(self.state),
            "epoch": self.epoch,
            "loss": self.loss,
            "config": self.config.model_dump(mode="json"),
            "tokenizer": self.tokenizer.state(),
            "data": self.data_identity,
            "initialized_from": self.initialized_from,
            "machine": describe_machine(self.runtime),
        }
