"""Estimate the memory and disk space of a run from its config alone.

The peak of an update is at the start of the backward pass, when most activations are in memory. `atlas.model.cost`
traces the tensors that autograd has saved at this point, with one real block. This module adds the memory of the loss.

Accuracy on a CPU: benchmarks/memory.py measured the peaks of `nano`, `tiny` and `small` with an allocator that keeps
freed memory (`atlas.process`). The estimates were 1 to 5 % below the measured peaks. No GPU has been measured yet.

Symbols: B sequences in a micro-batch, T max_seq_len, C hidden_size, L num_layers, V vocabulary.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

from atlas.config import AtlasConfig, TrainingConfig
from atlas.config.config import CUDA_LOSS_BYTES, LOSS_CHUNK_TOKENS
from atlas.config.model import FLEX_HEAD_SIZE
from atlas.model.cost import (
    Execution,
    SavedTensors,
    block_matrices,
    list_weights,
    stored_parameters,
    trace_saved_tensors,
)
from atlas.process import KEPT_BELOW
from atlas.training.optimizers.memory import state_bytes, step_bytes

_FP32, _HALF = 4, 2  # bytes
PROCESS_BYTES = {"cpu": 350_000_000, "cuda": 500_000_000, "mps": 500_000_000}
"""On a CPU: the interpreter, PyTorch and its libraries (measured). On a GPU: the CUDA context and library workspaces
(assumed)."""
_CPU_SLACK = 0.8
"""The freed activations that glibc keeps between allocations of other sizes, as a fraction of the small activations of
all blocks, including recomputed ones. glibc returns larger tensors to the system."""
ROOMY = 0.75
"""An update whose estimate is below this fraction of the free memory needs no trial. A run is not sharded if its
estimate for a micro-batch of one sequence is below this fraction of a device's memory."""
_DENSE_MASK = 5
"""Bytes per pair of tokens: 1 as bool and 4 in fp32."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes at the peak of an update; the parts add up to `total`.

    `gradients` are the gradients of earlier micro-batches of the same update. An update of a single micro-batch has no
    gradients when activations peak. For such an update, `gradients` counts only the memory that gradients need beyond
    the memory freed by activations and loss. `half_precision_weights` are the copies that matrix products keep at the
    peak. `allocator` is the freed memory that the allocator keeps.
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
        """The bytes of all parts together."""
        return sum(astuple(self))


def weight_bytes(training: TrainingConfig) -> int:
    """Return the bytes per weight. A number in the residual stream has the same size."""
    return _HALF if training.precision == "bf16-true" else _FP32


def estimate_training_memory(config: AtlasConfig, *, device: str, keeps_all: bool = False) -> TrainingMemory:
    """Estimate the peak memory of a training step on `device` (`cpu`, `cuda` or `mps`), with the micro-batch size of
    the config.

    `keeps_all` is for compiled blocks that recompute nothing. A run uses such blocks only if memory is ample.
    """
    model, training = config.model, config.training
    half = training.precision not in ("fp32", "auto") or (training.precision == "auto" and device == "cuda")
    micro_batch = training.batch_size if training.micro_batch_size == "auto" else training.micro_batch_size
    micro_batch = min(micro_batch, training.sequences_per_update)
    T, L, tokens = model.max_seq_len, model.num_layers, micro_batch * model.max_seq_len
    weights, width = list_weights(model, config.lora), weight_bytes(training)
    trainable = width * sum(weight.size for weight in weights if weight.is_trainable)
    is_sparse = device == "cuda" and not model.dropout and model.head_size >= FLEX_HEAD_SIZE
    is_dense = config.data.document_mask and not is_sparse
    compiles = device == "cuda" and training.compile != "off"
    compiled = "all" if keeps_all else "little" if compiles else None
    execution = Execution(device, half, width == _HALF, is_dense, compiled)
    saved = trace_saved_tensors(model, execution, config.lora)
    tensors = [tensor.bytes(micro_batch, T) for tensor in saved.block if tensor.sequences]
    block, at_loss = sum(tensors), _at_the_loss(config, tokens, half=half, device=device)
    if training.gradient_checkpointing:
        kept = L * saved.input.bytes(micro_batch, T)
        at_loss = max(at_loss, block + _recomputed(config, tokens, half=half) + _table_gradient(config))
    else:
        kept = L * block
    kept += sum(tensor.bytes(micro_batch, T) for tensor in saved.rest) + is_dense * _DENSE_MASK * tokens * T

    allocator = 0
    if device == "cpu":
        allocator = int(_CPU_SLACK * L * sum(size for size in tensors if size < KEPT_BELOW))
    half_weights = 0
    if half and width == _FP32:
        half_weights = _half_copies(config, saved, keeps_all=keeps_all)
    step = step_bytes(model, config.lora, training, device=device)
    if training.sequences_per_update > micro_batch:
        gradients = trainable
        at_loss = max(at_loss, step - kept - half_weights)
    else:
        gradients = max(0, trainable + max(2 * _table_gradient(config), step) - kept - at_loss)
    return TrainingMemory(
        weights=width * sum(weight.size for weight in weights),
        optimizer=state_bytes(model, config.lora, training),
        gradients=gradients,
        half_precision_weights=half_weights,
        activations=kept,
        allocator=allocator,
        loss=at_loss,
        process=PROCESS_BYTES[device],
    )


def _table_gradient(config: AtlasConfig) -> int:
    """Return the bytes of the gradient of the head's table in fp32."""
    return 0 if config.lora.rank else config.model.padded_vocab_size * config.model.hidden_size * _FP32


def _recomputed(config: AtlasConfig, tokens: int, *, half: bool) -> int:
    """Return the bytes of the tensors that the backward pass of a block recomputes, in addition to the block's saved
    tensors. The tensors are GELU's output, or SwiGLU's activated gates and their products with the values."""
    tensors = 2 if config.model.mlp == "swiglu" else 1
    return tensors * tokens * config.model.mlp_width * (_HALF if half else _FP32)


def _half_copies(config: AtlasConfig, saved: SavedTensors, *, keeps_all: bool) -> int:
    """Return the bytes of the weights' copies in half precision at the peak.

    Each block keeps the traced copies. The copies of the other matrices are recomputed one by one; the largest matrix
    is one of these. With gradient checkpointing, the copies of a block exist only during the block's backward pass. The
    copy of the head is freed before that.
    """
    model = config.model
    matrices = [_HALF * matrix.numel() for matrix in block_matrices(model).values()]
    head = _HALF * model.padded_vocab_size * model.hidden_size
    kept = sum(tensor.factor for tensor in saved.block if not tensor.sequences)
    if config.training.gradient_checkpointing:
        return max(kept + max(matrices), head)
    if keeps_all:
        return model.num_layers * sum(matrices) + head
    return model.num_layers * kept + max(matrices) + head


def _at_the_loss(config: AtlasConfig, tokens: int, *, half: bool, device: str) -> int:
    """Return the bytes that the loss needs in addition to the activations, see `atlas.training.loss`."""
    model, table, width = config.model, _table_gradient(config), _HALF if half else _FP32
    if config.training.loss:
        # Three copies of the logits in fp32: of the forward pass, of log_softmax and of the backward pass. Later one
        # copy is left, and the head's gradient exists before and after padding.
        logits = tokens * model.vocabulary * _FP32
        return max(3 * logits, logits + 2 * table)
    # The gradients of the last hidden states and of the head, and a chunk of logits, which is replaced by its gradient.
    gradients = tokens * model.hidden_size * width + table
    if device == "cuda":  # without a compiled kernel, the logits have two more copies in fp32
        logit = width + (2 * _FP32 if config.training.compile == "off" else 0)
        return gradients + min(tokens * model.padded_vocab_size * logit, CUDA_LOSS_BYTES)
    # In half precision there are a second gradient of the head, and the logits, log-probabilities and gradient of a
    # chunk.
    chunk = min(tokens, LOSS_CHUNK_TOKENS) * model.vocabulary * _FP32
    return gradients + (table // 2 + 2 * chunk if half else chunk)


def memory_of_a_step(config: AtlasConfig, *, device: str) -> int:
    """Estimate the bytes that the first step allocates. The weights are in memory before this step."""
    memory = estimate_training_memory(config, device=device)
    return memory.total - memory.weights - memory.process


def checkpoint_bytes(config: AtlasConfig) -> int:
    """Return the bytes of one checkpoint: weights and optimizer state."""
    weights = weight_bytes(config.training) * stored_parameters(config.model, config.lora)
    return weights + state_bytes(config.model, config.lora, config.training)


def snapshot_bytes(config: AtlasConfig) -> int:
    """Return the bytes of the copy in main memory from which checkpoints are written while training continues."""
    return checkpoint_bytes(config) if config.checkpoint.background else 0


def output_folder_bytes(config: AtlasConfig) -> int:
    """Return the largest number of bytes that the checkpoints of a run need on the disk. These are the kept checkpoints
    of steps, epochs and interrupts, the best checkpoint, and one that is being written."""
    most = checkpoint_bytes(config) * (3 * config.checkpoint.keep_checkpoints + 2)
    return most if config.checkpoint.max_total is None else min(most, config.checkpoint.max_total)
