"""Estimate the data that the ranks of a run send in an update, and the time of this communication.

The estimates come from a model of the communication, not from measurements. `ddp` sums the gradients of all ranks once,
during the last micro-batch's backward pass. `fsdp` gathers the weights of each block before the block's forward pass
and again before its backward pass. In each micro-batch, `fsdp` gathers the weights of the root (embeddings, final norm,
head) once, and reduce-scatters all gradients. If several groups of `shard_size` ranks each hold a model, the last
micro-batch also all-reduces the gradient shards over the groups. Weights and gradients are sent in the weights'
precision. All communication uses rings (Patarasuk & Yuan 2009). For an all-gather or a reduce-scatter, each of S ranks
sends (S-1)/S of the bytes. For an all-reduce, each rank sends twice as many bytes.

Computation never hides the root's communication: the root's weights are needed first, and its gradients are ready last.
Computation does not hide Muon's communication either: Muon gathers full matrices after the last backward pass. The time
of a transfer is its bytes divided by the bandwidth. The estimates ignore the latency of a ring's steps, some
microseconds each. For hundreds of ranks, these latencies add up to milliseconds.

Symbols: S is the number of ranks that share a model.
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
"""Fraction of computation time that can hide simultaneous communication: assumed, not measured."""


@dataclass(frozen=True)
class Link:
    """A connection between GPUs, or between nodes."""

    name: str
    gigabytes: float
    """Speed in one direction, in 10⁹ bytes per second."""
    is_shared: bool = False
    """Whether all GPUs of a node share one network port. Otherwise each GPU has its own port."""


LINKS = (
    # Nominal speeds from common knowledge, as in atlas/planning/cards.py; no speed was measured.
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
"""The default link inside a node, and the default link between nodes."""


@dataclass(frozen=True)
class Cluster:
    """A cluster of `nodes` nodes with `gpus` GPUs each.

    As with torchrun, rank r runs on node r // `gpus`, and uses GPU r % `gpus` of this node.
    """

    gpus: int
    nodes: int
    inside: Link
    between: Link | None
    """The link between nodes; None for a single node."""
    is_assumed: bool = False
    """Whether the links are the defaults, because the user named no link."""

    @property
    def ranks(self) -> int:
        """The number of ranks: all GPUs of all nodes."""
        return self.gpus * self.nodes

    def rate_of_neighbours(self, size: int) -> float:
        """Return the bandwidth (bytes/s) of each ring, if every `size` consecutive ranks form one ring."""
        if self.gpus % size == 0:
            return self._rate(0)
        return self._rate(1 if size % self.gpus == 0 else 2)

    def rate_across(self, size: int) -> float:
        """Return the bandwidth (bytes/s) of each ring, if the ranks r, r + `size`, r + 2 · `size`, … form one ring."""
        return self._rate(min(size, self.gpus))

    def _rate(self, leaving: int) -> float:
        """Return the bandwidth (bytes/s) of each ring, if `leaving` rings connect a node with other nodes. NCCL splits
        such a ring into one ring per port of the node, and all rings share the ports."""
        slowest = self.inside.gigabytes
        if leaving and self.between is not None:
            ports = 1 if self.between.is_shared else self.gpus
            slowest = min(slowest, self.between.gigabytes * ports / leaving)
        return LINK_EFFICIENCY * slowest * 1e9


def cluster_of(gpus: int, nodes: int, interconnect: str | None) -> Cluster:
    """Return the cluster that `--gpus`, `--nodes` and `--interconnect` describe. The default links are `ASSUMED_LINKS`.
    Raises `AtlasError` for an invalid option."""
    for flag, count, what in (("--gpus", gpus, "GPUs in each node"), ("--nodes", nodes, "nodes")):
        if count < 1:
            raise AtlasError(f"{flag} {count}: is the number of {what}; write 1 or more")
    names = ASSUMED_LINKS[: min(nodes, 2)] if interconnect is None else interconnect.split(",")
    if len(names) > 2 or (len(names) == 2 and nodes == 1):
        raise AtlasError(
            f"--interconnect {interconnect}: names {len(names)} links; give the link inside a node, and with --nodes "
            "also the link between nodes: nvlink4,infiniband-400"
        )
    if len(names) == 1 and nodes > 1:
        raise AtlasError(
            f"--interconnect {interconnect}: is the link inside a node; with --nodes {nodes} also give the link "
            f"between nodes: {interconnect},infiniband-400"
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
            f"did you mean {close[0]}? For any other"
            if close
            else f"use one of {', '.join(found)}; for any other"
        )
        raise AtlasError(
            f"--interconnect {text}: is not a known link; {hint} link, give its GB/s, such as 25"
        ) from None
    if not 0 < speed < math.inf:
        raise AtlasError(f"--interconnect {text}: is not a speed; write GB/s, above 0, such as 25")
    return Link(f"{speed:g} GB/s", speed)


# Bytes sent


def gather(size: float, ranks: int) -> float:
    """Return the bytes that each of `ranks` ranks sends for an all-gather or a reduce-scatter of `size` bytes."""
    return size * (ranks - 1) / ranks


def all_reduce(size: float, ranks: int) -> float:
    """Return the bytes that each of `ranks` ranks sends for an all-reduce of `size` bytes."""
    return 2 * gather(size, ranks)


@dataclass(frozen=True)
class Sizes:
    """Bytes of the weights in each part of a model, and bytes of the gradients of the trainable weights."""

    blocks: int
    root: int
    """The weights outside the blocks: embeddings, final norm and head."""
    block_gradients: int
    root_gradients: int
    embedding_gradients: int
    """The part of `root_gradients` that the backward pass computes last: the embeddings' gradients."""
    gathered: int
    """The fp32 momentum matrices that Muon gathers in full before its step; 0 for other optimizers."""


@dataclass(frozen=True)
class Pass:
    """Micro-batches of the same size: their number, and the seconds of each forward and each backward pass."""

    times: int
    forward: float
    backward: float


@dataclass
class Communication:
    """The communication of one rank in one update."""

    weights: float = 0.0
    """Bytes of weights that the rank sends. The rank receives as many bytes."""
    gradients: float = 0.0
    """Bytes of gradients, and of Muon's momentum, that the rank sends. The rank receives as many bytes."""
    seconds: float = 0.0
    exposed: float = 0.0
    """The part of `seconds` in which the rank computes nothing."""

    @property
    def bytes(self) -> float:
        """Bytes that one rank sends in one update."""
        return self.weights + self.gradients

    def add(self, times: int, weights: float, gradients: float, seconds: float, beside: float = 0.0) -> None:
        """Add `times` transfers. The other arguments are for one transfer: its bytes of weights, its bytes of
        gradients, its seconds, and the seconds of simultaneous computation (`beside`)."""
        self.weights += times * weights
        self.gradients += times * gradients
        self.seconds += times * seconds
        self.exposed += times * max(0.0, seconds - OVERLAP * beside)


def communicate(
    sizes: Sizes, cluster: Cluster, passes: Sequence[Pass], *, parallel: str, shards: int
) -> Communication:
    """Return the communication of an update that consists of `passes`. The last pass is the update's last micro-batch.

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
