"""The training loop. `step.py` computes one update; `recovery.py` rolls back; `run.py` defines `Run`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from atlas.errors import first_line
from atlas.training.devices.gpu_temperature import cool_down
from atlas.training.devices.memory import collector_spares_the_run, release_memory
from atlas.training.evaluate import Evaluation
from atlas.training.guard import count
from atlas.training.logs.run_log import perplexity
from atlas.training.micro_batch import evaluate_within_memory, gradient_within_memory
from atlas.training.recovery import emergency_save, recover, save_if_sound, save_or_roll_back
from atlas.training.run import Run
from atlas.training.schedule import learning_rate_at
from atlas.training.state import Result
from atlas.training.step import Update, apply_gradient


def train(run: Run) -> Result:
    """Train until the horizon, an early stop, the time limit or an interrupt. Then save a checkpoint and return the
    result."""
    config, state, log = run.config, run.state, run.log
    with _running(run) as after_update:
        run.keep_snapshot()
        if run.owes_evaluation:  # an interrupt ended this evaluation early
            finish_step(run)
        stream = run.batches()
        while (outcome := outcome_of(run)) is None:
            update = train_step(run, stream)
            if update is None:  # a stop was requested
                continue
            after_update()
            run.check_files()
            if update.fault and recover(run, update.fault):
                stream = run.batches()
                continue
            if not state.is_planned and run.world.broadcast(run.clock.has_measured):
                plan_horizon(run)
            is_last = state.step == state.horizon
            if is_last or state.step % config.training.log_interval == 0:
                log.train(metrics(run, update), total=run.num_updates)
            if finish_step(run):
                _cool_down(run)
            else:
                stream = run.batches()
        kind = {"interrupted": "interrupt", "stopped in time": "step"}.get(outcome)
        is_saved = kind is None or save_if_sound(run, [kind])
        log.event(outcome, state.step)
    with run.world.in_step():  # if a rank ended before the last save is complete, srun would kill the others
        log.flush_to_disk()
    saved = run.saver.written if is_saved else []
    return Result(outcome, state.step, state.loss, state.val_loss, saved)


@contextmanager
def _running(run: Run) -> Iterator[Callable[[], None]]:
    """A context for the training loop. It yields a function to call after each update. In the context, signals request
    a stop, the trackers and the progress bar are open, and an unexpected error causes a save. At the end of the
    context, all saves are complete."""
    run.model.train()
    run.clock.start()
    progress = run.log.progress(done=run.state.step, total=run.num_updates)
    with ExitStack() as stack:
        stack.callback(run.data.verifier.close)
        for context in (run.stop, run.log.tracked(), progress, run.saver, emergency_save(run)):
            stack.enter_context(context)
        yield stack.enter_context(collector_spares_the_run(run.runtime.device))


def outcome_of(run: Run) -> str | None:
    """Return the outcome of the run (see `Result`), or None if another update is due. Every rank must call this
    function."""
    state, clock, log = run.state, run.clock, run.log
    if run.stops_early:
        return "stopped early"
    if run.stop.requested and not run.is_complete:
        return "interrupted"
    if state.step >= state.horizon:
        return "finished"
    if clock.limit is None:
        return None
    at_the_end = run.saver.expected_seconds(run.num_bytes)
    if not run.world.broadcast(clock.is_over(at_the_end=at_the_end)):
        return None
    slow = ""
    if run.num_updates:
        slow = f" of {run.num_updates} planned: updates took longer than the measured ones"
    log.say(
        f"the {run.config.training.max_hours:g} h are over at step {state.step}{slow}; to continue, set a larger "
        "--max-hours"
    )
    return "stopped in time"


def train_step(run: Run, stream: Iterator[tuple[Tensor, ...]]) -> Update | None:
    """Perform one update with the next batch of `stream`. If a stop was requested meanwhile, return None without an
    update."""
    state, per_update = run.state, run.config.training.sequences_per_update
    run.clock.update_begins()
    with run.throughput.waiting_for_data():
        batch = next(stream)
    size = state.micro_batch_size
    gradient = gradient_within_memory(run.learner, batch, state, stop=run.stop, say=run.log.say)
    if gradient is None:
        return None
    rate = state.rate_scale * learning_rate_at(state.step, run.config.training, state.horizon)
    run.is_amid_update = True
    update = apply_gradient(run.learner, gradient, state, rate=rate)
    state.step += 1
    state.sequences_consumed += per_update
    if gradient.num_valid:
        count(state, update.loss, update.grad_norm, update.fault, guard=run.config.guard)
    run.is_amid_update = False
    _log_out_of_memory(run, "training", size, state.micro_batch_size)
    run.throughput.count(batch[0].numel() * run.world.size)
    run.log.advance(state.step)
    run.clock.update_ends()
    return update


def metrics(run: Run, update: Update) -> dict[str, Any]:
    """Return the values of an update's line in `metrics.jsonl`."""
    state = run.state
    return {
        "step": state.step,
        "epoch": run.epoch,
        "loss": update.loss,
        "perplexity": perplexity(update.loss),
        "learning_rate": update.learning_rate,
        "grad_norm": update.grad_norm,
        "sequences_consumed": state.sequences_consumed,
        "tokens": state.sequences_consumed * run.config.model.max_seq_len,
        "seconds": run.clock.elapsed,
        **run.throughput.metrics(),
        **(run.sensor.read().metrics() if run.sensor else {}),
    }


def finish_step(run: Run) -> bool:
    """Perform the evaluation and the save that are due at the current step, if any. Return False if the run rolled back
    instead."""
    config, state = run.config, run.state
    is_last = state.step == state.horizon
    kinds = ["epoch"] if run.has_ended_epoch and not state.bad_in_a_row and run.saves_epoch else []
    evaluation = None
    if run.data.val and (is_last or state.step % config.training.eval_interval == 0):
        evaluation = evaluate(run)
        if evaluation is None:  # a stop was requested
            return True
        kinds += ["best"] if state.update_best(evaluation.loss) else []
    run.stops_early = state.is_out_of_patience(config.training) and not is_last
    is_final = is_last or run.stops_early
    if is_final or state.step % config.checkpoint.save_interval == 0:
        kinds += state.end_save_interval(is_final=is_final, has_validation=run.data.val is not None)
    is_finite = evaluation is None or math.isfinite(evaluation.loss)
    is_sound = (is_finite and not kinds) or save_or_roll_back(run, kinds, evaluation, is_final=is_final)
    run.stops_early = run.stops_early and is_sound
    return is_sound


def evaluate(run: Run) -> Evaluation | None:
    """Evaluate the model on `run.val_windows`, and log the result and samples. Return the result, or None if a stop was
    requested meanwhile."""
    state, size = run.state, run.state.eval_batch_size
    with run.throughput.paused():
        evaluation = evaluate_within_memory(run, run.val_windows)
    _log_out_of_memory(run, "evaluation", size, state.eval_batch_size)
    if evaluation is None:
        return None
    values = {
        "step": state.step,
        "tokens": state.sequences_consumed * run.config.model.max_seq_len,
        "seconds": run.clock.elapsed,
        "val_loss": evaluation.loss,
        "val_perplexity": evaluation.perplexity,
        "bits_per_byte": evaluation.bits_per_byte,
    }
    run.log.validation(values, note=" (best)" if evaluation.loss < state.best_loss else "")
    state.note_evaluation(evaluation.loss)
    with run.throughput.paused():
        if samples := _samples(run):
            run.log.samples(state.step, run.config.tracking.sample_prompt, samples)
    if state.val_rises == 2:
        run.log.say(
            "warning: validation loss rises while training loss falls: the model memorizes its text; more text, a "
            "smaller model, dropout or an earlier stop (training.early_stopping_patience) help"
        )
    return evaluation


def plan_horizon(run: Run) -> None:
    """Compute the horizon from `training.max_hours` and the speed of the updates so far."""
    training, state, saver = run.config.training, run.state, run.saver
    seconds = 0.0
    if run.data.val:
        start = time.perf_counter()
        some = run.val_windows[: state.eval_batch_size]
        with run.throughput.paused():
            evaluate_within_memory(run, some)
            measured = time.perf_counter()
            _samples(run)
        if run.stop.requested:  # the measured time is too short; a resumed run measures again
            return
        seconds = (measured - start) * len(run.val_windows) / len(some) + time.perf_counter() - measured
    extra = seconds / training.eval_interval + saver.stall / run.config.checkpoint.save_interval
    at_the_end = seconds + saver.expected_seconds(run.num_bytes)
    left = run.clock.updates_left(extra_per_update=extra, at_the_end=at_the_end)
    state.horizon = run.world.broadcast(min(state.horizon, state.step + left))
    state.is_planned = True
    run.log.total(state.horizon)
    run.log.say(
        f"an update takes {run.clock.seconds_per_update:.3g} s: the run is planned to end at step {state.horizon:,}, "
        f"within {training.max_hours:g} h"
    )


def _samples(run: Run) -> list[str]:
    """Return `tracking.samples` generated texts on the first rank, and an empty list on the other ranks.

    A failure does not end the run, since samples do not affect training. The first failure is logged, and later
    evaluations generate no samples.
    """
    if run.sampler is None or not run.config.tracking.samples:
        return []
    if run.runtime.parallel == "fsdp":
        reason = "each process holds a part of the weights"
    elif not run.world.is_first:
        return []
    else:
        run.model.eval()
        try:
            # The blocks are compiled for the shapes of training only, so run without compilation.
            with torch.compiler.set_stance("force_eager" if run.runtime.compiles else "default"):
                # Every evaluation uses the same seed, so that samples differ only because of the model.
                tracking, seed = run.config.tracking, run.config.seed
                return run.sampler(run.model, run.data.tokenizer, tracking, seed, lambda: run.stop.requested)
        except Exception as error:
            reason = first_line(error)
        finally:
            run.model.train()
        # This line is outside `except`, because inside it the exception still references tensors.
        release_memory(run.runtime.device)
    run.log.say(f"step {run.state.step}: no samples from here on (tracking.samples): {reason}")
    run.sampler = None
    return []


def _log_out_of_memory(run: Run, work: str, before: int, sequences: int) -> None:
    if sequences < before:
        run.log.event("out of memory", run.state.step, work=work, sequences_at_once=sequences)


def _cool_down(run: Run) -> None:
    if run.sensor:
        limit = run.config.guard.max_gpu_temp
        with run.throughput.paused():
            cool_down(run.sensor, limit=limit, should_stop=lambda: run.stop.requested, say=run.log.say)
