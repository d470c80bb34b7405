"""Text → documents → token shards → sequences → batches.

What needs PyTorch is imported when it is first used: preparing text does not, and the processes that do it start
at once and stay small.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from atlas.data.prepare.pipeline import prepare, prepare_text_cached
from atlas.data.shards import PreparedDataset, TokenStream, open_dataset

if TYPE_CHECKING:
    from atlas.data.sequences.build import training_sequences, validation_sequences, validation_windows
    from atlas.data.sequences.dataset import IGNORE_INDEX, SequenceDataset, TextDataset
    from atlas.data.sequences.loader import SequenceOrder, batches
    from atlas.data.sequences.open import ResolvedData, resolve_data, resolve_mixture

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
    "IGNORE_INDEX": "sequences.dataset",
    "SequenceDataset": "sequences.dataset",
    "TextDataset": "sequences.dataset",
    "SequenceOrder": "sequences.loader",
    "batches": "sequences.loader",
    "ResolvedData": "sequences.open",
    "resolve_data": "sequences.open",
    "resolve_mixture": "sequences.open",
    "training_sequences": "sequences.build",
    "validation_sequences": "sequences.build",
    "validation_windows": "sequences.build",
}


def __getattr__(name: str) -> Any:
    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_NEED_TORCH[name]}"), name)
