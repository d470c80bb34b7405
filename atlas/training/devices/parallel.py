"""Share a model among several ranks with PyTorch's DDP or FSDP2, and gather or shard tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from atlas.config import AtlasConfig
from atlas.errors import AtlasError
from atlas.training.devices.world import World, has_joined


def refuse_parallel_alone(config: AtlasConfig) -> None:
    """Raise `AtlasError` if `training.parallel` needs several processes but the run has only one."""
    asked = config.training.parallel
    if asked in ("ddp", "fsdp") and not has_joined():
        raise AtlasError(
            f"training.parallel: {asked}: is for several processes: start them with torchrun --nproc-per-node=N -m "
            "atlas train …, or set training.parallel=auto"
        )


def wrap(
    objective: nn.Module, config: AtlasConfig, world: World, parallel: str, device: torch.device
) -> nn.Module:
    """Return `objective`, the module that computes the loss, wrapped for several ranks. `objective.model.blocks` are
    the blocks of the model.

    `ddp` (Li et al. 2020, arXiv:2006.15704): each rank holds the full model, and gradients are averaged over the ranks.
    `fsdp` (Zhao et al. 2023, arXiv:2304.11277; `fully_shard`): each rank holds a part of the weights, gradients and
    optimizer state. It gathers the full weights of a block only while the block runs. Each group of
    `training.shard_size` ranks holds one complete model.
    """
    if parallel == "ddp":
        return nn.parallel.DistributedDataParallel(
            objective, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
        )
    if parallel == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        shards = config.training.shard_size or world.size
        shape = (shards,) if shards == world.size else (world.size // shards, shards)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("copy", "shard")[-len(shape) :])
        model: Any = objective.model
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(objective, mesh=mesh)
    return objective


def no_sync_except_last(wrapped: nn.Module, *, is_last: bool) -> AbstractContextManager[Any]:
    """Return the context for a micro-batch. The ranks reduce gradients over replicas only in the last micro-batch of an
    update."""
    if isinstance(wrapped, nn.parallel.DistributedDataParallel) and not is_last:
        return wrapped.no_sync()
    if set_all_reduce := getattr(wrapped, "set_requires_all_reduce", None):
        set_all_reduce(is_last)  # each micro-batch still reduce-scatters its gradients, to save memory
    return nullcontext()


def is_sharded(tensor: Any) -> bool:
    """Whether `tensor` is a DTensor, of which each rank holds a part."""
    return hasattr(tensor, "full_tensor")


def map_tensors(value: Any, change: Callable[[str, Any], Any], name: str = "") -> Any:
    """Return a copy of nested dicts and lists in which the result of `change(name, tensor)` replaces each tensor. The
    name consists of the keys that lead to the tensor, joined by `/`."""
    if isinstance(value, Tensor):
        return change(name.lstrip("/"), value)
    if isinstance(value, Mapping):
        return {key: map_tensors(entry, change, f"{name}/{key}") for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(entry, change, f"{name}/{place}") for place, entry in enumerate(value))
    return value


def gather_full(value: Any, *, keep: bool = True, to_cpu: bool = True) -> Any:
    """Return a copy of nested dicts and lists in which the full tensor replaces every sharded tensor. Every rank must
    call this function.

    If `keep` is false, this rank only takes part in the communication. It drops each full tensor immediately, and
    returns None in place of the tensor.
    """

    def gather(_: str, tensor: Any) -> Any:
        if not is_sharded(tensor):
            return tensor
        full = tensor.full_tensor()
        return (full.cpu() if to_cpu else full) if keep else None

    return map_tensors(value, gather)


def shard_like(tensor: Tensor, other: Any) -> Tensor:
    """Return the full `tensor`, sharded like `other`. Every rank must have the full tensor."""
    if not is_sharded(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(other.device)
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def sharded_state(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the optimizer's state dict `saved`, with each full tensor sharded like its parameter."""
    parameters: Sequence[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]

    def shard(value: Any, parameter: Tensor) -> Any:
        is_full = isinstance(value, Tensor) and not is_sharded(value) and value.shape == parameter.shape
        return shard_like(value, parameter) if is_full else value

    state = {
        number: {key: shard(value, parameters[number]) for key, value in entry.items()}
        for number, entry in saved["state"].items()
    }
    return {**saved, "state": state}


def load_full_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load full weights, which every rank has, into a model that may be sharded."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(shard_like(weights[name].to(parameter.dtype), parameter))
