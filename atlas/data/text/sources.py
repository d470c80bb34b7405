"""Paths → files of text in a fixed order: files, archives, folders, patterns, URLs, the Kaggle archive.

Nothing is extracted to disk, and no file is loaded completely into memory. The Kaggle archive contains its text twice,
in `AllCombined.txt` and in parts such as `1of2/wiki_00`. If `AllCombined.txt` exists, Atlas leaves out the parts.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from atlas.data.text.archives import is_in_own_order, members_of
from atlas.data.text.documents import Group, Reading, SourceReport, holds_rows, json_format
from atlas.data.text.files import (
    COMBINED,
    ENDINGS,
    HTTP,
    Advance,
    Format,
    TextFile,
    ending_of,
    filesystem_of,
    format_of,
    is_archive,
    is_json,
    is_url,
)
from atlas.data.text.folders import files_below, is_of_a_run
from atlas.data.text.formats.decode import Piece
from atlas.data.text.hashes import hashes_of, written_at
from atlas.data.text.stdin import STANDARD_INPUT
from atlas.errors import AtlasError, DataError
from atlas.files import encodable
from atlas.progress import byte_progress

__all__ = ["Advance", "Group", "Reading", "SourceReport", "Sources", "is_text_or_archive"]

_VERSION = 2
"""The version of the rules by which files become documents."""
_DIGITS = re.compile(r"([0-9]+)")
_PATTERN = re.compile(r"[*?\[]")
_KINDS = (
    "a .txt, .md, .jsonl, .parquet, .zip or .tar file, a .json file with rows, a folder of such files, "
    "or a URL (text and JSON files can also be .gz, .zst, .bz2 or .xz)"
)


class _Root(NamedTuple):
    """A file or archive on the disk, or a file behind a URL."""

    resolved: str
    """Its path without links, or its URL."""
    name: str
    """Its name relative to the path that the user gave."""
    size: int


class Sources:
    """The text in the given paths, as documents in a fixed order.

    Raises `DataError` if a path is missing or names a file that Atlas does not read, or if no file is left to read.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        reading: Reading | None = None,
        trust_archives: bool = False,
        stdin: Path | None = None,
    ) -> None:
        """`stdin` is the file with the text from standard input. In `paths`, `-` stands for this file."""
        self.paths = [str(path) for path in paths]
        self.reading = reading or Reading()
        self._trust, self._stdin = trust_archives, stdin
        self.ignored: list[str] = []
        """Names of files in formats that Atlas does not read."""
        self.links_out: list[str] = []
        """Links in a folder that point outside the folder. Atlas does not follow such links, because the folder may be
        untrusted and the files outside may be private."""
        self.unreadable: list[str] = []
        """Subfolders that cannot be read, such as the `lost+found` of a disk."""
        self.own_folders: list[str] = []
        """Output folders of runs. Atlas does not read their logs as text."""
        self.in_own_order: list[str] = []
        """Compressed tars whose members are not sorted by name. Atlas reads these members in their stored order."""
        self._roots: dict[str, _Root] = {}
        """Path or URL of each file or archive that Atlas reads → what is known of it."""
        self._written: dict[str, tuple[int, int] | None] = {}
        """Path → when each file on the disk was written, before Atlas hashed it."""
        self._resolved: set[str] = set()
        """The paths in `_roots` without links, to recognise a file that was given twice."""
        files = [file for path in self.paths for file in self._files_of(path)]
        combined = [file for file in files if file.is_combined]
        doubled = {file for file in files if file.is_part and any(_holds(other, file) for other in combined)}
        self.left_out = [file.name for file in files if file in doubled]
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
                f"{self.names}: " + "; ".join(["nothing to read", *self._skipped(), f"give {_KINDS}"])
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
        while _PATTERN.search(path.name):
            path = path.parent
        while path.suffix.lower() in ENDINGS:
            path = path.with_suffix("")
        return path.name

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
        how = [_VERSION, reading.text_field, reading.separator, reading.encoding]
        identity = [*how, list(self.roots.items())]
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
            "left_out": self.left_out,
            "undecodable_bytes": dict(report.undecodable),
            "article_rule": report.articles.rule if report.articles else None,
        }

    def notes(self, report: SourceReport) -> list[str]:
        """Return notes about the text for the user, one line each."""
        notes = self._skipped()
        own_order = "is a compressed tar and is read in its own order, not by the names of its files"
        notes += [f"{name}: {own_order}" for name in self.in_own_order]
        notes += report.notes()
        if report.untitled:
            notes.append(
                f"{report.untitled:,} files are named like those of the Kaggle archive, but hold no title: each is "
                "read as plain text"
            )
        if articles := report.articles:
            notes.append(f"{articles.articles:,} articles, separated by {articles.rule}")
            notes += [f"boundary: {boundary}" for boundary in articles.boundaries]
            warnings = (articles.doubt and f"{articles.doubt}: look at the boundaries", articles.warning)
            notes += [f"warning: {warning}" for warning in warnings if warning]
        return notes

    def _skipped(self) -> list[str]:
        """Return one line for each reason why Atlas skips some files."""
        reasons = (
            (self.left_out, f"parts that hold the same text as {COMBINED} are left out"),
            (self.ignored, "files of other kinds are ignored"),
            (self.unreadable, "subfolders cannot be read and are left out"),
            (self.own_folders, "output folders of atlas train, or their files, are left out"),
            (
                self.links_out,
                "links that lead out of their folder are left out: give the paths that they point to",
            ),
        )
        return [f"{len(names)} {what} ({names[0]} …)" for names, what in reasons if names]

    # Paths → files

    def _files_of(self, given: str) -> Iterator[TextFile]:
        """Yield the files of a given path, in reading order."""
        path = Path(given)
        if given == STANDARD_INPUT and self._stdin:
            size = self._stdin.stat().st_size
            self._roots[str(self._stdin)] = _Root(str(self._stdin), STANDARD_INPUT, size)
            file = TextFile(str(self._stdin), "rows", size, shown="standard input")
            yield file if holds_rows(file, at_least=1) else replace(file, format="text")
        elif is_url(given):
            yield from self._remote(given)
        elif path.is_dir():
            yield from self._in_folder(path)
        elif path.is_file():
            yield from self._file(str(path), path.name, named=True)
        elif _PATTERN.search(given) and (found := glob.glob(given, recursive=True)):
            for match in sorted(found, key=_natural):
                if is_of_a_run(match):
                    self.own_folders.append(encodable(match))
                elif Path(match).is_file():
                    yield from self._file(str(Path(match)), match, named=False)
        elif path.exists():
            raise DataError(
                f"{given}: is a pipe or a device, which can be read only once; give it as standard input, with "
                "--input - < FILE"
            )
        else:
            raise DataError(f"{given}: {_why_missing(given)}")

    def _in_folder(self, folder: Path) -> Iterator[TextFile]:
        root, start = os.path.realpath(folder), "" if folder == Path() else str(folder)
        for name, entry in sorted(
            files_below(str(folder), self.unreadable, self.own_folders), key=lambda found: _natural(found[0])
        ):
            path, resolved = os.path.join(start, name), os.path.normpath(os.path.join(root, name))
            if entry.is_symlink():
                resolved = os.path.realpath(path)
                if not Path(resolved).is_relative_to(root):
                    self.links_out.append(encodable(path))
                    continue
            yield from self._file(path, name, named=False, resolved=resolved)

    def _file(self, path: str, name: str, *, named: bool, resolved: str | None = None) -> Iterator[TextFile]:
        root = _Root(resolved or os.path.realpath(path), name, os.stat(path).st_size)
        file = TextFile(path, format_of(os.path.basename(path)), root.size, trusted=self._trust)
        if root.resolved in self._resolved:
            return  # the file was given twice, or by its own path and by its folder
        if is_archive(path):
            self._add(path, root)
            yield from self._members(Path(path))
        elif format := self._format(file, named=named):
            self._add(path, root)
            yield replace(file, format=format)
        elif file.format and named:
            raise DataError(
                f"{path}: holds no rows: give JSON with one object per row, each with a text or a conversation"
            )
        elif named:
            raise DataError(f"{path}: {ending_of(file.basename) or 'no'} ending: Atlas reads {_KINDS}")
        else:
            self.ignored.append(encodable(name))

    def _format(self, file: TextFile, *, named: bool = False) -> Format | None:
        """Return the format that the name of a file promises. In a `.json` file, the content must have it."""
        if file.format == "rows" and is_json(file.basename):
            return json_format(file, self.reading.text_field, named=named)
        return file.format

    def _add(self, path: str, root: _Root) -> None:
        self._roots[path] = root
        self._resolved.add(root.resolved)

    def _members(self, path: Path) -> Iterator[TextFile]:
        members = members_of(path, trust=self._trust)
        in_order = sorted(members, key=lambda member: _natural(member.name))
        if is_in_own_order(path) and members != in_order:
            self.in_own_order.append(str(path))
            in_order = members
        for member in in_order:
            kind = format_of(member.name)
            file = TextFile(str(path), kind, member.size, member=member.name, trusted=self._trust)
            if _is_hidden(str(file.place)) or "__MACOSX" in file.place.parts:
                continue
            if member.is_file and kind != "parquet" and (format := self._format(file)):
                yield replace(file, format=format)
            else:
                self.ignored.append(file.name)

    def _remote(self, url: str) -> Iterator[TextFile]:
        with filesystem_of(url) as (filesystem, path):
            # `glob` also finds a single file. `find` would make HTTP parse a single file as a page of links.
            in_folder = not _PATTERN.search(path) and not filesystem.isfile(path)
            find = filesystem.find if in_folder else filesystem.glob
            found = find(path, detail=True)
            if not found and url.startswith(HTTP):  # for which no answer at all looks like no file
                filesystem.cat_file(path, start=0, end=1)
        files = {name: facts for name, facts in found.items() if facts.get("type") == "file"}
        if not files:
            raise DataError(f"{url}: no such file or folder; give {_KINDS}")
        for name in sorted(files, key=_natural):
            if is_archive(name):
                raise DataError(f"{url}: Atlas reads archives only from the disk; download {name}")
            full, size = filesystem.unstrip_protocol(name), int(files[name].get("size") or 0)
            file = TextFile(full, format_of(name), size, trusted=self._trust)
            # Atlas does not open the files that match a pattern, since opening downloads the beginning of each file.
            format = file.format if _PATTERN.search(path) else self._format(file, named=not in_folder)
            if not format:
                self.ignored.append(full)
            elif full not in self._roots:
                self._roots[full] = _Root(full, full, size)
                yield replace(file, format=format)


def _why_missing(given: str) -> str:
    """Return the reason and the remedy for a path that does not exist. Atlas 1.x accepted a list with commas."""
    parts = [part.strip() for part in given.split(",")]
    if len(parts) > 1 and all(part and Path(part, "dataset.json").exists() for part in parts):
        mixture = ", ".join(f"{{path: {part}, weight: 1}}" for part in parts)
        return f'is a list, but Atlas expects one path; to train on several datasets: --set "data.mixture=[{mixture}]"'
    if len(parts) > 1 and all(part and Path(part).exists() for part in parts):
        inputs = " ".join(f"--input {shlex.quote(part)}" for part in parts)
        return (
            "is a list, but Atlas expects one path; name a folder with these files or a pattern in quotes such as "
            f'"texts/*.txt", or prepare one dataset from them: atlas prepare {inputs} --output FOLDER'
        )
    return f"no such file or folder; give {_KINDS}"


def is_text_or_archive(path: Path) -> bool:
    """Return whether Atlas reads a file with this name. A `.json` file must also hold rows."""
    file = TextFile(str(path), format_of(path.name), path.stat().st_size)
    with suppress(AtlasError):  # the error is reported when the file is read
        if file.format == "rows" and is_json(path.name):
            return json_format(file, "text", named=False) is not None
        return bool(path.suffix) and (is_archive(path.name) or file.format is not None)
    return True


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


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _natural(name: str) -> list[list[str | int]]:
    """Return a key that sorts `wiki_9` before `wiki_10`, and keeps a folder's files together."""
    parts = name.split("/")
    return [
        [int(run) if place % 2 else run for place, run in enumerate(_DIGITS.split(part))] for part in parts
    ]
