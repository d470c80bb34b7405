"""Damaged bytes: files of a run are flipped, cut, swapped, emptied and replaced at random; one intact checkpoint stays.

Atlas must not accept a damaged one, and must resume from the newest intact one. The result must be that of a run with
intact files, bit for bit. A comparison with a copy decides which files are intact, not Atlas.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from atlas.cli import main as atlas
from atlas.errors import AtlasError
from atlas.training.checkpoint.load import load_checkpoint
from atlas.training.train import train
from tests.faults.runs import Broken, Run, command, hard_run, options, resumed_step, shown
from tests.runs import assert_same_run, config_flags, on_updates, run_for, same_bits

STEPS, STOPPED_AT = 12, 8
PROCESS_EVERY = 50
"""One round in so many goes through a process of its own; the others call the command line here."""

Damage = Callable[[random.Random, Path], None]


def _flip_bits(chance: random.Random, path: Path) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(chance.choice([1, 1, 1, 8, 64])):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def _cut(chance: random.Random, path: Path) -> None:
    size = path.stat().st_size
    os.truncate(path, chance.choice([size - 1, size // 2, chance.randrange(size)]))


def _extend(chance: random.Random, path: Path) -> None:
    with open(path, "ab") as file:
        file.write(chance.randbytes(chance.choice([1, 512, 65536])))


def _zero_a_block(chance: random.Random, path: Path) -> None:
    data = bytearray(path.read_bytes())
    start = chance.randrange(len(data)) // 512 * 512
    data[start : start + 512] = bytes(len(data[start : start + 512]))
    path.write_bytes(data)


def _empty(chance: random.Random, path: Path) -> None:
    os.truncate(path, 0)


def _fill_with_noise(chance: random.Random, path: Path) -> None:
    path.write_bytes(chance.randbytes(path.stat().st_size))


def _remove(chance: random.Random, path: Path) -> None:
    path.unlink()


def _put_a_folder(chance: random.Random, path: Path) -> None:
    path.unlink()
    path.mkdir()


def _write_other_json(chance: random.Random, path: Path) -> None:
    path.write_text(
        chance.choice(["null", "[]", "{}", '"x"', "[" * 100_000, "{" * 99, "1e999"]), encoding="utf-8"
    )


def _lie_about_a_field(chance: random.Random, path: Path) -> None:
    sidecar = json.loads(path.read_text(encoding="utf-8"))
    key = chance.choice(["step", "kind", "sequences_consumed", "files", "format", "data_fingerprint"])
    sidecar[key] = chance.choice([sidecar["step"] + 1, 10**9, -1, "best", None, [], {"name": "x"}])
    path.write_text(json.dumps(sidecar), encoding="utf-8")


ANY_FILE: tuple[Damage, ...] = (
    _flip_bits, _cut, _extend, _zero_a_block, _empty, _fill_with_noise, _remove, _put_a_folder,
)  # fmt: skip
SIDECAR_ONLY: tuple[Damage, ...] = (_write_other_json, _lie_about_a_field)


def _swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


@dataclass
class Scene:
    """A run that was stopped, its intact files, and how it ends without damage."""

    run: Run
    intact: dict[str, bytes]
    """Bytes by name of every file of the output folder."""
    contents: list[dict]
    """What its checkpoints hold."""
    ended: Path

    @property
    def checkpoints(self) -> list[str]:
        return sorted(name for name in self.intact if name.endswith(".pt"))

    def restore(self) -> None:
        shutil.rmtree(self.run.output)
        self.run.output.mkdir()
        for name, data in self.intact.items():
            (self.run.output / name).write_bytes(data)


@dataclass
class Tally:
    """Counts of the damage and its results."""

    rounds: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    files: int = 0
    refused: int = 0
    harmless: int = 0
    resumed_from: Counter[int] = field(default_factory=Counter)


def corrupt_and_resume(folder: Path, *, rounds: int, seed: int, processes: bool = True) -> list[str]:
    """Damage a stopped run `rounds` times and let it finish each time. Return the counts as lines."""
    chance = random.Random(seed)
    os.environ["ATLAS_CACHE_DIR"] = str(folder / "cache")
    scene = _make_scene(folder)
    tally = Tally()
    for number in shown(rounds, "corrupt"):
        scene.restore()
        done = _damage(chance, scene)
        try:
            _check_each(scene, done, tally)
            in_process = not (processes and number % PROCESS_EVERY == 0)
            _resume(scene, done, tally, in_process=in_process)
        except (Broken, AssertionError) as error:
            raise Broken(f"round {number} (--seed {seed}), {'; '.join(done)}: {error}") from error
        tally.rounds += 1
    return _summary(tally, seed=seed)


def _make_scene(folder: Path) -> Scene:
    settings = {
        "training__max_steps": STEPS,
        "training__eval_interval": 3,
        "checkpoint__save_interval": 2,
        "checkpoint__background": False,
        "data__num_workers": 0,
    }
    run = hard_run(folder, words=150, **settings)
    with contextlib.redirect_stderr(io.StringIO()):
        stopped = run_for(yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8")))

    def stop() -> None:
        stopped.stop.requested = stopped.state.step == STOPPED_AT

    on_updates(stopped, after=stop)
    with contextlib.redirect_stderr(io.StringIO()):
        assert train(stopped).outcome == "interrupted"
    stopped.checkpoints.lock.release()
    intact = {path.name: path.read_bytes() for path in run.output.iterdir()}
    contents = [load_checkpoint(path) for path in sorted(run.output.glob("*.pt"))]
    code, said = _atlas_train(run)
    if code != 0:
        raise Broken(f"the undamaged run does not resume: {said}")
    ended = folder / "ended"
    run.output.rename(ended)
    run.output.mkdir()
    return Scene(run, intact, contents, ended)


def _atlas_train(run: Run) -> tuple[int, str]:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = atlas(["train", *config_flags(run.folder / "run.yaml")])
    return code, said.getvalue()


def _damage(chance: random.Random, scene: Scene) -> list[str]:
    """Damage some checkpoints, but not all. Return a phrase for each change."""
    names = chance.sample(scene.checkpoints, k=chance.choice([1, 1, 2, 3, len(scene.checkpoints) - 1]))
    done = []
    while names:
        path = scene.run.output / names.pop()
        if names and chance.random() < 0.3:
            other = scene.run.output / names.pop()
            done.append(_damage_two(chance, path, other))
            continue
        sidecar = path.with_suffix(".json")
        if chance.random() < 0.6:
            victims, damage = [path], chance.choice(ANY_FILE)
        else:
            victims, damage = [sidecar], chance.choice(ANY_FILE + SIDECAR_ONLY)
        if chance.random() < 0.1 and damage in ANY_FILE:
            victims = [path, sidecar]
        for victim in victims:
            damage(chance, victim)
            done.append(f"{damage.__name__.strip('_').replace('_', ' ')}: {victim.name}")
    return done


def _damage_two(chance: random.Random, path: Path, other: Path) -> str:
    what = chance.choice(
        ["swapped files", "swapped sidecars", "one file under two names", "one sidecar for two"]
    )
    if what == "swapped files":
        _swap(path, other)
    elif what == "swapped sidecars":
        _swap(path.with_suffix(".json"), other.with_suffix(".json"))
    elif what == "one file under two names":
        other.write_bytes(path.read_bytes())
    else:
        other.with_suffix(".json").write_bytes(path.with_suffix(".json").read_bytes())
    return f"{what}: {path.name} and {other.name}"


def _check_each(scene: Scene, done: list[str], tally: Tally) -> None:
    """Check that each checkpoint, read by its name, is refused or gives what was saved."""
    for phrase in done:
        tally.kinds[phrase.partition(":")[0]] += 1
    for path in sorted(scene.run.output.glob("*.pt")):
        if _bytes(path) == scene.intact[path.name] and (
            _bytes(path.with_suffix(".json")) == scene.intact[path.with_suffix(".json").name]
        ):
            continue
        tally.files += 1
        try:
            contents = load_checkpoint(path)
        except AtlasError:
            tally.refused += 1
            continue
        if not any(same_bits(contents, saved) for saved in scene.contents):
            raise Broken(f"{path.name} was accepted, and is not what was saved")
        tally.harmless += 1


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _resume(scene: Scene, done: list[str], tally: Tally, *, in_process: bool) -> None:
    newest = max(step for _, step in _intact_pairs(scene))
    code, said = _atlas_train(scene.run) if in_process else (0, scene.run.finish())
    if code != 0 or "Traceback" in said:
        raise Broken(f"exit code {code}: {said.splitlines()[-1]}")
    step = resumed_step(said)
    if step < newest:
        raise Broken(f"resumed from step {step}, but an intact checkpoint of step {newest} was there")
    assert_same_run(scene.ended, scene.run.output, steps=STEPS)
    tally.resumed_from[step] += 1


def _intact_pairs(scene: Scene) -> list[tuple[str, int]]:
    """(name, step) of the checkpoints whose bytes, and whose sidecar's, are those of one that was saved."""
    steps = {
        (data, scene.intact[name[:-3] + ".json"]): json.loads(scene.intact[name[:-3] + ".json"])["step"]
        for name, data in scene.intact.items()
        if name.endswith(".pt")
    }
    pairs = (
        (path.name, (_bytes(path), _bytes(path.with_suffix(".json"))))
        for path in scene.run.output.glob("*.pt")
    )
    return [(name, steps[pair]) for name, pair in pairs if pair in steps]


def _summary(tally: Tally, *, seed: int) -> list[str]:
    kinds = ", ".join(f"{count} {kind}" for kind, count in tally.kinds.most_common())
    steps = ", ".join(f"step {step}: {count}" for step, count in sorted(tally.resumed_from.items()))
    return [
        f"corrupt: {tally.rounds} runs damaged (--seed {seed}): {kinds}",
        f"  files read by name: {tally.files}; refused: {tally.refused}; "
        f"read, and what was saved to the bit: {tally.harmless}; accepted and wrong: 0",
        f"  resumed from the newest intact checkpoint each time ({steps}); tracebacks: 0",
        "  weights, optimizer state, losses at the end: bit for bit those of the undamaged run, each time",
    ]


def main() -> int:
    asked = options("corrupt", rounds=200).parse_args()
    return command("corrupt", lambda folder: corrupt_and_resume(folder, rounds=asked.rounds, seed=asked.seed))


if __name__ == "__main__":
    sys.exit(main())
