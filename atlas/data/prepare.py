"""Documents → token shards: split into train and validation, tokenized, written, described."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from atlas.data.folder import alone, cache_folder, refuse_foreign, replacing
from atlas.data.progress import byte_progress
from atlas.data.shards import (
    FORMAT_VERSION,
    Manifest,
    PreparedDataset,
    SplitRecord,
    is_prepared,
    open_dataset,
    token_dtype,
)
from atlas.data.sources import SourceReport, Sources
from atlas.data.split import FEWEST_DOCUMENTS, Part, SplitRule
from atlas.data.writer import SplitWriter
from atlas.errors import AtlasError
from atlas.tokenizer import ByteLevelTokenizer, Tokenizer

SHARD_TOKENS = 100_000_000
_BATCH_CHARS = 1 << 20
_BATCH_PARTS = 4096


@dataclass(frozen=True)
class Summary:
    """What `prepare` made, or found made already."""

    dataset: PreparedDataset
    unchanged: bool

    @property
    def notes(self) -> list[str]:
        """What was found and decided on the way, one line each."""
        return self.dataset.manifest.notes


@dataclass(frozen=True)
class _Options:
    """What besides text and tokenizer decides the shards."""

    val_fraction: float
    shard_tokens: int = SHARD_TOKENS
    train_tokenizer: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise AtlasError(f"val_fraction {self.val_fraction}: must be at least 0 and below 1")
        if self.shard_tokens < 1:
            raise AtlasError(f"shard_tokens {self.shard_tokens}: must be at least 1")

    def key(self, sources: Sources, tokenizer: Tokenizer | None) -> str:
        """sha256 that two preparations share only if they make the same dataset."""
        fingerprint = tokenizer.fingerprint if tokenizer else None
        identity = [FORMAT_VERSION, sources.content_key, fingerprint, *vars(self).values()]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def prepare(
    inputs: Sequence[str | Path],
    output: str | Path | None = None,
    tokenizer: Tokenizer | None = None,
    *,
    train_tokenizer: int | None = None,
    val_fraction: float = 0.05,
    text_field: str = "text",
    shard_tokens: int = SHARD_TOKENS,
    trust_archives: bool = False,
) -> Summary:
    """Make a dataset folder of the text in `inputs`; `output` defaults to `default_output`.

    The tokenizer is `tokenizer`, or a BPE of `train_tokenizer` tokens learnt from the training part, or
    GPT-2's. A folder that holds exactly this already is left as it is; an older dataset is replaced.
    Raises `AtlasError` for input that cannot be read, an output folder that holds something else, a text of
    which nothing is left to train on, and, unless `trust_archives`, for a zip as large as only bombs are.
    """
    options = _Options(val_fraction, shard_tokens, train_tokenizer)
    if tokenizer and train_tokenizer:
        raise AtlasError(
            f"tokenizer {tokenizer.name}: cannot be given together with training a new one; give one of them"
        )
    if not tokenizer and not train_tokenizer:
        tokenizer = Tokenizer.gpt2()
    with _file_errors():
        sources = Sources(inputs, text_field=text_field, trust_archives=trust_archives)
    target = default_output(sources) if output is None else Path(output)
    with _file_errors(target):
        return _prepare(sources, target, tokenizer, options)


def prepare_text_cached(
    paths: Sequence[str | Path], tokenizer: Tokenizer, val_fraction: float, *, text_field: str = "text"
) -> Path:
    """The dataset folder of plain text, prepared once for the same content, tokenizer and options.

    It lies in the user's cache folder, or in the one that `ATLAS_CACHE_DIR` names.
    """
    options = _Options(val_fraction)
    with _file_errors():
        sources = Sources(paths, text_field=text_field)
        folder = cache_folder() / "datasets" / options.key(sources, tokenizer)[:32]
    with _file_errors(folder):
        return _prepare(sources, folder, tokenizer, options).dataset.folder


@contextmanager
def _file_errors(place: Path | str = "preparation") -> Iterator[None]:
    """A file that cannot be read, a folder that cannot be written, a full disk: the user's to mend."""
    try:
        yield
    except OSError as error:
        raise AtlasError(
            f"{error.filename or place}: {error.strerror or error}; check its permissions and the free space"
        ) from None


def default_output(sources: Sources) -> Path:
    """`data/processed/wikipedia` for the Kaggle archive, else `data/processed/<stem>` of the first input."""
    first = sources.paths[0].resolve()
    return Path("data", "processed", "wikipedia" if sources.is_kaggle else first.stem)


def _prepare(sources: Sources, output: Path, tokenizer: Tokenizer | None, options: _Options) -> Summary:
    refuse_foreign(output)
    key = options.key(sources, tokenizer)
    existing = _existing(output, key)
    if existing:
        return Summary(existing, unchanged=True)
    if next(sources.documents(), None) is None:
        raise AtlasError(f"{sources.names}: holds no text to train on; give some that does")
    rule = SplitRule.choose(sources.documents(), options.val_fraction)
    with alone(output):
        if existing := _existing(output, key):  # made meanwhile, by the one that this one waited for
            return Summary(existing, unchanged=True)
        _make(sources, output, tokenizer or _train_tokenizer(sources, rule, options), rule, key, options)
        return Summary(open_dataset(output), unchanged=False)


def _make(
    sources: Sources, output: Path, tokenizer: Tokenizer, rule: SplitRule, key: str, options: _Options
) -> None:
    """Read everything once, write the shards, and put the folder that describes them in place."""
    report = SourceReport()
    _require_space(sources, tokenizer, output)
    with replacing(output) as folder:
        with byte_progress(sources.total_bytes, "tokenizing") as advance:
            parts = rule.assign(sources.documents(report, advance))
            splits = _write_shards(folder, parts, tokenizer, options.shard_tokens)
        if "train" not in splits:
            raise AtlasError(
                f"{sources.names}: val_fraction {options.val_fraction} leaves no text to train on; "
                "give more text, or a smaller fraction"
            )
        if isinstance(tokenizer, ByteLevelTokenizer) and tokenizer.kind == "bpe":
            tokenizer.save(folder / "tokenizer.json")
        Manifest(
            version=FORMAT_VERSION,
            key=key,
            tokenizer={name: value for name, value in tokenizer.state().items() if name != "json"},
            dtype=token_dtype(tokenizer.vocab_size).str,
            splits=splits,
            options={**vars(options), "text_field": sources.text_field},
            source=sources.description(report),
            notes=[*sources.notes(report), *_notes(splits, rule, tokenizer, options)],
        ).write(folder)


def _existing(output: Path, key: str) -> PreparedDataset | None:
    """The dataset that `output` holds, if it is the wanted one and whole."""
    try:
        dataset = open_dataset(output) if is_prepared(output) else None
    except (AtlasError, OSError):
        return None  # a damaged one, or one that another process just replaces, is made again
    return dataset if dataset and dataset.manifest.key == key else None


def _train_tokenizer(sources: Sources, rule: SplitRule, options: _Options) -> Tokenizer:
    """A BPE learnt from the training part alone: validation text must be as new to it as to the model."""
    assert options.train_tokenizer is not None
    with byte_progress(sources.total_bytes, "learning the vocabulary") as advance:
        parts = rule.assign(sources.documents(advance=advance))
        return _learn((part.text for part in parts if part.split == "train"), options.train_tokenizer)


def _learn(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """`Tokenizer.train` in a thread beside this one: it is compiled code that would hear no signal for as
    long as it takes, minutes for a large text. An interrupt here leaves it without more text to read."""
    result: Future[Tokenizer] = Future()
    given_up = threading.Event()

    def learn() -> None:
        try:
            unless_given_up = itertools.takewhile(lambda _: not given_up.is_set(), texts)
            result.set_result(Tokenizer.train(unless_given_up, vocab_size))
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=learn, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.2)  # Windows hears Ctrl-C only between two waits
    finally:
        given_up.set()
    return result.result()


def _require_space(sources: Sources, tokenizer: Tokenizer, output: Path) -> None:
    """Refuse a disk that the tokens would not fit on, if the rest of the text is like its beginning."""
    free = shutil.disk_usage(output.absolute().parent).free
    token_bytes = token_dtype(tokenizer.vocab_size).itemsize
    if free > sources.total_bytes * token_bytes:
        return
    read: list[int] = []
    tokens = chars = 0
    for piece in sources.documents(advance=read.append):
        tokens += len(tokenizer.encode(piece.text)) + piece.ends_document
        chars += len(piece.text)
        if chars >= _BATCH_CHARS:
            break
    needed = tokens * token_bytes * sources.total_bytes // max(1, sum(read))
    if free < needed:
        raise AtlasError(
            f"{output}: its disk has {free / 1e6:,.0f} MB free, the tokens of {sources.names} take about "
            f"{needed / 1e6:,.0f} MB; free some, or choose a folder on another disk"
        )


def _write_shards(
    folder: Path, parts: Iterable[Part], tokenizer: Tokenizer, shard_tokens: int
) -> dict[str, SplitRecord]:
    dtype = token_dtype(tokenizer.vocab_size)
    writers = {split: SplitWriter(folder, split, dtype, shard_tokens) for split in ("train", "val")}
    end = np.array([tokenizer.eos_id])
    try:
        for batch in _batches(parts):
            for part, ids in zip(batch, tokenizer.encode_batch([part.text for part in batch]), strict=True):
                tokens = np.array(ids, dtype=np.int64)
                writers[part.split].write(
                    np.concatenate([tokens, end]) if part.ends_document else tokens,
                    num_bytes=len(part.text.encode("utf-8")),
                    starts_document=part.starts_document,
                )
        records = {split: writer.close() for split, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.abandon()
    return {split: record for split, record in records.items() if record}


def _batches(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """As much at once as keeps all cores busy and memory small."""
    batch: list[Part] = []
    chars = 0
    for part in parts:
        batch.append(part)
        chars += len(part.text)
        if chars >= _BATCH_CHARS or len(batch) >= _BATCH_PARTS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _notes(
    splits: dict[str, SplitRecord], rule: SplitRule, tokenizer: Tokenizer, options: _Options
) -> list[str]:
    notes = []
    wished = options.train_tokenizer
    if wished and tokenizer.vocab_size < wished:
        notes.append(
            f"the text is too small for {wished:,} tokens: the vocabulary has {tokenizer.vocab_size:,}"
        )
    if rule.cut_at is not None:
        notes.append(
            f"fewer than {FEWEST_DOCUMENTS} documents: not split by document, "
            f"the last {100 * rule.val_fraction:.3g} % of the text are held out for validation"
        )
    if rule.val_fraction and "val" not in splits:
        notes.append("nothing was held out for validation: too little text for this --val-fraction")
    return notes
