"""What ranks send, how long it takes and what each needs: compared with simulated rings, with what PyTorch's FSDP and
DDP really send, and with limits that hold for any model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from atlas.cli import main
from atlas.config import AtlasConfig
from atlas.config.loader import overlay, resolve
from atlas.errors import AtlasError
from atlas.model import build_model
from atlas.planning import scaling as planned
from atlas.planning import tables
from atlas.planning.cards import find_card
from atlas.planning.communication import (
    LINK_EFFICIENCY,
    LINKS,
    OVERLAP,
    Cluster,
    Link,
    Pass,
    Sizes,
    all_reduce,
    cluster_of,
    communicate,
    gather,
)
from atlas.planning.machine import Machine, machine_with
from atlas.planning.run import plan_run, seconds_of_update
from atlas.planning.scaling import Scaling, scale
from atlas.training.devices.parallel import no_sync_except_last, wrap
from atlas.training.devices.world import World
from atlas.training.loss import SummedLoss
from atlas.training.memory.estimate import estimate_training_memory

SHAPE = {"hidden_size": 64, "num_layers": 3, "num_heads": 2, "vocab_size": 250, "max_seq_len": 32}
FAST = Link("fast", 100.0)
CARD = machine_with(find_card("A100 80GB"))


def config_of(**sections: dict[str, Any]) -> AtlasConfig:
    return resolve(
        overlay({"model": SHAPE, "training": {"batch_size": 4, "gradient_accumulation_steps": 4}}, sections)
    )


def scaled(config: AtlasConfig, *, gpus: int = 4, nodes: int = 1, machine: Machine = CARD) -> Scaling:
    return scale(config, machine, Cluster(gpus, nodes, FAST, FAST if nodes > 1 else None))


def parallel(name: str, **training: Any) -> dict[str, Any]:
    return {"parallel": name, "batch_size": 4, "gradient_accumulation_steps": 4, **training}


# Rings


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_bytes_are_those_of_a_simulated_ring(ranks: int) -> None:
    """Each rank holds `ranks` chunks of 2 numbers, and in each step sends one to the next rank."""
    chunks = [[[float(rank * chunk)] * 2 for chunk in range(ranks)] for rank in range(ranks)]
    wanted = [sum(rank * chunk for rank in range(ranks)) for chunk in range(ranks)]
    sent = [0] * ranks

    def turn(first: int, *, adds: bool) -> None:
        for step in range(ranks - 1):
            moves = [(rank, (rank + first - step) % ranks) for rank in range(ranks)]
            for rank, chunk, numbers in [(r, c, list(chunks[r][c])) for r, c in moves]:
                there = chunks[(rank + 1) % ranks]
                there[chunk] = (
                    [a + b for a, b in zip(there[chunk], numbers, strict=True)] if adds else numbers
                )
                sent[rank] += 4 * len(numbers)

    size = 4 * 2 * ranks
    turn(0, adds=True)
    assert all(chunks[rank][(rank + 1) % ranks][0] == wanted[(rank + 1) % ranks] for rank in range(ranks))
    assert sent == [gather(size, ranks)] * ranks
    turn(1, adds=False)
    assert all([chunk[0] for chunk in chunks[rank]] == wanted for rank in range(ranks))
    assert sent == [all_reduce(size, ranks)] * ranks


@pytest.mark.parametrize(
    ("gpus", "nodes", "link", "neighbours", "across"),
    [
        (8, 1, None, {2: 300, 8: 300}, {2: 300, 8: 300}),
        # A port for each GPU: one ring uses all of a node's ports, and each of eight rings one.
        (8, 2, Link("ports", 25.0), {4: 300, 8: 300, 16: 200}, {8: 25, 4: 50, 1: 200}),
        (8, 4, Link("fast ports", 50.0), {16: 300, 32: 300}, {8: 50, 16: 50}),
        # One port for all: one ring uses all of it, and each of several rings a part.
        (8, 2, Link("port", 1.2, is_shared=True), {8: 300, 16: 1.2}, {8: 0.15, 2: 0.6}),
        # Groups that do not fill nodes: two rings leave some nodes.
        (8, 3, Link("port", 1.2, is_shared=True), {6: 0.6, 12: 0.6, 24: 1.2}, {}),
        (1, 4, Link("port", 1.2, is_shared=True), {4: 1.2}, {1: 1.2}),
    ],
)
def test_rings_share_what_leaves_a_node(
    gpus: int, nodes: int, link: Link | None, neighbours: dict[int, float], across: dict[int, float]
) -> None:
    cluster = Cluster(gpus, nodes, Link("inside", 300.0), link)
    found = {size: cluster.rate_of_neighbours(size) for size in neighbours}
    assert found == pytest.approx({size: LINK_EFFICIENCY * rate * 1e9 for size, rate in neighbours.items()})
    found = {size: cluster.rate_across(size) for size in across}
    assert found == pytest.approx({size: LINK_EFFICIENCY * rate * 1e9 for size, rate in across.items()})


def test_what_is_exposed_by_hand() -> None:
    """1 GB/s, of which 0.8 count; two micro-batches of 1 s forward and 2 s backward, and then a shorter one."""
    cluster = Cluster(2, 1, Link("slow", 1.0), None)
    sizes = Sizes(1 << 30, 1 << 28, 1 << 30, 1 << 28, 1 << 28, gathered=0)
    passes = [Pass(2, 1.0, 2.0), Pass(1, 0.5, 1.0)]
    second = LINK_EFFICIENCY * 1e9
    found = communicate(sizes, cluster, passes, parallel="ddp", shards=1)
    blocks, root = (1 << 30) / second, (1 << 28) / second
    assert found.bytes == found.gradients == (1 << 30) + (1 << 28)
    assert found.exposed == pytest.approx(root + blocks - OVERLAP * 1.0)

    found = communicate(sizes, cluster, passes, parallel="fsdp", shards=2)
    half = blocks / 2
    assert found.weights == 3 * (2 * (1 << 29) + (1 << 27))
    assert found.gradients == 3 * ((1 << 29) + (1 << 27))
    late = 3 * 2 * root / 2
    shorter = max(0, half - OVERLAP * 0.5) + max(0, 2 * half - OVERLAP * 1.0)
    assert found.exposed == pytest.approx(late + shorter)
    assert found.seconds == pytest.approx(found.bytes / second)


# What PyTorch sends


class Sent(TorchDispatchMode):
    """Bytes that go into each collective."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = {"_allgather_base_": [0], "_reduce_scatter_base_": [0], "allreduce_": [0]}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function).split(".")[1]
        if name in self.sizes and str(function).startswith("c10d."):
            tensors = args[0] if name == "allreduce_" else args[:2]
            self.sizes[name].append(max(t.numel() * t.element_size() for t in tensors))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def eight_ranks() -> Iterator[None]:
    """This process as the first of eight ranks that do not answer: nothing is sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    dist.destroy_process_group()


def objective_of(config: AtlasConfig) -> nn.Module:
    model = build_model(config.model, seed=0)
    model.gradient_checkpointing = config.training.gradient_checkpointing
    return SummedLoss(model)


@pytest.mark.parametrize("shards", [8, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_fsdp_sends_what_was_planned(shards: int, checkpointing: bool, tied: bool, eight_ranks: None) -> None:
    training = parallel(
        "fsdp", batch_size=3, gradient_accumulation_steps=8, shard_size=shards, micro_batch_size=2
    )
    config = config_of(
        model={"tie_embeddings": tied}, training={**training, "gradient_checkpointing": checkpointing}
    )
    objective = objective_of(config)
    wrapped = wrap(objective, config, World(size=8), "fsdp", torch.device("cpu"))
    tokens = torch.zeros(1, 32, dtype=torch.long)
    with Sent() as sent:
        for is_last in (False, True):
            with no_sync_except_last(wrapped, is_last=is_last):
                wrapped(tokens, tokens, num_valid=32).backward()
    gathered, scattered, reduced = (sum(sizes) for sizes in sent.sizes.values())

    found = scaled(config, gpus=4, nodes=2).communication
    assert found.weights == gather(gathered, shards)
    assert found.gradients == gather(scattered, shards) + all_reduce(reduced, 8 // shards)
    assert (reduced > 0) == (shards < 8)


def test_ddp_sends_the_gradients_of_all_trainable_weights_once(eight_ranks: None) -> None:
    config = config_of(training=parallel("ddp", gradient_accumulation_steps=8))
    wrapped = wrap(objective_of(config), config, World(size=8), "ddp", torch.device("cpu"))
    sizes = []

    def reduce(state, bucket):  # type: ignore[no-untyped-def]  # PyTorch compares annotations, which are strings here
        sizes.append(bucket.buffer().nbytes)
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    wrapped.register_comm_hook(None, reduce)  # type: ignore[operator]
    tokens = torch.zeros(1, 32, dtype=torch.long)
    for is_last in (False, True):
        with no_sync_except_last(wrapped, is_last=is_last):
            wrapped(tokens, tokens, num_valid=32).backward()
    sent = scaled(config, gpus=8).communication
    assert (sent.weights, sent.gradients) == (0, all_reduce(sum(sizes), 8))


def test_low_rank_updates_alone_are_summed_and_muon_needs_full_matrices() -> None:
    def sent(**sections: dict[str, Any]) -> tuple[float, float]:
        found = scaled(config_of(**sections), gpus=4).communication
        return found.weights, found.gradients

    low_rank = {"rank": 2, "targets": ["qkv"]}
    numbers = 3 * 2 * (64 + 3 * 64)
    assert sent(lora=low_rank) == (0, all_reduce(4 * numbers, 4))
    weights, gradients = sent(lora=low_rank, training=parallel("fsdp"))
    assert gradients == gather(4 * numbers, 4)
    assert weights > 10 * gradients

    _, plain = sent(training=parallel("fsdp"))
    _, whole = sent(training=parallel("fsdp", optimizer="muon"))
    assert whole - plain == gather(4 * 3 * 12 * 64 * 64, 4)


# Limits


def test_one_rank_is_a_run_alone() -> None:
    config = config_of()
    found = scaled(config, gpus=1)
    assert (found.parallel, found.communication.bytes, found.communication.exposed) == ("none", 0, 0)
    assert found.efficiency == 1
    run = plan_run(config, CARD, updates=1)
    assert run.seconds is not None
    assert found.computing == pytest.approx((run.seconds[0] * run.seconds[1]) ** 0.5)
    assert found.memory.total == estimate_training_memory(config, device="cuda").total
    assert found.tokens_per_second == pytest.approx(16 * 32 / found.computing)


@settings(max_examples=100, deadline=None)
@given(
    gpus=st.integers(1, 8),
    nodes=st.integers(1, 8),
    inside=st.floats(0.01, 1000),
    between=st.floats(0.01, 1000),
    more=st.floats(1, 100),
    one_port=st.booleans(),
    name=st.sampled_from(["auto", "ddp", "fsdp"]),
    sequences=st.integers(1, 6),
    at_once=st.integers(1, 4),
    checkpointing=st.booleans(),
)
def test_faster_links_are_never_slower_and_nothing_is_faster_than_computing(
    gpus: int,
    nodes: int,
    inside: float,
    between: float,
    more: float,
    one_port: bool,
    name: str,
    sequences: int,
    at_once: int,
    checkpointing: bool,
) -> None:
    config = config_of(
        training=parallel(
            name,
            batch_size=sequences * gpus * nodes,
            gradient_accumulation_steps=1,
            micro_batch_size=at_once,
            gradient_checkpointing=checkpointing,
        )
    )

    def on(inside: float, between: float) -> Scaling:
        link = Link("between", between, is_shared=one_port) if nodes > 1 else None
        return scale(config, CARD, Cluster(gpus, nodes, Link("inside", inside), link))

    found = on(inside, between)
    assert 0 < found.efficiency <= 1
    assert 0 <= found.communication.exposed <= found.communication.seconds * (1 + 1e-12)
    assert on(inside * more, between * more).seconds <= found.seconds * (1 + 1e-12)
    own = config.training.model_copy(update={"batch_size": sequences})  # of a rank
    alone = seconds_of_update(config.model_copy(update={"training": own}), CARD)
    assert found.computing == pytest.approx(alone)
    assert (found.communication.bytes == 0) == (gpus * nodes == 1)


def test_a_share_of_memory_falls_with_the_ranks_that_share_but_never_below_activations() -> None:
    def memory(shards: int) -> planned.RankMemory:
        training = parallel("fsdp", batch_size=64, micro_batch_size=2, shard_size=shards)
        return scaled(config_of(training=training), gpus=64).memory

    found = [memory(shards) for shards in (1, 2, 4, 16, 64)]
    totals = [each.total for each in found]
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) == len(totals)
    for shards, each in zip((1, 2, 4, 16, 64), found, strict=True):
        assert each.weights * shards == found[0].weights
        assert each.optimizer * shards == 2 * each.gradients * shards == 2 * found[0].weights
        assert each.total > each.activations + each.loss + each.process
        assert each.activations == found[0].activations
    whole = scaled(config_of(training=parallel("ddp", batch_size=64, micro_batch_size=2)), gpus=64).memory
    assert whole.gathered == 0
    assert whole.weights <= whole.gradients <= 2 * whole.weights


def test_what_is_gathered_is_the_root_and_two_blocks_with_their_gradients() -> None:
    config = config_of(training=parallel("fsdp"))
    model = build_model(config.model)
    block = 4 * sum(p.numel() for p in model.blocks[0].parameters())
    root = 4 * sum(p.numel() for p in model.parameters()) - 3 * block
    table = model.token_embedding.weight.nbytes  # the head's, whose gradient the loss has made
    assert scaled(config).memory.gathered == root + 2 * block + (root - table) + 2 * block


PEAK = """
import json, sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from atlas.config.loader import resolve
from atlas.model import build_model
from atlas.training.devices.parallel import no_sync_except_last, wrap
from atlas.training.devices.world import World
from atlas.training.loss import SummedLoss
from atlas.training.optimizers.build import build_optimizer

config, ranks = resolve(json.loads(sys.argv[1])), int(sys.argv[2])
training = config.training
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
model = build_model(config.model, seed=0).train()
model.gradient_checkpointing = training.gradient_checkpointing
wrapped = wrap(SummedLoss(model), config, World(size=ranks), training.parallel, torch.device("cpu"))
optimizer = build_optimizer(model, training)
if training.parallel == "ddp":  # its own hook waits for the network

    def unanswered(state, bucket):
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    wrapped.register_comm_hook(None, unanswered)
tokens = torch.randint(config.model.vocab_size, (training.sequences_at_once, config.model.max_seq_len))
for step in range(3):
    if step == 1:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # reset the peak
    count = training.sequences_per_update // ranks // len(tokens)
    for number in range(count):
        with no_sync_except_last(wrapped, is_last=number == count - 1):
            (wrapped(tokens, tokens, num_valid=tokens.numel()) / tokens.numel()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=config.training.parallel != "ddp")  # as `clear_gradient` does
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
print(int(status["VmHWM"].split()[0]) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux", reason="peak memory is in other units elsewhere, or not to be had"
)
@pytest.mark.parametrize(
    ("ranks", "training", "tied"),
    [
        (8, {"parallel": "ddp", "batch_size": 32}, True),
        (8, {"parallel": "ddp", "batch_size": 16}, True),
        (8, {"parallel": "fsdp", "batch_size": 32}, True),
        (64, {"parallel": "fsdp", "batch_size": 256, "shard_size": 8}, True),
        (64, {"parallel": "fsdp", "batch_size": 256, "gradient_checkpointing": True}, True),
        (64, {"parallel": "fsdp", "batch_size": 256}, False),
    ],
)
def test_memory_is_near_the_measured_peak(ranks: int, training: dict[str, Any], tied: bool) -> None:
    """The peak of one process as one rank of many, with a network that does nothing."""
    shape = {"hidden_size": 768, "num_layers": 8, "num_heads": 12, "vocab_size": 16384, "max_seq_len": 256}
    config = resolve(
        {"model": {**shape, "tie_embeddings": tied}, "training": {**training, "micro_batch_size": 2}}
    )
    returns_what_is_freed = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    measured = subprocess.run(
        [sys.executable, "-c", PEAK, config.model_dump_json(), str(ranks)],
        env={**os.environ, **returns_what_is_freed},
        check=True,
        capture_output=True,
        text=True,
    )
    machine = Machine("here", "cpu", 1 << 40, flops_per_second=1e11)
    memory = scaled(config, gpus=8, nodes=ranks // 8, machine=machine).memory
    assert -0.03 < (memory.total - memory.allocator) / int(measured.stdout) - 1 < 0.12


# The results


def test_auto_shards_what_does_not_fit() -> None:
    config = config_of()
    step = estimate_training_memory(config_of(training=parallel("auto", micro_batch_size=1)), device="cuda")
    needed = step.total
    assert scaled(config, machine=replace(CARD, memory=int(needed / 0.75) + 1)).parallel == "ddp"
    small = replace(CARD, memory=int(needed / 0.75) - 1)
    found = scaled(config, machine=small)
    assert (found.parallel, found.shard_size) == ("fsdp", 4)
    for optimizer in ("adafactor", "adamw8bit"):
        with pytest.raises(
            AtlasError, match=rf"training.optimizer: {optimizer}: .*does not fit.*adamw or muon"
        ):
            scaled(
                config_of(training=parallel("auto", optimizer=optimizer)),
                machine=replace(CARD, memory=1 << 20),
            )


@pytest.mark.parametrize(
    ("training", "says"),
    [
        ({"parallel": "none"}, "training.parallel: none: 4 processes .* use auto"),
        ({"parallel": "fsdp", "shard_size": 3}, "training.shard_size: 3: 4 processes are not a multiple"),
        ({"parallel": "ddp", "shard_size": 2}, "training.shard_size: 2: is for training.parallel fsdp"),
        ({"parallel": "fsdp", "precision": "fp16"}, "training.precision: fp16: .*use bf16, or ddp"),
        (
            {"parallel": "fsdp", "optimizer": "adafactor"},
            "training.optimizer: adafactor: .*use adamw or muon",
        ),
        ({"batch_size": 3, "gradient_accumulation_steps": 3}, "9 sequences cannot .* over 4 GPUs; choose"),
    ],
)
def test_an_impossible_setting_is_named(training: dict[str, Any], says: str) -> None:
    with pytest.raises(AtlasError, match=says):
        scaled(config_of(training=training))


def test_ranks_of_a_machine_without_gpus_share_it() -> None:
    machine = Machine("here", "cpu", 1 << 33, flops_per_second=1e11)
    found = scaled(config_of(), gpus=4, machine=machine)
    assert found.available == 1 << 31
    assert found.computing == pytest.approx(scaled(config_of(), gpus=1, machine=machine).computing)


# Links by name


@pytest.mark.parametrize(
    ("text", "nodes", "inside", "between"),
    [
        (None, 1, 24, None),
        (None, 2, 24, 1.2),
        ("NVLink4", 1, 450, None),
        ("nvlink3, infiniband-200", 2, 300, 25),
        ("pcie5,2.5", 2, 48, 2.5),
        ("1e2", 1, 100, None),
    ],
)
def test_links_are_found_by_name_or_are_numbers(
    text: str | None, nodes: int, inside: float, between: float | None
) -> None:
    cluster = cluster_of(8, nodes, text)
    assert cluster.inside.gigabytes == inside
    assert (cluster.between and cluster.between.gigabytes) == between
    assert cluster.is_assumed == (text is None)
    assert len({link.name for link in LINKS}) == len(LINKS)


# The command


def test_the_command_prints_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", "small", "--gpu", "A100 80GB", "--gpus", "8", "--nodes", "2"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "On 2 nodes of 8 GPUs, pcie4 inside, ethernet-10g between" in out
    rows = {tuple(line.split()[:-1]): line.split()[-1] for line in out.splitlines() if line.startswith(" ")}
    assert rows["training.parallel",] == "ddp"
    assert rows["sequences", "per", "rank", "and", "update"] == "2"
    assert ["gradients", "0.93", "GB"] in [line.split() for line in out.splitlines()]
    assert "Links: pcie4 inside a node, ethernet-10g between nodes, one port for all" in out
    assert "assumed, not measured" in out


def test_processes_on_this_machine_are_planned_and_not_set_up(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--config", "nano", "--set", "device=cpu", "--set", "training.parallel=fsdp", "--gpus", "2"]
    assert main(["plan", *asked]) == 0
    assert "On 2 processes in one node, pcie4 inside" in capsys.readouterr().out


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    def content(*arguments: str) -> dict[str, Any]:
        assert main(["plan", "--json", "--config", "small", "--gpu", "A100 80GB", *arguments]) == 0
        found = json.loads(capsys.readouterr().out)["scaling"]
        return found if found is None else dict(found)

    assert content() is None
    found = content("--gpus", "4", "--interconnect", "10", "--set", "training.parallel=fsdp")
    assert (found["ranks"], found["nodes"], found["between"]) == (4, 1, None)
    assert (found["parallel"], found["shard_size"], found["fits"]) == ("fsdp", 4, True)
    memory = found["rank_memory_bytes"]
    assert memory["total"] == sum(size for name, size in memory.items() if name != "total")
    seconds = found["communication_seconds"]
    assert seconds == pytest.approx(found["sent_bytes"]["total"] / (LINK_EFFICIENCY * 10e9))
    assert found["update_seconds"] == found["computing_seconds"] + found["exposed_seconds"]
    assert found["efficiency"] == pytest.approx(found["computing_seconds"] / found["update_seconds"])
    assert found["tokens_per_second"] == pytest.approx(32 * 1024 / found["update_seconds"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--nodes 2", "--nodes 2: needs the number of GPUs in each node, such as --gpus 8"),
        ("--interconnect pcie4", "--interconnect pcie4: needs the number of GPUs"),
        ("--gpus 0", "--gpus 0: is the number of GPUs in each node; write 1 or more"),
        ("--gpus 8 --nodes -1", "--nodes -1: is the number of nodes; write 1 or more"),
        ("--gpus 8 --interconnect nvlink", "--interconnect nvlink: .*did you mean nvlink[34]"),
        (
            "--gpus 8 --interconnect abacus",
            "use one of pcie3, .*infiniband-400; for any other link, give its GB/s",
        ),
        ("--gpus 8 --interconnect 0", "--interconnect 0: is not a speed; write GB/s, above 0"),
        ("--gpus 8 --interconnect nan", "--interconnect nan: is not a speed"),
        (
            "--gpus 8 --interconnect pcie4,pcie4",
            "names 2 links; give the link inside a node, and with --nodes",
        ),
        (
            "--gpus 8 --nodes 2 --interconnect pcie4",
            "pcie4: is the link inside a node; with --nodes 2 also give",
        ),
        ("--gpus 8 --nodes 2 --interconnect 1,2,3", "1,2,3: names 3 links"),
        (
            "--gpus 5",
            "an update of 32 sequences cannot be split evenly over 5 GPUs; choose training.batch_size",
        ),
        (
            "--gpus 8 --set training.precision=fp32",
            "--gpus 8: the speed of A100 in .*fp32 is not known.*--gpu",
        ),
    ],
)
def test_mistakes_are_one_line(arguments: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", "small", "--gpu", "A100 80GB", *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ")
    assert re.search(says, err), err


def test_several_gpus_are_for_one_config_and_need_a_speed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpus", "8", "--gpu", "A100"]) == 2
    assert "--gpus 8: needs a config, such as --config small" in capsys.readouterr().err
    assert main(["plan", "--config", "small", "--gpus", "8", "--memory", "8GB"]) == 2
    assert "the speed of 8GB (cuda)" in capsys.readouterr().err


def test_the_table_of_the_page_is_current() -> None:
    page = (tables.DOCS / "SCALING.md").read_text(encoding="utf-8")
    assert page == tables.with_tables("SCALING.md", page), "run python -m atlas.planning.tables"
