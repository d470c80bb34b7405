"""Documents → batches. Each batch is for one worker, and records the position in the sources where the batch ends."""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from atlas.data.prepare.split import Part, SplitRule
from atlas.data.text.report import SourceReport
from atlas.data.text.sources import Advance, Group, Sources
from atlas.errors import AtlasError

BATCH_CHARS = 1 << 19
BATCH_PARTS = 4096
Item = TypeVar("Item")
Started = TypeVar("Started")


class Position(NamedTuple):
    """The position after `part` parts of group number `group`. All earlier groups are done."""

    group: int = 0
    part: int = 0


@dataclass
class Batch:
    """Complete documents, or one part of a document that comes in several parts."""

    end: Position
    parts: list[Part] = field(default_factory=list)
    report: SourceReport = field(default_factory=SourceReport)
    """Findings about the groups that end in this batch."""
    bytes_read: int = 0
    """Bytes of the sources that were read for this batch."""
    read: str = ""
    """sha256 of the parts before `end` in the group that contains `end`."""

    @property
    def is_complete(self) -> bool:
        """Whether all parts are complete documents."""
        return all(part.starts_document and part.ends_document for part in self.parts)


def read_batches(groups: Sequence[Group], rule: SplitRule, start: Position) -> Iterator[Batch]:
    """Yield the text after `start` in batches. A large group begins a batch. The last batch contains the last report,
    and may have no parts. If the text cannot be read, the text before the error is the last batch."""
    batch, chars, read = Batch(start), 0, hashlib.sha256()

    def advance(count: int) -> None:
        batch.bytes_read += count

    def ended() -> Batch:
        nonlocal batch, chars
        done, batch, chars = batch, Batch(batch.end), 0
        done.read = read.hexdigest()
        return done

    try:
        for number, text in enumerate(texts_of(groups, rule)[start.group :], start.group):
            if batch.parts and sum(group.size for group in text) >= BATCH_CHARS:
                yield ended()
            found = SourceReport()
            for place, part in enumerate(_parts(text, rule, found, advance), start=1):
                is_complete = part.starts_document and part.ends_document
                if batch.parts and not is_complete:
                    yield ended()
                read.update(_content(part))
                if number == start.group and place <= start.part:
                    continue
                batch.parts.append(part)
                batch.end = Position(number, place)
                chars += len(part.text)
                if not is_complete or chars >= BATCH_CHARS or len(batch.parts) >= BATCH_PARTS:
                    yield ended()
            batch.report.merge(found)
            batch.end, read = Position(number + 1), hashlib.sha256()
    except AtlasError:
        yield ended()
        raise
    yield ended()


def texts_of(groups: Sequence[Group], rule: SplitRule) -> list[list[Group]]:
    """Return the groups of each text. The cuts of a rule count all documents, so all groups are then one text."""
    return [[group] for group in groups] if rule.cuts is None else [list(groups)]


class TextSoFar:
    """Keys of growing beginnings of the text, in complete files."""

    def __init__(self, sources: Sources, rule: SplitRule) -> None:
        self._sources, self._texts = sources, texts_of(sources.groups, rule)
        self._digest, self._number = hashlib.sha256(), 0

    def key(self, number: int) -> str:
        """Return the sha256 of the names and hashes of the first `number` texts. `number` must not become smaller."""
        for text in self._texts[self._number : number]:
            for group in text:
                self._digest.update(self._sources.identity_of(group))
        self._number = number
        return self._digest.hexdigest()


def read_again(groups: Sequence[Group], rule: SplitRule, end: Position) -> str:
    """Return what `Batch.read` is for a batch that ends at `end`."""
    read = hashlib.sha256()
    text = itertools.chain.from_iterable(texts_of(groups, rule)[end.group : end.group + 1])
    for part in itertools.islice(_parts(text, rule, SourceReport(), lambda _: None), end.part):
        read.update(_content(part))
    return read.hexdigest()


def _parts(text: Iterable[Group], rule: SplitRule, found: SourceReport, advance: Advance) -> Iterator[Part]:
    return rule.parts(piece for group in text for piece in group.pieces(found, advance))


def _content(part: Part) -> bytes:
    return f"{len(part.text)} {part.ends_document}:{part.text}".encode()


def start_ahead(start: Callable[[Item], Started], items: Iterable[Item], most: int) -> Iterator[Started]:
    """Yield the return value of `start` for each item, in order. At most `most` items are started before the oldest
    return value is yielded. If the next item is an `AtlasError`, all earlier return values come before the error."""
    under_way: deque[Started] = deque()
    try:
        for item in items:
            under_way.append(start(item))
            if len(under_way) >= most:
                yield under_way.popleft()
    except AtlasError:
        yield from under_way
        raise
    yield from under_way
