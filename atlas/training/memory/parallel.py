"""Choose how several ranks share a model: `none`, `ddp` or `fsdp`."""

from __future__ import annotations

import torch

from atlas.config import AtlasConfig
from atlas.errors import AtlasError
from atlas.machine import measure_memory
from atlas.training.devices.parallel import refuse_parallel_alone
from atlas.training.devices.world import World, has_joined
from atlas.training.memory.estimate import ROOMY, estimate_training_memory

_SHARDED = ("adamw", "muon")
"""The optimizers whose state can be sharded."""
_UNSHARDED = {"fp16": "only one rank would see an overflow", "bf16-true": "its rounding needs full weights"}
"""The precisions that do not support sharding, with the reason for each."""


def choose_parallel(config: AtlasConfig, world: World, device: torch.device) -> str:
    """Resolve `training.parallel` for these ranks to `none`, `ddp` or `fsdp`. Raises `AtlasError` if the config does
    not allow training with these ranks."""
    if not has_joined():
        refuse_parallel_alone(config)
        return "none"
    free = measure_memory(device.type)
    if device.type == "cpu":
        free //= world.local_size
    return share_model(config, world.size, device=device.type, memory=free)[0]


def share_model(config: AtlasConfig, ranks: int, *, device: str, memory: int) -> tuple[str, int]:
    """Resolve `training.parallel` for `ranks` devices of `memory` bytes each. Return the resolved value, and the number
    of ranks among which one copy of the model is sharded (1 without sharding).

    Raises `AtlasError` if the config does not allow training with these ranks.
    """
    training, asked = config.training, config.training.parallel
    if asked == "none" and ranks > 1:
        raise AtlasError(
            f"training.parallel: none: {ranks} processes would each train a model of their own: use auto"
        )
    parallel = asked
    if asked == "auto":
        one = config.replace("training", micro_batch_size=1)
        fits = estimate_training_memory(one, device=device).total <= ROOMY * memory
        parallel = "ddp" if fits else "fsdp"
    if ranks == 1 and asked in ("auto", "ddp"):
        parallel = "none"
    if parallel != "fsdp":
        if training.shard_size is not None:
            raise AtlasError(
                f"training.shard_size: {training.shard_size}: is for training.parallel fsdp, but this run uses "
                f"{parallel}: set fsdp, or remove shard_size"
            )
        return parallel, 1
    why = "" if asked == "fsdp" else "; a full step does not fit one device"
    if training.optimizer not in _SHARDED:
        raise AtlasError(
            f"training.optimizer: {training.optimizer}: its state cannot be sharded (fsdp){why}: use "
            f"{' or '.join(_SHARDED)}, or training.parallel ddp"
        )
    if training.precision in _UNSHARDED:
        raise AtlasError(
            f"training.precision: {training.precision}: does not work with training.parallel fsdp "
            f"({_UNSHARDED[training.precision]}){why}: use bf16, or ddp"
        )
    shards = training.shard_size or ranks
    if ranks % shards:
        raise AtlasError(
            f"training.shard_size: {shards}: {ranks} processes are not a multiple of {shards}: use a divisor of {ranks}"
        )
    return parallel, shards
