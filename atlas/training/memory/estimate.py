"""Estimate the memory and disk space of a run from its config alone.

The memory of an update peaks at the start of the backward pass, when most activations are in memory. `atlas.model.cost`
runs one real block on fake tensors, and lists the tensors that autograd saves for the backward pass. This module adds
the memory of the weights, the optimizer and the loss.

Accuracy on a CPU: benchmarks/memory.py measured the peaks of `nano`, `tiny` and `small`, with an allocator that keeps
freed memory (`atlas.process`). The peak of one preset varies by 6 % between processes. No GPU has been measured yet.

Symbols: B sequences in a micro-batch, T max_seq_len, C hidden_size, L num_layers, V vocabulary.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

from atlas.config import AtlasConfig, TrainingConfig
from atlas.config.config import CUDA_LOSS_BYTES, LOSS_CACHED_ROWS, LOSS_CHUNK_TOKENS
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
from atlas.training.devices.device import computes_in_half
from atlas.training.optimizers.memory import state_bytes, step_bytes

_FP32, _HALF = 4, 2  # bytes
PROCESS_BYTES = {"cpu": 350_000_000, "cuda": 500_000_000, "mps": 500_000_000}
"""The bytes that a process needs before training. On a CPU: the interpreter, PyTorch and its libraries (measured). On a
GPU: the CUDA context and the workspaces of libraries (assumed)."""
ROOMY = 0.75
"""If the estimate of an update is below this fraction of the free memory, Atlas uses the micro-batch size without a
trial. With `training.parallel: auto`, the model is not sharded if a micro-batch of one sequence needs less than this
fraction of a device's memory."""
_DENSE_MASK = 5
"""The bytes of a document mask per pair of tokens: 1 for the bool mask and 4 for its fp32 copy."""

_UNUSED_PART = 0.6
"""Beside the blocks in use, glibc keeps this part of the bytes that activations need: the free space between the blocks
(measured with benchmarks/memory.py)."""


@dataclass(frozen=True)
class TrainingMemory:
    """The memory at the peak of an update, in bytes. The parts add up to `total`.

    `gradients` is the memory of the gradients of earlier micro-batches in the same update. An update of a single
    micro-batch has no gradients when activations peak. For such an update, `gradients` counts only what the gradients
    and the optimizer's step need beyond the memory that activations and loss have freed. `half_precision_weights` is
    the memory of the half-precision copies of weights that exist at the peak. `allocator` is the freed memory that the
    allocator does not return to the system.
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
    """Estimate the peak memory of an update on `device` (`cpu`, `cuda` or `mps`), with the micro-batch size of the
    config.

    With `keeps_all`, the blocks are compiled and recompute nothing. A run uses such blocks only if memory is ample.
    """
    model, training = config.model, config.training
    half = computes_in_half(training.precision, device)
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
    if config.lora.updates_tables:
        kept += _table_gradient(config)  # the table with its update

    allocator = 0
    if device == "cpu":  # glibc keeps the memory of freed small activations, even if they are recomputed
        allocator = round(_UNUSED_PART * L * sum(size for size in tensors if size < KEPT_BELOW))
    half_weights = 0
    if half and width == _FP32:
        half_weights = _half_copies(config, saved, keeps_all=keeps_all)
    step = step_bytes(model, config.lora, training, device=device)
    if training.sequences_per_update > micro_batch:
        gradients = trainable
        at_loss = max(at_loss, step - kept - half_weights)
    else:
        # Autograd makes a new tensor for the sum of the gradients of tied tables, see `AtlasLM.tables`.
        copies = 1 if device == "cpu" and model.tie_embeddings and not training.loss else 2
        gradients = max(0, trainable + max(copies * _table_gradient(config), step) - kept - at_loss)
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
    """Return the size of the LM head's fp32 gradient in bytes. With LoRA, which freezes the LM head, 0."""
    is_frozen = config.lora.rank and not config.lora.updates_tables
    return 0 if is_frozen else config.model.padded_vocab_size * config.model.hidden_size * _FP32


def _recomputed(config: AtlasConfig, tokens: int, *, half: bool) -> int:
    """Return the bytes of the tensors that the backward pass of a block recomputes, in addition to the block's saved
    tensors. These tensors are GELU's output, or SwiGLU's activated gates and the products of the gates and the
    values."""
    tensors = 2 if config.model.mlp == "swiglu" else 1
    return tensors * tokens * config.model.mlp_width * (_HALF if half else _FP32)


def _half_copies(config: AtlasConfig, saved: SavedTensors, *, keeps_all: bool) -> int:
    """Return the bytes of the half-precision copies of weights at the peak.

    Each block keeps the copies that the trace lists. The copies of the other matrices are made again one by one, so
    only the largest matrix counts. With gradient checkpointing, the copies of a block exist only during the block's
    backward pass. The copy of the LM head is freed before that pass.
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
        # A custom loss needs three fp32 tensors of this size: logits, the result of log_softmax, and the logits'
        # gradient. Later, only this gradient is left, and the LM head's gradient exists before and after padding.
        logits = tokens * model.vocabulary * _FP32
        return max(3 * logits, logits + 2 * table)
    # The built-in loss needs the gradients of the last hidden states and of the LM head, and a chunk of logits. The
    # gradient of the chunk overwrites the chunk.
    gradients = tokens * model.hidden_size * width + table
    if device == "cuda":  # without a compiled kernel, the logits have two more copies in fp32
        logit = width + (2 * _FP32 if config.training.compile == "off" else 0)
        return gradients + min(tokens * model.padded_vocab_size * logit, CUDA_LOSS_BYTES)
    # In half precision, the probabilities of some rows exist in fp32.
    rows = min(tokens, LOSS_CHUNK_TOKENS)
    fp32_rows = min(rows, LOSS_CACHED_ROWS) if half else 0
    return gradients + model.vocabulary * (rows * width + fp32_rows * _FP32)


def memory_of_a_step(config: AtlasConfig, *, device: str) -> int:
    """Estimate the bytes that the first update allocates. The weights are in memory before this update."""
    memory = estimate_training_memory(config, device=device)
    return memory.total - memory.weights - memory.process


def checkpoint_bytes(config: AtlasConfig) -> int:
    """Return the size of a complete checkpoint in bytes: weights and optimizer state."""
    weights = weight_bytes(config.training) * stored_parameters(config.model, config.lora)
    return weights + state_bytes(config.model, config.lora, config.training)


def base_bytes(config: AtlasConfig) -> int:
    """Return the size of the file with the frozen weights of a LoRA run, which only `atlas_best.pt` has too; 0 without
    LoRA. Sharded checkpoints have no such file."""
    if not config.lora.rank or config.checkpoint.format == "sharded":
        return 0
    return weight_bytes(config.training) * stored_parameters(config.model)


def four_checkpoints_bytes(config: AtlasConfig) -> int:
    """Return the bytes of the best checkpoint, the newest one, and a new one in place of each."""
    return 4 * checkpoint_bytes(config) - base_bytes(config)


def snapshot_bytes(config: AtlasConfig, *, device: str) -> int:
    """Return the bytes of the state's copy in main memory, from which background saves write checkpoints; 0 without
    background saves. If the frozen weights of a LoRA run are in main memory, they are not copied."""
    if not config.checkpoint.background:
        return 0
    return checkpoint_bytes(config) - (base_bytes(config) if device == "cpu" else 0)


def output_folder_bytes(config: AtlasConfig) -> int:
    """Return the largest number of bytes that the checkpoints of a run need on the disk. These are the kept checkpoints
    of steps, epochs and interrupts, the best checkpoint, a checkpoint that is being written, and the base of a LoRA
    run."""
    one, base, kept = checkpoint_bytes(config), base_bytes(config), 3 * config.checkpoint.keep_checkpoints
    most = base + 2 * one + kept * (one - base)
    return most if config.checkpoint.max_total is None else min(most, config.checkpoint.max_total)
