"""A run on many GPUs: how they share the model, what each needs, and how long an update takes.

What runs is in `atlas.training.devices.parallel`, what is sent in `atlas.planning.communication`. Nothing here was
measured on several GPUs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from atlas.config import AtlasConfig
from atlas.errors import AtlasError
from atlas.model.cost import block_matrices, count_parameters, lora_parameters, training_flops_per_token
from atlas.planning.communication import Cluster, Communication, Pass, Sizes, communicate
from atlas.planning.machine import Machine
from atlas.planning.run import seconds_of_update
from atlas.training.memory.estimate import TrainingMemory, estimate_training_memory
from atlas.training.memory.parallel import share_model

_FP32 = 4


@dataclass(frozen=True)
class RankMemory(TrainingMemory):
    """Bytes of one rank at the peak of an update; see `TrainingMemory`. Beside the peak resident memory of a process
    whose network does nothing, as one rank of 8 or 64 on a CPU with an allocator that returns what is freed, it was 1 %
    below to 9 % above (tests/test_communication.py). GPUs have not been measured.

    With `fsdp` weights, gradients and optimizer are its shards, and `gathered` what it has whole for a while: the root,
    the block that runs and the next, and their gradients. Not all of this is there when the loss takes most, so that
    `total` is an upper bound.
    """

    gathered: int


@dataclass(frozen=True)
class Scaling:
    """An update on a cluster, and one of its ranks."""

    cluster: Cluster
    parallel: str
    """`none`, `ddp` or `fsdp`."""
    shard_size: int
    """How many ranks share a model."""
    sequences: int
    """Of an update, each rank's."""
    sequences_at_once: int
    memory: RankMemory
    available: int
    """Bytes that a rank has."""
    tokens: int
    """Of an update, all ranks'."""
    computing: float
    """Seconds."""
    communication: Communication

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.available

    @property
    def seconds(self) -> float:
        return self.computing + self.communication.exposed

    @property
    def efficiency(self) -> float:
        """The part of the time of an update in which a rank computes."""
        return self.computing / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """All ranks'."""
        return self.tokens / self.seconds


def scale(config: AtlasConfig, machine: Machine, cluster: Cluster) -> Scaling:
    """A config whose vocabulary is known, on a cluster of nodes with such GPUs. Raises `AtlasError` for what cannot be
    shared out so, and where the machine's speed is not known."""
    if machine.flops_per_second is None:
        raise AtlasError(
            f"--gpus {cluster.gpus}: the speed of {machine.name} in training.precision {config.training.precision} is "
            'not known, and so no time: take a card from the table, --gpu "A100 80GB", and precision auto'
        )
    if machine.device == "cpu":  # the ranks of a machine share it
        rate = machine.flops_per_second / cluster.gpus
        machine = replace(machine, memory=machine.memory // cluster.gpus, flops_per_second=rate)
    sequences = _share(config.training.sequences_per_update, cluster.ranks)
    at_once = min(config.training.sequences_at_once, sequences)
    parallel, shards = share_model(config, cluster.ranks, device=machine.device, memory=machine.memory)
    passes = _passes(config, machine, sequences, at_once)
    sizes = sizes_of(config, device=machine.device)
    return Scaling(
        cluster=cluster,
        parallel=parallel,
        shard_size=shards,
        sequences=sequences,
        sequences_at_once=at_once,
        memory=memory_of_a_rank(
            config,
            machine.device,
            parallel=parallel,
            shards=shards,
            at_once=at_once,
        ),
        available=machine.memory,
        tokens=config.training.sequences_per_update * config.model.max_seq_len,
        computing=sum(each.times * (each.forward + each.backward) for each in passes),
        communication=communicate(sizes, cluster, passes, parallel=parallel, shards=shards),
    )


def _share(sequences: int, ranks: int) -> int:
    if sequences % ranks:
        raise AtlasError(
            f"an update of {sequences} sequences cannot be split evenly over {ranks} GPUs; choose "
            "training.batch_size × training.gradient_accumulation_steps as a multiple of their number"
        )
    return sequences // ranks


def _passes(config: AtlasConfig, machine: Machine, sequences: int, at_once: int) -> list[Pass]:
    """The micro-batches of a rank's share; the last may be smaller. Their times are the shares of their FLOPs in the
    time of an update of the rank alone."""
    training = config.training
    share = {"batch_size": sequences, "gradient_accumulation_steps": 1, "micro_batch_size": at_once}
    own = config.model_copy(update={"training": training.model_copy(update=share)})
    plain = config.model_copy(
        update={"training": training.model_copy(update={"gradient_checkpointing": False})}
    )
    seconds = (seconds_of_update(own, machine) or 0.0) / sequences
    forward = seconds * training_flops_per_token(plain) / training_flops_per_token(config) / 3
    before = (sequences - 1) // at_once
    last = sequences - before * at_once
    return [
        Pass(times, size * forward, size * (seconds - forward))
        for times, size in ((before, at_once), (1, last))
    ]


def sizes_of(config: AtlasConfig, *, device: str) -> Sizes:
    """The bytes of a model's parts."""
    model, training, low_rank = config.model, config.training, lora_parameters(config)
    width = 2 if training.precision == "bf16-true" else _FP32
    empty = count_parameters(model.model_copy(update={"num_layers": 0})).total
    blocks = width * (count_parameters(model).total - empty + low_rank)
    root = estimate_training_memory(config, device=device).weights - blocks
    if low_rank:
        return Sizes(blocks, root, width * low_rank, 0, 0, made_whole=0)
    head = 0 if model.tie_embeddings else width * model.padded_vocab_size * model.hidden_size
    matrices = model.num_layers * sum(matrix.size for matrix in block_matrices(model).values())
    made_whole = _FP32 * matrices if training.optimizer == "muon" else 0
    return Sizes(blocks, root, blocks, root, root - head, made_whole=made_whole)


def memory_of_a_rank(
    config: AtlasConfig, device: str, *, parallel: str, shards: int, at_once: int
) -> RankMemory:
    """The peak of an update with so many sequences `at_once`, on one of `shards` ranks that share a model."""
    training = config.training
    if parallel != "none":
        # Between updates DDP keeps the memory of all gradients, and FSDP comes to have a shard's: as if there had been
        # a micro-batch before.
        alone = {"batch_size": at_once, "gradient_accumulation_steps": 2, "micro_batch_size": "auto"}
        training = training.model_copy(update=alone)
    whole = estimate_training_memory(config.model_copy(update={"training": training}), device=device)
    if parallel != "fsdp":
        # In the second update DDP makes its buckets anew, in the order in which gradients came, beside the old ones;
        # nothing else of an update is there then.
        beside = whole.half_precision_weights + whole.activations + whole.loss
        anew = max(0, whole.gradients - beside) if parallel == "ddp" else 0
        return RankMemory(**asdict(replace(whole, gradients=whole.gradients + anew)), gathered=0)
    sizes, layers = sizes_of(config, device=device), config.model.num_layers
    two = min(2, layers) / layers
    # The head's gradient is in `loss`.
    table = _FP32 * config.model.padded_vocab_size * config.model.hidden_size
    gradients = two * sizes.block_gradients + max(0, sizes.root_gradients - table)
    shares = {name: -(-getattr(whole, name) // shards) for name in ("weights", "optimizer", "gradients")}
    gathered = int(sizes.root + two * sizes.blocks + gradients)
    return RankMemory(**asdict(replace(whole, **shares)), gathered=gathered)
