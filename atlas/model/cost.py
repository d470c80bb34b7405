"""The cost of a model: its parameters, its FLOPs, and the bytes that autograd saves for the backward pass.

The numbers come from a real `AtlasLM` with one block, so that this module does not repeat the architecture. A model has
`num_layers` such blocks. The tensors are fake: they have a shape and a dtype but no memory. Two rules describe the
tensors that autograd saves on a GPU. tests/cuda_path checks both rules:

- The fused attention kernel saves q, k, v, its output, and one logsumexp per head and token (Dao et al. 2022,
  arXiv:2205.14135). On CUDA, dropout saves a mask of one byte per element.
- A compiled block saves its input, attention's output and logsumexp, and the outputs of all its matrix products except
  the last. The backward pass recomputes all other tensors. If memory is ample, the block also saves the inputs of the
  matrix products, q, k and v, the dropout masks, and the weights in half precision.

Symbols: B sequences in a micro-batch, T max_seq_len, C hidden_size, L num_layers.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from atlas.config import AtlasConfig, LoraConfig, ModelConfig
from atlas.model.attention import Context
from atlas.model.lora import add_lora
from atlas.model.transformer import AtlasLM

_NO_LORA = LoraConfig()
_FORWARD, _FORWARD_AND_BACKWARD = 2, 6
_TRACED = (2, 16), (4, 64)
"""(B, T) of the two traces. The second trace has 2 times the B and 4 times the T of the first trace, so that the growth
of a tensor determines the exponents of B and T."""
_GROWTHS = {2**i * 4**j: (i, j) for i in range(2) for j in range(3)}


# Parameters and FLOPs


class _NoValues(TorchFunctionMode):
    """Skip the random initialization of weights. For this initialization, PyTorch would load its compiler, even on the
    device `meta`."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        return options["tensor"] if function is nn.init.normal_ else function(*arguments, **options)


def one_block_model(model: ModelConfig, lora: LoraConfig = _NO_LORA) -> AtlasLM:
    """Return `model` with a single block, on the device `meta`. If `lora.rank` is not 0, the block has low-rank
    updates."""
    with torch.device("meta"), _NoValues():
        one = AtlasLM(model.model_copy(update={"num_layers": 1}))
        if lora.rank:
            add_lora(one, lora)
    return one.train()


def is_in_block(name: str) -> bool:
    """Whether the parameter `name` belongs to a block. Such a parameter exists once per layer."""
    return name.startswith("blocks.")


@dataclass(frozen=True)
class Weight:
    """A parameter of the model. A parameter in a block represents its `copies` in all blocks."""

    name: str
    """The parameter's name. For a parameter in a block: the name in the first block."""
    shape: torch.Size
    copies: int
    is_trainable: bool

    @property
    def size(self) -> int:
        """The number of elements in all copies."""
        return self.copies * self.shape.numel()


@functools.lru_cache(maxsize=128)
def list_weights(model: ModelConfig, lora: LoraConfig = _NO_LORA) -> tuple[Weight, ...]:
    """Return all parameters, including the rows that only pad the vocabulary. The function is fast even for a model of
    10,000 layers."""
    return tuple(
        Weight(name, p.shape, model.num_layers if is_in_block(name) else 1, p.requires_grad)
        for name, p in one_block_model(model, lora).named_parameters()
    )


@dataclass(frozen=True)
class Parameters:
    """The number of parameters of each part of a model, without the rows that only pad the vocabulary."""

    token_embedding: int
    position_embedding: int
    attention: int
    mlp: int
    norms: int
    head: int

    @property
    def total(self) -> int:
        """The number of parameters of the model."""
        return sum(astuple(self))


def count_parameters(model: ModelConfig) -> Parameters:
    """Return the number of parameters of each part of the model."""
    parts = dict.fromkeys(Parameters.__dataclass_fields__, 0)
    padding = (model.padded_vocab_size - model.vocabulary) * model.hidden_size
    for weight in list_weights(model):
        names = weight.name.split(".")
        is_norm = any("norm" in name for name in names)
        part = "norms" if is_norm else names[2] if is_in_block(weight.name) else names[0]
        is_table = part in ("token_embedding", "lm_head")
        parts["head" if part == "lm_head" else part] += weight.size - padding * is_table
    return Parameters(**parts)


def stored_parameters(model: ModelConfig, lora: LoraConfig = _NO_LORA) -> int:
    """Return the number of elements of all parameters, including padding rows and low-rank updates."""
    return sum(weight.size for weight in list_weights(model, lora))


def lora_parameters(config: AtlasConfig) -> int:
    """Return the number of parameters of the low-rank updates, (r, in) and (out, r) per matrix. Return 0 without
    LoRA."""
    if not config.lora.rank:
        return 0
    return sum(weight.size for weight in list_weights(config.model, config.lora) if weight.is_trainable)


def block_matrices(model: ModelConfig) -> dict[str, torch.Size]:
    """Return name → shape (outputs, inputs) for a block's matrices: `qkv` and `output` of attention, `up` and `down` of
    the MLP."""
    weights = (weight for weight in list_weights(model) if is_in_block(weight.name))
    return {weight.name.split(".")[-2]: weight.shape for weight in weights if len(weight.shape) == 2}


def training_flops_per_token(config: AtlasConfig) -> int:
    """Return the FLOPs per token of an update, forward and backward. Only matrix products count, because they take
    nearly all of the time. Evaluations do not count.

    As in PaLM's appendix B (Chowdhery et al. 2022, arXiv:2204.02311), each weight of a matrix needs 6 operations: a
    multiplication and an addition in the forward pass, and twice as many in the backward pass. Embeddings need no
    multiplication. Attention's two products need 12 · T · (width of all queries) per layer, if each token attends to
    all T tokens. This function counts all of these operations, although fused kernels skip later tokens and need only
    half of them.

    Gradient checkpointing repeats each block's forward pass, up to the last tensor that the backward pass needs. With
    dropout, this tensor is the block's output; without dropout, it is the input of the MLP's last product.
    """
    model = config.model
    matrices = block_matrices(model)
    weights = sum(matrix.numel() for matrix in matrices.values())
    attention = model.max_seq_len * model.num_heads * model.head_size
    block = _FORWARD_AND_BACKWARD * (weights + attention)
    if config.training.gradient_checkpointing:
        block += _FORWARD * (weights + attention - (0 if model.dropout else matrices["down"].numel()))
    return model.num_layers * block + _FORWARD_AND_BACKWARD * model.vocabulary * model.hidden_size


# Saved tensors


@dataclass(frozen=True)
class Saved:
    """The size of a tensor that autograd saves for the backward pass: `factor` · Bⁱ · Tʲ bytes."""

    factor: int
    sequences: int
    """The exponent i of B: 1, or 0 for a half-precision copy of a weight."""
    tokens: int
    """The exponent j of T."""

    def bytes(self, sequences: int, context: int) -> int:
        """Return the tensor's size in bytes for this number of sequences and this context length."""
        return self.factor * sequences**self.sequences * context**self.tokens  # type: ignore[no-any-return]


@dataclass(frozen=True)
class SavedTensors:
    """The tensors that the forward pass saves, except the weights. Tensors that share a storage count once."""

    input: Saved
    """The input of a block, which is the residual stream. `block` contains this input too."""
    block: tuple[Saved, ...]
    """The tensors that are saved inside one block."""
    rest: tuple[Saved, ...]
    """The tensors that are saved outside the blocks, except the loss's tensors and the half-precision copy of the LM
    head's weight."""


class Execution(NamedTuple):
    """How a model runs in training."""

    device: str
    """`cpu`, `cuda` or `mps`."""
    half: bool = False
    """Whether matrix products are in half precision."""
    half_weights: bool = False
    """Whether weights and residual stream are in half precision too."""
    dense_mask: bool = False
    """Whether attention has a dense mask of documents."""
    compiled: str | None = None
    """How much a compiled block saves: `little` or `all`. None if blocks are not compiled."""


def trace_saved_tensors(
    model: ModelConfig, execution: Execution, lora: LoraConfig = _NO_LORA
) -> SavedTensors:
    """Run the forward pass of one block on fake tensors, and return the tensors that autograd saves."""
    shape = {"num_layers": 1, "max_seq_len": 1, "vocab_size": 1}
    return _trace(model.model_copy(update=shape), lora, execution)


@functools.lru_cache(maxsize=128)
def _trace(model: ModelConfig, lora: LoraConfig, execution: Execution) -> SavedTensors:
    small, large = (_saved_bytes(model, lora, execution, *size) for size in _TRACED)
    [block_input], block, rest = (
        [_growth(*pair) for pair in zip(*sizes, strict=True)] for sizes in zip(small, large, strict=True)
    )
    return SavedTensors(block_input, tuple(block), tuple(saved for saved in rest if saved.sequences))


def _saved_bytes(
    model: ModelConfig, lora: LoraConfig, execution: Execution, sequences: int, context: int
) -> tuple[list[int], ...]:
    """Return three lists of bytes: the block's input, the tensors saved inside the block, and the tensors saved
    outside."""
    one = one_block_model(model.model_copy(update={"max_seq_len": context}), lora)
    dtype = torch.bfloat16 if execution.half_weights else torch.float32
    recorder = _Recorder(one, execution)
    with (
        warnings.catch_warnings(),
        FakeTensorMode(),
        torch.autograd.graph.saved_tensors_hooks(recorder.save, lambda tensor: tensor),
        recorder,
        torch.autocast("cpu", torch.bfloat16, enabled=execution.half, cache_enabled=False),
    ):
        warnings.simplefilter("ignore")  # hide warnings about kernels that a CPU lacks
        weights = {
            name: torch.empty(p.shape, dtype=dtype, requires_grad=p.requires_grad)
            for name, p in one.named_parameters()
        }
        tokens = torch.zeros(sequences, context, dtype=torch.long)
        documents = tokens if execution.dense_mask else None
        recorder.shared |= {recorder.hold(weight) for weight in weights.values()}
        torch.func.functional_call(one, weights, (tokens,), {"documents": documents})
    inside = [*recorder.inside.values()]
    return inside[:1], recorder.block(execution.compiled), [*recorder.outside.values()]


def _growth(small: int, large: int) -> Saved:
    i, j = _GROWTHS[min(_GROWTHS, key=lambda growth: abs(growth - large / small))]
    sequences, context = _TRACED[0]
    return Saved(small // (sequences**i * context**j), i, j)


class _Recorder(TorchFunctionMode):
    """Record the bytes of the storages that autograd saves inside and outside the block."""

    def __init__(self, model: AtlasLM, execution: Execution) -> None:
        super().__init__()
        self.device, self.width = execution.device, 2 if execution.half else 4
        self.shared: set[int] = set()
        """Storages that are not counted: weights, and tensors that all blocks share."""
        self.inside: dict[int, int] = {}
        self.outside: dict[int, int] = {}
        self.saved = self.outside
        self.inputs: dict[int, int] = {}
        self.outputs: dict[int, int] = {}
        """Storage → bytes: `inputs` for the inputs of the block's matrix products, and `outputs` for their outputs."""
        self.of_attention: dict[int, int] = {}
        """Storage → bytes, for attention's output and logsumexp."""
        self.masks: dict[int, int] = {}
        """Storage → bytes, for the dropout masks."""
        self.attended: dict[int, int] = {}
        """Storage → bytes, for queries, keys and values."""
        self._alive: list[Tensor] = []
        [block] = model.blocks
        block.register_forward_pre_hook(self._enter_block)
        block.register_forward_hook(self._leave_block)
        for module in block.modules():
            if isinstance(weight := getattr(module, "weight", None), Tensor) and weight.dim() == 2:
                module.register_forward_hook(self._record_product)

    def block(self, compiled: str | None) -> list[int]:
        """Return the size in bytes of each storage that the block saves."""
        if compiled is None:
            return [*self.inside.values()]
        *outputs, _ = self.outputs.items()
        kept = dict([next(iter(self.inside.items())), *self.of_attention.items(), *outputs])
        if compiled == "all":
            kept = self.inputs | kept | self.attended | self.masks
        return [*kept.values()]

    def _enter_block(self, block: nn.Module, arguments: tuple[Tensor, Context]) -> tuple[Tensor, Context]:
        self.saved = self.inside
        x, context = arguments
        self.shared |= {self.hold(leaf) for leaf in tree_leaves(context) if isinstance(leaf, Tensor)}
        # With LoRA, the input of the first block needs no gradient, but the inputs of all other blocks need gradients.
        return x.detach().requires_grad_(), context

    def _leave_block(self, *_: Any) -> None:
        self.saved = self.outside

    def _record_product(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        [x] = arguments
        self.inputs.setdefault(self.hold(x), x.numel() * self.width)
        self.outputs[self.hold(output)] = output.untyped_storage().nbytes()

    def save(self, tensor: Tensor) -> Tensor:
        """Record a tensor that autograd saves."""
        if (key := self.hold(tensor)) not in self.shared and tensor.dtype != torch.long:
            self.saved.setdefault(key, tensor.untyped_storage().nbytes())
        return tensor

    def hold(self, tensor: Tensor) -> int:
        """Return a key that identifies a tensor's storage. Keep the storage alive, because a new storage could get the
        key of a freed storage."""
        self._alive.append(tensor)
        return tensor.untyped_storage()._cdata  # type: ignore[no-any-return]

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = dict(options or {})
        is_attention, is_dropout = function is F.scaled_dot_product_attention, function is F.dropout
        before = {*self.saved}
        if is_attention:
            self.attended = {self.hold(tensor): tensor.untyped_storage().nbytes() for tensor in arguments[:3]}
            before |= self.attended.keys()
            if self.device != "cpu":
                options["dropout_p"] = 0.0
        if is_dropout and self.device == "cuda" and options["p"] > 0:
            result = torch.native_dropout(arguments[0], options["p"], options["training"])[0]
        else:
            result = function(*arguments, **options)
        own = {key: size for key, size in self.saved.items() if key not in before}
        if is_attention:
            self.of_attention = own
        elif is_dropout and self.saved is self.inside:
            self.masks |= own
        return result
