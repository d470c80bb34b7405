"""Floating-point operations of training: those of its matrix products, which take nearly all of its time.

As in PaLM's appendix B (Chowdhery et al. 2022, arXiv:2204.02311): each weight of a matrix takes 6 per token, a
multiplication and an addition in the forward pass and twice that in the backward pass, 6 · N in all. Attention's two
products take 12 · L · T · C on top where each token is compared with all T of its sequence; the fused kernels leave out
those after it, which halves that.

Symbols: L num_layers, C hidden_size, T max_seq_len, V vocabulary; N weights of matrices, the embeddings left out,
since a look-up multiplies nothing.
"""

from __future__ import annotations

from atlas.config import AtlasConfig

_FORWARD, _FORWARD_AND_BACKWARD = 2, 6


def training_flops_per_token(config: AtlasConfig) -> int:
    """Of one token's share in an update, forward and backward, evaluations left out.

    Gradient checkpointing takes each block's forward pass once more, up to the last tensor that the backward pass
    needs: with dropout that is its output, without it the input of the MLP's last product, 4 · C² weights earlier.
    """
    model = config.model
    C, T, V = model.hidden_size, model.max_seq_len, model.vocabulary
    attention = T * C
    block = _FORWARD_AND_BACKWARD * (12 * C * C + attention)
    if config.training.gradient_checkpointing:
        block += _FORWARD * ((12 if model.dropout else 8) * C * C + attention)
    return model.num_layers * block + _FORWARD_AND_BACKWARD * V * C
