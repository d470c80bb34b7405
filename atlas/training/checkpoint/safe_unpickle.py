"""Read the plain values and the tensors in a pickle without running the pickle.

A pickle is a program for a stack machine. The pickle that `torch.save` writes calls a function for each tensor.
`torch.load(..., weights_only=True)` calls only functions of a fixed list, but this list includes `bytearray` and
`torch.Tensor`. So a pickle of a hundred bytes can make `torch.load` allocate any amount of memory, or return a tensor
of 2^60 numbers whose storage has one number. 11 of the hostile pickles in `tests/faults/attacks.py` pass the checks of
the zip, and `torch.load` loads them or allocates memory for them. Also, `torch.load` cannot leave out the optimizer
state, which generation does not need.

The stack machine in this module has only the instructions that plain values and tensors need. This machine calls no
function. In place of a tensor, it returns a `TensorClaim`: the size and the storage that the pickle gives for the
tensor. Atlas checks this claim before it builds the tensor.

The instructions are documented in https://github.com/python/cpython/blob/main/Lib/pickletools.py
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch

MOST_VALUES = 3_000_000
"""The most values that a pickle may have. Each value needs about 100 bytes of memory. The checkpoint of a model of
1,000 layers, with AdamW's moments, has about 2 million values."""
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
    """A pickle is damaged, or holds anything except plain values and tensors."""


@dataclass(frozen=True)
class Storage:
    """A claim of the pickle: the record `key` of the zip file holds `numel` numbers of type `dtype`."""

    key: str
    dtype: torch.dtype
    numel: int

    @property
    def num_bytes(self) -> int:
        """The size of the storage in bytes."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class TensorClaim:
    """A claim of the pickle: a tensor is a view of `storage`. `offset`, `size` and `stride` count elements."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def is_inside(self) -> bool:
        """Whether all elements of the view are inside the storage, and the view has no more elements than the
        storage."""
        if math.prod(self.size) == 0:
            return self.offset <= self.storage.numel and math.prod(n for n in self.size if n) < 2**48
        last = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        return last < self.storage.numel and math.prod(self.size) <= self.storage.numel


@dataclass(frozen=True)
class _Name:
    """The `module name` of an object that the pickle asks to import. Atlas never imports the object."""

    name: str


def read_pickle(
    program: bytes, build: Callable[[TensorClaim], torch.Tensor], *, without: Collection[str] = ()
) -> Any:
    """Return the value in a pickle: nested dicts, lists and tuples of strings, numbers and tensors.

    `build` makes a tensor from its claim. If the value is a dict, the keys in `without` are left out, and their tensors
    are not built. Raises `NotPlainError` if the pickle is damaged or holds anything else.
    """
    try:
        value = _run(program)
    except (IndexError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise NotPlainError(f"it is damaged: {type(error).__name__}") from None
    if isinstance(value, dict):
        value = {key: entry for key, entry in value.items() if key not in without}
    count = 0

    def plain(value: Any, depth: int = 0) -> Any:
        """Copy `value` so that no object is shared, and limit the number and the depth of the values. Otherwise each
        list in a small file could hold the list of the next level many times, and a walk through all levels would never
        end."""
        nonlocal count
        count += 1
        if count > MOST_VALUES or depth > DEEPEST:
            raise NotPlainError(
                f"it holds more than {MOST_VALUES:,} values, or nests them deeper than {DEEPEST} levels"
            )
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
                raise NotPlainError(f"it holds a {type(value).__name__.strip('_').lower()} outside a tensor")
        return value

    return plain(value)


def _run(program: bytes) -> Any:
    stack: list[Any] = []
    below: list[list[Any]] = []  # for each open MARK, the stack below it
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
                    raise NotPlainError(f"it imports {'.'.join(argument.split()):.80}")
                stack.append(_Name(argument))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), _expect(_Name, stack.pop())
                stack.append(_dict_or_tensor(function.name, arguments))
            case "BUILD":  # sets the version numbers of a state dict, which Atlas ignores
                stack.pop()
                _expect(dict, stack[-1])
            case name:
                raise NotPlainError(f"it holds the instruction {name}")
    raise NotPlainError("it has no STOP instruction")


def _expect(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{type(value).__name__} in a wrong place")  # not the value: its text may be endless
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
    raise NotPlainError(f"it calls {'.'.join(name.split())} with unexpected arguments")


def _storage(identity: Any) -> Storage:
    match identity:
        case ("storage", _Name(name), str(key), str(), int(numel)) if name in _DTYPES and 0 <= numel < 2**62:
            return Storage(key, _DTYPES[name], numel)
    raise NotPlainError("it holds a storage of an unknown kind")
