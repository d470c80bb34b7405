"""What `--train-data` and `--val-data` name, opened: prepared folders as they are, plain text prepared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from atlas.data.prepare import prepare_text_cached
from atlas.data.shards import PreparedDataset, TokenStream, is_prepared, open_dataset
from atlas.errors import AtlasError
from atlas.tokenizer import Tokenizer


@dataclass(frozen=True)
class ResolvedData:
    """The streams of a run, their tokenizer, and the fingerprint that tells this training data from other."""

    train: TokenStream
    val: TokenStream | None
    tokenizer: Tokenizer
    fingerprint: str
    notes: list[str]
    """What was found and decided when plain text was prepared, one line each."""


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

    Raises `AtlasError` for missing or empty data, and where two tokenizers would meet.
    """
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
        train=replace(train, name=str(train_data)),
        val=val,
        tokenizer=tokenizer,
        fingerprint=dataset.fingerprint,
        notes=notes,
    )


def _validation_stream(val_data: str | Path, tokenizer: Tokenizer) -> TokenStream:
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
    raise AtlasError(
        f"{dataset.folder}: was prepared with tokenizer {dataset.tokenizer_state.get('name')} "
        f"({dataset.tokenizer_fingerprint[:16]}), not with {tokenizer.name} ({tokenizer.fingerprint[:16]}); "
        "prepare it again with atlas prepare --tokenizer"
    )
