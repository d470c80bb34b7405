"""Estimate the memory that a model needs during generation."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from atlas.config import ModelConfig
from atlas.model.cost import stored_parameters
from atlas.training.memory.estimate import PROCESS_BYTES

_FP32 = 4  # bytes


@dataclass(frozen=True)
class InferenceMemory:
    """Bytes of memory during generation in fp32 with a full KV cache."""

    weights: int
    cache: int
    activations: int
    process: int

    @property
    def total(self) -> int:
        """Total bytes."""
        return sum(astuple(self))


def estimate_inference_memory(model: ModelConfig, *, device: str, batch_size: int = 1) -> InferenceMemory:
    """Estimate the memory that generation needs. The KV cache has `batch_size` rows of `max_seq_len` tokens."""
    tokens = batch_size * model.max_seq_len
    inside = 2 * (model.hidden_size + model.mlp_width)
    return InferenceMemory(
        weights=stored_parameters(model) * _FP32,
        cache=2 * model.num_layers * tokens * model.kv_heads * model.head_size * _FP32,
        activations=tokens * inside * _FP32,  # prefill: the residual stream and the hidden layer of one MLP
        process=PROCESS_BYTES[device],
    )
