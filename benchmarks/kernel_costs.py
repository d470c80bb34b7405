"""Count the kernels that a program would run on a GPU, and their bytes and FLOPs, from shapes and dtypes on fake CUDA.

    log = KernelLog(vocabulary=50304)
    device.backend = log.backend()      # for torch.compile
    with device, log.mode():            # for all other operators
        …
    log.kernels

An operator that is not compiled is one kernel, which reads its inputs and writes its outputs once. In a compiled graph,
matrix products, attention and embeddings are separate kernels. The other operators between these kernels form one fused
kernel if tensors connect them. This is the best result that Inductor can reach. A fused kernel reads the tensors that
other kernels have made, and writes the tensors that other kernels need. If a kernel sums over rows that are too long
for a thread block's memory, it needs another pass: operators that use the sum read the inputs again. The maximum that
softmax subtracts needs no pass of its own, since Inductor computes the maximum and the sum in one pass (online softmax,
Milakov & Gimelshein 2018, arXiv:1805.02867). Import this module only after you have created `FakeCuda`.
"""

from __future__ import annotations

import contextlib
import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from functorch.compile import min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.decomposition import select_decomp_table
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

NEGLIGIBLE = 1 << 10
"""A tensor with fewer bytes does not connect two operators."""
ROW_IN_BLOCK = 1 << 14
"""The bytes of a row that a block of threads can keep, so that a second pass does not read the row from memory."""

_FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "lift_fresh",
    "alias",
    "_unsafe_view",
}
_WRITE_ONLY = {"copy_", "zero_", "fill_", "normal_", "uniform_", "random_", "bernoulli_"}
_FIRST_FACTOR = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1}
"""The position of a product's first matrix among its arguments."""
_LOOK_UPS = {"embedding", "gather", "index", "index_select"}
_SCATTERS = {"scatter_add_", "scatter_", "index_put_"}
_SUMS = {"sum", "mean", "var_mean", "logsumexp", "prod", "linalg_vector_norm"}


class Cost(NamedTuple):
    """The bytes and FLOPs of one kernel."""

    bytes: int
    flops: int = 0
    kind: str = "memory"
    """`product`, `misaligned` (a matrix product whose rows do not start at multiples of 16 bytes), `attention` or
    `memory`."""


class Kernel(NamedTuple):
    name: str
    part: str
    cost: Cost
    is_compiled: bool


@dataclass
class KernelLog:
    """The kernels that ran, and how often each of them ran.

    `vocabulary` is the number of rows of the head's table. A kernel outside the named parts counts as part of the loss
    if one of its dimensions has this size.
    """

    vocabulary: int
    kernels: Counter[Kernel] = field(default_factory=Counter)
    graphs: int = 0
    """The number of calls of compiled graphs."""
    part: str = "rest"
    is_on: bool = True

    def mode(self) -> TorchDispatchMode:
        """Return a dispatch mode that counts every operator, and makes up the numbers that the host reads from the
        device."""
        return _Counting(self)

    @contextlib.contextmanager
    def named(self, part: str) -> Iterator[None]:
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def label(self, owner: Any, attribute: str, part: str) -> None:
        """Count all kernels of `owner.attribute(…)` as `part`."""
        function = getattr(owner, attribute)

        def labelled(*arguments: Any, **options: Any) -> Any:
            with self.named(part):
                return function(*arguments, **options)

        setattr(owner, attribute, labelled)

    def backend(self) -> Callable[..., Any]:
        """Return a backend of `torch.compile` that counts each call of a graph."""
        return aot_autograd(
            fw_compiler=self._compiler("blocks forward"),
            bw_compiler=self._compiler("blocks backward"),
            inference_compiler=self._compiler("blocks forward"),
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
            keep_inference_input_mutations=True,  # like Inductor, which writes into its inputs itself
        )

    def _compiler(self, part: str) -> Callable[..., Any]:
        def compile_graph(module: GraphModule, inputs: Any) -> Any:
            costs = graph_costs(module, self.vocabulary)

            def run(*arguments: Any) -> Any:
                self.graphs += 1
                for name, cost, own_part in costs:
                    here = (own_part or part) if self.part == "rest" else self.part
                    self.kernels[Kernel(name, here, cost, True)] += 1
                before, self.is_on = self.is_on, False
                try:
                    return module.forward(*arguments)
                finally:
                    self.is_on = before

            return make_boxed_func(run)

        return compile_graph


class _Counting(TorchDispatchMode):
    def __init__(self, log: KernelLog) -> None:
        super().__init__()
        self.log = log

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # `torch.compile` does nothing under a mode that is not `infra`

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.overloadpacket in (aten._local_scalar_dense, aten.item):
            [tensor] = args
            return 1.0 if tensor.is_floating_point() else tensor.dtype == torch.bool or 7
        out = function(*args, **kwargs)
        if self.log.is_on and any(tensor.is_cuda for tensor in _tensors([*args, *kwargs.values(), out])):
            cost = operator_cost(function, args, kwargs, out)
            if cost:
                part = self.log.part
                if part == "rest" and _is_wide([*args, out], self.log.vocabulary):
                    part = "rest" if _name(function).startswith("embedding") else "loss"
                self.log.kernels[Kernel(_name(function), part, cost, False)] += 1
        return out


def operator_cost(function: Any, args: Any, kwargs: Any, out: Any) -> Cost | None:
    """Return the cost of one operator, or None if the operator runs no kernel."""
    name = _name(function)
    if function.namespace != "aten" or name in _FREE or _is_view(function):
        return None
    reads = writes = 0
    schema = function._schema.arguments
    by_name = {argument.name: argument for argument in schema}
    given = [*zip(schema, args, strict=False), *((by_name[key], value) for key, value in kwargs.items())]
    for argument, value in given:
        size = sum(_bytes(tensor) for tensor in _tensors(value) if tensor.is_cuda)
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        if name == "_fused_adamw_" and argument.name == "grads":
            is_written = False  # unless it unscales them
        writes += size if is_written else 0
        reads += 0 if is_written and (argument.kwarg_only or name in _WRITE_ONLY) else size
    if not any(returned.alias_info for returned in function._schema.returns):
        writes += sum(_bytes(tensor) for tensor in _tensors(out) if tensor.is_cuda)
    if name in _LOOK_UPS:
        ids = sum(_bytes(tensor) for tensor in _tensors(args[1:]) if not tensor.is_floating_point())
        reads, writes = writes + ids, writes
    if name in _SCATTERS:
        reads = writes = 2 * sum(_bytes(tensor) for tensor in _tensors(args[1:]))
    if "attention" in name:
        every = flop_registry[function._overloadpacket](*args, **kwargs, out_val=out)
        return Cost(reads + writes, every // 2, "attention")  # causal: half of all pairs
    if name in _FIRST_FACTOR:
        first, second = args[_FIRST_FACTOR[name] :][:2]
        matrices = [first, second, *_tensors([out, kwargs.get("out")])]
        is_aligned = all(max(tensor.stride()[-2:]) * tensor.element_size() % 16 == 0 for tensor in matrices)
        flops = 2 * int(first.numel() * second.shape[-1])
        return Cost(reads + writes, flops, "product" if is_aligned else "misaligned")
    return Cost(reads + writes)


def graph_costs(module: GraphModule, vocabulary: int) -> list[tuple[str, Cost, str | None]]:
    """Return (name, cost, part) of each kernel of a graph. The part is `loss` if a tensor is as wide as the
    `vocabulary`, `rest` for embeddings, and None for the blocks."""
    calls = [node for node in module.graph.nodes if _is_operator(node)]
    library = [node for node in calls if _is_library(node)]
    fusible = [
        node
        for node in calls
        if not _is_library(node) and _base(node) is node and _name(node.target) not in _FREE
    ]
    stored = {_base(source) for node in library for source in node.all_input_nodes}
    [output] = [node for node in module.graph.nodes if node.op == "output"]
    stored |= {_base(source) for source in output.all_input_nodes}
    costs = []
    for members in _connected(fusible):
        cost, touched = _fused_cost(members, stored)
        costs.append((f"fused {_name(members[-1].target)}", cost, _part(touched, vocabulary)))
    for node in library:
        values = [map_arg(node.args, _value), map_arg(dict(node.kwargs), _value)]
        cost = operator_cost(node.target, *values, _value(node))
        is_look_up = _name(node.target).startswith("embedding")
        part = "rest" if is_look_up else _part([node, *node.all_input_nodes], vocabulary)
        costs.append((_name(node.target), cost, part))
    return costs


def _levels(nodes: list[Node]) -> dict[Node, int]:
    """Return the number of library kernels that must run before each node. A node that needs only the graph's inputs
    runs directly before its users."""
    level: dict[Node, int] = {}
    for node in nodes:
        before = [level[source] + _is_library(source) for source in node.all_input_nodes]
        level[node] = max(before, default=0)
    for node in reversed(nodes):
        if level[node] == 0 and node.op == "call_function" and not _is_library(node):
            level[node] = min((0 if user.op == "output" else level[user] for user in node.users), default=0)
    return level


def _connected(nodes: list[Node]) -> list[list[Node]]:
    """Return groups of nodes that tensors connect, in the graph's order. No library kernel runs between two nodes of a
    group."""
    level = _levels(list(nodes[0].graph.nodes)) if nodes else {}
    leader = {node: node for node in nodes}

    def find(node: Node) -> Node:
        while leader[node] is not node:
            node = leader[node]
        return node

    for node in nodes:
        for source in map(_base, node.all_input_nodes):
            if source in leader and level[source] == level[node] and _size(source) >= NEGLIGIBLE:
                leader[find(source)] = find(node)
    groups = defaultdict(list)
    for node in nodes:
        groups[find(node)].append(node)
    return list(groups.values())


def _fused_cost(members: list[Node], stored: set[Node]) -> tuple[Cost, list[Node]]:
    """Return the cost of one kernel, and the tensors that the kernel reads and writes.

    A node's pass is the number of sums over long rows that must be complete before the node. Each pass reads the values
    that it needs, or computes them again from values that it reads.
    """
    inside = set(members)
    at: dict[Node, int] = {}
    for node in members:
        before = [
            at[source] + _ends_pass(source) for source in map(_base, node.all_input_nodes) if source in inside
        ]
        at[node] = max(before, default=0)
    needed: dict[Node, set[int]] = defaultdict(set)
    looked_up = written = 0
    touched = []
    for node in reversed(members):
        is_copy = _name(node.target) == "copy_"
        if is_copy or node in stored or any(_outside(user, inside) for user in _users(node)):
            written += _size(node)
            touched.append(node)
            needed[node].add(at[node])
        for source in node.all_input_nodes[1 if is_copy else 0 :]:
            key = _base(source) if _base(source) in inside else source
            if _name(node.target) in _LOOK_UPS and source is node.args[0]:
                looked_up += _size(node)
            else:
                needed[key] |= {at[node]} if _is_sum(node) or not needed[node] else needed[node]
    outside = [node for node in needed if node not in inside]
    read = sum(len(needed[node]) * _size(node) for node in outside)
    return Cost(read + looked_up + written), [*touched, *outside]


def _outside(user: Node, inside: set[Node]) -> bool:
    return user not in inside and user.op != "output" and not _is_library(user)


def _users(node: Node) -> Iterator[Node]:
    """Yield the nodes that use `node` or a view of `node`."""
    for user in node.users:
        if _base(user) is user:
            yield user
        else:
            yield from _users(user)


def _is_operator(node: Node) -> bool:
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)


def _is_library(node: Node) -> bool:
    if not _is_operator(node):
        return False
    name = _name(node.target)
    is_look_up = name in ("embedding", "embedding_dense_backward", "index_put")
    return is_look_up or name in _FIRST_FACTOR or "attention" in name


def _is_sum(node: Node) -> bool:
    return _name(node.target) in _SUMS or _name(node.target) in ("amax", "amin", "max", "argmax")


def _ends_pass(node: Node) -> bool:
    """Whether `node` is a sum over rows that are too long for a block to keep."""
    if _name(node.target) not in _SUMS or not isinstance(node.args[0], Node):
        return False
    rows = next(_tensors([_value(node)])).numel()
    return bool(_size(node.args[0]) > rows * ROW_IN_BLOCK)


def _base(node: Node) -> Node:
    """Return the node of which `node` is a view, or `node` itself."""
    while node.op == "call_function" and (
        node.target is operator.getitem or (_is_operator(node) and _is_view(node.target))
    ):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _value(node: Node) -> Any:
    return node.meta.get("val")


def _size(node: Node) -> int:
    return sum(map(_bytes, _tensors([_value(node)])))


def _part(nodes: list[Node], vocabulary: int) -> str | None:
    return "loss" if _is_wide([_value(node) for node in nodes], vocabulary) else None


def _is_wide(values: list[Any], vocabulary: int) -> bool:
    return any(vocabulary in tensor.shape for tensor in _tensors(values))


def _name(function: Any) -> str:
    return str(function._schema.name.split("::")[-1])


def _is_view(function: Any) -> bool:
    returned = function._schema.returns
    return bool(returned) and returned[0].alias_info is not None and not returned[0].alias_info.is_write


def _bytes(tensor: Any) -> int:
    """Return the bytes of a tensor that are read. A dimension of stride 0 counts once. A symbolic size becomes the size
    of this call, since another size is compiled again."""
    count: int = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= int(size) if stride else 1
    return count


def _tensors(values: Any) -> Iterator[Any]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
