"""The programs that a benchmark compares. Each program is a separate process, which waits for its turn without
computing.

The parent process writes a request as a line of JSON, and the child process answers with a line of JSON. In the child,
the output of libraries goes to standard error, so that it is not read as an answer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

PAUSE = 0.2
"""Seconds of pause after a turn, in which spinning threads stop spinning and sleep."""


@dataclass
class Contender:
    """A program that `command` starts and that calls `take_turns`."""

    name: str
    command: Sequence[str]
    process: subprocess.Popen[str] | None = None

    def launch(self) -> None:
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )

    def is_ready(self) -> bool:
        """Wait until the program is ready. Print a message and return False if the program ends before that."""
        if self._line():
            return True
        print(f"{self.name}: did not start and is left out; its own output is above", file=sys.stderr)
        return False

    def ask(self, request: Any = None) -> Any:
        """Return the program's answer to one turn."""
        assert self.process
        assert self.process.stdin
        print(json.dumps(request), file=self.process.stdin, flush=True)
        line = self._line()
        if not line:
            raise SystemExit(f"{self.name}: ended with {self.process.wait()}; its own words are above")
        time.sleep(PAUSE)
        return json.loads(line)

    def stop(self) -> None:
        """End the program by closing its input."""
        if self.process and self.process.stdin:
            self.process.stdin.close()
            self.process.wait()

    def _line(self) -> str:
        assert self.process
        assert self.process.stdout
        return self.process.stdout.readline()


def take_turns(prepare: Callable[[], Callable[[Any], Any]]) -> None:
    """Run in the child: get ready, then answer each line of input."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of libraries is not an answer
    answer = prepare()
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=out, flush=True)


def build_nanogpt(folder: str, device: str, **config: Any) -> tuple[Any, Any]:
    """Return the model of nanoGPT's `model.py` in `folder`, and its AdamW with the settings of nanoGPT's train.py.
    `config` has the field names of `GPTConfig`."""
    sys.path.insert(0, folder)
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    model = GPT(GPTConfig(**config)).to(device)
    return model, model.configure_optimizers(0.1, 3e-4, (0.9, 0.95), device)
