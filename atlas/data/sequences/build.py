"""The data of a run → its windows for training and validation, as the config defines them."""

from __future__ import annotations

from atlas.config import AtlasConfig
from atlas.data.sequences.conversations import ChatDataset, Conversations
from atlas.data.sequences.dataset import SequenceDataset
from atlas.data.sequences.mixture import MixtureDataset
from atlas.data.sequences.open import ResolvedData, Stream
from atlas.data.sequences.packing import PackedDataset
from atlas.data.shards import TokenStream

Windows = SequenceDataset | ChatDataset
SequenceSource = Windows | MixtureDataset


def training_sequences(data: ResolvedData, config: AtlasConfig) -> SequenceSource:
    """Return the training data: the windows of one dataset, or of a mixture."""
    parts = [training_windows(stream, config) for stream in data.trains]
    return parts[0] if len(parts) == 1 else MixtureDataset(parts, data.weights)


def training_windows(stream: Stream, config: AtlasConfig) -> Windows:
    """Return the windows of one training dataset."""
    masked = config.data.document_mask
    if isinstance(stream, TokenStream) and config.data.packing == "best_fit":
        return PackedDataset(stream, config.model.max_seq_len, with_documents=masked)
    return _windows(stream, config, masked, pad_last=False)


def validation_sequences(data: ResolvedData, config: AtlasConfig) -> SequenceSource | None:
    """Return the validation data, or None if there is none.

    Conversations that were held out from the training data are left out if no answer in them begins within a window.
    """
    trained_on = {stream.name for stream in data.trains}
    streams = [
        stream
        for stream in data.vals
        if stream.name not in trained_on
        or isinstance(stream, TokenStream)
        or stream.answers_within(config.model.max_seq_len).any()
    ]
    masked = config.data.document_mask or all(isinstance(stream, Conversations) for stream in streams)
    parts = [_windows(stream, config, masked, pad_last=True) for stream in streams]
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else MixtureDataset(parts, [1.0] * len(parts))


def validation_windows(stream: Stream, config: AtlasConfig) -> Windows:
    """Return windows with every token of a text, or with every answer that begins within a window. Attention stays
    inside each conversation."""
    masked = config.data.document_mask or isinstance(stream, Conversations)
    return _windows(stream, config, masked, pad_last=True)


def _windows(stream: Stream, config: AtlasConfig, masked: bool, *, pad_last: bool) -> Windows:
    length = config.model.max_seq_len
    if isinstance(stream, Conversations):
        return ChatDataset(stream, length, with_documents=masked)
    return SequenceDataset(stream, length, pad_last=pad_last, with_documents=masked)
