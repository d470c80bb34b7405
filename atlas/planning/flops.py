"""Floating-point operations of training: those of its matrix products, which take nearly all of its time.

As in PaLM's appendix B (Chowdhery et al. 2022, arXiv:2204.02311): each weight of a matrix takes 6 per token, a
multiplication and an addition in the forward pass and twice that in the backward pass, 6 · N in all. Attention's two
products take 12 · L · T · Q on top where each token is compared with all T of its sequence; the fused kernels leave out
those after it, which halves that.

Symbols: L num_layers, C hidden_size, Q width of all queries, T max_seq_len, V vocabulary; N weights of matrices, the
embeddings left out, since a look-up multiplies nothing.
"""

from __future__ import annotations

from atlas.config import AtlasConfig
from atlas.planning.shapes import block_matrices

_FORWARD, _FORWARD_AND_BACKWARD = 2, 6


def training_flops_per_token(config: AtlasConfig) -> int:
    """Of one token's share in an update, forward and backward, evaluations left out.

    Gradient checkpointing takes each block's forward pass once more, up to the last tensor that the backward pass
    needs: with dropout that is its output, without it the input of the MLP's last product.
    """
    model = config.model
    matrices = block_matrices(model)
    weights = sum(matrix.size for matrix in matrices.values())
    attention = model.max_seq_len * model.num_heads * model.head_size
    block = _FORWARD_AND_BACKWARD * (weights + attention)
    if config.training.gradient_checkpointing:
        block += _FORWARD * (weights + attention - (0 if model.dropout else matrices["down"].size))
    return model.num_layers * block + _FORWARD_AND_BACKWARD * model.vocabulary * model.hidden_size
