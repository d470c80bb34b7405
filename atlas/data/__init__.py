"""Text → documents → token shards → sequences → batches.

Modules that need PyTorch are imported when they are first used. Preparing text does not need PyTorch, so the processes
that prepare text start fast and use little memory.
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


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in ("dataset", "loader", "open", "build"):
            sequences = importlib.import_module(f"{__name__}.sequences.{module}")
            if hasattr(sequences, name):
                return getattr(sequences, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
