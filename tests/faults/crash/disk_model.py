"""What may be on a disk after a power cut: a model of a file system, replayed from recorded system calls.

As in ALICE (Pillai et al., OSDI 2014), a crash comes before any call, and what was not flushed until then may be lost:

- The data of a file is on the disk once the file is flushed. Before, its pending writes are all there, not there, or
  half there, or there is only their length and the bytes are zeros.
- Names (new files and folders, renames, removals) are on the disk once their folder is flushed. Before, they may be
  missing, in order: if a change of a folder is missing, so are the later changes of this folder.

This is weaker than ext4 and XFS, where a flush of any file also writes all earlier changes of names.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.crash.strace import Call

ROOT = 0
Tree = dict[str, bytes | None]
"""Path → content of each file; None for a folder."""


@dataclass(frozen=True)
class Names:
    """A change of names: (folder, name, node), where a node of None removes the name."""

    changes: tuple[tuple[int, str, int | None], ...]

    @property
    def folders(self) -> set[int]:
        return {folder for folder, _, _ in self.changes}


@dataclass(frozen=True)
class Data:
    """A write of `data` at `offset` in a file, or, with no data, the end of the file at `offset`."""

    node: int
    offset: int
    data: bytes | None


@dataclass(frozen=True)
class Flush:
    node: int


Operation = Names | Data | Flush


@dataclass
class Disk:
    """The nodes of a file system: a dict of names for a folder, the bytes of a file."""

    nodes: dict[int, dict[str, int] | bytes | bytearray] = field(default_factory=lambda: {ROOT: {}})

    @classmethod
    def read(cls, folder: Path) -> Disk:
        """A copy of what is in `folder`."""
        disk = cls()
        disk._read(folder, ROOT)
        return disk

    def _read(self, folder: Path, at: int) -> None:
        for path in sorted(folder.iterdir()):
            node = self.new({} if path.is_dir() else path.read_bytes())
            self.folder(at)[path.name] = node
            if path.is_dir():
                self._read(path, node)

    def new(self, content: dict[str, int] | bytes) -> int:
        node = len(self.nodes)
        self.nodes[node] = content
        return node

    def folder(self, node: int) -> dict[str, int]:
        content = self.nodes[node]
        assert isinstance(content, dict)
        return content

    def file(self, node: int) -> bytes | bytearray:
        content = self.nodes[node]
        assert not isinstance(content, dict)
        return content

    def find(self, path: str) -> int | None:
        """The node of a path."""
        node: int | None = ROOT
        for name in () if path == "." else path.split("/"):
            node = None if node is None else self.folder(node).get(name)
        return node

    def parent(self, path: str) -> tuple[int, str]:
        """The folder of a path, and its last name."""
        above, _, name = path.rpartition("/")
        folder = self.find(above or ".")
        assert folder is not None, path
        return folder, name

    def copy(self) -> Disk:
        """A copy that shares the bytes of files until they change."""
        nodes = self.nodes.items()
        return Disk(
            {node: content.copy() if isinstance(content, dict) else bytes(content) for node, content in nodes}
        )

    def apply(self, operation: Operation) -> None:
        if isinstance(operation, Names):
            for folder, name, node in operation.changes:
                if node is None:
                    self.folder(folder).pop(name, None)
                else:
                    self.folder(folder)[name] = node
        elif isinstance(operation, Data):
            content, data = self.file(operation.node), operation.data
            if isinstance(content, bytes):
                content = self.nodes[operation.node] = bytearray(content)
            end = operation.offset + len(data or b"")
            content.extend(bytes(max(0, end - len(content))))
            if data is None:
                del content[end:]
            else:
                content[operation.offset : end] = data

    def tree(self, at: int = ROOT, prefix: str = "") -> Tree:
        """What a reader sees."""
        tree: Tree = {}
        for name, node in self.folder(at).items():
            content = self.nodes[node]
            if isinstance(content, dict):
                tree[prefix + name] = None
                tree |= self.tree(node, f"{prefix}{name}/")
            else:
                tree[prefix + name] = bytes(content)
        return tree


def write(tree: Tree, folder: Path) -> None:
    """Make the files of a tree in an empty folder."""
    for name, content in tree.items():
        if content is None:
            (folder / name).mkdir(parents=True, exist_ok=True)
    for name, content in tree.items():
        if content is not None:
            (folder / name).write_bytes(content)


# From calls to operations


class Recording:
    """The operations of recorded calls that began with the files in `before`. Calls that change nothing are left
    out. `origins[i]` is the number of the call of operation i."""

    def __init__(self, before: Path, calls: Sequence[Call]) -> None:
        self.start = Disk.read(before)
        self.operations: list[Operation] = []
        self.origins: list[int] = []
        self._now = self.start.copy()
        self._positions: dict[int, int] = {}
        for number, call in enumerate(calls):
            if call.result is None or call.result < 0:
                continue
            for operation in self._operations(call):
                self._now.apply(operation)
                self.operations.append(operation)
                self.origins.append(number)
        self.start.nodes |= {  # so that every copy has the nodes of later files and folders
            node: {} if isinstance(content, dict) else b""
            for node, content in self._now.nodes.items()
            if node not in self.start.nodes
        }

    @property
    def end(self) -> Tree:
        """What the calls leave, if nothing is lost."""
        return self._now.tree()

    def _operations(self, call: Call) -> Iterator[Operation]:
        handler = getattr(
            self, f"_{call.name.removesuffix('at2').removesuffix('at').removesuffix('64')}", None
        )
        inside = call.paths and not any(os.path.isabs(path) for path in call.paths)
        if call.name == "read":
            self._read(call)
        elif handler and inside:
            yield from handler(call)

    def _read(self, call: Call) -> None:
        if call.descriptor in self._positions:
            self._positions[call.descriptor] += call.result or 0

    def _open(self, call: Call) -> Iterator[Operation]:
        flags, node = call.words[1].split("|"), self._now.find(call.paths[0])
        if node is None:
            assert "O_CREAT" in flags, call
            node = self._now.new(b"")
            yield Names(((*self._now.parent(call.paths[0]), node),))
        elif "O_TRUNC" in flags and self._now.file(node):
            yield Data(node, 0, None)
        assert call.result is not None
        self._positions[call.result] = -1 if "O_APPEND" in flags else 0

    def _lseek(self, call: Call) -> Iterator[Operation]:
        if self._positions.get(call.descriptor) != -1:  # a copy of a descriptor has no position yet
            self._positions[call.descriptor] = call.result or 0
        yield from ()

    def _write(self, call: Call) -> Iterator[Operation]:
        if (node := self._now.find(call.paths[0])) is None:  # removed while it was open
            return
        offset = self._positions[call.descriptor]
        if offset < 0:
            offset = len(self._now.file(node))
        else:
            self._positions[call.descriptor] += call.result or 0
        yield Data(node, offset, call.data[: call.result])

    def _pwrite(self, call: Call) -> Iterator[Operation]:
        if (node := self._now.find(call.paths[0])) is not None:
            yield Data(node, int(call.words[-1]), call.data[: call.result])

    def _sendfile(self, call: Call) -> Iterator[Operation]:
        target, source = (self._now.find(path) for path in call.paths)
        assert target is not None
        assert source is not None
        data = bytes(self._now.file(source)[int(call.words[2].strip("[").split("]")[0]) :][: call.result])
        offset = self._positions[call.descriptor]
        self._positions[call.descriptor] += len(data)
        if data:
            yield Data(target, offset, data)

    def _ftruncate(self, call: Call) -> Iterator[Operation]:
        node, length = self._now.find(call.paths[0]), int(call.words[-1])
        if node is not None and len(self._now.file(node)) != length:
            yield Data(node, length, None)

    _truncate = _ftruncate

    def _rename(self, call: Call) -> Iterator[Operation]:
        (one, name), (other, new_name) = map(self._now.parent, call.paths)
        node, replaced = self._now.find(call.paths[0]), self._now.find(call.paths[1])
        exchanged = replaced if "RENAME_EXCHANGE" in call.words else None
        yield Names(((one, name, exchanged), (other, new_name, node)))

    def _unlink(self, call: Call) -> Iterator[Operation]:
        yield Names(((*self._now.parent(call.paths[0]), None),))

    _rmdir = _unlink

    def _mkdir(self, call: Call) -> Iterator[Operation]:
        yield Names(((*self._now.parent(call.paths[0]), self._now.new({})),))

    def _fsync(self, call: Call) -> Iterator[Operation]:
        if (node := self._now.find(call.paths[0])) is not None:
            yield Flush(node)

    _fdatasync = _fsync


# Crashes

LOST, HALF, ZEROS, ALL = "lost", "half", "zeros", "all"


@dataclass(frozen=True)
class Crash:
    """A power cut before operation `at`: the changes of names that are lost, and which part of the pending writes is
    there: of one file, and of all others."""

    at: int
    lost: frozenset[int]
    others: str
    file: int | None = None
    part: str = ALL


def crashes(operations: Sequence[Operation]) -> Iterator[Crash]:
    """The crashes to try: before each flush and change of names, and after the last operation; with all pending names,
    without the last ones, or without one and those that depend on it; and with the pending data of all files, or of
    one of them, in each way."""
    for at in range(len(operations) + 1):
        if at < len(operations) and (at == 0 or isinstance(operations[at], Data)):
            continue  # writes are pending anyway: what the next flush or change of names finds covers them
        names, files = pending(operations[:at])
        losses = {frozenset[int]()}
        losses |= {frozenset(names[first:]) for first in range(len(names))}
        losses |= {dependent(operations, names, number) for number in names}
        for lost in losses:
            for way in (ALL, LOST, HALF, ZEROS) if files else (ALL,):
                yield Crash(at, lost, way)
        if len(files) > 1:
            for node, way in itertools.product(files, (LOST, HALF, ZEROS)):
                yield Crash(at, frozenset(), ALL, node, way)
            for node in files:
                yield Crash(at, frozenset(), LOST, node, ALL)


def pending(operations: Sequence[Operation]) -> tuple[list[int], list[int]]:
    """The numbers of the changes of names, and the files, that no flush has written."""
    names: list[int] = []
    files: dict[int, None] = {}
    for number, operation in enumerate(operations):
        if isinstance(operation, Names):
            names.append(number)
        elif isinstance(operation, Data):
            files[operation.node] = None
        else:
            files.pop(operation.node, None)
            names = _not_flushed(operations, names, operation.node)
    return names, [*files]


def _not_flushed(operations: Sequence[Operation], names: Sequence[int], folder: int) -> list[int]:
    """`names` without those that a flush of `folder` writes: its own changes, and earlier ones on which they depend."""
    folders, left = {folder}, []
    for number in reversed(names):
        operation = operations[number]
        assert isinstance(operation, Names)
        if operation.folders & folders:
            folders |= operation.folders
        else:
            left.append(number)
    return left[::-1]


def dependent(operations: Sequence[Operation], names: Sequence[int], first: int) -> frozenset[int]:
    """The change `first`, and the later ones that cannot be on the disk without it."""
    folders: set[int] = set()
    lost = []
    for number in names:
        operation = operations[number]
        assert isinstance(operation, Names)
        if number == first or operation.folders & folders:
            folders |= operation.folders
            lost.append(number)
    return frozenset(lost)


def replay(recording: Recording, crash: Crash) -> Tree:
    """What is on the disk after a crash."""
    disk = recording.start.copy()
    waiting: dict[int, list[Data]] = {}
    for number, operation in enumerate(recording.operations[: crash.at]):
        if isinstance(operation, Data):
            waiting.setdefault(operation.node, []).append(operation)
        elif isinstance(operation, Flush):
            for write_ in waiting.pop(operation.node, []):
                disk.apply(write_)
        elif number not in crash.lost:
            disk.apply(operation)
    for node, writes in waiting.items():
        for write_ in _torn(writes, crash.part if node == crash.file else crash.others):
            disk.apply(write_)
    return disk.tree()


def _torn(writes: Sequence[Data], way: str) -> list[Data]:
    """What is there of pending writes."""
    if way == ALL:
        return [*writes]
    if way == ZEROS:
        return [Data(w.node, w.offset, w.data and bytes(len(w.data))) for w in writes]
    if way == LOST:
        return []
    last = writes[len(writes) // 2]
    rest = [] if last.data is None else [Data(last.node, last.offset, last.data[: len(last.data) // 2])]
    return [*writes[: len(writes) // 2], *rest]
