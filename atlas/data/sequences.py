"""The data of a run as the windows that its settings ask for."""

from __future__ import annotations

from atlas.config import AtlasConfig
from atlas.data.conversations import ChatDataset, Conversations
from atlas.data.dataset import SequenceDataset
from atlas.data.mixture import MixtureDataset
from atlas.data.packing import PackedDataset
from atlas.data.resolve import ResolvedData, Stream

Windows = SequenceDataset | ChatDataset
Sequences = Windows | MixtureDataset


def training_sequences(data: ResolvedData, config: AtlasConfig) -> Sequences:
    """What is trained on: one dataset's windows, or a mixture's."""
    parts = [training_windows(stream, config) for stream in data.trains]
    return parts[0] if len(parts) == 1 else MixtureDataset(parts, data.weights)


def training_windows(stream: Stream, config: AtlasConfig) -> Windows:
    """The windows of one dataset, as they are trained on."""
    if isinstance(stream, Conversations) or config.data.packing == "concat":
        return _windows(stream, config)
    return PackedDataset(stream, config.model.max_seq_len, with_documents=config.data.document_mask)


def validation_sequences(data: ResolvedData, config: AtlasConfig) -> Sequences | None:
    """What is judged by; None where there is nothing."""
    parts = [validation_windows(stream, config) for stream in data.vals]
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else MixtureDataset(parts, [1.0] * len(parts))


def validation_windows(stream: Stream, config: AtlasConfig) -> Windows:
    """Every token of a text, or every answer that fits into a window."""
    return _windows(stream, config, pad_last=True)


def _windows(stream: Stream, config: AtlasConfig, *, pad_last: bool = False) -> Windows:
    length, masked = config.model.max_seq_len, config.data.document_mask
    if isinstance(stream, Conversations):
        return ChatDataset(stream, length, with_documents=masked)
    return SequenceDataset(stream, length, pad_last=pad_last, with_documents=masked)
