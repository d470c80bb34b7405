"""Handle a faulty update, which Atlas did not apply: log the fault, roll back, or end the run with a list of possible
causes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from atlas.errors import AtlasError, EndedElsewhere
from atlas.training.checkpoint.load import load_checkpoint, saved_optimizer
from atlas.training.checkpoint.moves import move_aside
from atlas.training.checkpoint.validate import check_optimizer_state
from atlas.training.devices.parallel import load_full_weights
from atlas.training.evaluate import Evaluation
from atlas.training.guard import Fault, diagnose, weights_fault
from atlas.training.run import Learner, Run
from atlas.training.state import MAX_ROLLBACKS


def recover(run: Run, fault: Fault) -> bool:
    """Log the fault, and roll back to the last save if necessary. Return whether the run rolled back."""
    state, guard, log = run.state, run.config.guard, run.log
    last = state.sequences_consumed - 1
    first = last + 1 - run.config.training.sequences_per_update
    log.event("skipped", state.step, reason=fault.reason, first_sequence=first, last_sequence=last)
    if fault.is_benign:
        return False
    log.say(f"step {state.step}: not applied: {fault.reason} (sequences {first:,} to {last:,} of the run)")
    goes_back = state.bad_in_a_row >= guard.max_bad_steps
    if fault.is_spike:
        goes_back = guard.spikes == "rollback"
    if goes_back:
        roll_back(run, fault)
    return goes_back


def save_or_roll_back(run: Run, kinds: list[str], evaluation: Evaluation | None, *, is_final: bool) -> bool:
    """Save a checkpoint and return True. If the weights or the validation loss are not finite, roll back to the last
    save instead and return False.

    After the final save, no later update can reveal faulty weights. So without an evaluation, the function also rolls
    back if the last update was not applied. Raises the `AtlasError` of `roll_back`.
    """
    fault = weights_fault(run.model, run.world)
    if evaluation and not math.isfinite(evaluation.loss):
        fault = fault or Fault(f"validation loss {evaluation.loss}")
    if is_final and run.state.bad_in_a_row and not evaluation:
        fault = fault or Fault(
            "the last update was not applied, and there is no validation loss to check the weights"
        )
    if fault:
        roll_back(run, fault)
        return False
    run.save(kinds, wait=is_final)
    return True


def save_if_sound(run: Run, kinds: list[str]) -> bool:
    """Save a run that was stopped, and return whether it was saved. If the weights are not finite, or the last updates
    were faulty, save nothing, since `--resume auto` would load the faulty weights."""
    state, fault = run.state, weights_fault(run.model, run.world)
    if state.bad_in_a_row:
        fault = fault or Fault(f"the last {state.bad_in_a_row} updates could not be applied")
    if fault:
        folder = run.checkpoints.folder
        run.log.say(f"step {state.step}: not saved: {fault.reason}; the earlier checkpoints in {folder} stay")
        return False
    run.save(kinds, wait=True)
    return True


@contextmanager
def emergency_save(run: Run) -> Iterator[None]:
    """A context for the training loop. After an unexpected exception, save the run after its last complete update, and
    raise the exception again.

    A run of several processes is not saved. A save needs all ranks, but ranks without an exception would not take part.
    The processes would then wait for each other forever.
    """
    begun_at = run.state.step
    try:
        yield
    except (AtlasError, EndedElsewhere):
        raise
    except Exception as error:
        state, log = run.state, run.log
        if run.world.size == 1 and not run.is_amid_update and state.step > begun_at:
            log.say(
                f"step {state.step}: an unexpected error ({type(error).__name__}): saving before the run ends"
            )
            is_best = state.evaluated_at == state.step and state.val_loss == state.best_loss
            try:
                save_if_sound(run, ["interrupt", *(["best"] if is_best else [])])
            except Exception as another:
                log.say(f"step {state.step}: not saved ({another}); the earlier checkpoints stay")
        raise


def roll_back(run: Run, fault: Fault) -> None:
    """Restore the last save, skip the data that the run has read since that save, and lower the learning rate. Raises
    `AtlasError` if there is no save, or after `MAX_ROLLBACKS` rollbacks."""
    state, came_to = run.state, run.state.step
    good = _target(run)
    if good is None or state.rollbacks == MAX_ROLLBACKS:
        why = "rolling back did not help" if good else "there is no save to roll back to"
        _give_up(run, fault, why)
    load_full_weights(run.model, good["model_state_dict"])
    # The optimizer keeps the tensors that it loads, and changes them. A second rollback may need the saved tensors, so
    # load a copy.
    optimizer_state = copy.deepcopy(good["optimizer_state_dict"])
    restore_optimizer(run.learner, {**good, "optimizer_state_dict": optimizer_state})
    since = state.went_back_to if state.rollbacks else good["step"]
    state.roll_back_to(good)
    run.keep_snapshot()  # overwrites the copy in memory, which may be of a save that did not help
    last = state.sequences_consumed - 1
    first = last + 1 - (came_to - since) * run.config.training.sequences_per_update
    found = run.checkpoints.found()
    abandoned = [path for entry, path in found if entry.step > state.step and entry.kind != "best"]
    if abandoned and run.world.is_first:  # otherwise --resume auto would load one of these checkpoints
        target = move_aside(run.checkpoints.folder, abandoned)
        run.log.say(f"{len(abandoned)} checkpoints after step {state.step} moved to {target}")
    run.log.rewind(state.step)  # after the move: a kill between the two leaves no gap in the metrics
    facts = {"from_step": came_to, "reason": fault.reason, "first_sequence": first, "last_sequence": last}
    run.log.event("rollback", state.step, **facts)
    run.log.say(
        f"step {came_to}: rolled back to step {state.step} (rollback {state.rollbacks} of {MAX_ROLLBACKS}): sequences "
        f"{first:,} to {last:,} are skipped, the learning rate is {state.rate_scale:g} of the planned one"
    )


def _target(run: Run) -> dict[str, Any] | None:
    """Return the contents of the save to roll back to, or None.

    The first rollback uses the last save. If that rollback did not help, the next rollback uses the save before the
    last, since finite weights can be faulty too. Without an earlier save, Atlas uses the same save again, but skips
    more data and lowers the learning rate again.
    """
    saver, world, there = run.saver, run.world, run.state.went_back_to
    if world.size == 1 and run.state.rollbacks == 0:
        return saver.last_good()
    found = None
    if world.is_first:
        saver.join()
        for before in [there, there + 1] if run.state.rollbacks else [None]:
            found = found or run.checkpoints.load_latest(before=before)
    if world.size == 1:
        return found[1] if found else saver.last_good()
    # Only the first rank has a copy in memory, so all ranks load the checkpoint from the disk.
    path = world.broadcast(found and str(found[0]))
    return found[1] if found else path and load_checkpoint(path)


def _give_up(run: Run, fault: Fault, why: str) -> NoReturn:
    state, training = run.state, run.config.training
    first = state.sequences_consumed - max(1, state.bad_in_a_row) * training.sequences_per_update
    rate = run.optimizer.param_groups[0]["lr"]
    sequences = f"sequences {first:,} to {state.sequences_consumed - 1:,} of the run"
    for line in diagnose(training, rate=rate, runtime=run.runtime, sequences=sequences):
        run.log.say(line)
    found = run.checkpoints.found()
    then = f"resume with --resume {found[0][1]}" if found else "start again"
    raise AtlasError(
        f"step {state.step}: {fault.reason}: {why} ({state.rollbacks} rollbacks): check the causes above, then {then}"
    )


def restore_optimizer(learner: Learner, contents: dict[str, Any], source: Path | None = None) -> None:
    """Load the states of the optimizer and of the gradient scaler from the `contents` of a checkpoint. If the
    checkpoint `source` is sharded, each rank reads its own shards. Raises `AtlasError` if the state does not fit the
    optimizer."""
    try:
        saved = saved_optimizer(contents, source, learner.optimizer)
        check_optimizer_state(learner.optimizer, saved)
        learner.load_optimizer_state(saved)
    except (KeyError, ValueError) as error:
        raise AtlasError(
            f"the checkpoint's optimizer state does not fit ({error}): start a new run from the checkpoint's weights "
            "with --init-from"
        ) from None
    if learner.scaler.is_enabled() and contents.get("scaler_state_dict"):
        learner.scaler.load_state_dict(contents["scaler_state_dict"])
