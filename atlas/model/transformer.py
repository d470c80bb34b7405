"""`AtlasLM`: a decoder-only transformer with the parts of GPT-2 (Radford et al. 2019), Llama (Touvron et al. 2023,
arXiv:2302.13971) and Qwen3. `ModelConfig` selects the parts, in any combination.

The blocks are pre-norm. The LM head may share the token embedding's weights. The model does not depend on training,
devices or files. Shapes: B batch, T tokens, C hidden_size, V vocab_size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

from atlas.config import ModelConfig
from atlas.model.attention import CausalSelfAttention, Context
from atlas.model.documents import document_mask, document_positions
from atlas.model.kv_cache import KVCache
from atlas.model.mlp import MLP
from atlas.model.norm import build_norm
from atlas.model.rope import rotation_at


class Block(nn.Module):
    """A transformer block: x + attention(norm(x)), then x + mlp(norm(x)). The module `recompute` decides which outputs
    the backward pass recomputes."""

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        self.attention_norm = build_norm(config)
        self.attention = CausalSelfAttention(config, layer)
        self.mlp_norm = build_norm(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        x = x + self.dropout(self.attention(self.attention_norm(x), context))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))  # type: ignore[no-any-return]


class AtlasLM(nn.Module):
    """A language model: token ids (B, T) → logits (B, T, V). The logits at position t predict token t + 1.

    `gradient_checkpointing` recomputes each block in the backward pass instead of keeping its activations (Chen et al.
    2016, arXiv:1604.06174).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.token_embedding = nn.Embedding(config.padded_vocab_size, config.hidden_size)
        if config.position == "learned":
            self.position_embedding = nn.Embedding(config.max_seq_len, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.final_norm = build_norm(config)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set biases to zero, gains of norms to 1, and weights to normally distributed numbers. Rows that only pad the
        vocabulary are zero.

        `gpt2`: std 0.02. For the projections that write to the residual stream, std is 0.02/√(2 · num_layers), so that
        the stream's variance does not grow with depth (Radford et al. 2019, section 2.3).

        `scaled`: std 1/(2√inputs) in the blocks, so that outputs have the same scale at any width (Yang et al. 2022,
        arXiv:2203.03466). The projections that write to the residual stream are zero, so every block starts as the
        identity (Zhang et al. 2019, arXiv:1901.09321). With a tied head, the logit of the input token itself is then
        std · width. The embedding's std is at most 5 / width, so that this logit is at most 5. Otherwise the model
        would start by repeating its input.
        """
        is_scaled = self.config.init == "scaled"
        residual_scale = 0.0 if is_scaled else 1 / math.sqrt(2 * self.config.num_layers)
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                std = 0.02
                if is_scaled:
                    is_inside, inputs = name.startswith("blocks."), module.weight.shape[1]
                    std = 0.5 / math.sqrt(inputs) if is_inside else min(0.02, 5 / inputs)
                if name.endswith(("attention.output", "mlp.down")):
                    std *= residual_scale
                nn.init.normal_(module.weight, std=std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                module.reset_parameters()
        for table in (self.token_embedding.weight, self.head_table):
            table[self.config.vocabulary :] = 0

    def forward(
        self, tokens: Tensor, cache: KVCache | None = None, documents: Tensor | None = None
    ) -> Tensor:
        """Return the logits (B, T, V) of `tokens` (B, T). With a `cache`, these tokens follow the tokens in the cache.

        `documents` (B, T) gives the number of each token's document. With `documents`, attention stays inside each
        document, and positions restart in each document.
        """
        if not (self.training and torch.is_grad_enabled()):
            return self.head(self.hidden_states(tokens, cache, documents))
        table, of_head = self.tables()
        hidden = self.hidden_states(tokens, cache, documents, table=table)
        return F.linear(hidden, of_head[: self.config.vocabulary])

    def hidden_states(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        documents: Tensor | None = None,
        *,
        table: Tensor | None = None,
    ) -> Tensor:
        """Return the hidden states (B, T, C) of `tokens` (B, T) after the final norm: the input of `head`. `table` is
        the first result of `tables`."""
        x, context = self.embed(tokens, cache, documents, table=table)
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, context, use_reentrant=False)
            else:
                x = block(x, context)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return self.final_norm(x)  # type: ignore[no-any-return]

    def embed(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        documents: Tensor | None = None,
        *,
        table: Tensor | None = None,
    ) -> tuple[Tensor, Context]:
        """Return, for `tokens` (B, T), the residual stream (B, T, C) before the first block, and the context for every
        block's attention."""
        context = self._context(tokens, cache, documents)
        x = self.token_embedding(tokens) if table is None else F.embedding(tokens, table, sparse=True)
        if self.config.position == "learned":
            x = x + self.position_embedding(context.positions)
        return self.dropout(x), context

    def _context(self, tokens: Tensor, cache: KVCache | None, documents: Tensor | None) -> Context:
        """Return the context, which is computed once for all blocks. A row with a single document needs no mask,
        because the attention kernel itself is causal."""
        T, rotation = tokens.shape[1], None
        mask: Tensor | BlockMask | None = None
        if cache is not None:
            if documents is not None:
                raise ValueError("a cache holds one document per row: give either a cache or documents")
            positions = cache.positions(T)
            mask = cache.visible(positions)
        else:
            if self.config.max_seq_len < T:
                raise ValueError(f"{T} tokens do not fit a context of {self.config.max_seq_len}")
            positions = torch.arange(T, device=tokens.device)
            if documents is not None:
                positions = document_positions(documents)
                dropout = self.config.dropout if self.training else 0.0
                mask = document_mask(documents, head_size=self.config.head_size, dropout=dropout)
        if self.config.position == "rope":
            rotation = rotation_at(
                positions, self.config.head_size, self.config.rope_theta, self.config.rope_scaling
            )
        return Context(positions, mask, rotation, cache)

    def tables(self) -> tuple[Tensor | None, Tensor]:
        """Return the tables of the embedding and of the head for a forward and a backward pass. The first is None if
        the embedding uses its own table. On a CPU, the gradients of tied tables are added in place."""
        weight = self.token_embedding.weight
        is_shared = self.config.tie_embeddings and weight.device.type == "cpu" and weight.requires_grad
        if is_shared and torch.is_grad_enabled():
            embedding, head = _TiedTables.apply(weight)  # type: ignore[no-untyped-call]
            return embedding, head
        return None, self.head_table

    @property
    def head_table(self) -> Tensor:
        """(padded V, C): the head's parameter, including the rows that pad the vocabulary. With LoRA, the sum of the
        parameter and its low-rank update."""
        module = self.token_embedding if self.config.tie_embeddings else self.lm_head
        return getattr(module, "updated_weight", module.weight)

    @property
    def head_weight(self) -> Tensor:
        """(V, C): the head's rows without the padding, as a view."""
        return self.head_table[: self.config.vocabulary]

    def head(self, hidden: Tensor) -> Tensor:
        """(…, C) → logits (…, V)."""
        return F.linear(hidden, self.head_weight)

    def num_parameters(self) -> int:
        """Return the number of parameters, without the rows that pad the vocabulary. These rows are always zero."""
        total = sum(parameter.numel() for parameter in self.parameters())
        tables = 1 if self.config.tie_embeddings else 2
        padding = self.config.padded_vocab_size - self.config.vocabulary
        return total - tables * padding * self.config.hidden_size


class _TiedTables(torch.autograd.Function):
    """The same table for the embedding and for the head. The embedding's gradient is sparse, since a batch has only
    some of the tokens; it is added to those rows of the head's gradient. Autograd itself would copy the head's
    gradient, which is the largest tensor of a small model."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return weight.view_as(weight), weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Tensor | None:
        embedding, head = gradients
        if embedding is None or head is None:
            return embedding if head is None else head
        return head.add_(embedding)


def build_model(config: ModelConfig, *, seed: int | None = None) -> AtlasLM:
    """Return a newly initialized model on the CPU. `seed` determines the model's weights."""
    if seed is not None:
        torch.manual_seed(seed)
    return AtlasLM(config)
