"""Parameters, memory and disk of a run, from its config alone.

Memory is counted tensor by tensor: what autograd keeps in `atlas.model` and `atlas.training.loss` at the
moment when most is alive, the start of the backward pass, plus what the process itself takes.

How far off: the tensors by about 1 % on a CPU (peak resident memory of updates of 7 shapes and batches, from 2 to 51
million parameters, with an allocator that returns what is freed). Where freed memory is kept (`atlas.process`), the
estimate including `_CPU_SLACK` is 1 to 5 % below what `nano`, `tiny` and `small` took (benchmarks/memory.py).
The figures for GPUs follow from the same count and have not been measured yet.

Symbols: B sequences at once, T max_seq_len, C hidden_size, L num_layers, H num_heads, V vocabulary.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

from atlas.config import AtlasConfig, ModelConfig, TrainingConfig
from atlas.config.config import LOSS_CHUNK_TOKENS

ASSUMED_VOCABULARY = 2048
"""Of a config that leaves `vocab_size` to the dataset: the demo's own byte-level BPE."""

_FP32 = 4
# Interpreter, PyTorch and its libraries on a CPU (measured); a CUDA context and its library workspaces.
_PROCESS = {"cpu": 350_000_000, "cuda": 500_000_000, "mps": 500_000_000}
# Freed activations that glibc keeps between allocations of other sizes, as a part of all blocks' activations,
# recomputed ones too.
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
    C, L, V, T, bias = (
        model.hidden_size,
        model.num_layers,
        model.vocabulary,
        model.max_seq_len,
        int(model.bias),
    )
    return Parameters(
        token_embedding=V * C,
        position_embedding=T * C,
        attention=L * (4 * C * C + bias * 4 * C),
        mlp=L * (8 * C * C + bias * 5 * C),
        norms=(2 * L + 1) * (1 + bias) * C,
        head=0 if model.tie_embeddings else V * C,
    )


def _stored_parameters(model: ModelConfig) -> int:
    """As tensors, the padding rows included."""
    tables = 1 if model.tie_embeddings else 2
    return (
        count_parameters(model).total
        + tables * (model.padded_vocab_size - model.vocabulary) * model.hidden_size
    )


def _weight_bytes(training: TrainingConfig) -> int:
    return 2 if training.precision == "bf16-true" else _FP32


def _optimizer_bytes(model: ModelConfig, training: TrainingConfig) -> int:
    """What `training.optimizer` keeps: see `atlas/training/optimizer.py`."""
    C, L, T, V = model.hidden_size, model.num_layers, model.max_seq_len, model.padded_vocab_size
    stored, in_blocks = _stored_parameters(model), 12 * L * C * C
    tables = (T + V if model.tie_embeddings else T + 2 * V) * C
    if training.optimizer == "muon":
        return _FP32 * (in_blocks + 2 * (stored - in_blocks))
    if training.optimizer == "adafactor":
        # Rows and columns of qkv (3 C, C), output (C, C), up (4 C, C), down (C, 4 C), and of the tables.
        sides = 16 * L * C + tables // C + (2 if model.tie_embeddings else 3) * C
        return _FP32 * (sides + stored - in_blocks - tables)
    if training.optimizer == "adamw8bit":
        # Of matrices a byte, and a scale for each 256 of them; of biases and norms, mostly below 4,096 numbers, fp32.
        matrices = in_blocks + tables
        return 2 * (matrices + matrices // 256 * _FP32 + (stored - matrices) * _FP32)
    return 2 * _FP32 * stored


def _step_temporaries(model: ModelConfig, training: TrainingConfig, *, device: str) -> int:
    """Bytes that the optimizer's step takes for the parameter that it is at, when activations are gone."""
    C = model.hidden_size
    largest = max(model.padded_vocab_size, model.max_seq_len, 4 * C) * C * _FP32
    # Of up (4 C, C) Muon makes the mean gradient, an orthogonalised one before and after an iteration, (C, C) products.
    width = _FP32 if device == "cpu" else 2
    muon = 4 * C * C * (_FP32 + 2 * width) + 2 * C * C * width
    own = {"adamw": 0, "adafactor": largest, "adamw8bit": 2 * largest, "muon": muon}[training.optimizer]
    if _weight_bytes(training) == _FP32:
        return own
    return 2 * largest + max(own, largest)  # the parameter and its gradient in fp32; then what rounds them


def estimate_training_memory(config: AtlasConfig, *, device: str) -> TrainingMemory:
    """The peak of a training step on `device` (`cpu`, `cuda` or `mps`), with the micro-batch of the config."""
    model, training = config.model, config.training
    half = training.precision not in ("fp32", "auto") or (training.precision == "auto" and device == "cuda")
    pure = training.precision == "bf16-true"
    micro_batch = training.batch_size if training.micro_batch_size == "auto" else training.micro_batch_size
    micro_batch = min(micro_batch, training.sequences_per_update)
    tokens, C = micro_batch * model.max_seq_len, model.hidden_size
    width = _weight_bytes(training)  # of the residual stream as well
    stored = _stored_parameters(model) * width
    table = model.padded_vocab_size * C * _FP32

    block = _block_activations(model, micro_batch, half=half, width=width, device=device)
    at_loss = _at_the_loss(config, tokens, half=half)
    if training.gradient_checkpointing:
        kept = model.num_layers * tokens * C * width
        recomputed_gelu = 4 * tokens * C * (2 if half else _FP32)
        at_loss = max(at_loss, block + recomputed_gelu + table)
    else:
        kept = model.num_layers * block
    kept += tokens * C * (width + (2 if half else _FP32))  # the last block's output, and the final norm's
    if model.dropout:
        kept += tokens * C * (1 if device == "cuda" else _FP32)

    if config.data.document_mask and (device != "cuda" or model.dropout):
        # The T × T mask as bool and fp32; in half precision each layer keeps a copy of its own.
        kept += tokens * model.max_seq_len * (5 + (2 * model.num_layers if half else 0))

    half_weights = 0
    if half and not pure:
        # Only attention's output keeps its copy: the others' are made again with the norms' and GELU's outputs. With
        # gradient checkpointing a block's copies live as long as its pass; the head's are there before it.
        in_blocks, head = (model.num_layers + 4) * C * C, model.padded_vocab_size * C
        half_weights = 2 * (max(5 * C * C, head) if training.gradient_checkpointing else in_blocks + head)

    accumulates = training.sequences_per_update > micro_batch
    step = _step_temporaries(model, training, device=device)
    if accumulates:
        gradients = stored
        at_loss = max(at_loss, step - kept - half_weights)
    else:
        gradients = max(0, stored + max(2 * table, step) - kept - at_loss)
    return TrainingMemory(
        weights=stored,
        optimizer=_optimizer_bytes(model, training),
        gradients=gradients,
        half_precision_weights=half_weights,
        activations=kept,
        allocator=int(_CPU_SLACK * model.num_layers * block) if device == "cpu" else 0,
        loss=at_loss,
        process=_PROCESS[device],
    )


def _at_the_loss(config: AtlasConfig, tokens: int, *, half: bool) -> int:
    """Bytes that the loss takes on top of the activations."""
    model = config.model
    table = model.padded_vocab_size * model.hidden_size * _FP32
    if config.training.loss:
        # The forward's, log_softmax's and the backward's copy of the logits in fp32; then one of them, and the
        # head's gradient before and after it is padded.
        logits = tokens * model.vocabulary * _FP32
        return max(3 * logits, logits + 2 * table)
    # The gradients by the last hidden states and by the head, and a chunk's logits, which become their own gradient;
    # in half precision the head's gradient a second time, and a chunk's logits, logarithms and gradient.
    chunk = min(tokens, LOSS_CHUNK_TOKENS) * model.vocabulary * _FP32
    if half:
        return tokens * model.hidden_size * 2 + table + table // 2 + 2 * chunk
    return tokens * model.hidden_size * _FP32 + table + chunk


def _block_activations(model: ModelConfig, batch: int, *, half: bool, width: int, device: str) -> int:
    """Bytes that autograd keeps of one block for B sequences.

    In units of C per token: the two inputs of norms, of `width` bytes; in the precision of the matrix products q, k
    and v, attention's output, and GELU's input (4). The norms' outputs and GELU's are recomputed.
    Attention keeps a logarithm per head, and its T × T weights never, except on a CPU with dropout, which its fused
    kernel lacks.
    """
    T, C = model.max_seq_len, model.hidden_size
    tokens = batch * T
    total = tokens * C * (2 * width + 8 * (2 if half else _FP32)) + tokens * (model.num_heads + 4) * _FP32
    if model.dropout:
        total += 2 * tokens * C * (1 if device == "cuda" else _FP32)
        if device == "cpu":
            total += 3 * batch * model.num_heads * T * T * _FP32
    return total


def estimate_inference_memory(model: ModelConfig, *, device: str, batch_size: int = 1) -> InferenceMemory:
    """With the KV cache of `batch_size` rows, each of `max_seq_len` tokens."""
    tokens, C = batch_size * model.max_seq_len, model.hidden_size
    return InferenceMemory(
        weights=_stored_parameters(model) * _FP32,
        cache=2 * model.num_layers * tokens * C * _FP32,
        activations=10 * tokens * C * _FP32,  # prefill: the residual stream and the inside of one MLP
        process=_PROCESS[device],
    )


def memory_of_a_step(config: AtlasConfig, *, device: str) -> int:
    """What the first step takes beyond the weights, which are there before it."""
    memory = estimate_training_memory(config, device=device)
    return memory.total - memory.weights - memory.process


def checkpoint_bytes(config: AtlasConfig) -> int:
    """One checkpoint: weights and optimizer state."""
    stored = _stored_parameters(config.model)
    return _weight_bytes(config.training) * stored + _optimizer_bytes(config.model, config.training)


def snapshot_bytes(config: AtlasConfig) -> int:
    """Main memory for the copy that checkpoints are written from while training goes on."""
    return checkpoint_bytes(config) if config.checkpoint.background else 0


def output_folder_bytes(config: AtlasConfig) -> int:
    """The most that checkpoints ever take: those kept of steps, epochs and interrupts, the best, one being written."""
    most = checkpoint_bytes(config) * (3 * config.checkpoint.keep_checkpoints + 2)
    return most if config.checkpoint.max_total is None else min(most, config.checkpoint.max_total)
