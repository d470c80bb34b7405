"""Documents → token shards: clean, split into train and validation, tokenize, write, describe."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from atlas.data.prepare.batching import Batch, Position, TextSoFar, read_again
from atlas.data.prepare.checks import require_most, require_space
from atlas.data.prepare.cleaning import Cleaning
from atlas.data.prepare.dedup import require_datasketch
from atlas.data.prepare.merge import Merger
from atlas.data.prepare.split import SplitRule
from atlas.data.prepare.staleness import roots_to_keep, what_changed
from atlas.data.prepare.tokenize import Encoder
from atlas.data.prepare.train_tokenizer import train_tokenizer_on
from atlas.data.prepare.workers import WorkerPool
from atlas.data.prepare.workspace import (
    LEFT_OUT,
    State,
    Workspace,
    building,
    locked,
    refuse_foreign,
    remove_leftovers,
)
from atlas.data.shards import FORMAT_VERSION, Manifest, PreparedDataset, open_dataset, token_dtype
from atlas.data.text.files import is_url
from atlas.data.text.hashes import hashes_of
from atlas.data.text.report import SourceReport, counted
from atlas.data.text.sources import Reading, Sources
from atlas.data.text.stdin import spooled_standard_input
from atlas.errors import AtlasError, DataError
from atlas.files import cache_folder, explain_failed_write, local_path, on_one_line
from atlas.outputs import place_of
from atlas.progress import byte_progress, notify
from atlas.tokenizer import STORED_AS_FILE, Tokenizer
from atlas.tokenizer.bpe import check_vocab_size

SHARD_TOKENS = 100_000_000
_SPLIT_VERSION = 2
"""The version of the rules by which documents are held out."""
COMMIT_SECONDS = 10.0
"""Seconds between two commits. A kill loses at most the work since the last commit, and never a finished shard."""


@dataclass(frozen=True)
class Summary:
    """The result of `prepare`: a new dataset, or an existing one that is unchanged."""

    dataset: PreparedDataset
    unchanged: bool

    @property
    def notes(self) -> list[str]:
        """Findings and decisions from the preparation, one line each."""
        return self.dataset.manifest.notes


@dataclass(frozen=True)
class _Options:
    """The settings that determine the shards, in addition to the text and the tokenizer."""

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


def prepare(
    inputs: Sequence[str | Path],
    output: str | Path | None = None,
    tokenizer: Tokenizer | None = None,
    *,
    train_tokenizer: int | None = None,
    val_fraction: float = 0.05,
    reading: Reading | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    shard_tokens: int = SHARD_TOKENS,
    cleaning: Cleaning | None = None,
    workers: int | None = None,
    engine: str = "local",
    trust_archives: bool = False,
    ask: Callable[[str], bool] | None = None,
) -> Summary:
    """Make a dataset of the text in `inputs`, in the folder `output`, which defaults to `default_output`.

    The tokenizer is `tokenizer`, or a BPE of `train_tokenizer` tokens trained on the training split. The default is
    GPT-2's tokenizer. `workers` processes tokenize, by default at most one per core. With `engine="ray"`, the processes
    run on a Ray cluster. The shards are the same in every case, bit for bit. If `output` already contains exactly this
    dataset, nothing is changed. A different dataset is replaced, and an interrupted preparation is resumed.

    `include` and `exclude` are patterns for the files of folders and archives. If Atlas would leave out more than 10 %
    of the bytes, `ask` decides, and None means no.

    Raises `DataError` if input cannot be read, `output` contains other files, cleaning leaves no text, or too much of
    the input would be left out. Unless `trust_archives`, the function also raises `DataError` for an archive that may
    be a bomb.
    """
    options = _Options(val_fraction, shard_tokens, train_tokenizer, cleaning or Cleaning())
    target = None if output is None else place_of(local_path("--output", output))
    if tokenizer and train_tokenizer:
        raise DataError(
            f"tokenizer {tokenizer.name}: cannot be combined with --train-tokenizer; give one of them"
        )
    if train_tokenizer:
        check_vocab_size(train_tokenizer)
    else:
        tokenizer = Tokenizer.wrap(tokenizer) if tokenizer else Tokenizer.gpt2()
    with _file_errors(), spooled_standard_input(inputs, target) as stdin:
        sources = Sources(
            inputs,
            reading=reading,
            include=include,
            exclude=exclude,
            trust_archives=trust_archives,
            stdin=stdin,
        )
        require_most(sources, ask)
        preparation = _Preparation(sources, tokenizer, options, WorkerPool(workers, engine))
        return preparation.run(target or place_of(default_output(sources)))


def prepare_text_cached(
    paths: Sequence[str | Path], tokenizer: Tokenizer, val_fraction: float, reading: Reading | None = None
) -> Path:
    """Return the dataset folder of plain text. The same content, tokenizer and options are prepared only once.

    The dataset is in the user's cache folder, or in the folder that `ATLAS_CACHE_DIR` names.
    """
    with _file_errors():
        sources = Sources(paths, reading=reading)
        require_most(sources, None)
        preparation = _Preparation(sources, tokenizer, _Options(val_fraction), WorkerPool())
        datasets = cache_folder() / "datasets"
        with explain_failed_write(
            datasets, "set ATLAS_CACHE_DIR to a folder that you may write to", kind=DataError
        ):
            datasets.mkdir(parents=True, exist_ok=True)
        places = [str(path) if is_url(path) else os.path.realpath(path) for path in paths]
        # The name of the work does not depend on the content of the files, which may be corrected before the next call.
        work = hashlib.sha256(json.dumps([places, preparation.work_key]).encode()).hexdigest()
        return preparation.run(datasets / preparation.key[:32], datasets / work[:32]).dataset.folder


@contextmanager
def _file_errors(place: Path | str = "preparation") -> Iterator[None]:
    """Turn an `OSError` into a `DataError`, for example if a file is unreadable or a disk is full."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{error.filename or place}: {error.strerror or error}; check its permissions and the free space"
        ) from None


def default_output(sources: Sources) -> Path:
    """Return `data/processed/wikipedia` for the Kaggle archive, else `data/processed/<stem of the first input>`."""
    return Path("data", "processed", "wikipedia" if sources.is_kaggle else sources.stem)


@dataclass(frozen=True)
class _Preparation:
    """The sources and settings of a dataset, and the processes that make the dataset. If `tokenizer` is None, a new
    tokenizer is trained."""

    sources: Sources
    tokenizer: Tokenizer | None
    options: _Options
    pool: WorkerPool

    @cached_property
    def option_values(self) -> dict[str, Any]:
        """The options as `dataset.json` stores them."""
        reading = asdict(self.sources.reading)
        del reading["names_text_field"], reading["on_error"]  # the dataset is the same
        reading = {name: value for name, value in reading.items() if value is not None}
        return asdict(self.options) | reading

    @cached_property
    def key(self) -> str:
        """sha256 that two preparations share only if they make the same dataset."""
        return self._key_with(self.sources.content_key)

    @property
    def work_key(self) -> str:
        """sha256 that two preparations share if they make the same tokens of the same documents. The documents in two
        texts may differ, unless the tokenizer is trained on them."""
        return self._key_with(None if self.tokenizer else self.sources.content_key)

    def _key_with(self, content_key: str | None) -> str:
        fingerprint = self.tokenizer.fingerprint if self.tokenizer else None
        identity = [FORMAT_VERSION, _SPLIT_VERSION, content_key, fingerprint, self.option_values]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def run(self, output: Path, work: Path | None = None) -> Summary:
        """Make the dataset in `output`, unless `output` already contains this dataset. The lock and the unfinished work
        lie beside `work`, under its name; the default is `output`."""
        work = work or output
        with _file_errors(output):
            refuse_foreign(output)
            if existing := self._existing(output):
                remove_leftovers(output, work)
                return Summary(existing, unchanged=True)
            report = SourceReport()
            if next(self.sources.documents(report), None) is None:
                report.check_faults(self.sources.reading.on_error, total_bytes=self.sources.total_bytes)
                raise DataError(f"{self.sources.names}: holds no text to train on; give a source with text")
            with locked(work), locked(output) if output != work else nullcontext():
                if existing := self._existing(output):  # another process made it while this process waited
                    return Summary(existing, unchanged=True)
                for line in what_changed(output, self.sources, self.tokenizer, self.option_values):
                    notify(line)
                with building(output, work, self.work_key, self._is_usable) as workspace:
                    # The files are hashed before they are read: if one changes in between, the next call sees it.
                    self._make(output, workspace, self.key)
                return Summary(open_dataset(output), unchanged=False)

    def _existing(self, output: Path) -> PreparedDataset | None:
        """Return the dataset in `output` if this dataset is intact and matches this preparation, else None."""
        try:
            dataset = open_dataset(output)
            if dataset.manifest.key != self.key:
                return None
            if self.sources.reading.on_error == "stop" and dataset.manifest.source.get("faults"):
                return None  # it was made without the rows that cannot be read
            if dataset.tokenizer_state["kind"] in STORED_AS_FILE:
                dataset.tokenizer()
            streams = [stream for name in ("train", "val") if (stream := dataset.split(name))]
            files = [file for stream in streams for file in stream.files]
            if hashes_of(path for path, _ in files) != [sha256 for _, sha256 in files]:
                return None
        except (AtlasError, OSError):
            return None  # missing, damaged, or just being replaced by another process: the dataset is prepared again
        return dataset

    def _is_usable(self, state: State) -> bool:
        """Return whether the work that led to `state` is also the beginning of this preparation. If a file changed,
        the text before the position of `state` must be the same, byte for byte."""
        if state["content_key"] == self.sources.content_key:
            return True
        rule, end = SplitRule(**state["rule"]), Position(*state["position"])
        depends_on_the_rest = rule.cuts is not None or self._split_rule.cuts is not None
        if depends_on_the_rest:
            return False
        if TextSoFar(self.sources, rule).key(end.group) != state["groups"]:
            return False
        return read_again(self.sources.groups, rule, end) == str(state["read"])

    @cached_property
    def _split_rule(self) -> SplitRule:
        with byte_progress(self.sources.total_bytes, "counting documents") as advance:
            documents = self.sources.documents(advance=advance)
            return SplitRule.choose(documents, self.options.val_fraction, self.options.cleaning)

    def _make(self, output: Path, workspace: Workspace, key: str) -> None:
        """Tokenize every document once, and write the shards and `dataset.json`. The method resumes the work of an
        interrupted call."""
        options, sources, folder = self.options, self.sources, workspace.dataset
        if workspace.state:
            rule, tokenizer = SplitRule(**workspace.state["rule"]), self.tokenizer or Tokenizer.load(folder)
            said = workspace.state.get("tokenizer_notes", [])
        else:
            rule, wanted = self._split_rule, options.train_tokenizer or 0
            tokenizer, said = (
                (self.tokenizer, [])
                if self.tokenizer
                else train_tokenizer_on(sources, rule, options.cleaning, wanted)
            )
        if tokenizer.kind in STORED_AS_FILE and not (folder / "tokenizer.json").exists():
            tokenizer.save(folder / "tokenizer.json")
        if self.tokenizer is None and not workspace.state:
            workspace.commit(
                {"content_key": sources.content_key, "rule": vars(rule), "tokenizer_notes": said}
            )
        dtype = token_dtype(tokenizer.vocab_size)
        with closing(Merger(workspace, rule, options.cleaning, dtype, options.shard_tokens)) as merger:
            require_space(sources, tokenizer, output, done=merger.tokens)
            if merger.tokens:
                notify(f"{output}: {merger.tokens:,} tokens were done before; resuming after them")
            encoder = Encoder(tokenizer, options.cleaning, dtype.str)
            report = self._tokenize(merger, encoder, workspace, {"tokenizer_notes": said})
            splits = merger.finish()
        self._require_text(splits, merger.cleaned["short"].documents)
        if missing := [*sources.choice.names_with_reasons(), *report.faults]:
            if unnamed := report.num_faults - len(report.faults):
                missing.append(f"and {unnamed:,} more rows or files that cannot be read")
            (folder / LEFT_OUT).write_text("".join(f"{on_one_line(line)}\n" for line in missing), "utf-8")
        facts = {"content_key": sources.content_key, "roots": roots_to_keep(sources)}
        notes = [*sources.notes(report), *said, *self._notes(splits, rule, tokenizer)]
        notes += report.fault_notes(f", see {output / LEFT_OUT}")
        if changed := sources.changed_since_hashed():
            notes.append(
                f"{changed}: was changed while Atlas read it; the next atlas prepare reads everything again"
            )
            key = hashlib.sha256(f"{key} {changed}".encode()).hexdigest()
        Manifest(
            version=FORMAT_VERSION,
            key=key,
            tokenizer={name: value for name, value in tokenizer.state().items() if name != "json"},
            dtype=dtype.str,
            splits=splits,
            options=self.option_values,
            source=sources.description(report) | facts,
            notes=notes,
            cleaning=merger.cleaned,
        ).write(folder)

    def _tokenize(
        self, merger: Merger, encoder: Encoder, workspace: Workspace, kept: dict[str, Any]
    ) -> SourceReport:
        """Tokenize and merge every batch. `kept` is added to every committed state. Commit after each
        finished shard, every `COMMIT_SECONDS`, and before an error of the input. The last state at the end of a file is
        kept too, for the case that the next file changes."""
        state = workspace.state
        report = SourceReport(**state.get("report", {}))
        start = Position(*state.get("position", ()))
        text, done = TextSoFar(self.sources, merger.rule), Batch(start)
        at_file_end = [state for state in workspace.states if not Position(*state.get("position", ())).part][
            -1:
        ]
        committed = file_end_committed = time.monotonic()

        def commit() -> None:
            nonlocal at_file_end
            facts = {
                "content_key": self.sources.content_key,
                "rule": vars(merger.rule),
                "tokens": merger.tokens,
            }
            place = {"position": done.end, "groups": text.key(done.end.group), "read": done.read}
            new = kept | facts | place | {"report": report.model_dump(), "assembly": merger.sync()}
            workspace.commit(*at_file_end, new)
            at_file_end = at_file_end if done.end.part else [new]

        with byte_progress(self.sources.total_bytes, "tokenizing") as advance:
            advance(sum(group.size for group in self.sources.groups[: start.group]))
            try:
                for batch, encoded in self.pool.encode(self.sources, merger.rule, start, encoder):
                    finished_shard, done = merger.add(batch, encoded), batch
                    report.merge(batch.report)
                    report.check_faults(self.sources.reading.on_error)
                    advance(batch.bytes_read)
                    last = committed if done.end.part else file_end_committed
                    if finished_shard or time.monotonic() - last >= COMMIT_SECONDS:
                        commit()
                        committed = time.monotonic()
                        file_end_committed = file_end_committed if done.end.part else committed
                report.check_faults(self.sources.reading.on_error, total_bytes=self.sources.total_bytes)
            except AtlasError:
                if merger.tokens:
                    commit()
                raise
        return report

    def _require_text(self, splits: Collection[str], short: int) -> None:
        # The first of several copies is kept, so copies cannot be the reason: all documents were too short.
        if not splits and short:
            shortest = self.options.cleaning.min_chars
            less = f", or a smaller --min-chars than {shortest}" if shortest > 1 else ""
            raise DataError(
                f"{self.sources.names}: cleaning leaves no text to train on: every document is left out "
                f"({short:,} as too short); give more text{less}"
            )
        if "train" not in splits:
            raise DataError(
                f"{self.sources.names}: val_fraction {self.options.val_fraction} leaves no text to train on; "
                "give more text, or a smaller fraction"
            )

    def _notes(self, splits: Collection[str], rule: SplitRule, tokenizer: Tokenizer) -> Iterator[str]:
        wanted = self.options.train_tokenizer
        if wanted and tokenizer.vocab_size < wanted:
            yield f"the text is too small for {wanted:,} tokens: the vocabulary has {tokenizer.vocab_size:,}"
        if rule.cuts is not None:
            of = "the ends of documents, " if len(rule.cuts) > 1 else "the end of the text, "
            yield (
                f"{counted(len(rule.cuts), 'document')}: too few to hold out some of them; instead, {of}"
                f"{100 * rule.val_fraction:.3g} % of the characters, are held out for validation"
            )
        if rule.val_fraction and "val" not in splits:
            yield "nothing was held out for validation: too little text for this --val-fraction"
