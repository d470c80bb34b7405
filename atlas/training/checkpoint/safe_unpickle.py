"""Read the plain values in a pickle without running it.

A pickle is a program for a stack machine, and `torch.save` writes one that calls a function for each tensor.
`torch.load(..., weights_only=True)` calls only functions of a fixed list. But `bytearray` and `torch.Tensor` are among
them, so a file of a hundred bytes can make it allocate any amount of memory, or return 2^60 numbers in a storage of
one. Behind the checks of the zip, it still loads, or allocates memory for, 11 of the hostile pickles in
`tests/faults/attacks.py`. It also cannot leave out the optimizer state, which generation does not need.

The machine here has the instructions that plain values and tensors need, and it calls nothing: a tensor is only a claim
until the claim is checked.

The instructions: https://github.com/python/cpython/blob/main/Lib/pickletools.py
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch

MOST_VALUES = 3_000_000
"""Each needs about 100 bytes. A model of 1,000 layers, with AdamW's moments, has about 2 million."""
DEEPEST = 32
_MOST_DIMENSIONS = 8

_DTYPES = {
    "torch FloatStorage": torch.float32,
    "torch DoubleStorage": torch.float64,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ByteStorage": torch.uint8,
}
_DICT, _TENSOR = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}


class NotPlainError(ValueError):
    """A pickle holds more than plain values and tensors."""


@dataclass(frozen=True)
class Storage:
    """`numel` numbers in the record `key` of the file."""

    key: str
    dtype: torch.dtype
    numel: int

    @property
    def num_bytes(self) -> int:
        """The size of the storage."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class TensorClaim:
    """A view of a storage; `size`, `stride` and `offset` count elements."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def is_inside(self) -> bool:
        """Whether the view has no more elements than its storage, all of them inside."""
        if math.prod(self.size) == 0:
            return self.offset <= self.storage.numel and math.prod(n for n in self.size if n) < 2**48
        last = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        return last < self.storage.numel and math.prod(self.size) <= self.storage.numel


@dataclass(frozen=True)
class _Name:
    """`module name` of something that a pickle would import. It is never imported."""

    name: str


def read_pickle(
    program: bytes, build: Callable[[TensorClaim], torch.Tensor], *, without: Collection[str] = ()
) -> Any:
    """Return the value that a pickle leaves on its stack: dicts, lists, tuples, strings, numbers, and tensors, which
    `build` makes. If it is a dict, the keys in `without` are left out and their tensors are not built.

    Raises `NotPlainError` for anything else."""
    try:
        value = _run(program)
    except (IndexError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise NotPlainError(f"it is damaged: {type(error).__name__}") from None
    if isinstance(value, dict):
        value = {key: entry for key, entry in value.items() if key not in without}
    count = 0

    def plain(value: Any, depth: int = 0) -> Any:
        """Copy `value` so that nothing is shared. Otherwise a small file could hold lists of lists of the same list,
        and a walk through them would never end."""
        nonlocal count
        count += 1
        if count > MOST_VALUES or depth > DEEPEST:
            raise NotPlainError(f"it holds more than {MOST_VALUES:,} values, or deeper than {DEEPEST} levels")
        match value:
            case dict():
                return {key: plain(entry, depth + 1) for key, entry in value.items()}
            case list():
                return [plain(entry, depth + 1) for entry in value]
            case tuple():
                return tuple(plain(entry, depth + 1) for entry in value)
            case TensorClaim():
                return build(value)
            case Storage() | _Name():
                raise NotPlainError(f"it holds a bare {type(value).__name__.strip('_').lower()}")
        return value

    return plain(value)


def _run(program: bytes) -> Any:
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks under the marks
    memo: dict[int, Any] = {}
    argument: Any
    for count, (opcode, argument, _) in enumerate(pickletools.genops(program)):
        if count > MOST_VALUES:
            raise NotPlainError(f"it has more than {MOST_VALUES:,} instructions")
        match opcode.name:
            case "PROTO":
                pass
            case "STOP":
                return stack.pop()
            case name if name in _LITERALS:
                stack.append(argument)
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(opcode.name[-1])
                stack[-size:] = [tuple(stack[i] for i in range(-size, 0))]
            case "MARK":
                below.append(stack)
                stack = []
            case "TUPLE":
                stack, entries = below.pop(), stack
                stack.append(tuple(entries))
            case "APPEND" | "APPENDS":
                stack, entries = (stack, [stack.pop()]) if opcode.name == "APPEND" else (below.pop(), stack)
                _expect(list, stack[-1]).extend(entries)
            case "SETITEM" | "SETITEMS":
                if opcode.name == "SETITEM":
                    entries = [stack.pop(-2), stack.pop()]
                else:
                    stack, entries = below.pop(), stack
                for key, entry in zip(entries[::2], entries[1::2], strict=True):
                    _expect(dict, stack[-1])[_expect((str, int), key)] = entry
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                if argument not in (_DICT, _TENSOR, *_DTYPES):
                    raise NotPlainError(f"it holds {'.'.join(argument.split()):.80}")
                stack.append(_Name(argument))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), _expect(_Name, stack.pop())
                stack.append(_dict_or_tensor(function.name, arguments))
            case "BUILD":  # the version numbers of a state dict, which PyTorch stores as its attribute
                stack.pop()
                _expect(dict, stack[-1])
            case name:
                raise NotPlainError(f"it holds the instruction {name}")
    raise NotPlainError("it does not end")


def _expect(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{type(value).__name__} in a wrong place")  # the value may have no finite text
    return value


def _dict_or_tensor(name: str, arguments: Any) -> Any:
    match name, arguments:
        case "collections OrderedDict", ():
            return {}
        case "torch._utils _rebuild_tensor_v2", (Storage() as storage, offset, size, stride, *_):
            counts = (offset, *_expect(tuple, size), *_expect(tuple, stride))
            natural = all(type(n) is int and 0 <= n < 2**62 for n in counts)
            if not natural or len(size) != len(stride) or len(size) > _MOST_DIMENSIONS:
                raise NotPlainError("it holds a tensor of an impossible shape")
            return TensorClaim(storage, offset, size, stride)
    raise NotPlainError(f"it calls {'.'.join(name.split())} with something else")


def _storage(identity: Any) -> Storage:
    match identity:
        case ("storage", _Name(name), str(key), str(), int(numel)) if name in _DTYPES and 0 <= numel < 2**62:
            return Storage(key, _DTYPES[name], numel)
    raise NotPlainError("it holds a storage of an unknown kind")
