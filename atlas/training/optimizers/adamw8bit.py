"""torchao's AdamW, whose two moments need one byte per number (Dettmers et al. 2021, arXiv:2110.02861).

torchao stores a moment in its own tensor class, with one byte per number and an fp32 scale for every 256 numbers. The
moments of small tensors stay in fp32. A checkpoint holds only plain tensors, so that reading the checkpoint runs no
code. Therefore, saving the state splits each moment into plain tensors, and loading the state rebuilds the moments.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from atlas.config import TrainingConfig
from atlas.errors import AtlasError

_BLOCK = 256
_SMALLEST = 4096
_INSTEAD = "or use --set training.optimizer=adafactor or muon, which need neither torchao nor a compiler"


def build_adamw8bit(groups: list[dict[str, Any]], config: TrainingConfig) -> torch.optim.Optimizer:
    """Build torchao's `AdamW8bit`, adapted to Atlas: learning rates are numbers, and the state dict holds plain values
    only. Raises `AtlasError` if torchao or a compiler is missing."""
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise AtlasError(
            f'training.optimizer: adamw8bit: needs torchao ({error}): pip install "atlas-llm[lowmem]", {_INSTEAD}'
        ) from None
    missing = _missing_compiler(groups)
    if missing:
        raise AtlasError(
            f"training.optimizer: adamw8bit: compiles its step, but no {missing} was found: install it, {_INSTEAD}"
        )
    groups, betas = [{**group, "is_8bit": True} for group in groups], (config.beta1, config.beta2)
    optimizer = AdamW8bit(groups, lr=config.learning_rate, betas=betas, block_size=_BLOCK)
    optimizer.register_step_pre_hook(_rate_as_tensor)
    optimizer.register_state_dict_post_hook(_to_plain)
    optimizer.register_load_state_dict_pre_hook(_from_plain)
    return optimizer  # type: ignore[no-any-return]


def shapes_8bit(parameter: Tensor) -> dict[str, Any]:
    """Return the shape of each tensor in a parameter's saved state. An 8-bit moment has two tensors: its bytes
    (`codes`) and its scales (`scale`)."""
    moment: Any = parameter.shape
    if parameter.numel() >= _SMALLEST and parameter.numel() % _BLOCK == 0:
        moment = {"codes": parameter.shape, "scale": torch.Size((parameter.numel() // _BLOCK,))}
    return {"step": torch.Size(), "exp_avg": moment, "exp_avg_sq": moment}


def _missing_compiler(groups: list[dict[str, Any]]) -> str | None:
    names = [os.environ.get("CXX"), os.environ.get("CC"), "g++", "c++", "clang++", "gcc", "clang", "cl"]
    if not any(name and shutil.which(name) for name in names):
        return "C++ compiler (such as g++)"
    on_gpu = any(parameter.is_cuda for group in groups for parameter in group["params"])
    return "Triton" if on_gpu and importlib.util.find_spec("triton") is None else None


def _rate_as_tensor(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Convert each learning rate to a tensor. torchao refuses numbers, since each new number would require compiling
    the step again."""
    for group in optimizer.param_groups:
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32)


def _to_plain(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    def plain(key: str, value: Any) -> Any:
        return {"codes": value.codes, "scale": value.scale} if hasattr(value, "codes") else value

    groups = [{**group, "lr": float(group["lr"])} for group in state_dict["param_groups"]]
    return {"state": _converted(state_dict["state"], plain), "param_groups": groups}


def _from_plain(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    from torchao.optim.subclass_8bit import OptimState8bit

    def moment(key: str, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        signed, device = key == "exp_avg", value["codes"].device
        qmap = OptimState8bit.zeros((_BLOCK,), signed, _BLOCK, device).qmap
        return OptimState8bit(value["codes"], value["scale"], qmap, signed, torch.float32)

    return {**state_dict, "state": _converted(state_dict["state"], moment)}


def _converted(state: dict[int, dict[str, Any]], convert: Callable[[str, Any], Any]) -> dict[int, Any]:
    return {
        number: {key: convert(key, value) for key, value in entry.items()} for number, entry in state.items()
    }
