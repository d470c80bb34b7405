"""Compare the sizes in a GGUF file's header with the file's length, before the package `gguf` reads the file.

`gguf.GGUFReader` trusts the header, and creates two NumPy arrays for each number of a list in the metadata. Without
this check, a file of 100 MB could need 50 GB of memory, and the reader would never finish a file that claims 2^62
entries.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import BinaryIO, Literal

import gguf
import numpy as np
from gguf import GGUFValueType as Kind

from atlas.files import check_regular

MOST_VALUES = 4_000_000
"""The largest allowed number of values in the metadata. A vocabulary of 256,000 tokens and the merges of its tokenizer
need about 1.3 million values."""
_MOST_ENTRIES = 1 << 17
_LONGEST_NAME = 1 << 16
_MOST_DIMENSIONS = 4


def is_gguf(path: Path) -> bool:
    """Return whether a file begins as a GGUF file does."""
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def check_header(path: Path) -> None:
    """Raise `ValueError` if the sizes in the header exceed the file's length or the limits of this module. Raise
    `OSError` if the file cannot be read."""
    size = check_regular(path)
    with path.open("rb") as file:
        _Header(file, size).check()


class _Header:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size, self._values = file, size, 0
        self._order: Literal["little", "big"] = "little"

    def check(self) -> None:
        if self._file.read(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        # The version is a small number. So its two low bytes, read as little-endian, are 0 only in a big-endian file.
        if self._number(4) & 0xFFFF == 0:
            self._order = "big"
        tensors, entries = self._number(8), self._number(8)
        if max(tensors, entries) > _MOST_ENTRIES:
            raise ValueError(
                f"it claims {tensors:,} tensors and {entries:,} entries, more than {_MOST_ENTRIES:,}"
            )
        for _ in range(entries):
            self._skip_text(_LONGEST_NAME)
            self._skip_value(Kind(self._number(4)))
        total = sum(self._tensor_bytes() for _ in range(tensors))
        if total > self._size:
            raise ValueError(f"its tensors claim {total:,} bytes, the file has {self._size:,}")

    def _tensor_bytes(self) -> int:
        self._skip_text(_LONGEST_NAME)
        rank = self._number(4)
        if rank > _MOST_DIMENSIONS:
            raise ValueError(f"a tensor claims {rank:,} dimensions")
        numel = math.prod(self._number(8) for _ in range(rank))
        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(self._number(4))]
        num_bytes = -(-numel // block) * block_bytes
        if self._number(8) + num_bytes > self._size:
            raise ValueError(f"a tensor of {numel:,} numbers extends beyond the end of the file")
        return int(num_bytes)

    def _skip_value(self, kind: Kind) -> None:
        count = 1
        if kind is Kind.ARRAY:
            kind, count = Kind(self._number(4)), self._number(8)
            if kind is Kind.ARRAY:
                raise ValueError("it holds lists of lists")
        self._values += count
        if self._values > MOST_VALUES:
            raise ValueError(f"its metadata claim {self._values:,} values, more than {MOST_VALUES:,}")
        if kind is Kind.STRING:
            for _ in range(count):
                self._skip_text(self._size)
        else:
            self._skip(count * np.dtype(gguf.GGUFReader.gguf_scalar_to_np[kind]).itemsize)

    def _skip_text(self, longest: int) -> None:
        length = self._number(8)
        if length > longest:
            raise ValueError(f"a string claims {length:,} bytes")
        self._skip(length)

    def _skip(self, length: int) -> None:
        if self._file.tell() + length > self._size:
            raise ValueError("it is cut off")
        self._file.seek(length, 1)

    def _number(self, num_bytes: int) -> int:
        """Read the next `num_bytes` bytes as an unsigned integer."""
        content = self._file.read(num_bytes)
        if len(content) < num_bytes:
            raise ValueError("it is cut off")
        return int.from_bytes(content, self._order)
