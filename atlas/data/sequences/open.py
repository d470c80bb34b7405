"""What `--train-data` and `--val-data` name, opened: prepared folders as they are, plain text prepared, conversations
read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from atlas.config.config import MixturePart
from atlas.data.prepare.pipeline import prepare_text_cached
from atlas.data.sequences.conversations import Conversations, holds_conversations, read_conversations
from atlas.data.shards import PreparedDataset, TokenStream, is_prepared, open_dataset
from atlas.errors import DataError
from atlas.tokenizer import Tokenizer

Stream = TokenStream | Conversations


@dataclass(frozen=True)
class ResolvedData:
    """The streams of a run, their tokenizer, and the fingerprint that tells this training data from other.

    A mixture has several training streams, each with its weight; one dataset is a mixture of one.
    """

    trains: tuple[Stream, ...]
    weights: tuple[float, ...]
    vals: tuple[Stream, ...]
    tokenizer: Tokenizer
    fingerprint: str
    notes: list[str]
    """What was found and decided when plain text was prepared, one line each."""

    @property
    def train(self) -> Stream:
        """The first training stream, which is the only one but in a mixture."""
        return self.trains[0]

    @property
    def val(self) -> Stream | None:
        """The first validation stream, if there is any."""
        return self.vals[0] if self.vals else None

    @property
    def name(self) -> str:
        """What the user calls the training data."""
        return ", ".join(stream.name for stream in self.trains)

    @property
    def has_conversations(self) -> bool:
        """Whether there is something to learn the form of a conversation from."""
        return any(isinstance(stream, Conversations) for stream in self.trains)


def resolve_data(
    train_data: str | Path,
    val_data: str | Path | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    val_fraction: float = 0.05,
) -> ResolvedData:
    """Open or prepare the data of a run.

    `tokenizer` is the one that the user named. Left out, a prepared folder brings its own and plain text
    takes GPT-2's. `val_fraction` of a plain text is held out, unless `val_data` is given. Of a prepared
    folder given as `val_data` the validation part is taken, or all of it where it has none.

    Raises `DataError` for missing or empty data, and where two tokenizers would meet.
    """
    if holds_conversations(train_data):
        return _resolve_conversations(train_data, val_data, tokenizer or Tokenizer.gpt2(), val_fraction)
    notes: list[str] = []
    if is_prepared(train_data):
        dataset = open_dataset(train_data)
        _refuse_other_tokenizer(dataset, tokenizer)
        tokenizer = tokenizer or dataset.tokenizer()
    else:
        tokenizer = tokenizer or Tokenizer.gpt2()
        held_out = val_fraction if val_data is None else 0.0
        dataset = open_dataset(prepare_text_cached([train_data], tokenizer, val_fraction=held_out))
        notes = dataset.manifest.notes
    train = dataset.split("train")
    assert train is not None
    val = dataset.split("val") if val_data is None else _validation_stream(val_data, tokenizer)
    return ResolvedData(
        trains=(replace(train, name=str(train_data)),),
        weights=(1.0,),
        vals=(val,) if val else (),
        tokenizer=tokenizer,
        fingerprint=dataset.fingerprint,
        notes=notes,
    )


def resolve_mixture(
    mixture: Sequence[MixturePart],
    val_data: str | Path | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    val_fraction: float = 0.05,
) -> ResolvedData:
    """Open or prepare several datasets, as `resolve_data` does one; validation is that of all, or `val_data`.

    All have one tokenizer: the one that the user named, else that of the first prepared folder among them.
    """
    prepared = next((part.path for part in mixture if is_prepared(part.path)), None)
    if tokenizer is None and prepared is not None:
        tokenizer = open_dataset(prepared).tokenizer()
    parts = [
        resolve_data(part.path, val_data, tokenizer=tokenizer, val_fraction=val_fraction) for part in mixture
    ]
    total = sum(part.weight for part in mixture)
    weights = tuple(part.weight / total for part in mixture)
    identity = [f"{part.fingerprint} {weight!r}" for part, weight in zip(parts, weights, strict=True)]
    return ResolvedData(
        trains=tuple(part.train for part in parts),
        weights=weights,
        vals=parts[0].vals if val_data else tuple(stream for part in parts for stream in part.vals),
        tokenizer=parts[0].tokenizer,
        fingerprint=hashlib.sha256("\n".join(identity).encode()).hexdigest(),
        notes=[note for part in parts for note in part.notes],
    )


def _resolve_conversations(
    path: str | Path, val_data: str | Path | None, tokenizer: Tokenizer, val_fraction: float
) -> ResolvedData:
    held_out = val_fraction if val_data is None else 0.0
    train, val, notes = read_conversations(path, tokenizer, val_fraction=held_out)
    vals = val if val_data is None else _validation_stream(val_data, tokenizer)
    return ResolvedData(
        trains=(train,),
        weights=(1.0,),
        vals=(vals,) if vals else (),
        tokenizer=tokenizer,
        fingerprint=train.fingerprint,
        notes=notes,
    )


def _validation_stream(val_data: str | Path, tokenizer: Tokenizer) -> Stream:
    if holds_conversations(val_data):
        return read_conversations(val_data, tokenizer, val_fraction=0.0)[0]
    if is_prepared(val_data):
        dataset = open_dataset(val_data)
        _refuse_other_tokenizer(dataset, tokenizer)
    else:
        dataset = open_dataset(prepare_text_cached([val_data], tokenizer, val_fraction=0.0))
    stream = dataset.split("val") or dataset.split("train")
    assert stream is not None
    return replace(stream, name=str(val_data))


def _refuse_other_tokenizer(dataset: PreparedDataset, tokenizer: Tokenizer | None) -> None:
    if tokenizer is None or dataset.tokenizer_fingerprint == tokenizer.fingerprint:
        return
    raise DataError(
        f"{dataset.folder}: was prepared with tokenizer {dataset.tokenizer_state.get('name')} "
        f"({dataset.tokenizer_fingerprint[:16]}), not with {tokenizer.name} ({tokenizer.fingerprint[:16]}); "
        "give the text that it was prepared from instead, or prepare that with atlas prepare --tokenizer"
    )
