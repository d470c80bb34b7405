"""Documents → batches for one worker each, with the place in the sources where each batch ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from atlas.data.prepare.split import Part, SplitRule
from atlas.data.text.sources import Group, SourceReport

BATCH_CHARS = 1 << 19
BATCH_PARTS = 4096


class Position(NamedTuple):
    """The place behind `part` parts of group number `group`. All earlier groups are done."""

    group: int = 0
    part: int = 0


@dataclass(frozen=True)
class Batch:
    """Complete documents, or one part of a document that comes in several."""

    parts: list[Part]
    end: Position
    report: SourceReport
    """What was found in the groups that end in this batch."""
    bytes_read: int
    """Bytes of the sources from their beginning to here."""

    @property
    def is_complete(self) -> bool:
        """Whether all parts are complete documents."""
        return all(part.starts_document and part.ends_document for part in self.parts)


def read_batches(groups: Sequence[Group], rule: SplitRule, start: Position) -> Iterator[Batch]:
    """The text behind `start`. The last batch may have no parts; it brings the last report."""
    by_place = rule.cut_at is not None  # in the complete text: all groups are read as one
    bytes_read = 0 if by_place else sum(group.size for group in groups[: start.group])
    parts: list[Part] = []
    chars, report, end = 0, SourceReport(), start

    def advance(count: int) -> None:
        nonlocal bytes_read
        bytes_read += count

    def batch() -> Batch:
        nonlocal parts, chars, report
        made = Batch(parts, end, report, bytes_read)
        parts, chars, report = [], 0, SourceReport()
        return made

    texts = [list(groups)] if by_place else [[group] for group in groups]
    for number, text in enumerate(texts[start.group :], start.group):
        found = SourceReport()
        pieces = (piece for group in text for piece in group.pieces(found, advance))
        for place, part in enumerate(rule.parts(pieces), start=1):
            if number == start.group and place <= start.part:
                continue
            is_complete = part.starts_document and part.ends_document
            if parts and not is_complete:
                yield batch()
            parts.append(part)
            chars += len(part.text)
            end = Position(number, place)
            if not is_complete or chars >= BATCH_CHARS or len(parts) >= BATCH_PARTS:
                yield batch()
        report.merge(found)
    end = Position(len(texts))
    yield batch()
