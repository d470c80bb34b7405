"""Text → documents → token shards → sequences → batches."""

from atlas.data.dataset import IGNORE_INDEX, SequenceDataset, TextDataset
from atlas.data.loader import SequenceOrder, batches
from atlas.data.prepare import prepare, prepare_text_cached
from atlas.data.resolve import ResolvedData, resolve_data
from atlas.data.shards import PreparedDataset, TokenStream, open_dataset

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
]
