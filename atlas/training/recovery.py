"""After an update that was not applied: count it, go back, or end the run with what to check."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from atlas.errors import AtlasError, EndedElsewhere
from atlas.training.checkpoint.load import load_checkpoint
from atlas.training.checkpoint.retention import move_aside
from atlas.training.devices.parallel import load_full_weights
from atlas.training.evaluate import Evaluation
from atlas.training.guard import Fault, diagnose, weights_fault
from atlas.training.state import MAX_ROLLBACKS

if TYPE_CHECKING:
    from atlas.training.train import Trainer


def recover(trainer: Trainer, fault: Fault) -> bool:
    """Log the fault; whether the run went back to its last save for it."""
    state, guard, log = trainer.state, trainer.config.guard, trainer.log
    last = state.sequences_consumed - 1
    first = last + 1 - trainer.config.training.sequences_per_update
    log.event("skipped", state.step, reason=fault.reason, first_sequence=first, last_sequence=last)
    if not fault.is_benign:
        log.say(
            f"step {state.step}: not applied: {fault.reason} (sequences {first:,} to {last:,} of the run)"
        )
    goes_back = (
        guard.spikes == "rollback" if fault.is_spike else state.bad_in_a_row >= guard.max_bad_steps
    ) and not fault.is_benign
    if goes_back:
        roll_back(trainer, fault)
    return goes_back


def save_or_go_back(trainer: Trainer, kinds: list[str], evaluation: Evaluation | None, *, wait: bool) -> bool:
    """Save, and return True; or, if the weights are ruined, go back to the last save and return False. With `wait` this
    is the last save of the run: no later update would show the damage. Raises `AtlasError` as `roll_back` does."""
    fault = weights_fault(trainer.model, trainer.world)
    if evaluation and not math.isfinite(evaluation.loss):
        fault = fault or Fault(f"validation loss {evaluation.loss}")
    if wait and trainer.state.bad_in_a_row and not evaluation:
        fault = fault or Fault("the last update was not applied, and there is no validation loss to judge by")
    if fault:
        roll_back(trainer, fault)
        return False
    trainer.save(kinds, wait=wait)
    return True


def save_if_sound(trainer: Trainer, kinds: list[str]) -> bool:
    """Save where a run was stopped, unless the weights are ruined or may be: `--resume auto` would take them. Return
    whether it was saved."""
    state, fault = trainer.state, weights_fault(trainer.model, trainer.world)
    if state.bad_in_a_row:
        fault = fault or Fault(f"the last {state.bad_in_a_row} updates could not be applied")
    if fault:
        folder = trainer.checkpoints.folder
        trainer.log.say(
            f"step {state.step}: not saved: {fault.reason}; the earlier checkpoints in {folder} stay"
        )
        return False
    trainer.save(kinds, wait=True)
    return True


@contextmanager
def emergency_save(trainer: Trainer) -> Iterator[None]:
    """Around the loop: an exception that nobody expected leaves a checkpoint of the last complete update, and is raised
    again. Only in a run of one process: of several, the others would wait for ever for this one's part of the save."""
    begun_at = trainer.state.step
    try:
        yield
    except (AtlasError, EndedElsewhere):
        raise
    except Exception as error:
        state, log = trainer.state, trainer.log
        if trainer.world.size == 1 and not trainer.is_amid_update and state.step > begun_at:
            log.say(
                f"step {state.step}: an unexpected error ({type(error).__name__}): saving before the run ends"
            )
            is_best = state.evaluated_at == state.step and state.val_loss == state.best_loss
            try:
                save_if_sound(trainer, ["interrupt", *(["best"] if is_best else [])])
            except Exception as another:
                log.say(f"step {state.step}: not saved ({another}); the earlier checkpoints stay")
        raise


def roll_back(trainer: Trainer, fault: Fault) -> None:
    """Go back to the last save, without the data since then and at a lower rate. Raises `AtlasError` if that did
    not help before, or if there is no save."""
    state, came_to = trainer.state, trainer.state.step
    good = _target(trainer)
    if good is None or state.rollbacks == MAX_ROLLBACKS:
        _give_up(
            trainer, fault, "there is no save to go back to" if good is None else "going back did not help"
        )
    load_full_weights(trainer.model, good["model_state_dict"])
    # The optimizer keeps the tensors that it is given, and these may be needed once more.
    trainer.restore({**good, "optimizer_state_dict": copy.deepcopy(good["optimizer_state_dict"])})
    since = state.went_back_to if state.rollbacks else good["step"]
    state.go_back_to(good)
    trainer.hold()  # the last save is now one that did not help
    last = state.sequences_consumed - 1
    first = last + 1 - (came_to - since) * trainer.config.training.sequences_per_update
    trainer.log.rewind(state.step)
    abandoned = [
        path
        for manifest, path in trainer.checkpoints.found()
        if manifest.step > state.step and manifest.kind != "best"
    ]
    if abandoned and trainer.world.is_first:  # else --resume auto would take what did not help
        target = move_aside(trainer.checkpoints.folder, abandoned)
        trainer.log.say(f"{len(abandoned)} checkpoints after step {state.step} moved to {target}")
    trainer.log.event(
        "rollback",
        state.step,
        from_step=came_to,
        reason=fault.reason,
        first_sequence=first,
        last_sequence=last,
    )
    trainer.log.say(
        f"step {came_to}: back to step {state.step} (rollback {state.rollbacks} of {MAX_ROLLBACKS}): sequences "
        f"{first:,} to {last:,} are skipped, the learning rate is {state.rate_scale:g} of what it was planned to be"
    )


def _target(trainer: Trainer) -> dict[str, Any] | None:
    """The last save; and if that did not help, the one before, since weights can be ruined and still finite; where
    there is none, the same once more, past more data and at a lower rate."""
    rollbacks, there = trainer.state.rollbacks, trainer.state.went_back_to
    if trainer.world.size > 1:
        return _target_of_all(trainer, [None] if rollbacks == 0 else [there, there + 1])
    last = trainer.saver.last_good()
    if rollbacks == 0:
        return last
    checkpoints = trainer.checkpoints
    older = checkpoints.load_latest(before=there) or checkpoints.load_latest(before=there + 1)
    return older[1] if older else last


def _target_of_all(trainer: Trainer, befores: Sequence[int | None]) -> dict[str, Any] | None:
    """Of several ranks only the first has a copy in memory: they go back to what is on the disk, of a step before the
    first of `befores` for which there is one."""
    world, found = trainer.world, None
    if world.is_first:
        trainer.saver.join()
        for before in befores:
            found = found or trainer.checkpoints.load_latest(before=before)
    path = world.broadcast(str(found[0]) if found else None)
    return found[1] if found else path and load_checkpoint(path)


def _give_up(trainer: Trainer, fault: Fault, why: str) -> NoReturn:
    state, training = trainer.state, trainer.config.training
    first = state.sequences_consumed - max(1, state.bad_in_a_row) * training.sequences_per_update
    rate = trainer.optimizer.param_groups[0]["lr"]
    sequences = f"sequences {first:,} to {state.sequences_consumed - 1:,} of the run"
    for line in diagnose(training, rate=rate, runtime=trainer.runtime, sequences=sequences):
        trainer.log.say(line)
    found = trainer.checkpoints.found()
    then = f"go on with --resume {found[0][1]}" if found else "start anew"
    raise AtlasError(
        f"step {state.step}: {fault.reason}: {why} ({state.rollbacks} rollbacks): check the causes above, then {then}"
    )
