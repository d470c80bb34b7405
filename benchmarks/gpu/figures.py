"""The results: one JSON object per line in `figures.jsonl`, written as soon as the result is known."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO


@dataclass(frozen=True)
class Setup:
    """The options of a call that its parts need. `rehearse`: tiny models on the CPU."""

    output: Path
    scratch: Path
    nanogpt: Path | None = None
    rehearse: bool = False

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    @property
    def file(self) -> Path:
        """The file of figures. A rehearsal has a separate one, so that none of its figures counts as a GPU's."""
        return self.output / ("rehearsal.jsonl" if self.rehearse else "figures.jsonl")

    @property
    def log(self) -> Path:
        """The output of the jobs."""
        return self.output / "log.txt"

    def as_json(self) -> str:
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Setup:
        values = json.loads(text)
        paths = {name: Path(values[name]) for name in ("output", "scratch", "nanogpt") if values[name]}
        return cls(**values | paths)


class LeftOut(Exception):
    """The reason why a job cannot run here: an optional package is missing."""


class Figures:
    """The lines of one part. New lines are also written to `out`."""

    def __init__(self, file: Path, part: str, out: TextIO | None = None) -> None:
        self.file = file
        self.part = part
        self.out = out or sys.stdout

    def lines(self) -> list[dict[str, Any]]:
        """The figures of this part. A line that was cut off when the time ended does not count."""
        found = []
        if self.file.exists():
            for line in self.file.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue
                if entry["part"] == self.part:
                    found.append(entry)
        return found

    def get(self, name: str) -> dict[str, Any] | None:
        """The last line of the figure `name`; None if it was not measured."""
        return next((line for line in reversed(self.lines()) if line.get("figure") == name), None)

    def add(self, name: str, **values: Any) -> None:
        self._write({"part": self.part, "figure": name, **values})

    def is_done(self, job: str) -> bool:
        return any(line.get("job") == job and line.get("done") for line in self.lines())

    def finish(self, job: str, seconds: float) -> None:
        """Note that all figures of `job` are in the file, so that another call skips it."""
        self._write({"part": self.part, "job": job, "done": True, "seconds": round(seconds, 1)})

    def fail(self, job: str, reason: str, seconds: float) -> None:
        """Append the error of `job`, which another call runs again."""
        self._write({"part": self.part, "job": job, "error": reason, "seconds": round(seconds, 1)})

    def _write(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry)
        with self.file.open("ab+") as file:
            if file.tell() and not _ends_a_line(file):
                line = f"\n{line}"
            file.write(f"{line}\n".encode())
        print(line.strip(), file=self.out, flush=True)


def _ends_a_line(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")
