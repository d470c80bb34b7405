"""Sharded checkpoints: a folder in which each rank writes its own part, for states that no rank holds whole.

`atlas_step_100/` holds the tensors as PyTorch's Distributed Checkpoint writes them, in safetensors files (its usual
format keeps a pickle beside them, and Atlas reads none), and `state.json` with everything else. It is a checkpoint if a
sidecar, `atlas_step_100.json` beside it, names the folder and each file with its size and sha256; `atlas_best.json` may
name the same folder.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from atlas.errors import CheckpointError
from atlas.files import read_limited
from atlas.training.checkpoint.manifest import STATE_FILE
from atlas.training.checkpoint.validate import check_contents
from atlas.training.devices.parallel import gather_full
from atlas.training.devices.world import has_joined

# One process may save and read shards, too, and PyTorch need not say each time that there are no others.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

_LARGEST_STATE = 160 << 20


def split(contents: Any, name: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Nested dicts and lists → the same for JSON, each tensor being `{"tensor": its name}`, and the tensors by name.
    Those of a single number, such as an optimizer's count of steps, are written out."""
    if isinstance(contents, Tensor):
        if contents.dim():
            return {"tensor": name}, {name: contents}
        number = gather_full(contents)
        return {"number": number.item(), "dtype": str(number.dtype).removeprefix("torch.")}, {}
    tensors: dict[str, Tensor] = {}
    if isinstance(contents, Mapping):
        pairs = {}
        for key, value in contents.items():
            pairs[f"#{key}" if isinstance(key, int) else key], found = split(
                value, f"{name}/{key}".lstrip("/")
            )
            tensors |= found
        return {"dict": pairs}, tensors
    if isinstance(contents, (list, tuple)):
        items = []
        for place, value in enumerate(contents):
            item, found = split(value, f"{name}/{place}")
            items.append(item)
            tensors |= found
        return {"list": items}, tensors
    return {"value": contents}, tensors


def join(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `split` took apart. Raises `ValueError` for what it did not write."""
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
    """The contents of a sharded checkpoint, its tensors whole and on the CPU. Raises `CheckpointError`.

    What the keys `without` name is left out, and no memory is taken for it.
    """
    try:
        plain = json.loads(read_limited(folder / STATE_FILE, limit=_LARGEST_STATE))
        pairs = {key: value for key, value in plain["dict"].items() if key not in without}
        metadata: Mapping[str, Any] = (
            HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        )
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in metadata.items()
            if name.split("/")[0] not in without
        }
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
        contents = join({"dict": pairs}, tensors)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, CheckpointException) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{folder}: is damaged, or no sharded checkpoint ({reason:.200}): {remedy}"
        ) from None
    return check_contents(contents, folder, remedy)


def read_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's part of a sharded checkpoint, each tensor sharded as its parameter is; every rank must call it.
    Raises `ValueError` for a state that is not there, or another optimizer's."""
    key = "optimizer_state_dict"
    plain = json.loads(read_limited(folder / STATE_FILE, limit=_LARGEST_STATE))["dict"].get(key, {"dict": {}})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    metadata: Mapping[str, Any] = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    tensors = {}
    for name, entry in metadata.items():
        if not name.startswith(f"{key}/state/"):
            continue
        number = int(name.split("/")[2])
        dtype = entry.properties.dtype
        if number < len(parameters) and parameters[number].shape == entry.size:
            tensors[name] = torch.zeros_like(parameters[number], dtype=dtype)
        else:
            tensors[name] = torch.empty(entry.size, dtype=dtype)
    load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not has_joined())
    return join(plain, tensors)  # type: ignore[no-any-return]
