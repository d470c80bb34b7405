"""Estimate the time that a GPU needs for an update, from the GPU's matrix-product rate and memory bandwidth.

The closed formula is fitted to the simulated times of benchmarks/roofline.py. The simulation runs Atlas's code on
tensors without memory and counts bytes and FLOPs. For every preset, the formula's time differs from the simulated time
by at most 15 %, as tests/planning/test_roofline.py checks. No time was measured on a GPU. The constants in capitals are
typical values of GPUs and their hosts, not measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

from atlas.config import AtlasConfig
from atlas.config.config import MUON_STACK_NUMBERS
from atlas.model.cost import block_matrices, count_parameters, one_block_model
from atlas.planning.cards import Card
from atlas.training.optimizers.muon import count_matrices

LAUNCH = 2.5e-6
"""Seconds that a GPU needs for the smallest kernel."""
OPERATOR, COMPILED_KERNEL, GRAPH = 6e-6, 3.5e-6, 80e-6
"""Seconds that the host needs to launch an operator, to launch a compiled kernel, and to enter a compiled graph."""
EAGER_BYTES = {"layernorm": 2.3, "rmsnorm": 8.5}
"""Memory traffic of an uncompiled block ÷ memory traffic of a compiled block, by norm. The value for `rmsnorm` includes
RoPE."""
EAGER_OPERATORS = {"layernorm": 35, "rmsnorm": 112}
"""Number of operators in the forward pass of an uncompiled block, by norm. The backward pass has as many operators."""


@dataclass(frozen=True)
class Speed:
    """The speed that a GPU reaches."""

    products: float
    """FLOP/s of large matrix products in the precision of training."""
    bandwidth: float
    """Bytes/s of the GPU's memory."""
    attention: float = 0.4
    """FlashAttention's speed as a fraction of `products`, for heads of 64 and sequences of 1,024 tokens."""
    misaligned: float = 0.33
    """The speed of matrix products with rows that are not aligned to 16 bytes, as a fraction of `products`."""


def card_speed(card: Card, *, products: float | None = None, bandwidth: float | None = None) -> Speed:
    """Return the speed that a card reaches: the measured rates if they are given, else fractions of the card's peaks.

    `products` is in FLOP/s and `bandwidth` in bytes/s. The tensor cores of GeForce cards accumulate in fp32 at
    half of their fp16 rate. `card.tflops` is this lower rate, and matrix products nearly reach it. On other cards,
    power and memory limit matrix products, and softmax slows attention down more than on GeForce cards.
    """
    reached, attention, misaligned = (0.95, 0.65, 0.5) if card.is_geforce else (0.8, 0.4, 0.33)
    products = products or reached * card.tflops * 1e12
    return Speed(products, bandwidth or 0.92 * card.bandwidth * 1e9, attention, misaligned)


def update_seconds(config: AtlasConfig, speed: Speed) -> float:
    """Return the time of one update in half precision, in seconds: the larger of the GPU's time and the host's time.

    A micro-batch of N tokens multiplies each matrix once forward and twice backward, and once more with gradient
    checkpointing. A product takes the time of its FLOPs or the time of its memory traffic, whichever is longer. All
    other time is memory traffic. In bytes, this traffic is:

    - 12 for each matrix weight, to round the weight and to convert its gradient to fp32 (18 with checkpointing);
    - 12 for each parameter, if gradients are accumulated over micro-batches;
    - 6 for each logit (40 if not compiled);
    - 30 for each number of the embedding table, to scale the head's gradient and to add the embedding's gradient;
    - 57 · C for each token, outside the blocks;
    - the traffic of `_block_bytes` and `_optimizer_work`.

    Symbols: L num_layers, C hidden_size, V padded vocabulary.
    """
    model, training = config.model, config.training
    sequences = training.sequences_at_once
    micro_batches = -(-training.sequences_per_update // sequences)
    is_compiled, accumulates = training.compile != "off", micro_batches > 1
    forwards = 2 if training.gradient_checkpointing else 1
    N, L, C, V = sequences * model.max_seq_len, model.num_layers, model.hidden_size, model.padded_vocab_size
    matrices, parameters = list(block_matrices(model).values()), count_parameters(model).total
    tensors = L * (4 + 3 * model.bias + model.has_qkv_bias + (4 if model.norm == "layernorm" else 2))

    def product(rows: int, columns: int) -> float:
        moved = 2 * (rows * columns + N * (rows + columns))
        return max(2 * N * rows * columns / speed.products, moved / speed.bandwidth, LAUNCH)

    # Attention has two matrix products forward and five backward. With the causal mask, each product covers half of all
    # token pairs.
    pairs = N * model.max_seq_len * model.num_heads * model.head_size
    attention = pairs * (2 * forwards + 5) / (speed.products * speed.attention)
    forward, backward = _block_bytes(config)
    moved = L * N * (forwards * forward + backward) + N * ((6 if is_compiled else 40) * V + 57 * C)
    moved += 6 * (forwards + 1) * L * sum(matrix.numel() for matrix in matrices) + 30 * V * C
    moved += 12 * accumulates * parameters
    block = (forwards + 2) * (sum(product(*matrix) for matrix in matrices) + 4 * LAUNCH) + attention
    gpu = L * block + 3 * product(V, C) + moved / speed.bandwidth + accumulates * tensors * LAUNCH / 2
    launches = 17 * COMPILED_KERNEL + GRAPH if is_compiled else EAGER_OPERATORS[model.norm] * OPERATOR
    host = (forwards + 1) * L * launches + (accumulates * tensors + 45) * OPERATOR

    once, flops, operators = _optimizer_work(config)
    step = (once + 12 * parameters) / speed.bandwidth + flops / speed.products + operators * LAUNCH / 2
    return max(micro_batches * gpu + step, micro_batches * host + (operators + 15) * OPERATOR)


def _block_bytes(config: AtlasConfig) -> tuple[float, float]:
    """Return the memory traffic of a block in bytes per token: forward, and backward. Matrix products are not included.

    The residual stream has 4 bytes per number, and the inputs and outputs of matrix products have 2 bytes. In a
    compiled block, each item of the following lists is one kernel. Forward: 6 · C bytes for the first norm; 12 · C for
    the residual sum with the second norm; 2 · (U + M) for the activation; 10 · C for the last residual sum. Backward: 6
    · C for rounding the incoming gradient; 4 · U + 2 · M for the activation; 18 · C and 14 · C for the norms with
    residual sums; 4 · W for joining the gradients of q, k and v. RoPE and the norms of queries and keys read and write
    q, k and v once more. A dropout mask has one byte per number.

    Symbols: C hidden_size, M mlp_width, U outputs of `up`, W width of q, k and v.
    """
    model, matrices = config.model, block_matrices(config.model)
    C, M, U, W = model.hidden_size, model.mlp_width, matrices["up"][0], matrices["qkv"][0]
    both = 4 * W * (model.position == "rope" or model.qk_norm) + 4 * C * (model.dropout > 0)
    factor = EAGER_BYTES[model.norm] if config.training.compile == "off" else 1.0
    return factor * (28 * C + 2 * (U + M) + both), factor * (38 * C + 4 * U + 2 * M + 4 * W + both)


def _optimizer_work(config: AtlasConfig) -> tuple[int, int, int]:
    """Return the bytes, FLOPs and operators of the optimizer step, without gradient clipping.

    AdamW reads weights, gradients and two moments, and writes weights and moments. Muon's Newton-Schulz iteration has
    five rounds of three matrix products. One of these three products multiplies two square matrices, whose side is the
    shorter side of the weight matrix.
    """
    model, kind = config.model, config.training.optimizer
    L, parameters = model.num_layers, count_parameters(model).total
    if kind == "adafactor":
        return 76 * parameters, 0, 144 * L
    if kind != "muon":
        return (16 if kind == "adamw8bit" else 28) * parameters, 0, 6
    inside = flops = operators = 0
    for (_, *shape), number in count_matrices(one_block_model(model)).items():
        short, long = sorted(shape)
        inside += L * number * short * long
        flops += L * number * 10 * short**2 * (2 * long + short)
        groups = -(-L * number // max(1, MUON_STACK_NUMBERS["cuda"] // (short * long)))
        operators += 30 * groups
    return 62 * inside + 28 * (parameters - inside), flops, operators
