"""Sharded checkpoints, which are folders to which each rank writes its own part of the state.

To save the state, no rank needs memory for the full state. The folder `atlas_step_100/` holds the tensors in
safetensors files, which PyTorch's Distributed Checkpoint writes. The file `state.json` in this folder holds everything
else. The default format of Distributed Checkpoint is not used, since it contains a pickle, and Atlas runs no pickle.
The folder is a checkpoint if the sidecar `atlas_step_100.json` beside it names the folder, and each file with its size
and sha256. The sidecar `atlas_best.json` may name the same folder.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from atlas.errors import CheckpointError, first_line
from atlas.files import read_limited
from atlas.training.checkpoint.atomic_write import named_tensors
from atlas.training.checkpoint.manifest import STATE_FILE
from atlas.training.checkpoint.validate import check_contents
from atlas.training.devices.parallel import gather_full
from atlas.training.devices.world import has_joined

# A single process may also save and read shards. PyTorch would then warn each time that no process group exists.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

_LARGEST_STATE = 160 << 20


def split(contents: Any) -> tuple[Any, dict[str, Tensor]]:
    """Split nested dicts and lists into a form that JSON can represent, and the tensors by name.

    In the JSON form, `{"tensor": name}` replaces each tensor. A tensor without dimensions, such as an optimizer's step
    count, becomes a number in the JSON form.
    """
    return _for_json(contents, ""), {name: tensor for name, tensor in named_tensors(contents) if tensor.dim()}


def _for_json(value: Any, name: str) -> Any:
    match value:
        case Tensor() if value.dim():
            return {"tensor": name.lstrip("/")}
        case Tensor():
            number = gather_full(value)
            return {"number": number.item(), "dtype": str(number.dtype).removeprefix("torch.")}
        case Mapping():
            names = [f"#{key}" if isinstance(key, int) else key for key in value]
            entries = [_for_json(entry, f"{name}/{key}") for key, entry in value.items()]
            return {"dict": dict(zip(names, entries, strict=True))}
        case list() | tuple():
            return {"list": [_for_json(entry, f"{name}/{place}") for place, entry in enumerate(value)]}
    return {"value": value}


def join(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `split`. Raises `ValueError` for JSON that `split` cannot have written."""
    match plain:
        case {"value": value} if value is None or isinstance(value, (bool, int, float, str)):
            return value
        case {"number": bool() | int() | float() as number, "dtype": str(dtype)}:
            kind = getattr(torch, dtype, None)
            if isinstance(kind, torch.dtype):
                return torch.tensor(number, dtype=kind)
        case {"tensor": str(name)} if name in tensors:
            return tensors[name]
        case {"list": list(items)}:
            return [join(item, tensors) for item in items]
        case {"dict": dict(pairs)}:
            return {int(key[1:]) if key.startswith("#") else key: join(pairs[key], tensors) for key in pairs}
    raise ValueError(f"{plain!s:.100} is not a part of a checkpoint")


def read_shards(folder: Path, *, remedy: str, without: Collection[str] = ()) -> dict[str, Any]:
    """The contents of a sharded checkpoint, with full tensors on the CPU. Raises `CheckpointError`.

    The keys in `without` are left out and need no memory.
    """

    def allocate(name: str, size: torch.Size, dtype: torch.dtype) -> Tensor | None:
        return None if name.split("/")[0] in without else torch.empty(size, dtype=dtype)

    try:
        plain = json.loads(read_limited(folder / STATE_FILE, limit=_LARGEST_STATE))
        pairs = {key: value for key, value in plain["dict"].items() if key not in without}
        contents = join({"dict": pairs}, _read_tensors(folder, allocate, no_dist=True))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, CheckpointException) as error:
        raise CheckpointError(
            f"{folder}: is damaged, or is not a sharded checkpoint ({first_line(error)}): {remedy}"
        ) from None
    return check_contents(contents, folder, remedy)


def read_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state in a sharded checkpoint, each tensor sharded like its parameter. Every rank must call this
    function.

    Raises `ValueError` if a tensor of the state is missing. This function does not check whether the state fits the
    optimizer.
    """
    key = "optimizer_state_dict"
    plain = json.loads(read_limited(folder / STATE_FILE, limit=_LARGEST_STATE))["dict"].get(key, {"dict": {}})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def allocate(name: str, size: torch.Size, dtype: torch.dtype) -> Tensor | None:
        if not name.startswith(f"{key}/state/"):
            return None
        number = int(name.split("/")[2])
        if number < len(parameters) and parameters[number].shape == size:
            return torch.zeros_like(parameters[number], dtype=dtype)
        return torch.empty(size, dtype=dtype)

    return join(plain, _read_tensors(folder, allocate, no_dist=not has_joined()))  # type: ignore[no-any-return]


def _read_tensors(
    folder: Path, allocate: Callable[[str, torch.Size, torch.dtype], Tensor | None], *, no_dist: bool
) -> dict[str, Tensor]:
    """Return the tensors by name. Skip a tensor if `allocate` returns None for it."""
    metadata: Mapping[str, Any] = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    memory = {name: allocate(name, entry.size, entry.properties.dtype) for name, entry in metadata.items()}
    tensors = {name: tensor for name, tensor in memory.items() if tensor is not None}
    load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=no_dist)
    return tensors
