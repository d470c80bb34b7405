"""Paths → documents in a fixed order.

Nothing is extracted to disk, and no file is loaded completely into memory. The Kaggle archive contains its text twice,
in `AllCombined.txt` and in parts such as `1of2/wiki_00`. If `AllCombined.txt` exists, Atlas leaves out the parts.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from atlas.data.text.documents import Group, Reading
from atlas.data.text.files import COMBINED, Advance, TextFile, filesystem_of, is_url
from atlas.data.text.formats import compression
from atlas.data.text.formats.decode import Piece
from atlas.data.text.formats.sniff import ROWS
from atlas.data.text.hashes import hashes_of, written_at
from atlas.data.text.report import SourceReport, counted
from atlas.data.text.search import KINDS, PATTERN, Search
from atlas.data.text.selection import Choice
from atlas.data.text.stdin import STANDARD_INPUT
from atlas.errors import DataError
from atlas.files import encodable
from atlas.progress import byte_progress

__all__ = ["Advance", "Group", "Reading", "SourceReport", "Sources"]

_LONGEST_ENDING = 8
_VERSION = 5
"""The version of the rules by which files become documents."""


class Sources:
    """The text in the given paths, as documents in a fixed order.

    Raises `DataError` if a path is missing or names a file that Atlas does not read, or if no file is left to read.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        reading: Reading | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        conversations: bool = False,
        trust_archives: bool = False,
        stdin: Path | None = None,
    ) -> None:
        """`stdin` is the file with the text from standard input. In `paths`, `-` stands for this file. Of folders,
        archives and patterns, only files that match one of the patterns in `include`, and none of those in `exclude`,
        are considered. With `conversations`, only rows with conversations are read."""
        self.paths = [str(path) for path in paths]
        self.reading = reading or Reading()
        search = Search(
            self.reading,
            include,
            exclude,
            conversations=conversations,
            trust_archives=trust_archives,
            stdin=stdin,
        )
        self.choice = Choice()
        for path in self.paths:
            self.choice.merge(search.choice_in(path))
        self.skipped, self.in_own_order = search.skipped, search.in_own_order
        self._unmatched = sorted(search.unmatched)
        files = self.choice.files
        self._roots = {root: search.roots[root] for root in dict.fromkeys(file.root for file in files)}
        """Path or URL of each file or archive that Atlas reads → what is known of it."""
        self._written: dict[str, tuple[int, int] | None] = {}
        """Path → when each file on the disk was written, before Atlas hashed it."""
        combined = [file for file in files if file.is_combined]
        doubled = {file for file in files if file.is_part and any(_holds(other, file) for other in combined)}
        self.doubled = [file.name for file in files if file in doubled]
        """Names of parts whose text is also in `AllCombined.txt`."""
        self.files = [file for file in files if file not in doubled]
        self.total_bytes = sum(file.size for file in self.files)
        groups = itertools.groupby(self.files, lambda file: _archive(file) if file.is_part else file)
        self.groups = [Group(tuple(texts), self.reading) for _, texts in groups]
        """The groups of files, in reading order. Atlas reads each group as one text."""
        self.is_kaggle = any(file.is_part or file.is_combined for file in self.files)
        """Whether any file is named like the files of the Kaggle archive."""
        if not self.files:
            raise DataError(
                f"{self.names}: " + "; ".join(["nothing to read", *self._skipped(), f"give {KINDS}"])
            )

    @property
    def names(self) -> str:
        """The given paths, for messages."""
        shown = ("standard input" if path == STANDARD_INPUT else path for path in self.paths)
        return encodable(", ".join(shown))

    @property
    def stem(self) -> str:
        """The name for a dataset of this text: the first path's name without its ending."""
        if self.paths[0] == STANDARD_INPUT:
            return "stdin"
        path = Path(self.paths[0].rstrip("/")) if is_url(self.paths[0]) else Path(self.paths[0]).resolve()
        while PATTERN.search(path.name):
            path = path.parent
        if path.suffix.lower() in compression.ENDINGS:
            path = path.with_suffix("")
        has_ending = 1 < len(path.suffix) <= _LONGEST_ENDING and not path.is_dir()
        return path.stem if has_ending else path.name

    @cached_property
    def roots(self) -> dict[str, str]:
        """Name → hash of each file or archive. The name is relative to the given path. If two files share a name, the
        path replaces the name of the second file."""
        named: dict[str, str] = {}
        for (resolved, name, _), content in zip(self._roots.values(), self._hashes.values(), strict=True):
            named[encodable(resolved if encodable(name) in named else name)] = content
        return named

    @cached_property
    def _hashes(self) -> dict[str, str]:
        """Path or URL of each file or archive → its hash."""
        on_disk = {path: root.size for path, root in self._roots.items() if not is_url(path)}
        self._written = {path: written_at(path) for path in on_disk}
        with byte_progress(sum(on_disk.values()), "hashing the files") as advance:
            hashes = dict(zip(on_disk, hashes_of(on_disk, advance), strict=True))
        return {path: hashes[path] if path in hashes else _url_key(path) for path in self._roots}

    def changed_since_hashed(self) -> str | None:
        """Return the name of a file that was written, replaced or removed since Atlas hashed it, or None."""
        changed = (path for path, before in self._written.items() if written_at(path) != before)
        return next((self._roots[path].name for path in changed), None)

    @cached_property
    def content_key(self) -> str:
        """sha256 of how the files are read, and of their names and hashes."""
        reading = self.reading
        identity = [
            _VERSION,
            reading.text_field,
            reading.separator,
            reading.encoding,
            list(self.roots.items()),
        ]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def identity_of(self, group: Group) -> bytes:
        """Return bytes that two groups share only if they give the same documents and the same reports."""
        return json.dumps(
            [[file.name, file.format, self._hashes[file.root]] for file in group.files]
        ).encode()

    def documents(
        self, report: SourceReport | None = None, advance: Advance = lambda _: None
    ) -> Iterator[Piece]:
        """Return an iterator over the pieces of all documents. Reading the pieces fills `report`. `advance` receives
        the number of bytes of each read."""
        report = report or SourceReport()
        return itertools.chain.from_iterable(group.pieces(report, advance) for group in self.groups)

    def description(self, report: SourceReport) -> dict[str, Any]:
        """Return the facts that `dataset.json` stores about the origin of the text."""
        return {
            "paths": [encodable(path) for path in self.paths],
            "files": len(self.files),
            "kinds": self._kinds(report),
            "left_out": self.doubled,
            "faults": report.num_faults,
            "undecodable_bytes": dict(report.undecodable),
            "article_rule": report.articles.rule if report.articles else None,
        }

    def _kinds(self, report: SourceReport) -> dict[str, tuple[int, int, int]]:
        """Return the kinds of files, each with its numbers of files, documents and characters."""
        files = Counter(group.files[0].kind for group in self.groups for _ in group.files)
        return {kind: (files[kind], report.documents[kind], report.characters[kind]) for kind in files}

    def notes(self, report: SourceReport) -> list[str]:
        """Return notes about the text for the user, one line each."""
        notes = self._skipped()
        own_order = "is a compressed tar and is read in its own order, not by the names of its files"
        notes += [f"{name}: {own_order}" for name in self.in_own_order]
        return [*notes, *self._without_effect(), *report.notes()]

    def _without_effect(self) -> Iterator[str]:
        """Yield one line for each thing that a user gave, and that changes nothing."""
        yield from (f"{pattern}: no file of a folder or an archive matches it" for pattern in self._unmatched)
        if empty := [file.name for file in self.files if not file.size]:
            more = f", {empty[1]}" if len(empty) == 2 else " …" if len(empty) > 2 else ""
            yield f"{counted(len(empty), 'empty file')} ({empty[0]}{more})"
        formats = {file.format for file in self.files}
        if self.reading.names_text_field and formats.isdisjoint(ROWS):
            yield f"--text-field {self.reading.text_field}: has no effect, since no file has rows"
        if self.reading.separator is not None and "text" not in formats:
            yield f"--separator {self.reading.separator}: has no effect, since no file is plain text"

    def _skipped(self) -> list[str]:
        """Return one line for each reason why Atlas skips some files."""
        reasons = (
            (self.doubled, f"parts that hold the same text as {COMBINED} are left out"),
            (self.skipped.unreadable, "subfolders cannot be read and are left out"),
            (self.skipped.own, "folders that Atlas made, or their files, are left out"),
            (
                self.skipped.links,
                "links that lead out of their folder, to a folder or within an archive are left out: give the "
                "paths that they point to",
            ),
        )
        lines = [f"{len(names)} {what} ({names[0]} …)" for names, what in reasons if names]
        return [*lines, *self.choice.notes()]


def _url_key(url: str) -> str:
    """Return a value that changes with the content behind a URL: its key, its ETag (or its date) and its size."""
    with filesystem_of(url) as (filesystem, path):
        facts = filesystem.info(path)  # HTTP's `ukey` does not depend on the content
        return (
            f"{filesystem.ukey(path)} {facts.get('ETag') or facts.get('Last-Modified')} {facts.get('size')}"
        )


def _archive(part: TextFile) -> tuple[str | None, PurePosixPath]:
    """Return the archive of a part (None for a file on the disk), and the folder that contains `1of2` and `2of2`."""
    return (part.root if part.member else None, part.place.parent.parent)


def _holds(combined: TextFile, part: TextFile) -> bool:
    """Return whether the folder of `AllCombined.txt` contains a part, in the same archive or on the disk."""
    same = combined.root == part.root or not (combined.member or part.member)
    return same and part.place.is_relative_to(combined.place.parent)
