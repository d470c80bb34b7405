"""One update: micro-batches to a gradient, the gradient judged, and the optimizer's step if it is sound."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from atlas.config import AtlasConfig
from atlas.data.sequences.dataset import IGNORE_INDEX
from atlas.errors import AtlasError, EndedElsewhere
from atlas.model import AtlasLM, add_lora, build_model
from atlas.planning import memory_advice
from atlas.training.devices.compile import compile_blocks, filled_up, refuse_failed_compilation
from atlas.training.devices.device import Runtime, rounding_generator, seed_micro_step
from atlas.training.devices.memory import is_out_of_memory, release_memory, remember_micro_batch
from atlas.training.devices.parallel import gather_full, no_sync_except_last, sharded_state, wrap
from atlas.training.devices.signals import Stopped, StopRequest
from atlas.training.guard import Fault, check_update
from atlas.training.loss import LossFunction, SummedLoss, load_loss
from atlas.training.optimizers.bf16 import step_rounding_weights
from atlas.training.optimizers.build import build_optimizer
from atlas.training.state import TrainState


def fresh_updater(config: AtlasConfig, runtime: Runtime, *, say: Callable[[str], None]) -> Updater:
    """The model of `config` with new weights, and what a run moves it by; without the run's data and folder."""
    model = build_model(config.model, seed=config.seed)
    if config.lora.rank:
        add_lora(model, config.lora)
    model = model.to(runtime.device, runtime.weights_dtype).train()
    model.gradient_checkpointing = config.training.gradient_checkpointing
    if runtime.compiles:
        compile_blocks(model)
    custom_loss = load_loss(config.training.loss) if config.training.loss else None
    return Updater(model, config, runtime, custom_loss, say=say)


_PROVEN = 3
"""Updates of so many sequences at once after which several ranks take it that memory suffices."""


class RanOutElsewhere(Exception):
    """Another rank ran out of memory in this update."""


@dataclass(frozen=True)
class Update:
    """What an update came to; with a `fault` it was not applied."""

    loss: float
    grad_norm: float
    fault: Fault | None


class Updater:
    """The model, its optimizer, and how a batch moves the one by the other."""

    def __init__(
        self,
        model: AtlasLM,
        config: AtlasConfig,
        runtime: Runtime,
        custom_loss: LossFunction | None,
        *,
        say: Callable[[str], None],
    ) -> None:
        self.model = model
        self.config = config
        self.runtime = runtime
        self.world = runtime.world
        self._done = (0, 0)
        """Of how many sequences at once, and of those how many updates, up to `_PROVEN`."""
        self._num_valid = 0
        """Targets in the update of all ranks."""
        self.say = say
        self.objective = SummedLoss(model, custom_loss, compiled=runtime.compiles)
        self.wrapped = wrap(self.objective, config, runtime.world, runtime.parallel, runtime.device)
        self.optimizer = build_optimizer(model, config.training)
        self.scaler = runtime.grad_scaler()
        self.rounds = runtime.weights_dtype != torch.float32

    def _clear_gradient(self) -> None:
        """DDP keeps the memory of gradients, and what it has no memory for yet would be made beside it."""
        self.optimizer.zero_grad(set_to_none=self.runtime.parallel != "ddp")

    def load_optimizer_state(self, saved: dict[str, Any]) -> None:
        """`saved` as the optimizer's state dict. PyTorch gives a state the dtype of its parameter; that of weights in
        bf16 is fp32 here, and so are they while it is loaded."""
        self.model.float()
        self.optimizer.load_state_dict(sharded_state(saved, self.optimizer))
        self.model.to(self.runtime.weights_dtype)

    def gradient(
        self,
        inputs: Tensor,
        targets: Tensor,
        state: TrainState,
        *,
        stop: StopRequest,
        documents: Tensor | None = None,
    ) -> Tensor | None:
        """The gradient of (N, T) sequences, in the parameters; their loss, a scalar on the device. None, and no
        gradient, on a stop.

        Where memory runs out, fewer sequences run at once from then on, and these are done again. Several ranks do so
        together in the first updates of so many at once, unless one runs out while it adds up gradients (or weights, in
        shards) with the others. Later they do not ask one another any more, since all would wait for the slowest before
        each backward pass.
        """
        asked = min(state.micro_batch_size, len(inputs))
        while True:
            proven = self._done == (state.micro_batch_size, _PROVEN)
            self._runs_with_others = self.world.size > 1 and (proven or self.runtime.parallel == "fsdp")
            try:
                with stop.at_once(enabled=self.runtime.compiles):
                    loss = self._accumulate(inputs, targets, documents, state, stop)
                break
            except Stopped:
                loss = None
                break
            except RanOutElsewhere:
                if min(state.micro_batch_size, len(inputs)) == 1:
                    raise EndedElsewhere from None
            except (RuntimeError, MemoryError) as error:
                refuse_failed_compilation(error)
                if not is_out_of_memory(error):
                    raise
                if self._runs_with_others:
                    self._end_all(state, len(inputs))
                self.world.any(True)
            # Here and not above: the exception holds on to the tensors of what failed.
            self._run_fewer_at_once(state, len(inputs))
        size, times = self._done
        self._done = state.micro_batch_size, min(_PROVEN, times + 1) if size == state.micro_batch_size else 1
        if loss is None:
            self._clear_gradient()
        elif state.micro_batch_size < asked:
            total = len(inputs) * self.world.size
            self.say(
                f"step {state.step + 1}: out of memory with {asked} sequences at once: {state.micro_batch_size} from "
                f"now on. An update still takes {total}. This is remembered for this machine and model; "
                "--set training.micro_batch_size=N sets it"
            )
            remember_micro_batch(self.config, self.runtime.device, state.micro_batch_size)
        return loss

    def _end_all(self, state: TrainState, num_sequences: int) -> NoReturn:
        running = min(state.micro_batch_size, num_sequences)
        remember_micro_batch(self.config, self.runtime.device, max(1, running // 2))
        raise AtlasError(
            f"rank {self.world.rank}: step {state.step + 1}: out of memory with {running} sequences at once, in the "
            f"midst of work with other ranks: --set training.micro_batch_size={max(1, running // 2)}, which a restart "
            "by torchrun takes by itself; the checkpoints are good"
        )

    def _run_fewer_at_once(self, state: TrainState, num_sequences: int) -> None:
        self.optimizer.zero_grad()
        release_memory(self.runtime.device)
        running = min(state.micro_batch_size, num_sequences)
        if running == 1:
            for line in memory_advice(self.config, device=self.runtime.device.type):
                self.say(line)
            raise AtlasError(
                f"step {state.step + 1}: out of memory with one sequence at once: see above for what would help; "
                "the checkpoints are good"
            )
        state.micro_batch_size = running // 2
        if self.runtime.parallel == "ddp":
            # The wrapper waits for a backward pass that will not come. The old one takes its hooks along when it goes.
            self.wrapped = self.objective
            self.wrapped = wrap(
                self.objective, self.config, self.runtime.world, self.runtime.parallel, self.runtime.device
            )

    def _accumulate(
        self, inputs: Tensor, targets: Tensor, documents: Tensor | None, state: TrainState, stop: StopRequest
    ) -> Tensor | None:
        """Sum the gradient over micro-batches.

        The loss is summed over valid tokens and divided by their number in the whole update, so that the
        split changes nothing. A micro-batch without a valid token adds nothing.
        """
        self._clear_gradient()
        world, size = self.world, self._sequences_at_once(len(inputs), state)
        counts = world.sums_soon(int((targets != IGNORE_INDEX).sum()), stop.asked)

        @functools.cache
        def total_valid() -> int:
            """At least 1; 0 where a rank was asked to stop."""
            valid, asked = counts()
            self._num_valid = int(valid)
            if asked:
                stop.agree()
            return 0 if asked else max(1, self._num_valid)

        total = torch.zeros((), device=self.runtime.device)
        wait: Callable[[], Any] = total_valid
        for start in range(0, len(inputs), size):
            if stop.requested:
                return None
            micro = slice(start, start + size)
            num_valid = int((targets[micro] != IGNORE_INDEX).sum())
            if num_valid == 0 and world.size == 1:
                continue
            is_last = start + size >= len(inputs)
            seed_micro_step(self.config.seed, state.step, world.rank * len(inputs) + start)
            with no_sync_except_last(self.wrapped, is_last=is_last):
                with self.runtime.autocast():
                    columns = [
                        inputs[micro],
                        targets[micro],
                        *([] if documents is None else [documents[micro]]),
                    ]
                    if self.runtime.compiles and self.objective.custom_loss is None:
                        columns = filled_up(columns, size)
                    loss = self.wrapped(*map(self._to_device, columns), num_valid=num_valid)
                    if total_valid() == 0:
                        return None
                    loss = loss / total_valid()
                total += loss.detach()
                if is_last and not self._runs_with_others:
                    if world.any(False):
                        raise RanOutElsewhere
                    self._runs_with_others = world.size > 1
                wait = world.add_up_soon(total) if is_last else total_valid
                # PyTorch takes the mean over ranks, and this is a part of a sum.
                self.scaler.scale(loss * world.size).backward()
        wait()
        return total

    def _sequences_at_once(self, num_sequences: int, state: TrainState) -> int:
        """Compiled, as even a split as there is: every micro-batch has the shape of the largest."""
        if not self.runtime.compiles:
            return state.micro_batch_size
        return -(-num_sequences // -(-num_sequences // state.micro_batch_size))

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.runtime.device, non_blocking=True)

    def apply(self, loss: Tensor, state: TrainState, *, rate: float) -> Update:
        """Clip the gradient and take the optimizer's step at `rate`, unless the numbers are unsound: then neither
        weights nor optimizer state move. The host waits for the device once, to read both numbers."""
        guard, parameters = self.config.guard, list(self.model.parameters())
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self._num_valid == 0:
            return Update(0.0, 0.0, None)
        self.scaler.unscale_(self.optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.training.grad_clip or math.inf)
        grad_norm = gather_full(grad_norm, to_cpu=False)
        figures = torch.stack([loss, grad_norm.to(loss)])

        # Of all optimizers and devices these have a kernel that reads `found_inf`.
        reads_flag = isinstance(self.optimizer, torch.optim.AdamW) and self.runtime.device.type in (
            "cpu",
            "cuda",
        )
        reads_flag = reads_flag and self.runtime.parallel != "fsdp"
        if reads_flag and not self.rounds and not self.scaler.is_enabled() and guard.spikes == "off":
            # The optimizer leaves everything as it is where `found_inf` is 1, so that the device need not wait
            # for the host to look at the numbers.
            self.optimizer.found_inf = (~figures.isfinite().all()).float()  # type: ignore[attr-defined]
            self.optimizer.step()
            loss_value, norm_value = figures.tolist()
            fault = check_update(loss_value, norm_value, state=state, guard=guard)
        else:
            loss_value, norm_value = figures.tolist()
            # The host waits for the scale too, which only an overflow needs.
            needs_scale = self.scaler.is_enabled() and not math.isfinite(norm_value)
            scale = self.scaler.get_scale() if needs_scale else None
            fault = check_update(loss_value, norm_value, state=state, guard=guard, loss_scale=scale)
            if fault is None:
                self._step(state.step)
            self.scaler.update()
        self._clear_gradient()
        return Update(loss_value, norm_value, fault)

    def _step(self, step: int) -> None:
        try:
            if self.rounds:
                generator = rounding_generator(self.config.seed, step, self.runtime.device)
                step_rounding_weights(self.optimizer, generator)
            else:
                self.scaler.step(self.optimizer)
        except RuntimeError as error:
            what = f"training.optimizer: {self.config.training.optimizer}: its step"
            instead = "a new run with training.optimizer adafactor or muon, which compile nothing"
            refuse_failed_compilation(error, what=what, instead=instead)
            raise
