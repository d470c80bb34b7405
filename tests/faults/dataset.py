"""A prepared dataset that changes under a run: rotten, cut, extended, replaced, swapped or removed files.

The change comes between a stop and the resume, or while the run trains. A run must never save what it computed from
changed bytes: it is refused, or it ends with one line. When the bytes are as before, the same command must finish the
run with the bits of a run whose data never changed. A change that leaves the bytes as they are must stop no run.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tests.faults.folder_model import FolderModel
from tests.faults.forked import Forked
from tests.faults.runs import Broken, command, options, shown
from tests.faults.trajectory import DEFAULT_SEED, STEPS, Trajectory, make_config, make_dataset, true_course

Change = Callable[[random.Random, Path], None]
_SHARD_TOKENS = 3000
"""More than a page of memory: a read beyond the end of a shard that was cut is a bus error."""

# Changes. Each gets the folder of the dataset


def _shard(chance: random.Random, data: Path) -> Path:
    """A shard, of the training split twice as often as of the validation split."""
    split = chance.choice(["train", "train", "val"])
    return chance.choice(sorted(path for path in data.glob(f"{split}-*.npy") if ".docs" not in path.name))


def _other_tokens(chance: random.Random, path: Path) -> bytes:
    """The bytes of a shard in which one or more tokens have other valid ids."""
    content, start = bytearray(path.read_bytes()), path.stat().st_size - 2 * len(np.load(path))
    count = (len(content) - start) // 2
    for place in chance.sample(range(count), k=chance.choice([1, 100, count])):
        at = start + 2 * place
        old = int.from_bytes(content[at : at + 2], "little")
        new = chance.choice([token for token in range(100, 250) if token != old])
        content[at : at + 2] = new.to_bytes(2, "little")
    return bytes(content)


def _overwrite(path: Path, content: bytes) -> None:
    """Change the bytes of a file in place."""
    with open(path, "r+b") as file:
        file.write(content)
        file.truncate()


def _replace(path: Path, content: bytes) -> None:
    """Put another file in the place of a file."""
    other = path.with_name("other")
    other.write_bytes(content)
    os.replace(other, path)


def _rot(chance: random.Random, data: Path) -> None:
    path = _shard(chance, data)
    _overwrite(path, _other_tokens(chance, path))


def _rot_unseen(chance: random.Random, data: Path) -> None:
    """As a bad disk would: the time of the last change stays."""
    path = _shard(chance, data)
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    _overwrite(path, _other_tokens(chance, path))
    os.utime(path, ns=times)


def _cut(chance: random.Random, data: Path) -> None:
    path = _shard(chance, data)
    size = path.stat().st_size
    os.truncate(path, chance.choice([0, size // 2, size - 2, chance.randrange(size)]))


def _extend(chance: random.Random, data: Path) -> None:
    with open(_shard(chance, data), "ab") as file:
        file.write(bytes(chance.choice([2, 5000])))


def _replace_a_shard(chance: random.Random, data: Path) -> None:
    path = _shard(chance, data)
    _replace(path, _other_tokens(chance, path))


def _swap(chance: random.Random, data: Path) -> None:
    one, other = data / "train-00000.npy", data / "train-00001.npy"
    one.rename(data / "other")
    other.rename(one)
    (data / "other").rename(other)


def _remove(chance: random.Random, data: Path) -> None:
    _shard(chance, data).unlink()


def _change_documents(chance: random.Random, data: Path) -> None:
    """Move the beginning of the second document of a shard by one token."""
    path = chance.choice([path for path in sorted(data.glob("*.docs.npy")) if len(np.load(path)) > 1])
    starts = np.load(path)
    starts[1] += 1 if len(starts) < 3 or starts[1] + 1 < starts[2] else -1
    content = path.read_bytes()
    _overwrite(path, content[: len(content) - starts.nbytes] + starts.tobytes())


def _change_manifest(chance: random.Random, data: Path) -> None:
    manifest = json.loads((data / "dataset.json").read_text(encoding="utf-8"))
    shard = chance.choice(manifest["splits"]["train"]["shards"])
    shard["sha256"] = shard["sha256"][::-1]
    _overwrite(data / "dataset.json", json.dumps(manifest).encode())


def _touch(chance: random.Random, data: Path) -> None:
    for path in data.iterdir():
        path.touch()


def _copy_in_place(chance: random.Random, data: Path) -> None:
    for path in data.iterdir():
        _replace(path, path.read_bytes())


def _write_again(chance: random.Random, data: Path) -> None:
    for path in data.iterdir():
        _overwrite(path, path.read_bytes())


def _format_manifest(chance: random.Random, data: Path) -> None:
    manifest = json.loads((data / "dataset.json").read_text(encoding="utf-8"))
    _replace(data / "dataset.json", json.dumps(manifest, indent=7).encode())


HARMFUL: tuple[Change, ...] = (
    _rot, _rot_unseen, _cut, _extend, _replace_a_shard, _swap, _remove, _change_documents, _change_manifest,
)  # fmt: skip
HARMLESS: tuple[Change, ...] = (_touch, _copy_in_place, _write_again, _format_manifest)
_READ_ONCE = (_change_manifest, _change_documents)
"""Changes of files that a run reads only when it starts. A run that has read them may finish; its bits are right."""
WHEN = (
    "after SIGKILL",
    "after SIGTERM",
    "after the end",
    "while it starts",
    "while it trains",
    "before SIGTERM",
)
_FIRST_READS = 12
"""A run reads files of its data at least so often before it trains."""


# Rounds


@dataclass
class Tally:
    """Counts of the changes and their results."""

    changes: Counter[str] = field(default_factory=Counter)
    when: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    ended: int = 0
    unharmed: int = 0


@dataclass
class Round:
    """One change of one dataset under one run."""

    folder: Path
    intact: Path
    truth: Trajectory
    read: dict[tuple[int, int, int, int], tuple[int, int]]
    background: bool

    def __post_init__(self) -> None:
        self.data = self.folder / "data"
        shutil.copytree(self.intact, self.data)
        self.model = FolderModel(self.folder / "run", self.truth, self.read)
        self.arguments = make_config(self.folder, data=self.data)
        self.arguments += ["--set", f"checkpoint.background={self.background}"]

    def start(self) -> Forked:
        return Forked(self.arguments, self.folder / "said.txt", self.folder / "run")

    def run(self, change: Change, when: str, chance: random.Random, tally: Tally) -> None:
        if when == "while it starts":
            process = Forked(self.arguments, self.folder / "said.txt", self.data)
            process.proceed(operations=chance.randint(1, _FIRST_READS))
        else:
            process = self.start()
            process.proceed(updates=STEPS + 1 if when == "after the end" else chance.randint(1, STEPS))
        lives = when in ("while it starts", "while it trains", "before SIGTERM")
        if when in ("after SIGKILL", "after SIGTERM"):
            process.send(signal.SIGKILL if when == "after SIGKILL" else signal.SIGTERM)
            if process.code is None:
                process.proceed()
        self.model.check()
        change(chance, self.data)
        if when == "before SIGTERM":
            process.send(signal.SIGTERM)
        if not lives:
            process = self.start()
        if process.code is None:
            process.proceed()
        self._check_end(process, change, when, tally)
        self._restore(chance)
        if change in HARMLESS or chance.random() < 0.5:
            shutil.move(self.data, self.folder / "elsewhere")
            self.arguments += ["--train-data", str(self.folder / "elsewhere")]
        last = self.start()
        if last.code is None:
            last.proceed()
        self.model.check()
        if last.code != 0 or self.model.newest_step() != STEPS:
            raise Broken(f"with its data as before, exit code {last.code}: {last.said[-300:]}")

    def _check_end(self, process: Forked, change: Change, when: str, tally: Tally) -> None:
        """One line where the data have changed, the end of the run where they have not; and never other bits. The log
        may hold losses from changed bytes; the resumed run removes them."""
        self.model.saved()
        code, said = process.code, process.said
        may_end = {2}
        if when == "before SIGTERM":
            may_end = {2, 130}
        elif change in HARMLESS:
            may_end = {0}
        elif when == "after the end" or (when.startswith("while") and change in _READ_ONCE):
            may_end = {0, 2}
        if change in HARMLESS and when == "before SIGTERM":
            may_end = {130}
        errors = sum(line.startswith("error:") for line in said.splitlines())
        if code not in may_end or errors != (code == 2) or "Traceback" in said:
            raise Broken(f"exit code {code} with {errors} lines of error: {said[-400:]}")
        tally.refused += code == 2 and process.updates == 0
        tally.ended += code == 2 and process.updates > 0
        tally.unharmed += code != 2

    def _restore(self, chance: random.Random) -> None:
        """Bring the bytes back, in the old files or in new ones."""
        write = chance.choice([_overwrite, _replace])
        for path in self.intact.iterdir():
            if not (self.data / path.name).exists():
                shutil.copy(path, self.data)
            elif (self.data / path.name).read_bytes() != path.read_bytes():
                write(self.data / path.name, path.read_bytes())


def change_and_resume(folder: Path, *, rounds: int, seed: int) -> list[str]:
    """Change the data of a run `rounds` times. Return the counts as lines."""
    chance = random.Random(seed)
    os.environ["ATLAS_CACHE_DIR"] = str(folder / "cache")
    intact = make_dataset(folder, words=4000, shard_tokens=_SHARD_TOKENS)
    truth = true_course(folder, make_config(folder, data=intact), (DEFAULT_SEED,))
    cases = [(change, when) for change in HARMFUL + HARMLESS for when in WHEN]
    chance.shuffle(cases)
    tally, read = Tally(), {}  # type: ignore[var-annotated]
    for number in shown(rounds, "dataset"):
        change, when = cases[number % len(cases)]
        name = change.__name__.strip("_").replace("_", " ")
        place = folder / f"round-{number}"
        place.mkdir()
        one = Round(place, intact, truth, read, background=chance.random() < 0.5)
        try:
            one.run(change, when, chance, tally)
        except Broken as error:
            raise Broken(f"round {number} (--seed {seed}), {name} {when}: {error}") from error
        tally.changes[name] += 1
        tally.when[when] += 1
        shutil.rmtree(place)
    changes, whens = (
        ", ".join(f"{count} {what}" for what, count in counts.most_common())
        for counts in (tally.changes, tally.when)
    )
    return [
        f"dataset: {rounds} runs whose data changed (--seed {seed}): {changes}",
        f"  {whens}",
        f"  refused at the start: {tally.refused}; ended with one line: {tally.ended}; not harmed: {tally.unharmed}; "
        "tracebacks and bus errors: 0",
        "  checkpoints from changed bytes: 0; with the old bytes, finished bit for bit as if nothing had changed",
    ]


def main() -> int:
    asked = options("dataset", rounds=156).parse_args()
    return command("dataset", lambda folder: change_and_resume(folder, rounds=asked.rounds, seed=asked.seed))


if __name__ == "__main__":
    sys.exit(main())
