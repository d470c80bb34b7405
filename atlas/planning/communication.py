"""What the ranks of a run send one another in an update, and how much of that is not hidden behind computing.

This is a model, not a measurement. `ddp` sums the gradients of all ranks once, during the last micro-batch's backward
pass. `fsdp` gathers the weights of each block before its forward pass and again before its backward pass, and those of
the root (embeddings, final norm, head) once. It reduces the gradients' shards in each micro-batch. If several groups of
`shard_size` ranks hold a model, the last micro-batch also sums the shards' gradients over the groups. Everything is in
the weights' precision and passes through rings (Patarasuk & Yuan 2009). Each of S ranks sends (S-1)/S of the bytes to
gather or to reduce-scatter them, and twice that for an all-reduce.

What the root sends is never hidden: its weights are needed first, and its gradients are ready last. The same holds for
Muon, which needs each full matrix when everything is computed. Time is bytes by speed. The latency of a ring's steps,
some microseconds each, is left out, though it adds up to milliseconds for hundreds of ranks.

Symbols: S ranks that share a model, R groups of them.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from atlas.errors import AtlasError

LINK_EFFICIENCY = 0.8
"""Fraction of a link's nominal speed that a ring reaches: assumed, not measured."""
OVERLAP = 0.8
"""Fraction of the computing beside it that communication can hide behind: assumed, not measured."""


@dataclass(frozen=True)
class Link:
    """A connection between GPUs, or between nodes."""

    name: str
    gigabytes: float
    """10⁹ bytes a second in one direction."""
    is_shared: bool = False
    """All GPUs of a node share one port; otherwise each has its own."""


LINKS = (
    # Nominal speeds from common knowledge, as in atlas/planning/cards.py; nothing here was measured.
    Link("pcie3", 12.0),
    Link("pcie4", 24.0),
    Link("pcie5", 48.0),
    Link("nvlink3", 300.0),
    Link("nvlink4", 450.0),
    Link("ethernet-1g", 0.12, is_shared=True),
    Link("ethernet-10g", 1.2, is_shared=True),
    Link("ethernet-25g", 3.0, is_shared=True),
    Link("ethernet-100g", 12.0, is_shared=True),
    Link("infiniband-200", 25.0),
    Link("infiniband-400", 50.0),
)
ASSUMED_LINKS = ("pcie4", "ethernet-10g")
"""Inside a node, and between nodes."""


@dataclass(frozen=True)
class Cluster:
    """`nodes` of `gpus` each. Rank r is GPU r mod `gpus` of node r div `gpus`, as torchrun counts."""

    gpus: int
    nodes: int
    inside: Link
    between: Link | None
    """None where there is one node."""
    is_assumed: bool = False
    """The user named no links."""

    @property
    def ranks(self) -> int:
        """All processes."""
        return self.gpus * self.nodes

    def rate_of_neighbours(self, size: int) -> float:
        """Return the bytes/s of each ring of `size` consecutive ranks."""
        if self.gpus % size == 0:
            return self._rate(0)
        return self._rate(1 if size % self.gpus == 0 else 2)

    def rate_across(self, size: int) -> float:
        """Return the bytes/s of each of the `size` rings that consist of every `size`-th rank."""
        return self._rate(min(size, self.gpus))

    def _rate(self, leaving: int) -> float:
        """Return the bytes/s of each ring, of which `leaving` leave a node. NCCL splits a ring that leaves into one for
        each port of the node, and rings share the ports."""
        slowest = self.inside.gigabytes
        if leaving and self.between is not None:
            ports = 1 if self.between.is_shared else self.gpus
            slowest = min(slowest, self.between.gigabytes * ports / leaving)
        return LINK_EFFICIENCY * slowest * 1e9


def cluster_of(gpus: int, nodes: int, interconnect: str | None) -> Cluster:
    """Return the cluster of the command line's options; default links: `ASSUMED_LINKS`. Raises `AtlasError`."""
    for flag, count, what in (("--gpus", gpus, "GPUs in each node"), ("--nodes", nodes, "nodes")):
        if count < 1:
            raise AtlasError(f"{flag} {count}: is the number of {what}; write 1 or more")
    names = ASSUMED_LINKS[: min(nodes, 2)] if interconnect is None else interconnect.split(",")
    if len(names) > 2 or (len(names) == 2 and nodes == 1):
        raise AtlasError(
            f"--interconnect {interconnect}: names {len(names)} links; give the one inside a node, and with --nodes "
            "the one between them: nvlink4,infiniband-400"
        )
    if len(names) == 1 and nodes > 1:
        raise AtlasError(
            f"--interconnect {interconnect}: is the link inside a node; with --nodes {nodes} give the one between them "
            f"as well: {interconnect},infiniband-400"
        )
    links = [_link(name) for name in names]
    return Cluster(gpus, nodes, links[0], links[1] if nodes > 1 else None, is_assumed=interconnect is None)


def _link(text: str) -> Link:
    name = text.strip().lower()
    found = {link.name: link for link in LINKS}
    if name in found:
        return found[name]
    try:
        speed = float(name)
    except ValueError:
        close = difflib.get_close_matches(name, found, n=1, cutoff=0.6)
        hint = (
            f"did you mean {close[0]}? Of another" if close else f"take one of {', '.join(found)}; of another"
        )
        raise AtlasError(
            f"--interconnect {text}: is not a link that is known here; {hint} give GB/s, as 25"
        ) from None
    if not 0 < speed < math.inf:
        raise AtlasError(f"--interconnect {text}: is not a speed; write GB/s, above 0, as 25")
    return Link(f"{speed:g} GB/s", speed)


# What is sent


def gather(size: float, ranks: int) -> float:
    """Return the bytes that each of `ranks` sends for an all-gather or a reduce-scatter of `size` bytes."""
    return size * (ranks - 1) / ranks


def all_reduce(size: float, ranks: int) -> float:
    """Return the bytes that each of `ranks` sends for an all-reduce of `size` bytes."""
    return 2 * gather(size, ranks)


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's parts: weights, and the gradients of trainable ones."""

    blocks: int
    root: int
    """Everything outside the blocks."""
    block_gradients: int
    root_gradients: int
    embedding_gradients: int
    """The part of `root_gradients` that belongs to what comes before the blocks."""
    gathered: int
    """Matrices that the optimizer needs in full."""


@dataclass(frozen=True)
class Pass:
    """Micro-batches of one size: their number, and the seconds of computing in each."""

    times: int
    forward: float
    backward: float


@dataclass
class Communication:
    """What one rank sends in one update."""

    weights: float = 0.0
    """Bytes sent; as many are received."""
    gradients: float = 0.0
    """Likewise."""
    seconds: float = 0.0
    exposed: float = 0.0
    """The part of `seconds` in which nothing is computed."""

    @property
    def bytes(self) -> float:
        """Bytes that a rank sends in an update."""
        return self.weights + self.gradients

    def add(self, times: int, weights: float, gradients: float, seconds: float, beside: float = 0.0) -> None:
        """Add `times` transfers: the bytes of one, its seconds, and the seconds of computing `beside` it."""
        self.weights += times * weights
        self.gradients += times * gradients
        self.seconds += times * seconds
        self.exposed += times * max(0.0, seconds - OVERLAP * beside)


def communicate(
    sizes: Sizes, cluster: Cluster, passes: Sequence[Pass], *, parallel: str, shards: int
) -> Communication:
    """Return the communication of an update of `passes`, the last of which is its last micro-batch.

    `parallel` is `none`, `ddp` or `fsdp`; `shards` ranks share a model.
    """
    sent = Communication()
    if parallel == "ddp":
        rate = cluster.rate_of_neighbours(cluster.ranks)
        late = all_reduce(sizes.embedding_gradients, cluster.ranks)
        early = all_reduce(sizes.block_gradients + sizes.root_gradients, cluster.ranks) - late
        sent.add(1, 0.0, early, early / rate, passes[-1].backward)
        sent.add(1, 0.0, late, late / rate)
    if parallel != "fsdp":
        return sent
    rate, across = cluster.rate_of_neighbours(shards), cluster.rate_across(shards)
    root, blocks = gather(sizes.root, shards), gather(sizes.blocks, shards)
    root_sum, blocks_sum = gather(sizes.root_gradients, shards), gather(sizes.block_gradients, shards)
    for number, micro in enumerate(passes, start=1):
        groups = cluster.ranks // shards if number == len(passes) else 1
        root_copies = all_reduce(sizes.root_gradients / shards, groups)
        blocks_copies = all_reduce(sizes.block_gradients / shards, groups)
        sent.add(micro.times, root, 0.0, root / rate)
        sent.add(micro.times, blocks, 0.0, blocks / rate, micro.forward)
        seconds = (blocks + blocks_sum) / rate + blocks_copies / across
        sent.add(micro.times, blocks, blocks_sum + blocks_copies, seconds, micro.backward)
        sent.add(micro.times, 0.0, root_sum + root_copies, root_sum / rate + root_copies / across)
    full = gather(sizes.gathered, shards)
    sent.add(1, 0.0, full, full / rate)
    return sent
