"""Paths → files: what lies below a folder, in an archive, behind a URL or a pattern, and which of it Atlas reads."""

from __future__ import annotations

import glob
import os
import posixpath
import re
import shlex
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from atlas.data.text.archives import BombError, has_archive_name, is_in_own_order, members_of
from atlas.data.text.documents import Reading
from atlas.data.text.files import HTTP, TextFile, filesystem_of, is_url
from atlas.data.text.folders import Skipped, files_below, is_hidden, is_of_a_run
from atlas.data.text.formats.sniff import ARCHIVES, ROWS, Unread
from atlas.data.text.selection import Choice, choose, kind_of_rows, matches, refuse_conversations
from atlas.data.text.stdin import STANDARD_INPUT
from atlas.errors import AtlasError, DataError
from atlas.files import encodable

PATTERN = re.compile(r"[*?\[]")
_DIGITS = re.compile(r"([0-9]+)")
KINDS = (
    "text, JSON, a table (CSV, Parquet, Arrow), HTML, a PDF, an EPUB or a MediaWiki dump, compressed or not, an "
    "archive or a folder of such files, or a URL"
)
_LOOKED_INTO = 20
"""Number of files behind URLs that Atlas looks into, of all files with the same ending."""


class Root(NamedTuple):
    """A file or archive on the disk, or a file behind a URL."""

    resolved: str
    """Its path without links, or its URL."""
    name: str
    """Its name relative to the path that the user gave."""
    size: int


class Search:
    """Finds the files of the paths that a user gave, one path after the other. A file that was given twice, such as by
    its path and by its folder, is found once."""

    def __init__(
        self,
        reading: Reading,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        *,
        conversations: bool = False,
        trust_archives: bool = False,
        stdin: Path | None = None,
    ) -> None:
        """The arguments are those of `Sources`."""
        self.reading = reading
        self._include, self._exclude = {*include}, {*exclude}
        self.unmatched = self._include | self._exclude
        """The user's patterns that no file of a folder or an archive matched so far."""
        self._conversations, self._trust, self._stdin = conversations, trust_archives, stdin
        self.skipped = Skipped()
        self.in_own_order: list[str] = []
        """Compressed tars whose members are not sorted by name. Atlas reads these members in their stored order."""
        self.roots: dict[str, Root] = {}
        """Path or URL of each file or archive that was found → what is known of it."""
        self._resolved: set[str] = set()
        """The paths in `roots` without links."""

    def choice_in(self, given: str) -> Choice:
        """Return the files of a given path, in reading order, and those that are left out."""
        path = Path(given)
        if given == STANDARD_INPUT and self._stdin:
            size = self._stdin.stat().st_size
            self.roots[str(self._stdin)] = Root(str(self._stdin), STANDARD_INPUT, size)
            return self._named(TextFile(str(self._stdin), "text", size, shown="standard input"))
        if is_url(given):
            return self._remote_choice(given)
        if path.is_dir():
            return self._chosen(self._in_folder(path), given)
        if path.is_file():
            file = self._file(str(path), path.name)
            return self._named(file) if file else Choice()
        if PATTERN.search(given) and (found := glob.glob(given, recursive=True)):
            self.skipped.own += [encodable(match) for match in found if is_of_a_run(match)]
            names = [match for match in found if Path(match).is_file() and not is_of_a_run(match)]
            files = (
                file for name in sorted(names, key=_natural) if (file := self._file(str(Path(name)), name))
            )
            return self._chosen(files, given)
        if path.exists():
            raise DataError(
                f"{given}: is a pipe or a device, which can be read only once; give it as standard input, with "
                "--input - < FILE"
            )
        raise DataError(f"{given}: {_why_missing(given)}")

    def _named(self, file: TextFile) -> Choice:
        """Return the choice of a single file that the user named."""
        what = self._identified(file)
        if what in ARCHIVES:
            return self._chosen(self._members(file), file.root)
        if isinstance(what, Unread):
            raise DataError(f"{file.name}: cannot be read: {what.explain(shlex.quote(file.name))}")
        if what.format in ROWS and not self._conversations:
            refuse_conversations(what, kind_of_rows(what, self.reading), self.reading)
        return Choice([what])

    def _chosen(self, found: Iterable[TextFile], given: str) -> Choice:
        """Return the choice among files on the disk that were found."""
        identified: list[tuple[TextFile, TextFile | Unread]] = []
        waiting = deque(found)
        while waiting:
            file = waiting.popleft()
            if not self._is_wanted(file, given):
                continue
            what: TextFile | Unread = file
            try:
                what = self._identified(file)
                if what in ARCHIVES and not file.member:
                    waiting.extendleft(reversed([*self._members(file)]))
                    continue
            except BombError:
                raise
            except DataError as error:  # a damaged file of text is reported when it is read
                if what in ARCHIVES:
                    what = Unread(f"an archive that cannot be read ({error!s:.200})")
                elif not file.member and not os.access(file.root, os.R_OK):
                    what = Unread("without permission to read")
            identified.append((file, what))
        return choose(identified, self.reading, conversations=self._conversations)

    def _is_wanted(self, file: TextFile, given: str) -> bool:
        """Return whether the user's patterns admit a file below the path `given`."""
        names = file.name, file.name.removeprefix(given).lstrip("/"), file.basename
        matched = {pattern for pattern in self._include | self._exclude if matches(names, pattern)}
        self.unmatched -= matched
        return bool(matched & self._include or not self._include) and not matched & self._exclude

    def _identified(self, file: TextFile) -> TextFile | Unread:
        if not file.member and has_archive_name(file.root):
            return ARCHIVES[0]
        return file.identified(self.reading.text_field, self.reading.encoding)

    def _in_folder(self, folder: Path) -> Iterator[TextFile]:
        root, start = os.path.realpath(folder), "" if folder == Path() else str(folder)
        for name, entry in sorted(
            files_below(str(folder), self.skipped), key=lambda found: _natural(found[0])
        ):
            path, resolved = os.path.join(start, name), os.path.normpath(os.path.join(root, name))
            if entry.is_symlink():
                resolved = os.path.realpath(path)
                if not Path(resolved).is_relative_to(root):
                    self.skipped.links.append(encodable(path))
                    continue
            if file := self._file(path, name, resolved):
                yield file

    def _file(self, path: str, name: str, resolved: str | None = None) -> TextFile | None:
        """Return a file on the disk, or None if the file was given twice, such as by its path and by its folder."""
        root = Root(resolved or os.path.realpath(path), name, os.stat(path).st_size)
        if root.resolved in self._resolved:
            return None
        self.roots[path] = root
        self._resolved.add(root.resolved)
        return TextFile(path, "text", root.size, trusted=self._trust)

    def _members(self, archive: TextFile) -> Iterator[TextFile]:
        path = Path(archive.root)
        members = members_of(path, trust=self._trust)
        in_order = sorted(members, key=lambda member: _natural(member.name))
        if is_in_own_order(path) and members != in_order:
            self.in_own_order.append(str(path))
            in_order = members
        for member in in_order:
            file = TextFile(str(path), "text", member.size, member=member.name, trusted=self._trust)
            if any(map(is_hidden, file.place.parts)):
                continue
            if member.is_file:
                yield file
            else:
                self.skipped.links.append(file.name)

    def _remote_choice(self, url: str) -> Choice:
        """Return the choice among the files behind a URL. Looking into a file downloads its beginning, so of many
        files with the same ending, only the first are identified, and the others are like them."""
        with filesystem_of(url) as (filesystem, path):
            # `glob` also finds a single file. `find` would make HTTP parse a single file as a page of links.
            is_one = not PATTERN.search(path) and filesystem.isfile(path)
            find = filesystem.glob if is_one or PATTERN.search(path) else filesystem.find
            found = find(path, detail=True)
            if not found and url.startswith(HTTP):  # for which no answer at all looks like no file
                filesystem.cat_file(path, start=0, end=1)
        sizes = {
            name: int(facts.get("size") or 0) for name, facts in found.items() if facts.get("type") == "file"
        }
        if not sizes:
            raise DataError(f"{url}: no such file or folder; give {KINDS}")
        known: dict[str, list[TextFile | Unread]] = {}
        identified: list[tuple[TextFile, TextFile | Unread]] = []
        for name in sorted(sizes, key=_natural):
            full = filesystem.unstrip_protocol(name)
            file = TextFile(full, "text", sizes[name], trusted=self._trust)
            if full in self.roots or not (is_one or self._is_wanted(file, url)):
                continue
            if has_archive_name(name):
                raise DataError(f"{url}: Atlas reads archives only from the disk; download {name}")
            self.roots[full] = Root(full, full, sizes[name])
            if is_one:
                return self._named(file)
            alike = known.setdefault(posixpath.splitext(name)[1], [])
            if len(alike) < _LOOKED_INTO:
                alike.append(self._identified(file))
            what = alike[-1]
            identified.append((file, what if isinstance(what, Unread) else replace(file, format=what.format)))
        return choose(identified, self.reading, conversations=self._conversations)


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
    return f"no such file or folder; give {KINDS}"


def is_text_or_archive(path: Path) -> bool:
    """Return whether Atlas reads a file."""
    with suppress(AtlasError):  # the error is reported when the file is read
        what = TextFile(str(path), "text", path.stat().st_size).identified()
        return has_archive_name(path) or what in ARCHIVES or not isinstance(what, Unread)
    return True


def _natural(name: str) -> list[list[str | int]]:
    """Return a key that sorts `wiki_9` before `wiki_10`, and keeps a folder's files together."""
    parts = name.split("/")
    return [
        [int(run) if place % 2 else run for place, run in enumerate(_DIGITS.split(part))] for part in parts
    ]
