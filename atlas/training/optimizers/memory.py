"""The memory of an optimizer: the bytes of its state, and the bytes that its step needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from atlas.config import LoraConfig, ModelConfig, TrainingConfig
from atlas.config.config import MUON_STACK_NUMBERS
from atlas.model.cost import is_in_block, list_weights, one_block_model
from atlas.training.devices.device import computes_in_half
from atlas.training.optimizers.build import build_optimizer, state_shapes
from atlas.training.optimizers.muon import count_matrices

_FP32, _HALF, _CODE = 4, 2, 1  # bytes


def state_bytes(model: ModelConfig, lora: LoraConfig, training: TrainingConfig) -> int:
    """Return the size of the optimizer's state in bytes, without its step counts. The size is the same in memory and in
    a checkpoint."""
    one = one_block_model(model, lora)
    copies = {p: model.num_layers if is_in_block(name) else 1 for name, p in one.named_parameters()}
    return sum(
        copies[parameter] * _bytes(state_shapes(group, parameter))
        for group in _groups(one, training)
        for parameter in group["params"]
    )


def _groups(model: nn.Module, training: TrainingConfig) -> list[dict[str, Any]]:
    if training.optimizer == "adamw8bit":  # so that an estimate does not need torchao
        return [{"is_8bit": True, "params": [p for p in model.parameters() if p.requires_grad]}]
    return build_optimizer(model, training).param_groups


def _bytes(shapes: dict[str, Any]) -> int:
    total = 0
    for name, shape in shapes.items():
        if isinstance(shape, dict):
            total += _bytes(shape)
        elif shape != torch.Size():
            total += shape.numel() * (_CODE if name == "codes" else _FP32)
    return total


def step_bytes(model: ModelConfig, lora: LoraConfig, training: TrainingConfig, *, device: str) -> int:
    """Return the bytes that the optimizer's step needs on `device`, in addition to weights, gradients and state."""
    weights = [weight for weight in list_weights(model, lora) if weight.is_trainable]
    largest = _FP32 * max(weight.size // weight.copies for weight in weights)
    is_rounded = training.precision == "bf16-true"  # bf16 weights are updated one after the other
    if training.optimizer == "muon":
        matrices = count_matrices(one_block_model(model, lora))
        layers = 1 if is_rounded else model.num_layers
        is_in_fp32 = device == "cpu" and not computes_in_half(training.precision, device)
        width = _FP32 if is_in_fp32 else _HALF
        sizes = [
            _muon_bytes(rows, columns, n * layers, device, width)
            for (_, rows, columns), n in matrices.items()
        ]
        own = max(sizes, default=0)
    else:
        # Any other optimizer of PyTorch has no fused step, and makes a temporary copy of all parameters.
        own = {"adamw": 0, "adafactor": largest, "adamw8bit": 2 * largest}.get(
            training.optimizer, largest if is_rounded else _FP32 * sum(weight.size for weight in weights)
        )
    if not is_rounded:
        return own
    return 2 * largest + max(own, largest)  # fp32 parameter and gradient, plus the step or the rounding


def _muon_bytes(rows: int, columns: int, count: int, device: str, width: int) -> int:
    """Return the bytes that Muon needs to orthogonalize one stack of matrices. There are `count` matrices of shape
    (`rows`, `columns`), and matrix products have `width` bytes per number.

    The memory holds the mean gradients, the stack before and after an iteration, and two square products per matrix,
    whose side is the matrix's shorter side.
    """
    short, size = min(rows, columns), rows * columns
    stacked = min(count, max(1, MUON_STACK_NUMBERS[device] // size))
    return stacked * (size * (_FP32 + 2 * width) + 2 * short * short * width)
