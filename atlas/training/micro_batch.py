"""Choose the micro-batch size of training and the batch size of evaluations. Before a run, Atlas finds the largest size
that fits into memory. If memory runs out during the run, Atlas halves the size.

Each trial of a size runs in a separate process, so that a failed trial leaves no memory allocated. The search begins at
the estimated size. A size whose estimate is far below the free memory needs no trial. On CUDA a micro-batch may be
larger than `batch_size`, since a small micro-batch leaves a large GPU partly idle.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence

import torch

from atlas.config import AtlasConfig
from atlas.config.loader import resolve
from atlas.errors import AtlasError, EndedElsewhere
from atlas.machine import data_bytes, measure_memory
from atlas.process import keep_memory
from atlas.training.devices.compile import refuse_failed_compilation
from atlas.training.devices.device import Runtime, as_computed, setup_runtime
from atlas.training.devices.memory import (
    is_out_of_memory,
    release_memory,
    remember_micro_batch,
    remembered_micro_batch,
)
from atlas.training.devices.parallel import wrap
from atlas.training.devices.signals import Stopped, StopRequest
from atlas.training.evaluate import Evaluation, evaluate
from atlas.training.memory.estimate import ROOMY, estimate_training_memory
from atlas.training.memory.fit import largest_micro_batch, memory_advice
from atlas.training.run import Learner, Run
from atlas.training.state import TrainState
from atlas.training.step import (
    Batch,
    Gradient,
    accumulate_gradient,
    apply_gradient,
    clear_gradient,
    fresh_learner,
)

_COMFORTABLE = 0.6
"""The fraction of a GPU's free memory that a micro-batch larger than `batch_size` may use."""
_FILLED = 1.05
_LEFT_FREE = 0.05
"""The fraction of the free memory that a trial may not use. A run needs this memory for prefetched batches, the log and
fragmentation."""
_PROVEN = 3
"""The number of updates with one micro-batch size after which the ranks assume that this size fits into memory."""
_TOO_LARGE = 3  # the exit code of a trial that ran out of memory
_KILLED = {-6, -9, -11}
"""The exit codes of a trial that a signal ended. SIGABRT: an allocation failed in C++. SIGKILL: the system ended the
trial. SIGSEGV: a thread got no stack."""


class _OutOfMemoryElsewhere(Exception):
    """Another rank ran out of memory in this update."""


def gradient_within_memory(
    learner: Learner, batch: Batch, state: TrainState, *, stop: StopRequest, say: Callable[[str], None]
) -> Gradient | None:
    """Return the result of `accumulate_gradient`, or None if a stop was requested. If memory runs out, halve the
    micro-batch size, also for later updates, and try again.

    Several ranks lower the size together, but only in the first `_PROVEN` updates with the same size. In later updates
    the ranks do not synchronize for this. Otherwise each update would wait one more time for the slowest rank. Raises
    `AtlasError` if not even one sequence fits. With several ranks, the function also raises the error if memory runs
    out in a later update, with sharded weights, or during an exchange of gradients.
    """
    world, num_sequences = learner.runtime.world, len(batch[0])
    asked = min(state.micro_batch_size, num_sequences)
    is_joint = False

    def join_others() -> None:
        nonlocal is_joint
        if not is_joint and world.any(False):
            raise _OutOfMemoryElsewhere
        is_joint = world.size > 1

    while True:
        size = min(state.micro_batch_size, num_sequences)
        is_proven = learner.proven == (size, _PROVEN)
        is_joint = world.size > 1 and (is_proven or learner.runtime.parallel == "fsdp")
        gradient = None
        try:
            with stop.at_once(enabled=learner.runtime.compiles):
                gradient = accumulate_gradient(learner, batch, state, stop=stop, before_reduction=join_others)
            break
        except Stopped:
            clear_gradient(learner)
            return None
        except _OutOfMemoryElsewhere:
            if size == 1:
                raise EndedElsewhere from None
        except (RuntimeError, MemoryError) as error:
            refuse_failed_compilation(error)
            if not is_out_of_memory(error):
                raise
            if is_joint:
                half = max(1, size // 2)
                remember_micro_batch(learner.config, learner.runtime, half)
                raise AtlasError(
                    f"rank {world.rank}: step {state.step + 1}: out of memory with {size} sequences per micro-batch, "
                    "when the ranks could not lower this number together: add --set training.micro_batch_size="
                    f"{half}. A run that torchrun restarts lowers the number by itself. The checkpoints are intact"
                ) from None
            world.any(True)
        # This line is outside `except`, because inside it the exception still references the tensors of the failed
        # update.
        state.micro_batch_size = _fewer(learner, size, state.step, say=say)
    proven_size, updates = learner.proven
    learner.proven = size, min(_PROVEN, updates + 1) if proven_size == size else 1
    if size < asked:
        say(
            f"step {state.step + 1}: out of memory with {asked} sequences per micro-batch: {size} from now on. An "
            f"update still has {num_sequences * world.size} sequences. Atlas stores the new number for this machine "
            "and model; --set training.micro_batch_size=N sets another number"
        )
        remember_micro_batch(learner.config, learner.runtime, size)
    return gradient


def evaluate_within_memory(run: Run, windows: Sequence[int]) -> Evaluation | None:
    """Return the result of `evaluate` with batches of `state.eval_batch_size` windows, or None if a stop was requested.
    If memory runs out, halve `state.eval_batch_size` and try again."""
    state, runtime, stop, dataset = run.state, run.runtime, run.stop, run.data.val
    assert dataset is not None
    asked = min(state.eval_batch_size, len(windows))
    while True:
        size = min(state.eval_batch_size, len(windows))
        try:
            with stop.at_once(enabled=runtime.compiles):
                evaluation = evaluate(
                    run.learner.objective,
                    dataset,
                    windows,
                    batch_size=state.eval_batch_size,
                    runtime=runtime,
                    should_stop=lambda: stop.requested,
                )
            break
        except Stopped:
            return None
        except (RuntimeError, MemoryError) as error:
            refuse_failed_compilation(error)
            if not is_out_of_memory(error):
                raise
        # This line is outside `except`, because inside it the exception still references the tensors of the evaluation.
        release_memory(runtime.device)
        if size == 1 or runtime.parallel == "fsdp":
            raise AtlasError(
                f"step {state.step}: out of memory while evaluating {size} sequences in a batch: a lower "
                "training.eval_batch_size, a shorter model.max_seq_len or a smaller model helps"
            )
        state.eval_batch_size = size // 2
    if size < asked:
        run.log.say(
            f"step {state.step}: out of memory while evaluating {asked} sequences in a batch: {size} from now on "
            "(training.eval_batch_size)"
        )
    return evaluation


def _fewer(learner: Learner, size: int, step: int, *, say: Callable[[str], None]) -> int:
    """Free the memory of a failed update, and return half of `size`. Raises `AtlasError` if `size` is 1."""
    config, runtime = learner.config, learner.runtime
    learner.optimizer.zero_grad()
    release_memory(runtime.device)
    if size == 1:
        for line in memory_advice(config, device=runtime.device.type):
            say(line)
        raise AtlasError(
            f"step {step + 1}: out of memory with one sequence per micro-batch: see above for what would help; "
            "the checkpoints are intact"
        )
    if runtime.parallel == "ddp":
        # DDP still waits for the failed backward pass, so wrap the model again. Free the old wrapper first, so that DDP
        # removes the hooks of the old wrapper.
        learner.wrapped = learner.objective
        learner.wrapped = wrap(learner.objective, config, runtime.world, runtime.parallel, runtime.device)
    return size // 2


def fit_micro_batch(
    config: AtlasConfig, runtime: Runtime, *, say: Callable[[str], None], may_exceed: bool = False
) -> int:
    """Return the micro-batch size that `auto` stands for: the largest number up to `batch_size` that fits into memory.

    On CUDA with `may_exceed`, the size may exceed `batch_size`, up to all sequences of an update, if enough memory
    stays free. Atlas remembers the size for this machine and config. Raises `AtlasError` if not even one sequence fits.
    """
    config = as_computed(config, runtime)
    most = config.training.batch_size
    free = measure_memory(runtime.device.type)
    if may_exceed and runtime.device.type == "cuda" and (more := _more_than_batch_size(config, runtime, say)):
        return more
    known = remembered_micro_batch(config, runtime)
    if known is not None and _estimate(config, known, runtime) <= 1.1 * free:
        if known < most:
            say(
                f"{known} sequences run per micro-batch: more did not fit into this machine's memory before; "
                f"--set training.micro_batch_size={most} tries {most} again"
            )
        return min(known, most)
    if _estimate(config, most, runtime) <= ROOMY * free:
        return most
    say(f"looking for how many of {most} sequences fit into {free / 1e9:.2f} GB")
    guess = min(most, max(1, largest_micro_batch(config, free, device=runtime.device.type)))
    limit = int((1 - _LEFT_FREE) * free) + (data_bytes() if runtime.device.type == "cpu" else 0)
    found = _largest(most, guess, lambda size: _trial_fits(config, size, limit, say))
    if found == 0:
        for line in memory_advice(config, device=runtime.device.type, available=free):
            say(line)
        raise AtlasError(
            f"training: not even one sequence fits into the {free / 1e9:.2f} GB of memory that are free: see above for "
            "what would help"
        )
    remember_micro_batch(config, runtime, found)
    say(
        f"{found} of {most} sequences run per micro-batch: an update still has {config.training.sequences_per_update} "
        "sequences"
    )
    return found


def is_short_of_memory(config: AtlasConfig, runtime: Runtime, size: int) -> bool:
    """Whether memory may be too small for `size` sequences per micro-batch if compiled blocks recompute nothing in the
    backward pass."""
    return _estimate(config, size, runtime, keeps_all=True) > ROOMY * measure_memory(runtime.device.type)


def _more_than_batch_size(config: AtlasConfig, runtime: Runtime, say: Callable[[str], None]) -> int | None:
    """Return the largest micro-batch size above `batch_size` that splits an update almost evenly and leaves enough GPU
    memory free. Return None if there is no such size."""
    sequences = -(-config.training.sequences_per_update // runtime.world.size)
    known = remembered_micro_batch(config, runtime)
    for num_micro_batches in range(1, config.training.gradient_accumulation_steps):
        size = -(-sequences // num_micro_batches)
        if size <= config.training.batch_size:
            break
        if size * num_micro_batches > _FILLED * sequences:  # too many rows would only be padding
            continue
        limit = int(_COMFORTABLE * measure_memory(runtime.device.type))
        need = _estimate(config, size, runtime)
        if runtime.compiles:
            # Compiled blocks save more tensors than the blocks of a trial, which are not compiled.
            limit -= _estimate(config, size, runtime, keeps_all=True) - need
        if need > limit or (known is not None and known < size):
            continue
        if known == size or _trial_fits(config, size, limit, say):
            remember_micro_batch(config, runtime, size)
            say(
                f"{size} sequences run per micro-batch: an update has {config.training.sequences_per_update}, and "
                "there is enough GPU memory"
            )
            return size
    return None


def _estimate(config: AtlasConfig, size: int, runtime: Runtime, *, keeps_all: bool = False) -> int:
    config = as_computed(config, runtime).replace("training", micro_batch_size=size)
    return estimate_training_memory(config, device=runtime.device.type, keeps_all=keeps_all).total


def _largest(most: int, guess: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number from 1 to `most` for which `fits` returns true, or 0 if there is none. The search is a
    bisection that starts at `guess`. It requires that if a number fits, all smaller numbers fit too."""
    low, high, size = 0, most + 1, min(guess, most)
    while high - low > 1:
        low, high = (size, high) if fits(size) else (low, size)
        size = (low + high) // 2
    return low


def _trial_fits(config: AtlasConfig, size: int, limit: int, say: Callable[[str], None]) -> bool:
    """Whether a child process that may use `limit` bytes can run an update with micro-batches of `size` sequences. On a
    CPU, the limit includes the memory of Python and PyTorch. The child does not compile, since compilation takes about
    a minute."""
    # The child is a single process, so it cannot share the model with other ranks.
    alone = config.replace("training", parallel="auto", shard_size=None)
    trial = alone.model_dump(mode="json"), size, limit, torch.get_num_threads()
    command = [sys.executable, "-m", "atlas.training.micro_batch"]
    child = subprocess.run(
        command, input=json.dumps(trial), capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    if child.returncode not in {0, _TOO_LARGE, *_KILLED}:
        reason = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        raise AtlasError(
            f"training.micro_batch_size: auto: the trial of an update failed ({reason:.200}): set a number"
        )
    fits = child.returncode == 0
    say(f"  {size} per micro-batch: {'fits' if fits else 'does not fit'}")
    return fits


def _run_trial() -> int:
    """Run the trial in the child process and return the exit code. If an update of the run has several micro-batches,
    an update of the trial has two: the gradient of the first is in memory during the second."""
    settings, size, limit, threads = json.load(sys.stdin)
    keep_memory()  # as in the run: with this setting, a process uses a little more memory
    config = resolve(settings)
    torch.set_num_threads(threads)
    runtime = setup_runtime(config)
    _limit_memory(limit, runtime.device)
    sequences = min(2 * size, config.training.sequences_per_update)
    tokens = torch.randint(0, config.model.vocabulary, (sequences, config.model.max_seq_len + 1))
    state = TrainState(horizon=1, micro_batch_size=size)
    try:
        learner = fresh_learner(config, runtime)
        documents = [torch.zeros_like(tokens[:, 1:])] if config.data.document_mask else []
        batch = [tokens[:, :-1], tokens[:, 1:], *documents]
        for _ in range(2):  # the second update runs with the optimizer's state and fragmented memory
            gradient = accumulate_gradient(learner, batch, state, stop=StopRequest())
            apply_gradient(learner, gradient, state, rate=0.0)
    except (ImportError, RuntimeError, MemoryError) as error:
        # Python raises ImportError if no memory is left to map a library that PyTorch loads on first use.
        if not isinstance(error, ImportError) and not is_out_of_memory(error):
            raise
        return _TOO_LARGE
    return 0


def _limit_memory(limit: int, device: torch.device) -> None:
    """Make an allocation beyond `limit` bytes fail, if PyTorch or the system supports such a limit."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))  # of the current GPU
    if device.type == "cpu" and sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        allowed = [value for value in (limit, soft, hard) if value != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_DATA, (min(allowed), hard))


if __name__ == "__main__":
    sys.exit(_run_trial())
