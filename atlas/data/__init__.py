"""Text → documents → token shards → sequences → batches.

What needs PyTorch is imported when it is first used: preparing text does not, and the processes that do it start
at once and stay small.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from atlas.data.prepare import prepare, prepare_text_cached
from atlas.data.shards import PreparedDataset, TokenStream, open_dataset

if TYPE_CHECKING:
    from atlas.data.dataset import IGNORE_INDEX, SequenceDataset, TextDataset
    from atlas.data.loader import SequenceOrder, batches
    from atlas.data.resolve import ResolvedData, resolve_data, resolve_mixture
    from atlas.data.sequences import training_sequences, validation_sequences, validation_windows

__all__ = [
    "IGNORE_INDEX",
    "PreparedDataset",
    "ResolvedData",
    "SequenceDataset",
    "SequenceOrder",
    "TextDataset",
    "TokenStream",
    "batches",
    "open_dataset",
    "prepare",
    "prepare_text_cached",
    "resolve_data",
    "resolve_mixture",
    "training_sequences",
    "validation_sequences",
    "validation_windows",
]

_NEED_TORCH = {
    "IGNORE_INDEX": "dataset",
    "SequenceDataset": "dataset",
    "TextDataset": "dataset",
    "SequenceOrder": "loader",
    "batches": "loader",
    "ResolvedData": "resolve",
    "resolve_data": "resolve",
    "resolve_mixture": "resolve",
    "training_sequences": "sequences",
    "validation_sequences": "sequences",
    "validation_windows": "sequences",
}


def __getattr__(name: str) -> Any:
    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_NEED_TORCH[name]}"), name)
