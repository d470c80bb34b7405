"""Strange files: a pipe, a socket, a folder, a link, a huge file in place of each file that a command reads or writes.

Whatever lies there, the command must end in time: with its work done, or with one line and exit code 2. It must not
write through a link or change a file outside its folder, and must not read a huge file into memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import random
import resource
import shutil
import signal
import stat
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from atlas.cli import main as atlas
from tests.conftest import corpus
from tests.faults.runs import PATIENCE_S, Broken, command, options, shown

STEPS, STOPPED_AT = 6, 4
MOST_MEMORY = 400 << 20
"""How much the memory of this process may grow, in bytes: less than half of the huge file."""
HUGE = 1 << 30

TRAIN = f"train --config run.yaml --max-steps {STEPS}"
FROM_TEXT = (
    f"{TRAIN} --train-data text.txt --tokenizer tokenizer.json --set data.packing=best_fit --output-dir new"
)
COMMANDS = {
    "output folder": [
        f"{TRAIN} --resume auto",
        f"{TRAIN} --no-resume",
        "report run --output r.html",
        "info run",
    ],
    "new output folder": [TRAIN, f"{TRAIN} --profile"],
    "dataset": [f"{TRAIN} --output-dir new", "prepare --input text.txt --output data", "info data"],
    "preparation": ["prepare --input text.txt --output data --min-chars 2"],
    "settings": [
        f"{FROM_TEXT} --no-resume",
        "plan --config run.yaml",
        "info run.yaml",
        "info tokenizer.json",
    ],
    "cache": [FROM_TEXT],
    "export": ["export --checkpoint run/atlas_best.pt --output out/model.gguf --quantize f32 --no-verify"],
}
"""The commands that meet the strange files of each place."""
MORE_NAMES = {
    "output folder": [
        *("metrics.lost.jsonl", "training.rank-1.log", "previous-1", "tensorboard", "profile.json"),
        *(
            "atlas_writing.tmp",
            f"atlas_step_{STEPS}.pt",
            f"atlas_step_{STEPS}.pt.tmp",
            f"atlas_step_{STEPS}.json",
        ),
        *("atlas_best.json.tmp", "metrics.jsonl.tmp", "config.yaml.tmp"),
    ],
    "preparation": [
        *(
            ".data.lock",
            ".data.preparing",
            ".data.preparing/journal.json",
            ".data.preparing/journal.json.tmp",
        ),
        *(
            ".data.preparing/dataset",
            ".data.preparing/train.starts",
            ".data.replaced-0123abcd",
            ".data.stdin-1",
        ),
    ],
    "settings": ["run.yaml", "tokenizer.json", "text.txt"],
    "export": ["out", "out/model.gguf", "out/model.gguf.tmp", "out/Modelfile", "out/Modelfile.tmp"],
}
"""Names besides those that the commands leave: of files that exist only for some time, or not in every run."""
APPENDED = {"training.log", "metrics.jsonl", "metrics.lost.jsonl", "atlas.lock"}
"""Files that a run extends in place, so that another name of the file shows the new lines."""
ALLOWED = {("text.txt", "1 GB"), ("cache/hashes.sqlite", "dangling link"), ("run/atlas.lock", "hard link")}
"""A text may be huge, the cache is the user's own, and a lock's only content is who holds it."""


# The kinds of files


def _hard_link(path: Path, outside: Path) -> None:
    os.link(outside / "precious", path)


def _dangling_link(path: Path, outside: Path) -> None:
    path.symlink_to(outside / "missing")


def _unreadable(path: Path, outside: Path) -> None:
    shutil.copy(outside / "precious", path)
    path.chmod(0)


def _huge(path: Path, outside: Path) -> None:
    shutil.copy(outside / "precious", path)
    os.truncate(path, HUGE)


def _folder(path: Path, outside: Path) -> None:
    path.mkdir()
    (path / "file").write_bytes(b"not empty")


KINDS: dict[str, Callable[[Path, Path], None]] = {
    "pipe": lambda path, outside: os.mkfifo(path),
    "socket": lambda path, outside: os.mknod(path, stat.S_IFSOCK | 0o600),
    "folder": _folder,
    "dangling link": _dangling_link,
    "link to itself": lambda path, outside: path.symlink_to(path.name),
    "link to an endless device": lambda path, outside: path.symlink_to("/dev/zero"),
    "unreadable file": _unreadable,
    "hard link": _hard_link,
    "1 GB": _huge,
}
"""Each makes such a file at a path. A file or a link has the content that lay there before, from `outside/precious`."""


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """Root may read every file. In this context this thread may not, as any other user."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    effective = sets[0]
    sets[0] &= ~(1 << 1 | 1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    libc.capset(header, sets)
    try:
        yield
    finally:
        sets[0] = effective
        libc.capset(header, sets)


# The cases


@dataclass(frozen=True)
class Case:
    place: str
    name: str
    kind: str
    command: str

    def __str__(self) -> str:
        return f"{self.kind} as {self.name}: atlas {self.command}"


@dataclass
class Tally:
    kinds: Counter[str] = field(default_factory=Counter)
    names: set[str] = field(default_factory=set)
    refused: int = 0
    done: int = 0
    slowest: float = 0.0


def strange_files(folder: Path, *, rounds: int | None, seed: int) -> list[str]:
    """Put each kind of file in the place of each name, or only `rounds` of them, drawn at random. Return the counts."""
    chance = random.Random(seed)
    scene = make_scene(folder / "scene")
    cases = list(cases_of(scene))
    chosen = cases if rounds is None else chance.sample(cases, min(rounds, len(cases)))
    tally = Tally()
    for number in shown(len(chosen), "file types"):
        try_one(chosen[number], scene, folder / "case", tally)
    return [
        f"file types: {len(chosen)} of {len(cases)} cases (--seed {seed}), {len(tally.names)} names: "
        + ", ".join(f"{count} × {kind}" for kind, count in tally.kinds.most_common()),
        f"  refused in one line: {tally.refused}; done: {tally.done}; the longest took {tally.slowest:.1f} s",
        "  hung: 0; tracebacks: 0; written outside the folder: 0; read into memory: 0",
    ]


def make_scene(scene: Path) -> Path:
    """A folder with a text, a tokenizer, a dataset, a run that was stopped, and a filled cache."""
    scene.mkdir(parents=True)
    (scene / "text.txt").write_text(corpus(400), encoding="utf-8")
    settings = {
        "device": "cpu",
        "model": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_seq_len": 16},
        "data": {"train_data": "data", "num_workers": 0},
        "training": {
            "batch_size": 2,
            "warmup_steps": 1,
            "log_interval": 1,
            "eval_interval": 2,
            "eval_sequences": 4,
        },
        "checkpoint": {"output_dir": "run", "save_interval": 2, "background": False},
        "tracking": {"samples": 0},
    }
    (scene / "run.yaml").write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    for line in (
        "prepare --input text.txt --output data --train-tokenizer 300",
        f"{TRAIN} --max-steps {STOPPED_AT}",
        f"{FROM_TEXT.replace('tokenizer.json', 'data/tokenizer.json')}",
    ):
        code, said = call(line, scene)
        if code != 0:
            raise Broken(f"atlas {line}: {said}")
    shutil.copy(scene / "data" / "tokenizer.json", scene / "tokenizer.json")
    shutil.rmtree(scene / "new")
    return scene


def cases_of(scene: Path) -> Iterator[Case]:
    """Every kind in the place of every name, for every command that meets it."""
    names = {place: list(more) for place, more in MORE_NAMES.items()}
    names["output folder"] += [f"{path.name}" for path in sorted((scene / "run").iterdir())]
    names["output folder"] = [f"run/{name}" for name in names["output folder"]] + ["run"]
    names["new output folder"] = names["output folder"]
    names["dataset"] = ["data", *(f"data/{path.name}" for path in sorted((scene / "data").iterdir()))]
    names["cache"] = [
        str(path.relative_to(scene)) for path in [scene / "cache", *sorted((scene / "cache").rglob("*"))]
    ]
    for place, commands in COMMANDS.items():
        for line in commands:
            for name in names[place]:
                kinds = [kind for kind in KINDS if (name, kind) not in ALLOWED]
                yield from (Case(place, name, kind, line) for kind in kinds)


# One case


def try_one(case: Case, scene: Path, folder: Path, tally: Tally) -> None:
    """Copy the scene, put the strange file there, and run the command. Raise `Broken` if a promise is broken."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(scene, folder / "work")
    work, outside = folder / "work", folder / "outside"
    if case.place == "new output folder":
        shutil.rmtree(work / "run")
    outside.mkdir()
    path = work / case.name
    precious = path.read_bytes() if path.is_file() else b'{"precious": 1}\n'
    (outside / "precious").write_bytes(precious)
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    KINDS[case.kind](path, outside)
    memory, begun = peak_memory(), time.perf_counter()
    try:
        with without_privileges():
            code, said = call(case.command, work)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = next(
            (f for f in reversed(traceback.extract_tb(error.__traceback__)) if "/atlas/" in f.filename), place
        )
        raise Broken(
            f"{case}: {type(error).__name__}: {error} at {Path(where.filename).name}:{where.lineno}"
        ) from error
    took = time.perf_counter() - begun
    check(case, code, said, outside, precious)
    if peak_memory() - memory > MOST_MEMORY:
        raise Broken(f"{case}: {(peak_memory() - memory) >> 20} MiB more memory")
    tally.kinds[case.kind] += 1
    tally.names.add(case.name)
    tally.refused += code == 2
    tally.done += code == 0
    tally.slowest = max(tally.slowest, took)


def check(case: Case, code: int, said: str, outside: Path, precious: bytes) -> None:
    """Raise `Broken` unless the command did its work or ended with one line, and wrote nothing outside its folder."""
    lines = said.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if code not in (0, 2) or errors != lines[-1:] * (code == 2):
        raise Broken(f"{case}: exit code {code}: {' / '.join(lines[-3:])}")
    is_run = case.command.startswith("train") and "--profile" not in case.command
    if code == 0 and is_run and not any(f"at step {STEPS}" in line for line in lines):
        raise Broken(f"{case}: exit code 0, but the run is not complete: {' / '.join(lines[-3:])}")
    # The output of `prepare` or `export` may be a link to a place that is not yet there: the user has named it.
    is_output = f"--output {case.name}" in case.command
    if (outside / "missing").exists() and not is_output:
        raise Broken(f"{case}: wrote through the link")
    kept = (outside / "precious").read_bytes()
    appended = Path(case.name).name in APPENDED
    if kept != precious and not (appended and kept.startswith(precious)):
        raise Broken(f"{case}: changed the file outside")


class Hung(BaseException):
    """A command did not end in time. No handler catches it."""


def call(line: str, folder: Path) -> tuple[int, str]:
    """The exit code of a command, called in this process and in this folder, and what it said."""

    def hang(number: int, frame: object) -> None:
        raise Hung

    said = io.StringIO()
    before = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)
    try:
        with contextlib.chdir(folder), environment(ATLAS_CACHE_DIR="cache"):
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                return atlas(line.split()), said.getvalue()
    except Hung as hung:
        raise Broken(f"atlas {line}: hangs for {PATIENCE_S:.0f} s: {said.getvalue()[-300:]}") from hung
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def main() -> int:
    parser = options("file_types", rounds=0)
    asked = parser.parse_args()
    return command("file_types", partial(strange_files, rounds=asked.rounds or None, seed=asked.seed))


if __name__ == "__main__":
    sys.exit(main())
