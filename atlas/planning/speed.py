"""How long a GPU needs for an update: a rule in closed form of two numbers of the GPU, the rate of its matrix products
and the bandwidth of its memory.

The rule is fitted to benchmarks/roofline.py, which counts the bytes and FLOPs of Atlas's own code by running it on
tensors without memory. tests/planning/test_roofline.py holds the rule within 15 % of that for every preset. Nothing
here was measured on a GPU. The constants in capitals are stated: they are what such GPUs and hosts usually reach.
"""

from __future__ import annotations

from dataclasses import dataclass

from atlas.config import AtlasConfig
from atlas.config.config import MUON_STACK_NUMBERS
from atlas.model.cost import block_matrices, count_parameters, one_block_model
from atlas.planning.cards import Card
from atlas.training.optimizers.muon import count_matrices

LAUNCH = 2.5e-6
"""Seconds of a GPU for the smallest kernel."""
OPERATOR, COMPILED_KERNEL, GRAPH = 6e-6, 3.5e-6, 80e-6
"""Seconds of the host to launch an operator, to launch a kernel of a compiled graph, and to enter such a graph."""
EAGER_BYTES = {"layernorm": 2.3, "rmsnorm": 8.5}
"""The bytes of blocks that are not compiled, as a multiple of those of compiled blocks. RMSNorm comes with RoPE."""
EAGER_OPERATORS = {"layernorm": 35, "rmsnorm": 112}
"""Operators of a block that is not compiled, forward; the backward pass has as many."""


@dataclass(frozen=True)
class Speed:
    """The speed that a GPU reaches."""

    products: float
    """FLOP/s of large matrix products in the precision of training."""
    bandwidth: float
    """Bytes/s of its memory."""
    attention: float = 0.4
    """FlashAttention's speed as a fraction of `products`, for heads of 64 and sequences of 1,024 tokens."""
    misaligned: float = 0.33
    """The speed of products with rows that do not begin at multiples of 16 bytes, as a fraction of `products`."""


def card_speed(card: Card, *, products: float | None = None, bandwidth: float | None = None) -> Speed:
    """Return the speed of a card: a fraction of its peaks, or what was measured.

    The tensor cores of GeForce cards are held to half of their rate, which products then nearly reach. Those of other
    cards are limited by power and memory, and attention's softmax slows them down more.
    """
    reached, attention, misaligned = (0.95, 0.65, 0.5) if card.is_geforce else (0.8, 0.4, 0.33)
    products = products or reached * card.tflops * 1e12
    return Speed(products, bandwidth or 0.92 * card.bandwidth * 1e9, attention, misaligned)


def update_seconds(config: AtlasConfig, speed: Speed) -> float:
    """Return the seconds of one update in half precision: those of the GPU or of its host, whichever needs more.

    A micro-batch of N tokens multiplies each matrix once forward and twice backward, and once more with gradient
    checkpointing. A product needs the time of its FLOPs or of its bytes. The rest is bytes: 12 for each weight that is
    rounded and whose gradient becomes fp32, 6 more with gradient checkpointing; 12 for each gradient that is
    accumulated; 6 for each logit (40 if not compiled); 30 for each number of the table, whose gradient is scaled and
    added to that of the embedding; 57 · C for a token outside the blocks. See `_block_bytes` and `_optimizer_work` for
    the others. Symbols: L num_layers, C hidden_size, V padded vocabulary.
    """
    model, training = config.model, config.training
    sequences = training.sequences_at_once
    micro_batches = -(-training.sequences_per_update // sequences)
    is_compiled, accumulates = training.compile != "off", micro_batches > 1
    forwards = 2 if training.gradient_checkpointing else 1
    N, L, C, V = sequences * model.max_seq_len, model.num_layers, model.hidden_size, model.padded_vocab_size
    matrices, parameters = list(block_matrices(model).values()), count_parameters(model).total
    tensors = L * (4 + 4 * model.bias + (4 if model.norm == "layernorm" else 2))

    def product(rows: int, columns: int) -> float:
        moved = 2 * (rows * columns + N * (rows + columns))
        return max(2 * N * rows * columns / speed.products, moved / speed.bandwidth, LAUNCH)

    # Attention has two products forward and five backward. Each covers half of all pairs of tokens.
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
    """Return the bytes that a block moves for a token outside its matrix products, forward and backward.

    The residual stream has 4 bytes a number, the inputs and outputs of products have 2. Compiled, each of these is a
    kernel. Forward: first norm, 6 bytes for each of C; residual sum and second norm, 12; activation, 2 for each of U
    and M; residual sum, 10. Backward: incoming gradient rounded, 6; activation, 4 for each of U and 2 for each of M;
    norms and residual sums, 18 and 14; gradients of q, k and v joined, 4 for each of W. RoPE and the norms of queries
    and keys move q, k and v once more. Dropout keeps masks of a byte.

    Symbols: C hidden_size, M mlp_width, U outputs of `up`, W width of q, k and v.
    """
    model, matrices = config.model, block_matrices(config.model)
    C, M, U, W = model.hidden_size, model.mlp_width, matrices["up"][0], matrices["qkv"][0]
    both = 4 * W * (model.position == "rope" or model.qk_norm) + 4 * C * (model.dropout > 0)
    factor = EAGER_BYTES[model.norm] if config.training.compile == "off" else 1.0
    return factor * (28 * C + 2 * (U + M) + both), factor * (38 * C + 4 * U + 2 * M + 4 * W + both)


def _optimizer_work(config: AtlasConfig) -> tuple[int, int, int]:
    """Return bytes, FLOPs and operators of the optimizer's step, gradient clipping left out.

    AdamW reads weights, gradients and two moments, and writes all but the gradients. Muon's iteration has five rounds
    of three products, of which one is of the shorter side alone.
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
