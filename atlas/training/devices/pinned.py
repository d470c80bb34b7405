"""Page-locked (pinned) main memory. A GPU copies to pinned memory at full speed while the CPU continues.

PyTorch's own allocator rounds the size of each pinned tensor up to a power of two: a checkpoint of 6 GB may need 8 GB.
This module puts the tensors one after the other into one block of ordinary memory, and CUDA locks that block.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy
import torch
from torch import Tensor

_PAGE = 4096
_ALIGNED = 64  # each tensor begins at a multiple of this many bytes
_PORTABLE = 1
"""`cudaHostRegisterPortable`: pinned for all CUDA contexts of the process."""


def pinned_like(tensors: Sequence[Tensor], *, say: Callable[[str], None]) -> list[Tensor]:
    """Return uninitialized CPU tensors with the shapes and dtypes of `tensors`, in one pinned block. Each tensor has
    its own storage object.

    The block is freed with the last of these tensors. If CUDA cannot lock the block, the block stays ordinary memory,
    and the function logs a line with `say`.
    """
    size = sum(_rounded(tensor.nbytes, _ALIGNED) for tensor in tensors)
    # CUDA locks full pages, and the pages of another block may be locked already. So this block has its own pages.
    block = numpy.empty(_rounded(size, _PAGE) + _PAGE, dtype=numpy.uint8)
    offset = -block.ctypes.data % _PAGE
    _lock(block, block.ctypes.data + offset, _rounded(size, _PAGE), say)
    buffers = []
    for tensor in tensors:
        piece = torch.from_numpy(block[offset : offset + tensor.nbytes])
        buffers.append(piece.view(tensor.dtype).view(tensor.shape))
        offset += _rounded(tensor.nbytes, _ALIGNED)
    return buffers


def _lock(block: numpy.ndarray, address: int, size: int, say: Callable[[str], None]) -> None:
    if size == 0:
        return
    cuda = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    if (error := int(cuda.cudaHostRegister(address, size, _PORTABLE))) == 0:
        # Unlock the block before it is freed. Otherwise CUDA would regard the next allocation at this address as
        # locked. Do not unlock the block when the process exits, since CUDA may have shut down already.
        weakref.finalize(block, cuda.cudaHostUnregister, address).atexit = False
        return
    with suppress(RuntimeError):  # CUDA raises the error once more in the next kernel; this kernel clears it
        torch.ones(1, device="cuda")
    say(
        f"CUDA cannot pin {size / 1e9:.2f} GB of main memory for the copy of each checkpoint (error "
        f"{error}): the copy uses ordinary memory, and each save stops training for longer"
    )


def _rounded(size: int, unit: int) -> int:
    return math.ceil(size / unit) * unit
