"""A cache of the keys and values of earlier tokens, so that the model computes only the new tokens.

The caller owns the cache and passes it to `AtlasLM.forward`; the model keeps no state. Slot `s` of a row holds the
token at position `s`. The mask is therefore simple: a query attends to the slots up to its own position. No query
attends to the slots beyond a row's length, and later tokens overwrite these slots. For prompts of different lengths,
pad the prompts on the right, run the model, and then call `truncate` with the true lengths.

Sequences may be added and removed while the model generates other sequences. The rows in use are always the first rows,
so that a forward pass computes only these rows.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from atlas.config import ModelConfig


def long_tensor(numbers: Sequence[Any], device: torch.device) -> Tensor:
    """Return nested sequences of integers as an int64 tensor on `device`.

    Unlike `torch.tensor(numbers, device=device)`, this function does not wait for the GPU. The caller may change
    `numbers` after the call, since PyTorch first copies pageable memory to its own buffer.
    """
    return torch.tensor(numbers, dtype=torch.long).to(device, non_blocking=device.type == "cuda")


class KVCache:
    """Preallocated keys and values, with one length per row.

    `keys` and `values` have shape (num_layers, B, num_kv_heads, max_len, head_dim); `lengths` has shape (B,). B is the
    number of rows in use. At first, B is `batch_size`. `truncate` and `remove` change B.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        *,
        max_len: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.max_len = max_len or config.max_seq_len
        shape = (config.num_layers, batch_size, config.kv_heads, self.max_len, config.head_size)
        # Zeros, not uninitialized memory: attention multiplies masked slots by a weight of 0, and 0 × NaN is NaN.
        self._all_keys = torch.zeros(shape, device=device, dtype=dtype)
        self._all_values = torch.zeros(shape, device=device, dtype=dtype)
        self._lengths: list[int] = []
        self.truncate([0] * batch_size)

    def positions(self, num_new: int) -> Tensor:
        """(B, num_new): the positions of the next `num_new` tokens of each row."""
        if self.longest + num_new > self.max_len:
            raise ValueError(f"{num_new} tokens after {self.longest} do not fit a cache of {self.max_len}")
        return self.lengths[:, None] + torch.arange(num_new, device=self.lengths.device)

    def visible(self, positions: Tensor) -> Tensor | None:
        """Return the mask (B, 1, T, S) bool: to which of the first S slots each query at `positions` (B, T) attends.

        Return None if attention needs no mask, since attention without a mask is faster. No mask is needed for a single
        query that attends to every slot. No mask is needed for an empty cache either, because causal attention is then
        enough.
        """
        if self._even and (positions.shape[1] == 1 or self.longest == 0):
            return None
        slots = torch.arange(self.longest + positions.shape[1], device=positions.device)
        return (slots <= positions[:, :, None])[:, None]

    def update(self, layer: int, positions: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, K, T, D) at `positions` (B, T). Return the keys and values in the first S slots of
        the layer, each (B, K, S, D)."""
        end = self.longest + positions.shape[1]
        if self._even:
            self.keys[layer, :, :, self.longest : end] = keys
            self.values[layer, :, :, self.longest : end] = values
        else:
            rows = torch.arange(positions.shape[0], device=positions.device)[:, None]
            # Advanced indices around a slice put the indexed dimensions first: (B, T, K, D).
            self.keys[layer][rows, :, positions] = keys.transpose(1, 2)
            self.values[layer][rows, :, positions] = values.transpose(1, 2)
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, num_new: int) -> None:
        """Add `num_new` to the length of every row. The model calls this method once per forward pass, after the last
        layer."""
        self.lengths += num_new
        self._lengths = [length + num_new for length in self._lengths]

    def truncate(self, lengths: Sequence[int]) -> None:
        """Set the length of each row, and drop the slots beyond this length, such as the padding of prompts.
        Afterwards, `len(lengths)` rows are in use."""
        num_rows = len(lengths)
        self.keys, self.values = self._all_keys[:, :num_rows], self._all_values[:, :num_rows]
        self.lengths = long_tensor(lengths, self.keys.device)
        # The lengths are also on the host, so that slicing needs no device sync.
        self._lengths = list(lengths)

    def free_rows(self, lengths: Sequence[int]) -> KVCache:
        """Return the next rows that are not in use as a cache of their own, with these lengths and with the memory of
        this cache. `truncate` with all lengths puts these rows into use."""
        part, rows = copy.copy(self), slice(len(self._lengths), len(self._lengths) + len(lengths))
        part._all_keys, part._all_values = self._all_keys[:, rows], self._all_values[:, rows]
        part.truncate(lengths)
        return part

    def remove(self, row: int) -> None:
        """Remove a row. The last row moves to the place of the removed row."""
        *lengths, length = self._lengths
        last = len(lengths)
        if row != last:
            self.keys[:, row, :, :length] = self.keys[:, last, :, :length]
            self.values[:, row, :, :length] = self.values[:, last, :, :length]
            lengths[row] = length
        self.truncate(lengths)

    def clear(self, row: int | None = None) -> None:
        """Fill the slots of a row, or of all rows, with zeros, since NaN in a slot would corrupt the next sequence."""
        rows = slice(None) if row is None else row
        self._all_keys[:, rows] = 0
        self._all_values[:, rows] = 0

    @property
    def row_lengths(self) -> list[int]:
        """The number of tokens in each row."""
        return list(self._lengths)

    @property
    def longest(self) -> int:
        """The number of tokens in the longest row."""
        return max(self._lengths, default=0)

    @property
    def _even(self) -> bool:
        """Whether all rows are equally long."""
        return len(set(self._lengths)) <= 1


class CacheWindow(KVCache):
    """A view of a cache's rows in use, for a forward pass of one token per row. Attention reads the first `num_slots`
    slots of each row, and masks the slots beyond the row's length.

    No shape and no number on the host depends on the lengths. One CUDA graph of the forward pass therefore works for
    all lengths.
    """

    def __init__(self, cache: KVCache, num_slots: int) -> None:
        self.keys, self.values = (part[..., :num_slots, :] for part in (cache.keys, cache.values))
        self.lengths = cache.lengths.clone()
        self._slots = torch.arange(num_slots, device=self.lengths.device)
        self._rows = torch.arange(len(self.lengths), device=self.lengths.device)[:, None]

    def positions(self, num_new: int) -> Tensor:
        """(B, 1): the position of each row's next token."""
        assert num_new == 1
        return self.lengths[:, None]

    def visible(self, positions: Tensor) -> Tensor:
        """Return the mask (B, 1, 1, num_slots) bool of the slots up to `positions` (B, 1)."""
        return (self._slots <= positions[:, :, None])[:, None]

    def update(self, layer: int, positions: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, K, 1, D) at `positions` (B, 1). Return the keys and values in all slots of the
        layer, each (B, K, num_slots, D)."""
        self.keys[layer][self._rows, :, positions] = keys.transpose(1, 2)
        self.values[layer][self._rows, :, positions] = values.transpose(1, 2)
        return self.keys[layer], self.values[layer]

    def advance(self, num_new: int) -> None:
        """Do nothing: the caller advances the underlying cache."""
