"""Open the data that `--train-data` and `--val-data` name: prepared folders, conversations, and plain text. Plain text
is prepared first."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from atlas.config.config import MixturePart
from atlas.data.prepare.pipeline import prepare_text_cached
from atlas.data.sequences.conversations import Conversations, holds_conversations, read_conversations
from atlas.data.shards import TokenStream, is_prepared, open_dataset
from atlas.data.text.documents import Reading
from atlas.errors import DataError
from atlas.tokenizer import Tokenizer
from atlas.tokenizer.chat import CHAT_TEMPLATE
from atlas.tokenizer.load import with_chat_template

Stream = TokenStream | Conversations


@dataclass(frozen=True)
class ResolvedData:
    """The streams of a run, their tokenizer, and the fingerprint that identifies the training data.

    A mixture has several training streams, each with its weight. A single dataset is a mixture of one.
    """

    trains: tuple[Stream, ...]
    weights: tuple[float, ...]
    vals: tuple[Stream, ...]
    tokenizer: Tokenizer
    fingerprint: str
    notes: list[str]
    """Findings and decisions from the preparation of the data, one line each."""

    @property
    def train(self) -> Stream:
        """The first training stream. Only a mixture has more than one training stream."""
        return self.trains[0]

    @property
    def val(self) -> Stream | None:
        """The first validation stream, or None."""
        return self.vals[0] if self.vals else None

    @property
    def val_fingerprint(self) -> str:
        """Identifies the validation data."""
        parts = [
            [stream.fingerprint]
            if isinstance(stream, Conversations)
            else [sha256 for _, sha256 in stream.files]
            for stream in self.vals
        ]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @property
    def name(self) -> str:
        """The name of the training data in messages."""
        return ", ".join(stream.name for stream in self.trains)

    @property
    def has_conversations(self) -> bool:
        """Whether the model is trained on conversations."""
        return any(isinstance(stream, Conversations) for stream in self.trains)


def resolve_data(
    train_data: str | Path,
    val_data: str | Path | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    val_fraction: float = 0.05,
    chat_format: str | None = None,
    on_error: str | None = None,
) -> ResolvedData:
    """Open or prepare the data of a run.

    `chat_format` is the layout of conversations that the user named, and `on_error` is that of `Reading`.
    `tokenizer` is the tokenizer that the user named. By default a prepared folder uses its own tokenizer, and other
    data uses GPT-2's. Without `val_data`, `val_fraction` of a text or of conversations is held out. If `val_data` is a
    prepared folder, Atlas uses its validation split, or else its training split.

    Raises `DataError` for missing or empty data, and if `tokenizer` is not the tokenizer of a prepared folder.
    """
    train: Stream
    val: Stream | None
    held_out = val_fraction if val_data is None else 0.0
    has_conversations = holds_conversations(train_data, chat_format)
    if chat_format is not None and not has_conversations:
        raise DataError(
            f"data.chat_format {chat_format}: {train_data} holds no conversations in a known layout; omit it "
            "to train on the text"
        )
    if has_conversations:
        tokenizer = with_chat_template(tokenizer or Tokenizer.gpt2(), CHAT_TEMPLATE)
        train, val, notes = read_conversations(
            train_data, tokenizer, val_fraction=held_out, chat_format=chat_format, on_error=on_error
        )
        fingerprint = train.fingerprint
    else:
        if is_prepared(train_data):
            dataset, notes = open_dataset(train_data), []
            if tokenizer and dataset.tokenizer_fingerprint != tokenizer.fingerprint:
                raise DataError(
                    f"{dataset.folder}: was prepared with tokenizer {dataset.tokenizer_state.get('name')} "
                    f"({dataset.tokenizer_fingerprint[:16]}), not with {tokenizer.name} "
                    f"({tokenizer.fingerprint[:16]}); give the text that it was prepared from instead, or prepare "
                    "that text with atlas prepare --tokenizer"
                )
            tokenizer = tokenizer or dataset.tokenizer()
        else:
            tokenizer = tokenizer or Tokenizer.gpt2()
            reading = Reading(on_error=on_error)
            dataset = open_dataset(prepare_text_cached([train_data], tokenizer, held_out, reading))
            notes = dataset.manifest.notes
        train, val = replace(dataset.train, name=str(train_data)), dataset.split("val")
        fingerprint = dataset.fingerprint
    if val_data is not None:
        layout = chat_format if holds_conversations(val_data, chat_format) else None
        other = resolve_data(
            val_data, tokenizer=tokenizer, val_fraction=0.0, chat_format=layout, on_error=on_error
        )
        val = other.val or other.train
    return ResolvedData((train,), (1.0,), (val,) if val else (), tokenizer, fingerprint, notes)


def resolve_mixture(
    mixture: Sequence[MixturePart],
    val_data: str | Path | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    val_fraction: float = 0.05,
    chat_format: str | None = None,
    on_error: str | None = None,
) -> ResolvedData:
    """Open or prepare several datasets, as `resolve_data` does for one. Validation uses the validation data of all
    datasets, or `val_data`.

    All datasets use one tokenizer: the tokenizer that the user named, else the tokenizer of the first prepared folder,
    else GPT-2's.
    """
    prepared = next((part.path for part in mixture if is_prepared(part.path)), None)
    if tokenizer is None and prepared is not None:
        tokenizer = open_dataset(prepared).tokenizer()
    holding = [holds_conversations(part.path, chat_format) for part in mixture]
    if chat_format is not None and not any(holding):
        raise DataError(
            f"data.chat_format {chat_format}: no part of data.mixture has rows of conversations; omit it"
        )
    parts = [
        resolve_data(
            part.path,
            val_data,
            tokenizer=tokenizer,
            val_fraction=val_fraction,
            chat_format=chat_format if has_chats else None,
            on_error=on_error,
        )
        for part, has_chats in zip(mixture, holding, strict=True)
    ]
    total = sum(part.weight for part in mixture)
    weights = tuple(part.weight / total for part in mixture)
    identity = [f"{part.fingerprint} {weight!r}" for part, weight in zip(parts, weights, strict=True)]
    return ResolvedData(
        trains=tuple(part.train for part in parts),
        weights=weights,
        vals=parts[0].vals if val_data else tuple(stream for part in parts for stream in part.vals),
        tokenizer=next(
            (part.tokenizer for part in parts if part.tokenizer.chat_template), parts[0].tokenizer
        ),
        fingerprint=hashlib.sha256("\n".join(identity).encode()).hexdigest(),
        notes=[note for part in parts for note in part.notes],
    )
