"""The shape of the network, and the llama.cpp architecture that computes this network."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from atlas.config.fields import Float, Int, Section

MAX_PARAMETERS = 10**13
"""The largest number of parameters that a model may have. In fp32, the weights of such a model need 40 TB."""
VOCAB_MULTIPLE = 64
"""The number of embedding rows is padded to a multiple of `VOCAB_MULTIPLE`; the padding rows are zero and stay zero."""
FLEX_HEAD_SIZE = 16
"""The smallest width of a head that FlexAttention's CUDA kernel supports."""
_ROPE_THETA = 10_000.0

_SIZES = {"hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_size", "vocab_size"}
_EVERY_VALUE = _SIZES | {"max_seq_len", "rope_theta", "norm_eps", "dropout", "bias", "tie_embeddings", "init"}
"""Fields whose value never prevents an export: llama.cpp supports every value, or the field changes only the
training."""
_PLAIN: dict[str, tuple[Any, ...]] = {
    "qk_norm": (False,),
    "qkv_bias": (None, False),
    "rope_scaling": (None,),
    "nope_interval": (None,),
}
_ROTATED: dict[str, tuple[Any, ...]] = {
    "position": ("rope",),
    "norm": ("rmsnorm",),
    "mlp": ("swiglu",),
    "bias": (False,),
}
_ANY: tuple[Any, ...] = ()
_ARCHITECTURES: dict[str, dict[str, tuple[Any, ...]]] = {
    # for gelu_exact, llama.cpp computes the tanh form
    "gpt2": _PLAIN | {"position": ("learned",), "norm": ("layernorm",), "mlp": ("gelu", "gelu_exact")},
    "llama": _PLAIN | _ROTATED | {"rope_scaling": _ANY},
    "qwen2": _PLAIN | _ROTATED | {"qkv_bias": (True,)},
    "qwen3": _PLAIN | _ROTATED | {"qk_norm": (True,)},
    "smollm3": _PLAIN | _ROTATED | {"nope_interval": (4,)},
}
"""Architecture of llama.cpp → field → the values that the architecture supports, or `_ANY`. If a field is neither in
this table nor in `_EVERY_VALUE`, no model can be exported."""


class RopeScaling(Section):
    """The wavelengths of rope in Llama 3.1 and later: long ones are stretched, so that a model for a short context
    learns a longer one. See the model card of Llama 3.1 (arXiv:2407.21783)."""

    factor: Float = Field(8.0, ge=1)
    """The factor by which the longest wavelengths are stretched."""
    low_freq_factor: Float = Field(1.0, gt=0)
    """Wavelengths above original_context / low_freq_factor are stretched by the full factor."""
    high_freq_factor: Float = Field(4.0, gt=0)
    """Wavelengths below original_context / high_freq_factor stay as they are."""
    original_context: Int = Field(8192, ge=1)
    """The context in tokens, before it was made longer."""

    @model_validator(mode="after")
    def _are_ordered(self) -> RopeScaling:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor {self.low_freq_factor:g} must be less than high_freq_factor "
                f"{self.high_freq_factor:g}"
            )
        return self


class ModelConfig(Section):
    """The shape of the network. The settings of this section and the weights are enough to rebuild the model."""

    hidden_size: Int = Field(768, ge=1, le=2**24)
    """Width of the residual stream; divisible by num_heads."""
    num_layers: Int = Field(12, ge=1, le=10_000)
    """Number of transformer blocks."""
    num_heads: Int = Field(12, ge=1, le=2**24)
    """Attention heads per block."""
    num_kv_heads: Int | None = Field(None, ge=1, le=2**24)
    """Heads of keys and values, each shared by num_heads / num_kv_heads heads of queries. Default: num_heads."""
    head_dim: Int | None = Field(None, ge=1, le=2**24)
    """Width of a head. Default: hidden_size / num_heads."""
    mlp_size: Int | None = Field(None, ge=1, le=2**26)
    """Width inside the MLP. Default for gelu: 4 × hidden_size. Default for swiglu, which has a third matrix: 8/3 ×
    hidden_size, rounded up to a multiple of 64."""
    vocab_size: Int | None = Field(None, ge=1, le=2**24)
    """Tokens in the vocabulary. Default: the vocabulary size of the dataset's tokenizer."""
    max_seq_len: Int = Field(1024, ge=1, le=2**32)
    """Context length in tokens."""
    position: Literal["learned", "rope"] = "learned"
    """Position encoding. learned: learned vectors. rope: rotated queries and keys."""
    rope_theta: Float = Field(_ROPE_THETA, gt=1)
    """Base of rope's wavelengths. The longest wavelength is about 2π × rope_theta tokens."""
    rope_scaling: RopeScaling | None = None
    """How rope's wavelengths are stretched, as in Llama 3.1 and later. Default: not at all."""
    nope_interval: Int | None = Field(None, ge=1)
    """Every nope_interval-th block has no rope, as in SmolLM3. Default: all blocks have it."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Norm before attention and MLP."""
    norm_eps: Float = Field(1e-5, gt=0, lt=1)
    """ε, which a norm adds to the variance or the mean square."""
    mlp: Literal["gelu", "gelu_exact", "swiglu"] = "gelu"
    """Activation of the MLP. gelu: GELU's tanh form, as in GPT-2. gelu_exact: exact GELU, as in Atlas 1.x; llama.cpp
    computes the tanh form instead. swiglu: values multiplied by a gate, as in Llama."""
    qk_norm: bool = False
    """RMS norms of queries and keys, per head."""
    dropout: Float = Field(0.0, ge=0, lt=1)
    """Dropout probability during training, for the embeddings, the attention weights, and the outputs of attention and
    MLP."""
    bias: bool = True
    """Biases in linear layers and layer norms, as in GPT-2."""
    qkv_bias: bool | None = None
    """Biases in the projections to queries, keys and values. Default: as bias. Qwen2 has only these biases."""
    tie_embeddings: bool = True
    """The LM head shares the token embedding's weights."""
    init: Literal["gpt2", "scaled"] = "gpt2"
    """Initial weights. gpt2: a standard deviation of 0.02, and less for the projections that write to the residual
    stream. scaled: in the blocks, a standard deviation that falls with the width, and zero for the projections that
    write to the residual stream."""

    @model_validator(mode="after")
    def _settings_fit(self) -> ModelConfig:
        if self.head_dim is None and self.hidden_size % self.num_heads:
            pairs = 2 * self.num_heads  # position rope needs heads of an even size
            below = self.hidden_size // pairs * pairs
            sizes = " or ".join(str(size) for size in (below, below + pairs) if size)
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}: "
                f"use hidden_size {sizes}, or a num_heads that divides {self.hidden_size}"
            )
        if self.num_heads % self.kv_heads:
            divisors = [str(n) for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            raise ValueError(
                f"num_heads {self.num_heads} is not divisible by num_kv_heads {self.kv_heads}: "
                f"use one of {', '.join(divisors)}"
            )
        if self.position == "rope" and self.head_size % 2:
            raise ValueError(
                f"head_dim {self.head_size} is odd, and position rope rotates pairs: use head_dim {self.head_size + 1}"
            )
        of_rope = {
            f"rope_theta {self.rope_theta:g}": self.rope_theta != _ROPE_THETA,
            "rope_scaling": self.rope_scaling is not None,
            f"nope_interval {self.nope_interval}": self.nope_interval is not None,
        }
        if self.position != "rope" and (
            useless := [setting for setting, is_set in of_rope.items() if is_set]
        ):
            raise ValueError(
                f"{useless[0]} has no effect with position {self.position}: set position to rope"
            )
        return self

    @model_validator(mode="after")
    def _some_machine_holds_it(self) -> ModelConfig:
        inside = 2 * self.num_heads * self.head_size + 2 * self.mlp_width
        rows = inside * self.num_layers + (self.vocab_size or 0) + self.max_seq_len
        if rows * self.hidden_size > MAX_PARAMETERS:
            raise ValueError(
                f"num_layers {self.num_layers}, hidden_size {self.hidden_size}, vocab_size {self.vocab_size} and "
                f"max_seq_len {self.max_seq_len} make {rows * self.hidden_size:.0e} parameters, and no machine holds "
                f"more than {MAX_PARAMETERS:.0e}: use smaller ones"
            )
        return self

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    @property
    def has_qkv_bias(self) -> bool:
        """Whether the projections to queries, keys and values have biases."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    def has_rope(self, layer: int) -> bool:
        """Whether the block `layer`, counted from 0, rotates queries and keys."""
        return self.position == "rope" and (not self.nope_interval or (layer + 1) % self.nope_interval != 0)

    @property
    def head_size(self) -> int:
        """Width of a head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def mlp_width(self) -> int:
        """Width inside the MLP, after the activation."""
        if self.mlp_size is not None:
            return self.mlp_size
        return -(-8 * self.hidden_size // 3 // 64) * 64 if self.mlp == "swiglu" else 4 * self.hidden_size

    @property
    def vocabulary(self) -> int:
        """`vocab_size`, which must be set before a model is built. Raises `ValueError` if `vocab_size` is not set."""
        if self.vocab_size is None:
            raise ValueError("vocab_size is not resolved yet")
        return self.vocab_size

    @property
    def padded_vocab_size(self) -> int:
        """Number of rows of the embedding and of the LM head, including the padding rows."""
        return -(-self.vocabulary // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def resolved_sizes(self) -> dict[str, Any]:
        """All fields, with the defaults that depend on other fields filled in."""
        sizes = {"num_kv_heads": self.kv_heads, "head_dim": self.head_size, "mlp_size": self.mlp_width}
        return self.model_dump() | sizes

    @property
    def gguf_architecture(self) -> str | None:
        """The llama.cpp architecture that computes this model, or None if no architecture does."""
        if self._unknown_fields:
            return None
        return next((name for name in _ARCHITECTURES if not self._changes_for(name)), None)

    @property
    def train_only(self) -> str | None:
        """Why the model cannot be exported, and what to change, or None if the model can be exported."""
        if unknown := self._unknown_fields:
            return f"the table of llama.cpp's architectures does not name model.{unknown[0]}: remove this setting"
        if self.gguf_architecture:
            return None
        nearest = min(_ARCHITECTURES, key=lambda name: len(self._changes_for(name)))
        settings = self._changes_for(nearest).items()
        changes = (f"model.{name} to {str(value).lower()}" for name, value in settings)
        return f"no architecture of llama.cpp computes this model: for {nearest}, set {' and '.join(changes)}"

    @property
    def _unknown_fields(self) -> list[str]:
        """Fields that the table of architectures does not name: an exported file would silently leave them out."""
        named = _EVERY_VALUE.union(set.intersection(*map(set, _ARCHITECTURES.values())))
        return [name for name in type(self).model_fields if name not in named]

    def _changes_for(self, architecture: str) -> dict[str, Any]:
        """Return setting → the value that `architecture` needs, for each setting that the architecture does not
        support."""
        computed = _ARCHITECTURES[architecture]
        changes = {
            name: values[0]
            for name, values in computed.items()
            if values is not _ANY and getattr(self, name) not in values
        }
        if architecture == "gpt2":  # in gpt2, all heads together are as wide as the model
            if self.kv_heads != self.num_heads:
                changes["num_kv_heads"] = self.num_heads
            if self.head_size * self.num_heads != self.hidden_size:
                changes["head_dim"] = "null"
        return changes
