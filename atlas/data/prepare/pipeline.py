"""Documents → token shards: cleaned, split into train and validation, tokenized, written, described."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atlas.data.prepare.batching import Position
from atlas.data.prepare.cleaning import Cleaning
from atlas.data.prepare.dedup import require_datasketch
from atlas.data.prepare.merge import Merger
from atlas.data.prepare.split import FEWEST_DOCUMENTS, SplitRule
from atlas.data.prepare.staleness import roots_to_keep, what_changed
from atlas.data.prepare.tokenize import Encoder
from atlas.data.prepare.train_tokenizer import learn_tokenizer
from atlas.data.prepare.workers import WorkerPool
from atlas.data.prepare.workspace import Workspace, alone, building, refuse_foreign
from atlas.data.shards import (
    FORMAT_VERSION,
    Manifest,
    PreparedDataset,
    SplitRecord,
    is_prepared,
    open_dataset,
    token_dtype,
)
from atlas.data.text.sources import SourceReport, Sources
from atlas.data.text.stdin import spooled_standard_input
from atlas.errors import AtlasError, DataError
from atlas.files import cache_folder
from atlas.progress import byte_progress, say
from atlas.tokenizer import ByteLevelTokenizer, Tokenizer

SHARD_TOKENS = 100_000_000
COMMIT_SECONDS = 10.0
"""So much work a kill may cost; a finished shard is never done again."""
_WORTH_SAYING = 1_000_000
"""Bytes on the disk."""
_PROBE_CHARS, _ENCODED_PROBE_CHARS = 1 << 23, 1 << 19
"""Of the beginning so much is read, and so much tokenized, to know what the whole will take."""


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
    cleaning: Cleaning = field(default_factory=Cleaning)

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise DataError(f"val_fraction {self.val_fraction}: must be at least 0 and below 1")
        if self.shard_tokens < 1:
            raise DataError(f"shard_tokens {self.shard_tokens}: must be at least 1")
        if self.cleaning.near_dedup:
            require_datasketch()

    def to_json(self, sources: Sources) -> dict[str, Any]:
        return vars(self) | {"cleaning": self.cleaning.to_json(), "text_field": sources.text_field}

    def key(self, sources: Sources, tokenizer: Tokenizer | None) -> str:
        """sha256 that two preparations share only if they make the same dataset."""
        fingerprint = tokenizer.fingerprint if tokenizer else None
        identity = [FORMAT_VERSION, sources.content_key, fingerprint, self.to_json(sources)]
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
    cleaning: Cleaning | None = None,
    workers: int | None = None,
    engine: str = "local",
    trust_archives: bool = False,
) -> Summary:
    """Make a dataset folder of the text in `inputs`; `output` defaults to `default_output`.

    The tokenizer is `tokenizer`, or a BPE of `train_tokenizer` tokens learnt from the training part, or
    GPT-2's. `workers` processes tokenize (default: one for each core), here or, with `engine="ray"`, on a Ray
    cluster; the shards are the same, bit for bit. A folder that holds exactly this already is left as it is, an
    older dataset is replaced, and what a killed call had done is gone on with.
    Raises `DataError` for input that cannot be read, an output folder that holds something else, a text of
    which nothing is left to train on, and, unless `trust_archives`, for a zip as large as only bombs are.
    """
    options = _Options(val_fraction, shard_tokens, train_tokenizer, cleaning or Cleaning())
    if tokenizer and train_tokenizer:
        raise DataError(
            f"tokenizer {tokenizer.name}: cannot be given together with training a new one; give one of them"
        )
    if not train_tokenizer:
        tokenizer = Tokenizer.wrap(tokenizer) if tokenizer else Tokenizer.gpt2()
    with _file_errors(), spooled_standard_input(inputs, output) as stdin:
        sources = Sources(inputs, text_field=text_field, trust_archives=trust_archives, stdin=stdin)
        target = default_output(sources) if output is None else Path(output)
        with _file_errors(target):
            return _prepare(sources, target, tokenizer, options, WorkerPool(workers, engine))


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
        return _prepare(sources, folder, tokenizer, options, WorkerPool()).dataset.folder


@contextmanager
def _file_errors(place: Path | str = "preparation") -> Iterator[None]:
    """A file that cannot be read, a folder that cannot be written, a full disk: the user's to mend."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{error.filename or place}: {error.strerror or error}; check its permissions and the free space"
        ) from None


def default_output(sources: Sources) -> Path:
    """`data/processed/wikipedia` for the Kaggle archive, else `data/processed/<stem>` of the first input."""
    return Path("data", "processed", "wikipedia" if sources.is_kaggle else sources.stem)


def _prepare(
    sources: Sources, output: Path, tokenizer: Tokenizer | None, options: _Options, pool: WorkerPool
) -> Summary:
    refuse_foreign(output)
    key = options.key(sources, tokenizer)
    if existing := _existing(output, key):
        return Summary(existing, unchanged=True)
    if next(sources.documents(), None) is None:
        raise DataError(f"{sources.names}: holds no text to train on; give some that does")
    with alone(output):
        if existing := _existing(output, key):  # made meanwhile, by the one that this one waited for
            return Summary(existing, unchanged=True)
        for line in what_changed(output, sources, tokenizer, options.to_json(sources)):
            say(line)
        with building(output, key) as workspace:
            _make(sources, output, tokenizer, options, pool, workspace)
        return Summary(open_dataset(output), unchanged=False)


def _make(
    sources: Sources,
    output: Path,
    tokenizer: Tokenizer | None,
    options: _Options,
    pool: WorkerPool,
    workspace: Workspace,
) -> None:
    """Read everything once, write the shards, and describe them; or go on where a killed call was."""
    state, folder = workspace.state or {}, workspace.dataset
    if state:
        rule = SplitRule(**state["rule"])
        tokenizer = tokenizer or Tokenizer.load(folder)
    else:
        rule = SplitRule.choose(sources.documents(), options.val_fraction, options.cleaning)
        if tokenizer is None:
            assert options.train_tokenizer is not None
            tokenizer = learn_tokenizer(sources, rule, options.cleaning, options.train_tokenizer)
        if is_own := isinstance(tokenizer, ByteLevelTokenizer) and tokenizer.kind == "bpe":
            tokenizer.save(folder / "tokenizer.json")
        if is_own and options.train_tokenizer:
            workspace.commit({"rule": vars(rule)})
    dtype = token_dtype(tokenizer.vocab_size)
    merger = Merger(
        folder,
        workspace.folder,
        rule,
        options.cleaning,
        dtype,
        options.shard_tokens,
        state=state.get("assembly"),
    )
    _require_space(sources, tokenizer, output, done=merger.tokens)
    if merger.tokens:
        say(f"{output}: {merger.tokens:,} tokens were done before; going on behind them")
    try:
        report = _tokenize(sources, merger, Encoder(tokenizer, options.cleaning, dtype.str), pool, workspace)
        splits = merger.finish()
    finally:
        merger.close()
    gone = [f"{record.documents:,} by {step}" for step, record in merger.left_out.items()]
    if not splits and gone:
        shortest = options.cleaning.min_chars
        less = f", or a smaller --min-chars than {shortest}" if shortest > 1 else ""
        raise DataError(
            f"{sources.names}: cleaning leaves no text to train on: every document is left out "
            f"({', '.join(gone)}); give more text{less}"
        )
    if "train" not in splits:
        raise DataError(
            f"{sources.names}: val_fraction {options.val_fraction} leaves no text to train on; "
            "give more text, or a smaller fraction"
        )
    Manifest(
        version=FORMAT_VERSION,
        key=workspace.key,
        tokenizer={name: value for name, value in tokenizer.state().items() if name != "json"},
        dtype=dtype.str,
        splits=splits,
        options=options.to_json(sources),
        source=sources.description(report)
        | {"content_key": sources.content_key, "roots": roots_to_keep(sources)},
        notes=[*sources.notes(report), *_notes(splits, rule, tokenizer, options)],
        cleaning=merger.cleaned,
    ).write(folder)


def _tokenize(
    sources: Sources, merger: Merger, encoder: Encoder, pool: WorkerPool, workspace: Workspace
) -> SourceReport:
    """Every batch into the assembly, with a commit after each finished shard and every few seconds."""
    state = workspace.state or {}
    report = SourceReport.from_json(state["report"]) if "report" in state else SourceReport()
    start = Position(*state.get("position", ()))
    committed = time.monotonic()
    with byte_progress(sources.total_bytes, "tokenizing") as advance:
        shown = 0
        for batch, encoded in pool.encode(sources, merger.rule, start, encoder):
            finished_shard = merger.add(batch, encoded)
            report.merge(batch.report)
            advance(batch.bytes_read - shown)
            shown = batch.bytes_read
            if finished_shard or time.monotonic() - committed >= COMMIT_SECONDS:
                workspace.commit(
                    {
                        "rule": vars(merger.rule),
                        "position": batch.end,
                        "report": report.to_json(),
                        "assembly": merger.sync(),
                    }
                )
                committed = time.monotonic()
    return report


def _require_space(sources: Sources, tokenizer: Tokenizer, output: Path, *, done: int) -> None:
    """Say what the tokens will take if the rest of the text is like its beginning; refuse a disk too small."""
    bytes_read: list[int] = []
    tokens = encoded_chars = chars = 0
    for piece in sources.documents(advance=bytes_read.append):
        chars += len(piece.text)
        if encoded_chars < _ENCODED_PROBE_CHARS:
            tokens += len(tokenizer.encode(piece.text)) + piece.ends_document
            encoded_chars += len(piece.text)
        if chars >= _PROBE_CHARS:
            break
    all_chars = chars * max(1, sources.total_bytes) / max(1, sum(bytes_read))
    all_tokens = int(all_chars * tokens / max(1, encoded_chars))
    needed = max(0, all_tokens - done) * token_dtype(tokenizer.vocab_size).itemsize
    free = shutil.disk_usage(output.absolute().parent).free
    if free < needed:
        raise DataError(
            f"{output}: its disk has {free / 1e6:,.0f} MB free, the tokens of {sources.names} take about "
            f"{needed / 1e6:,.0f} MB; free some, or choose a folder on another disk"
        )
    if needed >= _WORTH_SAYING:
        say(f"{output}: will take about {needed / 1e6:,.0f} MB of the {free / 1e6:,.0f} MB that are free")


def _existing(output: Path, key: str) -> PreparedDataset | None:
    """The dataset that `output` holds, if it is the wanted one and whole."""
    try:
        dataset = open_dataset(output) if is_prepared(output) else None
    except (AtlasError, OSError):
        return None  # a damaged one, or one that another process just replaces, is made again
    return dataset if dataset and dataset.manifest.key == key else None


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
