"""Which files of a folder or an archive Atlas reads, and why it leaves out the others."""

from __future__ import annotations

import fnmatch
import itertools
import posixpath
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace

from atlas.data.text.documents import BOTH, ROWS_LOOKED_AT, Reading, likely_field, read_rows
from atlas.data.text.files import TextFile, is_url
from atlas.data.text.formats import compression
from atlas.data.text.formats.chats import has_messages, is_empty, layout_of
from atlas.data.text.formats.code import is_code_name
from atlas.data.text.formats.sniff import ROWS, Format, Unread
from atlas.data.text.report import SourceReport, counted, megabytes
from atlas.errors import DataError

MOST_LEFT_OUT = 0.1
"""Atlas asks the user if it would leave out more than this share of the bytes."""
_ABOUT = (
    "readme", "license", "licence", "copying", "notice", "changelog", "changes", "contributing", "citation", "authors",
)  # fmt: skip
"""Beginnings of the names of texts about the other files."""
_AS_TEXT: tuple[Format, ...] = ("text", "jsonl", "json", "csv", "html")
_SHOWN, _MOST_PATTERNS = 3, 6
_NO_ROWS, _NO_CONVERSATIONS = "no rows, beside files of rows", "rows that are no conversations"
_PAGE_OF_CHATS = "the same chats as conversations.json"
_SET_NAME = re.compile(r"(?:^|[/_.-])(train|test|valid|val|validation|dev|eval)(?=[/_.-]|$)", re.I)
_EXTRA = re.compile(r'pip install "atlas-llm\[(\w+)\]"')


class AmbiguousRowsError(DataError):
    """Rows with both a text and messages, between which only the user can decide."""


@dataclass
class Choice:
    """The files to read, in order, and those that are left out, by the reason."""

    files: list[TextFile] = field(default_factory=list)
    left_out: dict[str, list[TextFile]] = field(default_factory=dict)

    def leave_out(self, file: TextFile, reason: str) -> None:
        """Add a file that Atlas does not read."""
        self.left_out.setdefault(reason, []).append(file)

    def merge(self, other: Choice) -> None:
        """Add `other`, the choice among the files that follow."""
        self.files += other.files
        for reason, files in other.left_out.items():
            self.left_out.setdefault(reason, []).extend(files)

    def notes(self) -> Iterator[str]:
        """Yield one line for each reason why files are left out."""
        for reason, files in self.left_out.items():
            count = "1 file is" if len(files) == 1 else f"{len(files):,} files are"
            names = ", ".join(file.name for file in files[:_SHOWN])
            more = " …" if len(files) > _SHOWN else ""
            yield f"{count} left out, {megabytes(_size(files))}: {reason} ({names}{more})"
        shared = len(posixpath.commonpath([posixpath.dirname(file.name) for file in self.files] or [""]))
        named = ((file.name, _SET_NAME.findall(file.name[shared:])) for file in self.files)
        sets = {name: found[-1].lower() for name, found in named if found}
        held_out = [name for name, which in sets.items() if which != "train"]
        if "train" in sets.values() and held_out:
            names = ", ".join(held_out[:_SHOWN]) + (" …" if len(held_out) > _SHOWN else "")
            yield (
                f"{counted(len(held_out), 'file')} named like a test or validation set, but used like the others "
                f"({names}); to leave them out, name only the others, or use atlas prepare --exclude"
            )

    def names_with_reasons(self) -> Iterator[str]:
        """Yield one line for each file that is left out."""
        yield from (f"{file.name}: {reason}" for reason, files in self.left_out.items() for file in files)

    @property
    def bytes_of_other_text(self) -> int:
        """The size of the text that is left out because only conversations are read."""
        texts = (*self.left_out.get(_NO_ROWS, ()), *self.left_out.get(_NO_CONVERSATIONS, ()))
        return _size(file for file in texts if not is_about(file))

    @property
    def share_left_out(self) -> float:
        """The share of the bytes in the files that are left out."""
        left_out = sum(_size(files) for reason, files in self.left_out.items() if reason != _PAGE_OF_CHATS)
        return left_out / max(1, left_out + _size(self.files))

    def install_command(self) -> str:
        """Return the command that installs the packages for the files that are left out, or an empty string."""
        extras = {extra for reason in self.left_out for extra in _EXTRA.findall(reason)}
        return f'pip install "atlas-llm[{",".join(sorted(extras))}]"' if extras else ""

    def exclude_options(self) -> str:
        """Return the options, as few as possible, with which the user would agree that much is left out."""
        kept_endings, kept_names = (
            {_ending(file) for file in self.files},
            {file.basename for file in self.files},
        )
        sizes: Counter[str] = Counter()
        for file in itertools.chain.from_iterable(self.left_out.values()):
            ending = _ending(file)
            has_own_ending = ending and ending not in kept_endings
            sizes[f"*{ending}" if has_own_ending else file.basename] += file.size
        kept, left_out, patterns = _size(self.files), sizes.total(), []
        for pattern, size in sizes.most_common():
            if left_out <= MOST_LEFT_OUT * (kept + left_out):
                break
            patterns.append(pattern)
            left_out -= size
        if len(patterns) > _MOST_PATTERNS or not kept_names.isdisjoint(patterns):
            return "--exclude PATTERN"
        return " ".join(f"--exclude {shlex.quote(pattern)}" for pattern in patterns)


def _ending(file: TextFile) -> str:
    """Return the ending of a file's name together with that of its compression, such as `.svg.gz`."""
    stem, ending = posixpath.splitext(file.basename)
    return posixpath.splitext(stem)[1] + ending if ending in compression.ENDINGS else ending


def _size(files: Iterable[TextFile]) -> int:
    return sum(file.size for file in files)


def matches(names: Iterable[str], pattern: str) -> bool:
    """Return whether one of the names matches a pattern. `*` matches `/` too."""
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def choose(
    found: Iterable[tuple[TextFile, TextFile | Unread]], reading: Reading, *, conversations: bool
) -> Choice:
    """Choose among the files of a folder or an archive: each file with its format, or with what it is if Atlas does not
    read it. With `conversations`, only rows with conversations are read.

    A folder that is mostly source code is read as text. In other folders, code is left out. In a folder of mostly rows,
    files such as a README describe the rows, and are left out.
    """
    found = [*found]
    code = sum(file.size for file, what in found if _is_code(file, what))
    readable = sum(
        file.size for file, what in found if not isinstance(what, Unread) and not _is_code(file, what)
    )
    is_codebase = code > readable and not conversations
    choice = Choice()
    rows: list[TextFile] = []
    chats = {file.place.parent for file, _ in found if file.basename == "conversations.json"}
    for file, what in found:
        if file.basename == "chat.html" and file.place.parent in chats:  # ChatGPT's export has both
            choice.leave_out(file, _PAGE_OF_CHATS)
        elif is_codebase and _is_text(what):
            choice.files.append(replace(file, format="text"))
        elif isinstance(what, Unread):
            choice.leave_out(file, what.explain("FILE"))
        elif _is_code(file, what):
            choice.leave_out(file, "source code")
        else:
            rows += [what] if what.format in ROWS else []
            choice.files.append(what)
    return _among_rows(choice, rows, reading, conversations=conversations) if rows else choice


def _is_code(file: TextFile, what: TextFile | Unread) -> bool:
    """Return whether the name of a file is that of source code or settings, and its content has no other format."""
    return is_code_name(file.basename) and _is_text(what)


def _is_text(what: TextFile | Unread) -> bool:
    return what.is_text if isinstance(what, Unread) else what.format in _AS_TEXT


def _among_rows(choice: Choice, rows: list[TextFile], reading: Reading, *, conversations: bool) -> Choice:
    """Leave out rows of another kind than the wanted one and, in a folder of mostly rows, files that describe them.

    Raises `DataError` if the folder has mostly rows of another kind.
    """
    has_mostly_rows = conversations or 2 * _size(rows) > _size(choice.files)
    kinds = _kinds_of(rows, reading)
    wanted = "conversation" if conversations else "document"
    has_wanted = wanted in kinds.values() or not has_mostly_rows
    chosen = Choice(left_out=choice.left_out)
    for file in choice.files:
        kind = kinds.get(file)
        if kind is None and has_mostly_rows and (conversations or is_about(file)):
            chosen.leave_out(file, _NO_ROWS)
        elif kind is not None and kind != wanted and has_wanted:
            chosen.leave_out(file, _other_rows(file, kind, reading, conversations=conversations))
        else:
            if kind is not None and not conversations:
                refuse_conversations(file, kind, reading)
            chosen.files.append(file)
    return chosen


def _kinds_of(rows: Iterable[TextFile], reading: Reading) -> dict[TextFile, str]:
    """Return the kind of rows in each file. Behind URLs, all files with the same ending are like the first."""
    kinds: dict[TextFile, str] = {}
    by_ending: dict[str, str] = {}
    for file in rows:
        ending = posixpath.splitext(file.basename)[1]
        is_known = is_url(file.root) and ending in by_ending
        kinds[file] = by_ending[ending] if is_known else kind_of_rows(file, reading)
        by_ending.setdefault(ending, kinds[file])
    return kinds


def _other_rows(file: TextFile, kind: str, reading: Reading, *, conversations: bool) -> str:
    if conversations:
        return _NO_CONVERSATIONS
    if kind == "other":
        field = likely_field(file, reading)
        remedy = f", which --text-field {field} would read" if field != "NAME" else ""
        return f"rows without {reading.text_field!r}{remedy}"
    return "conversations; give them to atlas train --train-data"


def is_about(file: TextFile) -> bool:
    """Return whether a file is named like a text about the other files, such as a README."""
    return file.format == "text" and file.basename.lower().startswith(_ABOUT)


def refuse_conversations(file: TextFile, kind: str, reading: Reading) -> None:
    """Raise `DataError` for a file whose rows are conversations, or have both a text and messages."""
    if kind == "conversation":
        raise DataError(
            f"{file.name}: its rows are conversations, which atlas prepare does not support; pass a file of only "
            "conversations to atlas train --train-data, or name the field of a text with --text-field"
        )
    if kind == "both":
        raise AmbiguousRowsError(
            f"{file.name}: its rows have {BOTH}; for the text, run atlas prepare with --text-field "
            f"{reading.text_field}; for the conversations, run atlas train with --chat-format openai"
        )


def kind_of_rows(file: TextFile, reading: Reading) -> str:
    """Return what most of the first rows of a file are: `document` if they have the text field, `conversation`, or
    `other`. The kind is `both` if a row has a text and a list of messages. A file without rows is a `document`."""
    kinds = Counter[str]()
    with suppress(DataError):  # the error is reported when the file is read
        rows = read_rows(file, replace(reading, on_error="skip"), SourceReport(), lambda _: None)
        values = (row.value for row in rows if row.value and not is_empty(row.value))
        for value in itertools.islice(values, ROWS_LOOKED_AT):
            kinds[_kind_of(value, reading)] += 1
    return "both" if "both" in kinds else max(kinds, key=lambda kind: kinds[kind], default="document")


def _kind_of(row: object, reading: Reading) -> str:
    if isinstance(row, str):
        return "document"
    has_text = isinstance(row, dict) and reading.text_field in row
    if has_text and not reading.names_text_field and has_messages(row):
        return "both"
    return "document" if has_text else "conversation" if layout_of(row) else "other"
