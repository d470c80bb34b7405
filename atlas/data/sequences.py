"""The data of a run as the windows that its settings ask for."""

from __future__ import annotations

from atlas.config import AtlasConfig
from atlas.data.dataset import SequenceDataset
from atlas.data.mixture import MixtureDataset
from atlas.data.packing import PackedDataset
from atlas.data.resolve import ResolvedData
from atlas.data.shards import TokenStream

Sequences = SequenceDataset | MixtureDataset


def training_sequences(data: ResolvedData, config: AtlasConfig) -> Sequences:
    """What is trained on: one dataset's windows, or a mixture's."""
    parts = [training_windows(stream, config) for stream in data.trains]
    return parts[0] if len(parts) == 1 else MixtureDataset(parts, data.weights)


def training_windows(stream: TokenStream, config: AtlasConfig) -> SequenceDataset:
    """The windows of one dataset, as they are trained on."""
    if config.data.packing == "best_fit":
        return PackedDataset(stream, config.model.max_seq_len, with_documents=config.data.document_mask)
    return _windows(stream, config)


def validation_sequences(data: ResolvedData, config: AtlasConfig) -> Sequences | None:
    """What is judged by, every token of it; None where there is nothing."""
    parts = [_windows(stream, config, pad_last=True) for stream in data.vals]
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else MixtureDataset(parts, [1.0] * len(parts))


def _windows(stream: TokenStream, config: AtlasConfig, *, pad_last: bool = False) -> SequenceDataset:
    length, masked = config.model.max_seq_len, config.data.document_mask
    return SequenceDataset(stream, length, pad_last=pad_last, with_documents=masked)
