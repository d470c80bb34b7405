"""The matrices of a block, from which parameters, memory and operations follow."""

from __future__ import annotations

from typing import NamedTuple

from atlas.config import ModelConfig


class Matrix(NamedTuple):
    """Of a linear layer: numbers out and in."""

    rows: int
    columns: int

    @property
    def size(self) -> int:
        return self.rows * self.columns


def block_matrices(model: ModelConfig) -> dict[str, Matrix]:
    """`qkv` and `output` of attention, `up` and `down` of the MLP."""
    C, M, queries = model.hidden_size, model.mlp_width, model.num_heads * model.head_size
    return {
        "qkv": Matrix(queries + 2 * model.kv_heads * model.head_size, C),
        "output": Matrix(C, queries),
        "up": Matrix(2 * M if model.mlp == "swiglu" else M, C),
        "down": Matrix(C, M),
    }
