"""Cut `metrics.jsonl` back to the step from which a run resumes."""

from __future__ import annotations

import errno
import itertools
import json
import math
import mmap
import os
import re
import shutil
from pathlib import Path

from atlas.files import check_regular, flush_to_disk, open_regular, replacing

_LONGEST_RECORD = 64 << 20  # bytes
_PROBE = 64  # bytes


def rewind(metrics: Path, lost: Path, step: int) -> None:
    """Move the records after `step` from the file `metrics` to the end of the file `lost`.

    The records in `metrics` are in the order of their steps, except that the event of a save comes later. So only the
    end of the file is read. The records are on the disk in `lost` before they leave `metrics`. If a kill or a power
    cut comes between the two, the next call does not append them again. Raises `OSError`.
    """
    if not os.path.lexists(metrics) or check_regular(metrics) == 0:
        return
    kept: list[bytes] = []
    moved: list[bytes] = []
    with open_regular(metrics, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as records:
        start = end = len(records)
        is_behind = False
        while end and not is_behind:
            earliest = max(0, end - _LONGEST_RECORD)
            start = records.rfind(b"\n", earliest, end - 1) + 1
            if start == 0 < earliest:
                raise OSError(errno.EFBIG, f"has a line of more than {_LONGEST_RECORD:,} bytes", str(metrics))
            line = records[start:end]
            kind, its_step = _kind_and_step(line)
            if its_step <= step:
                kept.append(line)
            elif line.strip(b"\0\n"):  # a power cut may leave zeros
                moved.append(line.rstrip(b"\n") + b"\n")
            is_behind = kind != "event" and its_step <= step
            end = start
    if start + sum(map(len, kept)) == os.path.getsize(metrics):
        return
    _append_once(lost, b"".join(reversed(moved)))
    with replacing(metrics) as rest:  # a new file, so that readers of a live run notice
        shutil.copyfile(metrics, rest)
        os.truncate(rest, start)
        with open(rest, "ab") as end_of_rest:
            end_of_rest.writelines(reversed(kept))


def _kind_and_step(line: bytes) -> tuple[str, float]:
    """The kind and the step of a record. The step of an incomplete or damaged record is infinity, so that `rewind`
    moves the record."""
    try:
        if not line.endswith(b"\n"):
            raise ValueError("the record is incomplete")
        record = json.loads(line)
        return str(record["kind"]), float(record["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return "", math.inf


def _append_once(path: Path, data: bytes) -> None:
    """Append `data` to a file, except what the end of the file already holds of it, and flush the file to the disk. A
    power cut may have left the beginning of `data` there. If the last line of the file is incomplete for another
    reason, end this line first."""
    with open_regular(path, "ab+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - len(data)))
        tail = file.read()
        rest = data[_overlap(tail, data) :]
        file.write(b"\n" + rest if rest == data and tail and not tail.endswith(b"\n") else rest)
        flush_to_disk(file)


def _overlap(tail: bytes, data: bytes) -> int:
    """Return how many bytes at the end of `tail`, from the beginning of a line, are the beginning of `data`."""
    for start in itertools.chain([0], (newline.end() for newline in re.finditer(b"\n", tail))):
        if tail.startswith(data[: min(_PROBE, len(tail) - start)], start) and data.startswith(tail[start:]):
            return len(tail) - start
    return 0
