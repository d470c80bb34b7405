"""Documents → batches that a worker takes at once, each with the place in the sources where it ends."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from atlas.data.prepare.split import Part, SplitRule
from atlas.data.text.decode import Piece
from atlas.data.text.sources import Advance, Group, SourceReport

BATCH_CHARS = 1 << 19
BATCH_PARTS = 4096


class Position(NamedTuple):
    """Behind the `part`-th part of the `group`-th group of files; groups before it are done with."""

    group: int = 0
    part: int = 0


@dataclass(frozen=True)
class Batch:
    """Whole documents, or one part of a document that comes in several."""

    parts: list[Part]
    end: Position
    report: SourceReport
    """What was met in the groups that this batch brought to their end."""
    bytes_read: int
    """Of the sources, from their beginning to here."""

    @property
    def is_whole(self) -> bool:
        return all(part.starts_document and part.ends_document for part in self.parts)


Read = Callable[[SourceReport, Advance], Iterator[Piece]]


def read_batches(groups: Sequence[Group], rule: SplitRule, start: Position) -> Iterator[Batch]:
    """The text behind `start`. The last batch may have no parts, and brings the last report."""
    bytes_read = 0 if rule.cut_at is not None else sum(group.size for group in groups[: start.group])

    def advance(count: int) -> None:
        nonlocal bytes_read
        bytes_read += count

    parts: list[Part] = []
    chars, report, end = 0, SourceReport(), start

    def batch() -> Batch:
        nonlocal parts, chars, report
        made = Batch(parts, end, report, bytes_read)
        parts, chars, report = [], 0, SourceReport()
        return made

    for number, read in enumerate(_streams(groups, rule)):
        if number < start.group:
            continue
        met = SourceReport()
        skipped = start.part if number == start.group else 0
        for place, part in enumerate(rule.parts(read(met, advance)), start=1):
            if place <= skipped:
                continue
            is_whole = part.starts_document and part.ends_document
            if parts and not is_whole:
                yield batch()
            parts.append(part)
            chars += len(part.text)
            end = Position(number, place)
            if not is_whole or chars >= BATCH_CHARS or len(parts) >= BATCH_PARTS:
                yield batch()
        report.merge(met)
    end = Position(number + 1)
    yield batch()


def _streams(groups: Sequence[Group], rule: SplitRule) -> list[Read]:
    """One for each group; one for all where the place in the whole text decides."""
    if rule.cut_at is None:
        return [group.pieces for group in groups]
    return [
        lambda report, advance: itertools.chain.from_iterable(
            group.pieces(report, advance) for group in groups
        )
    ]
