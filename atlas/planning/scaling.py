"""A run on many GPUs: the parallel mode, the memory of each GPU, and the time of an update.

`atlas.training.devices.parallel` distributes the model over the ranks. `atlas.planning.communication` estimates the
bytes that the ranks send. No estimate was compared with a measurement on several GPUs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from atlas.config import AtlasConfig
from atlas.errors import AtlasError
from atlas.model.cost import block_matrices, count_parameters, lora_parameters, training_flops_per_token
from atlas.planning.communication import Cluster, Communication, Pass, Sizes, communicate
from atlas.planning.machine import Machine
from atlas.planning.run import seconds_of_update
from atlas.training.memory.estimate import TrainingMemory, estimate_training_memory, weight_bytes
from atlas.training.memory.parallel import share_model

_FP32 = 4


@dataclass(frozen=True)
class RankMemory(TrainingMemory):
    """Bytes of memory of one rank at the peak of an update; see `TrainingMemory`.

    With `fsdp`, weights, gradients and optimizer state are the rank's shards. `gathered` is the memory of tensors that
    the rank temporarily holds in full: the root, the current block, the next block, and their gradients. Not all of
    these tensors exist when the loss uses the most memory, so `total` is an upper bound.

    The estimate was between 1 % below and 9 % above the measured peak of resident memory. The measured process was one
    rank of 8 or 64 on a CPU, with simulated communication and an allocator that returns freed memory
    (tests/planning/test_communication.py). No GPU was measured.
    """

    gathered: int


@dataclass(frozen=True)
class Scaling:
    """The time of an update on a cluster, and the memory and communication of one rank."""

    cluster: Cluster
    parallel: str
    """`none`, `ddp` or `fsdp`."""
    shard_size: int
    """Number of ranks that share one copy of the model."""
    sequences: int
    """Sequences per rank in an update."""
    micro_batch: int
    """Sequences per rank in a micro-batch."""
    memory: RankMemory
    available: int
    """Bytes of memory that a rank's device has."""
    tokens: int
    """Tokens of all ranks together in an update."""
    computing: float
    """Seconds of computation in an update."""
    communication: Communication

    @property
    def fits(self) -> bool:
        """Whether the device's memory is enough for a rank."""
        return self.memory.total <= self.available

    @property
    def seconds(self) -> float:
        """Seconds of an update: computation, and the communication that computation does not hide."""
        return self.computing + self.communication.exposed

    @property
    def efficiency(self) -> float:
        """Fraction of the time of an update in which a rank computes."""
        return self.computing / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all ranks together."""
        return self.tokens / self.seconds


def scale(config: AtlasConfig, machine: Machine, cluster: Cluster) -> Scaling:
    """Plan a run of `config` on a cluster of GPUs like `machine`. The vocabulary size in `config` must be known. Raises
    `AtlasError` if the GPUs cannot share an update or the model, or if the speed of `machine` is unknown."""
    if machine.flops_per_second is None:
        raise AtlasError(
            f"--gpus {cluster.gpus}: the speed of {machine.name} in training.precision {config.training.precision} is "
            'not known, so no time can be estimated; name a known card, as in --gpu "A100 80GB", and use precision auto'
        )
    if machine.device == "cpu":  # the processes share the CPU and its memory
        rate = machine.flops_per_second / cluster.gpus
        machine = replace(machine, memory=machine.memory // cluster.gpus, flops_per_second=rate)
    sequences, left = divmod(config.training.sequences_per_update, cluster.ranks)
    if left:
        raise AtlasError(
            f"an update of {config.training.sequences_per_update} sequences cannot be split evenly over "
            f"{cluster.ranks} GPUs; choose training.batch_size × training.gradient_accumulation_steps as a multiple "
            "of their number"
        )
    micro_batch = min(config.training.sequences_at_once, sequences)
    parallel, shards = share_model(config, cluster.ranks, device=machine.device, memory=machine.memory)
    passes = _passes(config, machine, sequences, micro_batch)
    sizes = _sizes_of(config, device=machine.device)
    return Scaling(
        cluster=cluster,
        parallel=parallel,
        shard_size=shards,
        sequences=sequences,
        micro_batch=micro_batch,
        memory=_memory_of_a_rank(config, machine.device, parallel, shards, micro_batch),
        available=machine.memory,
        tokens=config.training.sequences_per_update * config.model.max_seq_len,
        computing=sum(each.times * (each.forward + each.backward) for each in passes),
        communication=communicate(sizes, cluster, passes, parallel=parallel, shards=shards),
    )


def _passes(config: AtlasConfig, machine: Machine, sequences: int, micro_batch: int) -> list[Pass]:
    """Return the micro-batches of one rank in an update. The last micro-batch may be smaller. Each micro-batch gets a
    part of the update's time in proportion to its size. The forward and the backward pass share this time in proportion
    to their FLOPs."""
    share = {"batch_size": sequences, "gradient_accumulation_steps": 1, "micro_batch_size": micro_batch}
    own = config.replace("training", **share)
    plain = config.replace("training", gradient_checkpointing=False)
    seconds = (seconds_of_update(own, machine) or 0.0) / sequences
    forward = seconds * training_flops_per_token(plain) / training_flops_per_token(config) / 3
    before = (sequences - 1) // micro_batch
    last = sequences - before * micro_batch
    return [
        Pass(times, size * forward, size * (seconds - forward))
        for times, size in ((before, micro_batch), (1, last))
    ]


def _sizes_of(config: AtlasConfig, *, device: str) -> Sizes:
    """Return the size of a model's weights and gradients in bytes, inside and outside the blocks."""
    model, training, low_rank = config.model, config.training, lora_parameters(config)
    width = weight_bytes(training)
    empty = count_parameters(model.model_copy(update={"num_layers": 0})).total
    blocks = width * (count_parameters(model).total - empty + low_rank)
    root = estimate_training_memory(config, device=device).weights - blocks
    if low_rank:
        return Sizes(blocks, root, width * low_rank, 0, 0, gathered=0)
    head = 0 if model.tie_embeddings else width * model.padded_vocab_size * model.hidden_size
    matrices = model.num_layers * sum(matrix.numel() for matrix in block_matrices(model).values())
    gathered = _FP32 * matrices if training.optimizer == "muon" else 0
    return Sizes(blocks, root, blocks, root, root - head, gathered=gathered)


def _memory_of_a_rank(
    config: AtlasConfig, device: str, parallel: str, shards: int, micro_batch: int
) -> RankMemory:
    """Estimate the peak memory of an update with `micro_batch` sequences per micro-batch, on one of `shards` ranks that
    share a model."""
    if parallel != "none":
        # Between updates, DDP keeps the memory of all gradients, and FSDP keeps the memory of a gradient shard. The
        # peak is the same as with gradient accumulation, so the estimate assumes two micro-batches.
        alone = {"batch_size": micro_batch, "gradient_accumulation_steps": 2, "micro_batch_size": "auto"}
        config = config.replace("training", **alone)
    full = estimate_training_memory(config, device=device)
    if parallel != "fsdp":
        # In the second update, DDP rebuilds its gradient buckets in the order in which the gradients were ready. The
        # new and the old buckets then exist at the same time, but the other tensors of the update do not exist yet.
        beside = full.half_precision_weights + full.activations + full.loss
        rebuilt = max(0, full.gradients - beside) if parallel == "ddp" else 0
        return RankMemory(**asdict(replace(full, gradients=full.gradients + rebuilt)), gathered=0)
    sizes, layers = _sizes_of(config, device=device), config.model.num_layers
    two = min(2, layers) / layers
    # `loss` already includes the head's gradient.
    table = _FP32 * config.model.padded_vocab_size * config.model.hidden_size
    gradients = two * sizes.block_gradients + max(0, sizes.root_gradients - table)
    shares = {name: -(-getattr(full, name) // shards) for name in ("weights", "optimizer", "gradients")}
    gathered = int(sizes.root + two * sizes.blocks + gradients)
    return RankMemory(**asdict(replace(full, **shares)), gathered=gathered)
