"""The keys and values of finished texts, so that a text with the same beginning is read only from where it differs.

The next turn of a conversation begins with all of the earlier turns, and requests of one program often begin with the
same instructions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from atlas.model import KVCache

LEAST_REUSED = 32
"""The number of tokens below which a common beginning is not worth a prefill of its own."""
_Ids = np.ndarray[Any, np.dtype[np.int64]]


class Beginning(NamedTuple):
    """The keys and values of the first tokens of a text, each (num_layers, num_kv_heads, num_tokens, head_dim)."""

    keys: Tensor
    values: Tensor

    @property
    def num_tokens(self) -> int:
        """The number of tokens."""
        return self.keys.shape[2]


class _Text(NamedTuple):
    ids: _Ids
    first: bytes
    """The first `LEAST_REUSED` ids."""
    beginning: Beginning


class PrefixCache:
    """The keys and values of at most `most_tokens` tokens, of the texts that were used last."""

    def __init__(self, most_tokens: int) -> None:
        self.most_tokens = most_tokens
        self._kept: list[_Text] = []
        """The texts, the one that was used last at the end."""

    def keep(self, ids: Sequence[int], cache: KVCache, row: int) -> None:
        """Copy the keys and values of `ids`, which are the first tokens in this row of `cache`."""
        if not LEAST_REUSED <= len(ids) <= self.most_tokens:
            return
        new = np.array(ids, dtype=np.int64)
        common = self._common_with(new)
        if len(new) in common:  # a known text begins with the new one
            self._kept.append(self._kept.pop(common.index(len(new))))
            return
        # The new text replaces its own beginnings. This frees memory before the copy needs it.
        self._kept = [each for each, same in zip(self._kept, common, strict=True) if same < len(each.ids)]
        num_tokens = len(new) + sum(len(each.ids) for each in self._kept)
        while num_tokens > self.most_tokens:
            num_tokens -= len(self._kept.pop(0).ids)
        keys, values = (part[:, row, :, : len(new)].clone() for part in (cache.keys, cache.values))
        self._kept.append(_Text(new, _first(new), Beginning(keys, values)))

    def find(self, ids: Sequence[int]) -> Beginning | None:
        """Return the keys and values of as many of the first `ids` as are known, but not of the last one. Return None
        if fewer than `LEAST_REUSED` are known."""
        wanted = np.array(ids, dtype=np.int64)
        common = self._common_with(wanted[:-1])
        longest = max(common, default=0)
        if longest < LEAST_REUSED:
            return None
        self._kept.append(self._kept.pop(common.index(longest)))
        return Beginning(*(part[:, :, :longest] for part in self._kept[-1].beginning))

    def _common_with(self, ids: _Ids) -> list[int]:
        """Return with how many of the first `ids` each kept text begins; 0 instead of less than `LEAST_REUSED`. All
        running texts wait meanwhile, so most texts are excluded by one comparison."""
        first = _first(ids)
        return [_num_common(each.ids, ids) if each.first == first else 0 for each in self._kept]


def _first(ids: _Ids) -> bytes:
    return ids[:LEAST_REUSED].tobytes()


def _num_common(one: _Ids, other: _Ids) -> int:
    """The number of ids with which both texts begin."""
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    return int(differs.argmax()) if differs.any() else length
