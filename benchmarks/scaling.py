"""Measure the tokens per second of several processes that train one model, compared with plain DistributedDataParallel.

    python benchmarks/scaling.py                                nano, 1 and 2 processes
    python benchmarks/scaling.py --preset tiny --updates 1
    python benchmarks/scaling.py --processes 1 2 4 8
    python benchmarks/scaling.py --parallel fsdp                sharded, beside plain `fully_shard`
    python benchmarks/scaling.py --device cuda --preset small --processes 1 --parallel fsdp     the cost of one shard

Atlas computes its updates as `atlas train` does under torchrun. The plain loop is a typical loop written by hand: the
same model and loss on random tokens, PyTorch's wrapper (DDP or FSDP2), a fused AdamW, and gradient clipping. The plain
loop has nothing else. For example, it does not divide the loss by the number of valid tokens on all ranks, and does not
check for lack of memory or for a non-finite loss. Each process has one thread and the same number of sequences,
whatever the number of processes. One process is an ordinary run without torchrun and wrapper. With `--parallel fsdp`,
the script also measures one process under torchrun, with a single shard. All processes run in fp32 on the CPU with
Atlas's memory settings (atlas/process.py), or in bf16 with one GPU per process.

All programs start once. Then the programs take turns: one computes some updates, while the others wait without
computing. The table shows medians. Efficiency is the speed of N processes divided by N times the speed of one process.
If processes share cores, caches or memory bandwidth, no program can reach 100 %. The last column shows the speed of
Atlas divided by the speed of the other program.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from contenders import Contender, take_turns
from results import add_record_option, recorded

if TYPE_CHECKING:
    import torch

    from atlas.config import AtlasConfig
    from atlas.training.devices.world import World

VOCABULARY = 2048
"""The vocabulary of a preset that does not state one."""
WARM_UP = 3
PATIENCE = 3600.0
"""Seconds for which the other ranks wait while the first rank waits for its turn."""


@dataclass(frozen=True)
class Task:
    """The model and the batch of every contender. The batch is for one process."""

    preset: str
    batch_size: int
    parallel: str
    updates: int
    device: str = "cpu"

    def config(self, processes: int) -> AtlasConfig:
        from atlas.config.loader import overlay, read_yaml, resolve
        from atlas.config.presets import preset_path

        preset = read_yaml(preset_path(self.preset))
        training = {
            "batch_size": self.batch_size * processes,
            "optimizer": "adamw",
            "precision": "fp32" if self.device == "cpu" else "auto",
            "parallel": self.parallel if "RANK" in os.environ else "auto",
        }
        given = {"model": {"vocab_size": VOCABULARY}} if "vocab_size" not in preset["model"] else {}
        return resolve(overlay(preset, {**given, "training": training, "device": self.device}))

    def batch(self, config: AtlasConfig) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the inputs and targets of one process."""
        import torch

        tokens = torch.randint(0, config.model.vocabulary, (self.batch_size, config.model.max_seq_len + 1))
        return tokens[:, :-1], tokens[:, 1:]


Step = Callable[[], None]


# The contenders, in separate processes


def atlas(task: Task, world: World) -> Step:
    from atlas.training.devices.device import setup_runtime
    from atlas.training.devices.signals import StopRequest
    from atlas.training.memory.parallel import choose_parallel
    from atlas.training.state import TrainState
    from atlas.training.step import accumulate_gradient, apply_gradient, fresh_learner

    config = task.config(world.size)
    runtime = setup_runtime(config, world)
    runtime = replace(runtime, parallel=choose_parallel(config, world, runtime.device))
    learner = fresh_learner(config, runtime)
    state = TrainState(horizon=10**9, micro_batch_size=task.batch_size, eval_batch_size=task.batch_size)
    stop = StopRequest(print, is_alone=world.size == 1)

    def step() -> None:
        gradient = accumulate_gradient(learner, task.batch(config), state, stop=stop)
        apply_gradient(learner, gradient, state, rate=3e-4)
        state.step += 1

    return step


def plain(task: Task, world: World) -> Step:
    import torch
    from torch.distributed.fsdp import fully_shard

    from atlas.model import build_model
    from atlas.training.devices.device import setup_runtime
    from atlas.training.loss import SummedLoss

    config = task.config(world.size)
    runtime = setup_runtime(config, world)
    model = build_model(config.model, seed=0).train().to(runtime.device)
    objective: Any = SummedLoss(model)
    if world.size > 1 and task.parallel == "ddp":
        objective = torch.nn.parallel.DistributedDataParallel(objective)
    elif world.size > 1:
        for block in model.blocks:
            fully_shard(block)
        fully_shard(objective)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)

    def step() -> None:
        inputs, targets = (tensor.to(runtime.device) for tensor in task.batch(config))
        with runtime.autocast():
            loss = objective(inputs, targets) / targets.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.training.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


KINDS = {"atlas": atlas, "plain": plain}


def serve(kind: str, task: Task) -> None:
    """Run one rank of a contender. The first rank answers with the seconds of a turn; the other ranks only compute."""
    from atlas.process import set_up_process

    set_up_process()
    from atlas.training.devices.world import join_world, together

    world = join_world(PATIENCE)

    def prepare() -> Callable[[Any], float]:
        step = KINDS[kind](task, world)
        for _ in range(WARM_UP):
            step()

        def turn(request: Any) -> float:
            world.broadcast(True)
            start = time.perf_counter()
            for _ in range(task.updates):
                step()
            return time.perf_counter() - start

        def follow(request: Any) -> float:
            while world.broadcast():
                for _ in range(task.updates):
                    step()
            return 0.0

        return turn if world.is_first else follow

    with together(world):
        if world.is_first:
            take_turns(prepare)
            world.broadcast(False)
        else:
            os.dup2(2, 1)  # output of libraries is not an answer
            prepare()(None)


# The parent


@dataclass
class Trainee:
    """A contender and its results."""

    contender: Contender
    processes: int
    seconds: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.contender.name


def trainee(name: str, kind: str, processes: int, task: Task, *, wrapped: bool = False) -> Trainee:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 or wrapped else []), __file__]
    return Trainee(Contender(name, [*command, "--child", kind, json.dumps(asdict(task))]), processes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="1 is always among them")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--updates", type=int, default=20, help="updates in a contender's turn")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences per process and update")
    parser.add_argument("--parallel", default="ddp", choices=["ddp", "fsdp"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    add_record_option(parser)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind, given = arguments.child
        serve(kind, Task(**json.loads(given)))
        return

    os.environ["OMP_NUM_THREADS"] = "1"
    task = Task(
        arguments.preset, arguments.batch_size, arguments.parallel, arguments.updates, arguments.device
    )
    names = {"atlas": "Atlas", "plain": f"plain {task.parallel.upper()}"}
    chosen = [
        trainee(name, kind, processes, task)
        for processes in sorted({1, *arguments.processes})
        for kind, name in names.items()
    ]
    if task.parallel == "fsdp":
        chosen.insert(2, trainee("Atlas, one shard", "atlas", 1, task, wrapped=True))
    with recorded("Scaling", arguments):
        for one in chosen:
            one.contender.launch()
            if not one.contender.is_ready():
                raise SystemExit("nothing to compare")
        for _ in range(arguments.rounds):
            for one in chosen:
                one.seconds.append(one.contender.ask())
        for one in chosen:
            one.contender.stop()
        report(task, chosen)


def report(task: Task, chosen: list[Trainee]) -> None:
    """Print a table that compares each of `chosen` with the first one, Atlas, for the same number of processes, and
    with its own speed in one process."""
    context = task.config(1).model.max_seq_len
    print(
        f"{task.preset}: {task.batch_size} × {context} tokens a process, {task.parallel}, {task.device}, "
        f"{'fp32, a thread each' if task.device == 'cpu' else 'bf16'}, "
        f"medians of {len(chosen[0].seconds)} × {task.updates} updates\n"
    )
    tokens = task.updates * task.batch_size * context
    speed = {
        (one.name, one.processes): one.processes * tokens / statistics.median(one.seconds) for one in chosen
    }
    first = chosen[0].name
    print("| processes | | tokens/s | efficiency | Atlas ÷ it |\n|---:|---|---:|---:|---:|")
    for (name, processes), rate in speed.items():
        print(
            f"| {processes} | {name} | {rate:,.0f} | {rate / speed[name, 1] / processes:.1%} "
            f"| {speed[first, processes] / rate:.3f} |"
        )


if __name__ == "__main__":
    main()
