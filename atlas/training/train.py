"""The loop: read it from top to bottom, nothing happens elsewhere.

State that decides what comes next is in `TrainState` and in every checkpoint; everything else about a step
(its sequences, rate, dropout) is a function of it. That is why k steps, a kill and N − k steps equal N.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from atlas.config import AtlasConfig
from atlas.data.sequences.build import SequenceSource
from atlas.data.sequences.loader import batches
from atlas.data.sequences.mixture import order_of
from atlas.errors import AtlasError
from atlas.model import AtlasLM
from atlas.tokenizer import Tokenizer
from atlas.training.checkpoint.atomic_write import tensor_bytes
from atlas.training.checkpoint.load import saved_optimizer
from atlas.training.checkpoint.lock import FolderLock
from atlas.training.checkpoint.manager import CheckpointManager
from atlas.training.checkpoint.manifest import FORMAT_VERSION
from atlas.training.checkpoint.open_saver import open_saver
from atlas.training.checkpoint.validate import check_optimizer_state
from atlas.training.devices.device import Runtime, describe_machine
from atlas.training.devices.gpu_temperature import GpuSensor, cool_down
from atlas.training.devices.memory import collector_spares_the_run
from atlas.training.devices.parallel import gather_full
from atlas.training.devices.signals import StopRequest
from atlas.training.evaluate import Evaluation, evaluate_within_memory, fixed_subset
from atlas.training.guard import count
from atlas.training.horizon import is_out_of_time, plan_horizon
from atlas.training.logs.run_log import RunLog, perplexity
from atlas.training.logs.throughput import Throughput
from atlas.training.loss import LossFunction
from atlas.training.recovery import emergency_save, recover, save_if_sound, save_or_go_back
from atlas.training.samples import Sampler, write_samples
from atlas.training.schedule import RunClock, learning_rate_at
from atlas.training.state import Result, TrainState
from atlas.training.step import Update, Updater


class Trainer:
    """One run on one device: model, data, optimizer, output folder, and where it stands."""

    def __init__(
        self,
        config: AtlasConfig,
        model: AtlasLM,
        tokenizer: Tokenizer,
        train_data: SequenceSource,
        val_data: SequenceSource | None,
        *,
        data_identity: dict[str, Any],
        runtime: Runtime,
        state: TrainState,
        checkpoints: CheckpointManager,
        log: RunLog,
        custom_loss: LossFunction | None = None,
        initialized_from: str | None = None,
        saves_in_background: bool = True,
        sharded: bool = False,
        sensor: GpuSensor | None = None,
        lock: FolderLock | None = None,
        sampler: Sampler | None = None,
    ) -> None:
        self.config = config
        self.model = model.to(runtime.device, runtime.weights_dtype)
        self.model.gradient_checkpointing = config.training.gradient_checkpointing
        self.tokenizer = tokenizer
        self.train_data = train_data
        self.val_data = val_data
        self.val_windows = fixed_subset(len(val_data), config.training.eval_sequences) if val_data else []
        self.order = order_of(train_data, config.seed)
        self.data_identity = data_identity
        self.runtime = runtime
        self.state = state
        self.checkpoints = checkpoints
        self.world = runtime.world
        self.saver = open_saver(
            checkpoints, self.world, sharded=sharded, in_background=saves_in_background, log=log
        )
        self._is_sharded = sharded
        self.log = log
        self.sensor = sensor
        self.lock = lock
        """Held as long as the trainer lives."""
        self.initialized_from = initialized_from
        self.sampler = sampler
        self.updater = Updater(self.model, config, runtime, custom_loss, say=log.say)
        self.optimizer = self.updater.optimizer
        self.stop = StopRequest(log.say, is_alone=self.world.size == 1)
        self._rate = 0.0
        self.is_amid_update = False
        """Whether the weights may have moved without the state that counts it."""
        self.clock = RunClock(config.training.max_hours, before=state.seconds)
        self._timer = Throughput(config, runtime)

    def restore(self, contents: dict[str, Any], source: Path | None = None) -> None:
        """Take optimizer and scaler state from a checkpoint; the weights were there before. Of the shards of `source`
        each rank reads its own part."""
        try:
            saved = saved_optimizer(contents, source, self.optimizer)
            check_optimizer_state(self.optimizer, saved)
            self.updater.load_optimizer_state(saved)
        except (KeyError, ValueError) as error:
            raise AtlasError(
                f"the checkpoint's optimizer state does not fit ({error}): start from its weights with --init-from"
            ) from None
        if self.updater.scaler.is_enabled() and contents.get("scaler_state_dict"):
            self.updater.scaler.load_state_dict(contents["scaler_state_dict"])

    # The loop

    def train(self) -> Result:
        """Train to the horizon, an early stop, the end of the time or an interrupt, and leave a checkpoint."""
        config, state = self.config, self.state
        outcome, is_saved = "finished", True
        self.model.train()
        self.clock = RunClock(config.training.max_hours, before=state.seconds)
        progress = self.log.progress(done=state.step, total=self.total)
        spared = collector_spares_the_run(self.runtime.device)
        with self.stop, self.log.tracked(), progress, self.saver, emergency_save(self), spared as spare:
            self.hold()
            self._catch_up()
            stream = self._batches()
            while state.step < state.horizon and not self.stop.requested:
                if is_out_of_time(self):
                    outcome = "stopped in time"
                    break
                epoch_before = self.epoch
                self.clock.update_begins()
                with self._timer.waiting_for_data():
                    batch = next(stream)
                update = self.train_step(*batch)
                if update is None:
                    break
                self.clock.update_ends()
                spare()
                if update.fault and recover(self, update.fault):
                    stream = self._batches()
                    continue
                if not state.is_planned and self.world.broadcast(self.clock.has_measured):
                    self._plan_horizon()
                last = state.step == state.horizon
                if last or state.step % config.training.log_interval == 0:
                    self.log.train(self._metrics(update), total=self.total)

                kinds = ["epoch"] if self.epoch > epoch_before and not state.bad_in_a_row else []
                evaluation = None
                if self.val_data and (last or state.step % config.training.eval_interval == 0):
                    evaluation = self._evaluate()
                    if evaluation is None:
                        break
                    kinds += self._judge(evaluation.loss)
                stops_early = self._out_of_patience() and not last
                if last or stops_early or state.step % config.checkpoint.save_interval == 0:
                    kinds += self._due_kinds(must=last or stops_early)
                if kinds and not save_or_go_back(self, kinds, evaluation, wait=last or stops_early):
                    stream = self._batches()
                    continue
                if stops_early:
                    outcome = "stopped early"
                    break
                self._cool_down()
            if self.stop.requested and not self.is_complete:
                outcome = "interrupted"
            if outcome in ("interrupted", "stopped in time"):
                is_saved = save_if_sound(self, ["interrupt" if outcome == "interrupted" else "step"])
            self.log.event(outcome, state.step)
        self.log.flush_to_disk()
        saved = self.saver.written if is_saved else []
        return Result(outcome, state.step, state.loss, state.val_loss, saved)

    def train_step(self, inputs: Tensor, targets: Tensor, documents: Tensor | None = None) -> Update | None:
        """One update from (N, T) sequences; None, and no update, when a stop was requested meanwhile."""
        state, at_once = self.state, self.state.micro_batch_size
        loss = self.updater.gradient(inputs, targets, state, stop=self.stop, documents=documents)
        if loss is None:
            return None
        self._rate = state.rate_scale * learning_rate_at(state.step, self.config.training, state.horizon)
        self.is_amid_update = True
        update = self.updater.apply(loss, state, rate=self._rate)
        state.step += 1
        state.sequences_consumed += self.config.training.sequences_per_update
        count(state, update.loss, update.grad_norm, update.fault, guard=self.config.guard)
        self.is_amid_update = False
        self._note_memory("training", at_once, state.micro_batch_size)
        self._timer.count(inputs.numel() * self.world.size)
        self.log.advance(state.step)
        return update

    def _batches(self) -> Iterator[tuple[Tensor, ...]]:
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
            rank=self.world.rank,
            world_size=self.world.size,
        )

    @property
    def total(self) -> int | None:
        """The updates of the whole run, once they are known."""
        return self.state.horizon if self.state.is_planned else None

    @property
    def epoch(self) -> int:
        """Whole passes over the training data so far."""
        return self.state.sequences_consumed // len(self.train_data)

    def _metrics(self, update: Update) -> dict[str, Any]:
        state = self.state
        metrics = {
            "step": state.step,
            "epoch": self.epoch,
            "loss": update.loss,
            "perplexity": perplexity(update.loss),
            "learning_rate": self._rate,
            "grad_norm": update.grad_norm,
            "sequences_consumed": state.sequences_consumed,
            "tokens": state.sequences_consumed * self.config.model.max_seq_len,
            "seconds": self.clock.elapsed,
            **self._timer.metrics(),
        }
        return metrics | (self.sensor.read().metrics() if self.sensor else {})

    # Between updates

    def _plan_horizon(self) -> None:
        plan_horizon(self)

    def _note_memory(self, work: str, before: int, sequences_at_once: int) -> None:
        """Log that memory ran out, if fewer sequences run at once than before."""
        if sequences_at_once < before:
            self.log.event("out of memory", self.state.step, work=work, sequences_at_once=sequences_at_once)

    def _cool_down(self) -> None:
        if self.sensor:
            limit = self.config.guard.max_gpu_temp
            with self._timer.paused():
                cool_down(self.sensor, limit=limit, should_stop=lambda: self.stop.requested, say=self.log.say)

    # Judging and keeping

    def _catch_up(self) -> None:
        """Do the evaluation that an interrupt cut short, so that the run is the one without the interrupt."""
        if not self.owes_evaluation:
            return
        if evaluation := self._evaluate():
            last = self.state.step == self.state.horizon
            if kinds := self._judge(evaluation.loss) + (["step"] if last else []):
                save_or_go_back(self, kinds, evaluation, wait=last)

    @property
    def owes_evaluation(self) -> bool:
        """Whether the step that the run stands at should have been evaluated, and was not."""
        return self.val_data is not None and self.state.owes_evaluation(self.config.training.eval_interval)

    @property
    def is_complete(self) -> bool:
        return self.state.step >= self.state.horizon and not self.owes_evaluation

    def loss_on(self, windows: list[int]) -> Evaluation | None:
        assert self.val_data is not None
        return evaluate_within_memory(
            self.updater.wrapped if self.runtime.parallel == "fsdp" else self.updater.objective,
            self.val_data,
            windows,
            state=self.state,
            runtime=self.runtime,
            stop=self.stop,
            say=self.log.say,
        )

    def _evaluate(self) -> Evaluation | None:
        """Validation loss on the fixed subset, logged; None if a stop was requested meanwhile."""
        state, at_once = self.state, self.state.eval_batch_size
        with self._timer.paused():
            evaluation = self.loss_on(self.val_windows)
        self._note_memory("evaluation", at_once, state.eval_batch_size)
        if evaluation is None:
            return None
        self.log.validation(
            {
                "step": state.step,
                "tokens": state.sequences_consumed * self.config.model.max_seq_len,
                "seconds": self.clock.elapsed,
                "val_loss": evaluation.loss,
                "val_perplexity": evaluation.perplexity,
                "bits_per_byte": evaluation.bits_per_byte,
            },
            note=" (best)" if evaluation.loss < state.best_loss else "",
        )
        state.note_evaluation(evaluation.loss)
        with self._timer.paused():
            write_samples(self)
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

    def _due_kinds(self, *, must: bool) -> list[str]:
        """What a save at this step is to be called. In a streak of updates that were not applied there is none:
        it would be what the run goes back to."""
        state = self.state
        kinds = ["step"] if must or not state.bad_in_a_row else []
        if state.step > state.trouble_at:
            state.rollbacks = 0
        if not self.val_data and state.loss_since_save.count and not state.bad_in_a_row:
            kinds += self._judge(state.loss_since_save.mean)
            state.loss_since_save.reset()
        return kinds

    def save(self, kinds: list[str], *, wait: bool) -> None:
        """Write one checkpoint under the names of `kinds`; return when it is on the disk; without `wait`, copied."""
        state = self.state
        state.seconds = self.clock.elapsed
        facts = {
            "step": state.step,
            "epoch": self.epoch,
            "loss": state.loss,
            "val_loss": state.val_loss,
            "perplexity": None if state.loss is None else perplexity(state.loss),
            "sequences_consumed": state.sequences_consumed,
            "model": self.config.model.model_dump(mode="json"),
            "data_fingerprint": self.data_identity["fingerprint"],
            "initialized_from": self.initialized_from,
        }
        with self._timer.paused():
            contents = self.contents(as_shards=self._is_sharded)
            if self.world.is_first or self._is_sharded:
                self.saver.save(contents, kinds, facts, wait=wait)

    def hold(self) -> None:
        """Keep the state as it is to go back to."""
        if self._is_sharded:
            return
        contents = self.contents()
        if self.world.is_first:
            self.saver.hold(contents)

    @property
    def num_bytes(self) -> int:
        """Of a checkpoint's tensors."""
        return tensor_bytes([self.model.state_dict(), self.optimizer.state_dict()])

    def contents(self, *, as_shards: bool = False) -> dict[str, Any]:
        """Everything a checkpoint holds: plain values and tensors only. Every rank must call it; where the model is in
        shards, only the first has them whole afterwards, and none `as_shards`."""
        tensors = {
            "model_state_dict": dict(self.model.state_dict()),
            "optimizer_state_dict": self.optimizer.state_dict(),
        }
        return {
            "format_version": FORMAT_VERSION,
            **(tensors if as_shards else gather_full(tensors, keep=self.world.is_first)),
            "scaler_state_dict": self.updater.scaler.state_dict(),
            **asdict(self.state),
            "epoch": self.epoch,
            "config": self.config.model_dump(mode="json"),
            "tokenizer": self.tokenizer.state(),
            "data": self.data_identity,
            "initialized_from": self.initialized_from,
            "machine": describe_machine(self.runtime),
        }
