"""Documents → batches. Each batch is for one worker, and records the position in the sources where the batch ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from atlas.data.prepare.split import Part, SplitRule
from atlas.data.text.sources import Group, SourceReport

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

    @property
    def is_complete(self) -> bool:
        """Whether all parts are complete documents."""
        return all(part.starts_document and part.ends_document for part in self.parts)


def read_batches(groups: Sequence[Group], rule: SplitRule, start: Position) -> Iterator[Batch]:
    """Yield the text after `start` in batches. The last batch contains the last report, and may have no parts."""
    # `rule.cut_at` is a position in the complete text, so all groups are then read as one text.
    texts = [[group] for group in groups] if rule.cut_at is None else [list(groups)]
    batch, chars = Batch(start), 0

    def advance(count: int) -> None:
        batch.bytes_read += count

    for number, text in enumerate(texts[start.group :], start.group):
        found = SourceReport()
        pieces = (piece for group in text for piece in group.pieces(found, advance))
        for place, part in enumerate(rule.parts(pieces), start=1):
            if number == start.group and place <= start.part:
                continue
            is_complete = part.starts_document and part.ends_document
            if batch.parts and not is_complete:
                yield batch
                batch, chars = Batch(batch.end), 0
            batch.parts.append(part)
            batch.end = Position(number, place)
            chars += len(part.text)
            if not is_complete or chars >= BATCH_CHARS or len(batch.parts) >= BATCH_PARTS:
                yield batch
                batch, chars = Batch(batch.end), 0
        batch.report.merge(found)
    batch.end = Position(len(texts))
    yield batch


def start_ahead(start: Callable[[Item], Started], items: Iterable[Item], most: int) -> Iterator[Started]:
    """Yield the return value of `start` for each item, in order. At most `most` items are started before the oldest
    return value is yielded."""
    under_way: deque[Started] = deque()
    for item in items:
        under_way.append(start(item))
        if len(under_way) >= most:
            yield under_way.popleft()
    yield from under_way
