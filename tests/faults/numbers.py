"""Bad numbers in random updates, and memory that runs out in random micro-batches.

    python -m tests.faults.numbers --rounds 40
    python -m tests.faults.numbers --rounds 40 --memory

A hook on the optimizer or the loss causes them. The expected result is computed here, without the guard: a bad update
must leave every bit of weights and optimizer state as it was, and be logged with its sequences. A run that was short of
memory must have the losses of one that had enough.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch

from atlas.training.loss import compute_lm_loss
from atlas.training.run import Run
from atlas.training.train import train
from tests.conftest import corpus
from tests.faults.runs import Broken, command, options, shown
from tests.runs import layer, logged, on_updates, run_for, same_bits

STEPS = 12
WRONG = ("loss nan", "loss inf", "gradient nan", "gradient inf")


def random_trainer(folder: Path, chance: random.Random) -> Run:
    """A fresh run of random batch, accumulation and micro-batch."""
    os.environ["ATLAS_CACHE_DIR"] = str(folder / "cache")
    text = folder / "text.txt"
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text(corpus(300), encoding="utf-8")
    batch, accumulation = chance.randint(2, 6), chance.randint(1, 2)
    explicit = layer(
        folder / "run",
        text,
        training__max_steps=STEPS,
        training__batch_size=batch,
        training__gradient_accumulation_steps=accumulation,
        training__micro_batch_size=chance.randint(1, batch),
        seed=chance.randint(0, 1000),
    )
    with contextlib.redirect_stderr(io.StringIO()):
        return run_for(explicit)


def go_wrong(run: Run, wrong: dict[int, str]) -> None:
    """Let these steps be wrong in their way, and hold the run to moving nothing by them."""
    forward, before = run.learner.objective.forward, []

    def spoilt(*columns: torch.Tensor, **named: object) -> torch.Tensor:
        loss = forward(*columns, **named)
        what, value = wrong.get(run.state.step + 1, "- 0").split()
        if what == "loss" and run.model.training:
            return loss * float(value)
        if what == "gradient" and run.model.training:
            # The forward pass is sound; the gradient of one weight is not.
            first = next(run.model.parameters()).view(-1)[3]
            return loss + _Spoil.apply(first, float(value))
        return loss

    def remember() -> None:
        before[:] = copy.deepcopy([run.model.state_dict(), run.optimizer.state_dict()["state"]])

    def check() -> None:
        after = (run.model.state_dict(), run.optimizer.state_dict()["state"])
        is_wrong = run.state.step in wrong
        moved = not same_bits(before[0], after[0]) or (before[1] and not same_bits(before[1], after[1]))
        if bool(moved) is is_wrong:
            raise Broken(f"step {run.state.step}: {'moved' if moved else 'did not move'} the weights")

    run.learner.objective.forward = spoilt
    on_updates(run, before=remember, after=check)


class _Spoil(torch.autograd.Function):
    """Zero, with a gradient of `value`."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, value: float) -> torch.Tensor:
        ctx.value = value
        return torch.zeros_like(weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.full_like(grads[0], ctx.value), None


def wrong_numbers(folder: Path, *, rounds: int, seed: int) -> list[str]:
    """Random updates are wrong, never five in a row. Return the counts as lines."""
    chance, made = random.Random(seed), 0
    for number in shown(rounds, "numbers"):
        run = random_trainer(folder / str(number), chance)
        steps = [step for step in range(1, STEPS + 1) if chance.random() < 0.3 and step % 5]
        wrong = {step: chance.choice(WRONG) for step in steps}
        go_wrong(run, wrong)
        with contextlib.redirect_stderr(io.StringIO()):
            train(run)
        size = run.config.training.sequences_per_update
        events = [
            (line["step"], line["first_sequence"], line["last_sequence"])
            for line in logged(folder / str(number) / "run", "event")
            if line["event"] == "skipped"
        ]
        if events != [(step, (step - 1) * size, step * size - 1) for step in wrong]:
            raise Broken(f"round {number}: wrong at {list(wrong)}, logged {events}")
        if [line["step"] for line in logged(folder / str(number) / "run")] != list(range(1, STEPS + 1)):
            raise Broken(f"round {number}: the log does not have each step once")
        made += len(wrong)
    return [
        f"numbers: {made} wrong updates in {rounds} runs (--seed {seed}): none moved a bit, each is logged"
    ]


def short_memory(folder: Path, *, rounds: int, seed: int) -> list[str]:
    """An allocator with space for fewer and fewer sequences from random micro-batches on. Return the counts as
    lines."""
    chance, refused = random.Random(seed), 0
    for number in shown(rounds, "memory"):
        place = folder / str(number)
        state = chance.getstate()
        enough = random_trainer(place / "enough", chance)
        with contextlib.redirect_stderr(io.StringIO()):
            train(enough)
        chance.setstate(state)
        run = random_trainer(place / "short", chance)
        limits = sorted((chance.randint(1, 30), chance.randint(1, 5)) for _ in range(3))
        calls = 0

        def allocate(
            logits: torch.Tensor,
            targets: torch.Tensor,
            mask: torch.Tensor | None = None,
            limits: list[tuple[int, int]] = limits,
        ) -> torch.Tensor:
            nonlocal calls, refused
            calls += 1
            room = min([fits for begin, fits in limits if begin <= calls], default=99)
            if len(logits) > room:
                refused += 1
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate it all")
            return compute_lm_loss(logits, targets, mask)

        run.learner.objective.custom_loss = allocate
        with contextlib.redirect_stderr(io.StringIO()):
            train(run)
        for one, other in zip(logged(place / "enough" / "run"), logged(place / "short" / "run"), strict=True):
            same = math.isclose(one["loss"], other["loss"], rel_tol=1e-5)
            if not same or one["sequences_consumed"] != other["sequences_consumed"]:
                raise Broken(f"round {number}: {one} with enough memory, {other} without")
    return [
        f"memory: {refused} allocations refused in {rounds} runs (--seed {seed}): the losses are those of runs "
        "with enough (1e-5), an update still takes the same sequences"
    ]


def main() -> int:
    parser = options("numbers", rounds=40)
    parser.add_argument("--memory", action="store_true", help="memory that runs out instead of numbers")
    asked = parser.parse_args()
    kind = short_memory if asked.memory else wrong_numbers
    return command("numbers", lambda folder: kind(folder, rounds=asked.rounds, seed=asked.seed))


if __name__ == "__main__":
    sys.exit(main())
