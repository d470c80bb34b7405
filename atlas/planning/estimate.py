"""Parameters, memory and disk of a run, from its config alone.

Memory is counted tensor by tensor: what autograd keeps in `atlas.model` and `atlas.training.loss` at the
moment when most is alive, the start of the backward pass, plus what the process itself takes.

How far off: the tensors by about 1 % on a CPU (peak resident memory of updates of 7 shapes and batches, from 2 to 51
million parameters, with an allocator that returns what is freed). Where freed memory is kept (`atlas.process`), the
estimate including `_CPU_SLACK` is 1 to 5 % below what `nano`, `tiny` and `small` took (benchmarks/memory.py).
The figures for GPUs follow from the same count and have not been measured yet.

Symbols: B sequences at once, T max_seq_len, C hidden_size, L num_layers, H num_heads, M mlp_width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

from atlas.config import AtlasConfig, ModelConfig, TrainingConfig
from atlas.config.config import CUDA_LOSS_BYTES, LOSS_CHUNK_TOKENS, MUON_STACK_NUMBERS
from atlas.config.model import FLEX_HEAD_SIZE
from atlas.planning.shapes import Matrix, block_matrices
from atlas.process import KEPT_BELOW

ASSUMED_VOCABULARY = 2048
"""Of a config that leaves `vocab_size` to the dataset: the demo's own byte-level BPE."""

_FP32 = 4
# Interpreter, PyTorch and its libraries on a CPU (measured); a CUDA context and its library workspaces.
_PROCESS = {"cpu": 350_000_000, "cuda": 500_000_000, "mps": 500_000_000}
# Freed activations that glibc keeps between allocations of other sizes, as a part of all blocks' activations,
# recomputed ones too. Larger tensors are given back.
_CPU_SLACK = 0.8


@dataclass(frozen=True)
class Parameters:
    """Trainable numbers by part, without the rows that only pad the vocabulary."""

    token_embedding: int
    position_embedding: int
    attention: int
    mlp: int
    norms: int
    head: int

    @property
    def total(self) -> int:
        return sum(astuple(self))


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes at the peak of an update; the parts add up to `total`.

    `gradients` are those that earlier micro-batches of the same update have left. An update of a single
    micro-batch has none of them yet when activations peak: then the part counts only what gradients need
    beyond the space that activations and loss free. `half_precision_weights` are the copies that matrix
    products keep at that moment. `allocator` is freed memory that it keeps.
    """

    weights: int
    optimizer: int
    gradients: int
    half_precision_weights: int
    activations: int
    allocator: int
    loss: int
    process: int

    @property
    def total(self) -> int:
        return sum(astuple(self))


@dataclass(frozen=True)
class InferenceMemory:
    """Bytes while generating with a full KV cache, in fp32."""

    weights: int
    cache: int
    activations: int
    process: int

    @property
    def total(self) -> int:
        return sum(astuple(self))


def assume_vocabulary(config: AtlasConfig) -> AtlasConfig:
    """The config with a `vocab_size`, `ASSUMED_VOCABULARY` where it leaves it to the dataset."""
    if config.model.vocab_size is not None:
        return config
    model = config.model.model_copy(update={"vocab_size": ASSUMED_VOCABULARY})
    return config.model_copy(update={"model": model})


def count_parameters(model: ModelConfig) -> Parameters:
    """Exact, by the closed formula of the architecture."""
    C, L, V, bias = model.hidden_size, model.num_layers, model.vocabulary, int(model.bias)
    qkv, output, up, down = block_matrices(model).values()
    norm = C * (1 + bias) if model.norm == "layernorm" else C
    return Parameters(
        token_embedding=V * C,
        position_embedding=model.max_seq_len * C if model.position == "learned" else 0,
        attention=L * (qkv.size + output.size + bias * (qkv.rows + C)),
        mlp=L * (up.size + down.size + bias * (up.rows + C)),
        norms=(2 * L + 1) * norm + (2 * L * model.head_size if model.qk_norm else 0),
        head=0 if model.tie_embeddings else V * C,
    )


def _tables(model: ModelConfig) -> list[int]:
    """Rows of the embeddings and of a head of its own."""
    tables = [model.padded_vocab_size] * (1 if model.tie_embeddings else 2)
    return [*tables, model.max_seq_len] if model.position == "learned" else tables


def _stored_parameters(model: ModelConfig) -> int:
    """As tensors, the padding rows included."""
    tables = 1 if model.tie_embeddings else 2
    return (
        count_parameters(model).total
        + tables * (model.padded_vocab_size - model.vocabulary) * model.hidden_size
    )


def _weight_bytes(training: TrainingConfig) -> int:
    return 2 if training.precision == "bf16-true" else _FP32


def lora_parameters(config: AtlasConfig) -> int:
    """Numbers in the low-rank updates, (r, in) and (out, r) each; 0 without them."""
    matrices = block_matrices(config.model)
    sides = sum(matrices[target].rows + matrices[target].columns for target in config.lora.targets)
    return config.model.num_layers * config.lora.rank * sides


def _optimizer_bytes(config: AtlasConfig) -> int:
    """What `training.optimizer` keeps: see `atlas/training/optimizers/build.py`. Of low-rank updates at most."""
    model, training = config.model, config.training
    if config.lora.rank:
        return 2 * _FP32 * lora_parameters(config)
    C, L, matrices = model.hidden_size, model.num_layers, block_matrices(model).values()
    stored, in_blocks = _stored_parameters(model), L * sum(matrix.size for matrix in matrices)
    tables = sum(_tables(model)) * C
    if training.optimizer == "muon":
        return _FP32 * (in_blocks + 2 * (stored - in_blocks))
    if training.optimizer == "adafactor":
        # A number for each row and each column.
        sides = L * sum(matrix.rows + matrix.columns for matrix in matrices) + sum(
            rows + C for rows in _tables(model)
        )
        return _FP32 * (sides + stored - in_blocks - tables)
    if training.optimizer == "adamw8bit":
        # Of matrices a byte, and a scale for each 256 of them; of biases and norms, mostly below 4,096 numbers, fp32.
        in_bytes = in_blocks + tables
        return 2 * (in_bytes + in_bytes // 256 * _FP32 + (stored - in_bytes) * _FP32)
    return 2 * _FP32 * stored


def _step_temporaries(model: ModelConfig, training: TrainingConfig, *, device: str) -> int:
    """Bytes that the optimizer's step takes for the parameter that it is at, when activations are gone."""
    C, matrices = model.hidden_size, block_matrices(model).values()
    largest = max(max(_tables(model)) * C, *(matrix.size for matrix in matrices)) * _FP32
    # The weights of `bf16-true` are updated one parameter after the other.
    layers = model.num_layers if _weight_bytes(training) == _FP32 else 1
    muon = max(_muon_bytes(matrix, count, device=device) for matrix, count in _muon_parts(model, layers))
    own = {"adamw": 0, "adafactor": largest, "adamw8bit": 2 * largest, "muon": muon}.get(
        training.optimizer, 0
    )
    if _weight_bytes(training) == _FP32:
        return own
    return 2 * largest + max(own, largest)  # the parameter and its gradient in fp32; then what rounds them


def _muon_bytes(matrix: Matrix, count: int, *, device: str) -> int:
    """Bytes that Muon's step takes for as many of `count` matrices as it orthogonalizes together: their mean gradients,
    the stack before and after an iteration, and two products of the shorter side."""
    width, short = (_FP32 if device == "cpu" else 2), min(matrix)
    stacked = min(count, max(1, MUON_STACK_NUMBERS[device] // matrix.size))
    return stacked * (matrix.size * (_FP32 + 2 * width) + 2 * short * short * width)


def _muon_parts(model: ModelConfig, layers: int) -> list[tuple[Matrix, int]]:
    """Return each shape of matrix that Muon orthogonalizes, with the number that it stacks at most."""
    C, M = model.hidden_size, model.mlp_width
    queries, keys = (heads * model.head_size for heads in (model.num_heads, model.kv_heads))
    qkv = [(Matrix(queries, C), 3)] if queries == keys else [(Matrix(queries, C), 1), (Matrix(keys, C), 2)]
    mlp = [(Matrix(M, C), 2 if model.mlp == "swiglu" else 1), (Matrix(C, M), 1)]
    return [(matrix, count * layers) for matrix, count in [*qkv, *mlp]]


def estimate_training_memory(config: AtlasConfig, *, device: str, keeps_all: bool = False) -> TrainingMemory:
    """The peak of a training step on `device` (`cpu`, `cuda` or `mps`), with the micro-batch of the config.

    With `keeps_all` of compiled blocks that make nothing again (`training.compilation`), at most: this a run takes only
    where there is room for it.
    """
    model, training = config.model, config.training
    half = training.precision not in ("fp32", "auto") or (training.precision == "auto" and device == "cuda")
    pure = training.precision == "bf16-true"
    micro_batch = training.batch_size if training.micro_batch_size == "auto" else training.micro_batch_size
    micro_batch = min(micro_batch, training.sequences_per_update)
    tokens, C = micro_batch * model.max_seq_len, model.hidden_size
    width = _weight_bytes(training)  # of the residual stream as well
    stored = (_stored_parameters(model) + lora_parameters(config)) * width
    learned = lora_parameters(config) * width or stored
    table = 0 if config.lora.rank else model.padded_vocab_size * C * _FP32

    tensors = _block_tensors(model, micro_batch, half=half, width=width, device=device)
    if keeps_all:  # what norms and the activation gave
        tensors.append(tokens * (2 * C + model.mlp_width) * (2 if half else _FP32))
    block = sum(tensors)
    at_loss = _at_the_loss(config, tokens, half=half, device=device)
    if training.gradient_checkpointing:
        kept = model.num_layers * tokens * C * width
        # What GELU makes again, or SwiGLU's gates and what they let through.
        inside = (2 if model.mlp == "swiglu" else 1) * tokens * model.mlp_width * (2 if half else _FP32)
        at_loss = max(at_loss, block + inside + table)
    else:
        kept = model.num_layers * block
    kept += tokens * C * (width + (2 if half else _FP32))  # the last block's output, and the final norm's
    if model.dropout:
        kept += tokens * C * (1 if device == "cuda" else _FP32)

    is_dense = device != "cuda" or model.dropout or model.head_size < FLEX_HEAD_SIZE
    if config.data.document_mask and is_dense:
        # The T × T mask as bool and fp32; in half precision each layer keeps a copy of its own.
        kept += tokens * model.max_seq_len * (5 + (2 * model.num_layers if half else 0))

    half_weights = _half_copies(config, keeps_all=keeps_all) if half and not pure else 0
    accumulates = training.sequences_per_update > micro_batch
    step = _step_temporaries(model, training, device=device)
    if accumulates:
        gradients = learned
        at_loss = max(at_loss, step - kept - half_weights)
    else:
        gradients = max(0, learned + max(2 * table, step) - kept - at_loss)
    return TrainingMemory(
        weights=stored,
        optimizer=_optimizer_bytes(config),
        gradients=gradients,
        half_precision_weights=half_weights,
        activations=kept,
        allocator=int(_CPU_SLACK * model.num_layers * sum(t for t in tensors if t < KEPT_BELOW))
        if device == "cpu"
        else 0,
        loss=at_loss,
        process=_PROCESS[device],
    )


def _half_copies(config: AtlasConfig, *, keeps_all: bool) -> int:
    """Bytes of the weights' copies in half precision that are there when most is.

    Only attention's output keeps its copy: the others' are made again with the norms' and GELU's outputs. With gradient
    checkpointing a block's copies live as long as its pass; the head's are there before it.
    """
    model = config.model
    qkv, output, up, down = (matrix.size for matrix in block_matrices(model).values())
    head = model.padded_vocab_size * model.hidden_size
    if config.training.gradient_checkpointing:
        return 2 * max(output + max(up, down), head)
    if keeps_all:
        return 2 * (model.num_layers * (qkv + output + up + down) + head)
    return 2 * (model.num_layers * output + max(up, down) + head)


def _at_the_loss(config: AtlasConfig, tokens: int, *, half: bool, device: str) -> int:
    """Bytes that the loss takes on top of the activations."""
    model = config.model
    table = 0 if config.lora.rank else model.padded_vocab_size * model.hidden_size * _FP32
    if config.training.loss:
        # The forward's, log_softmax's and the backward's copy of the logits in fp32; then one of them, and the
        # head's gradient before and after it is padded.
        logits = tokens * model.vocabulary * _FP32
        return max(3 * logits, logits + 2 * table)
    if device == "cuda":
        # The gradients by the last hidden states and by the head, and a chunk's logits, which become their own
        # gradient; where no kernel is compiled, with two copies in fp32.
        width = 2 if half else _FP32
        logit = width + (2 * _FP32 if config.training.compile == "off" else 0)
        chunk = min(tokens * model.padded_vocab_size * logit, CUDA_LOSS_BYTES)
        return tokens * model.hidden_size * width + table + chunk
    # The gradients by the last hidden states and by the head, and a chunk's logits, which become their own gradient;
    # in half precision the head's gradient a second time, and a chunk's logits, logarithms and gradient.
    chunk = min(tokens, LOSS_CHUNK_TOKENS) * model.vocabulary * _FP32
    if half:
        return tokens * model.hidden_size * 2 + table + table // 2 + 2 * chunk
    return tokens * model.hidden_size * _FP32 + table + chunk


def _block_tensors(model: ModelConfig, batch: int, *, half: bool, width: int, device: str) -> list[int]:
    """Bytes of each tensor that autograd keeps of one block for B sequences.

    The two inputs of norms, of `width` bytes a number; in the precision of the matrix products q, k and v, attention's
    output, and what the MLP's activation takes; with RoPE q and k once more, turned. The norms' outputs and the
    activation's are recomputed. Attention keeps a logarithm per head, and its T × T weights never, except on a CPU with
    dropout, which its fused kernel lacks.
    """
    T, C = model.max_seq_len, model.hidden_size
    tokens, matrices, precise = batch * T, block_matrices(model), 2 if half else _FP32
    widths = [matrices["qkv"].rows, matrices["output"].columns, matrices["up"].rows]
    if model.position == "rope":
        widths += [heads * model.head_size for heads in (model.num_heads, model.kv_heads)]
    tensors = [tokens * C * width] * 2 + [tokens * numbers * precise for numbers in widths]
    tensors.append(tokens * (model.num_heads + 4) * _FP32)
    if model.dropout:
        tensors += [tokens * C * (1 if device == "cuda" else _FP32)] * 2
        if device == "cpu":
            tensors += [batch * model.num_heads * T * T * _FP32] * 3
    return tensors


def estimate_inference_memory(model: ModelConfig, *, device: str, batch_size: int = 1) -> InferenceMemory:
    """With the KV cache of `batch_size` rows, each of `max_seq_len` tokens."""
    tokens = batch_size * model.max_seq_len
    inside = 2 * (model.hidden_size + model.mlp_width)
    return InferenceMemory(
        weights=_stored_parameters(model) * _FP32,
        cache=2 * model.num_layers * tokens * model.kv_heads * model.head_size * _FP32,
        activations=tokens * inside * _FP32,  # prefill: the residual stream and the inside of one MLP
        process=_PROCESS[device],
    )


def memory_of_a_step(config: AtlasConfig, *, device: str) -> int:
    """What the first step takes beyond the weights, which are there before it."""
    memory = estimate_training_memory(config, device=device)
    return memory.total - memory.weights - memory.process


def checkpoint_bytes(config: AtlasConfig) -> int:
    """One checkpoint: weights and optimizer state."""
    stored = _stored_parameters(config.model) + lora_parameters(config)
    return _weight_bytes(config.training) * stored + _optimizer_bytes(config)


def snapshot_bytes(config: AtlasConfig) -> int:
    """Main memory for the copy that checkpoints are written from while training goes on."""
    return checkpoint_bytes(config) if config.checkpoint.background else 0


def output_folder_bytes(config: AtlasConfig) -> int:
    """The most that checkpoints ever take: those kept of steps, epochs and interrupts, the best, one being written."""
    most = checkpoint_bytes(config) * (3 * config.checkpoint.keep_checkpoints + 2)
    return most if config.checkpoint.max_total is None else min(most, config.checkpoint.max_total)
