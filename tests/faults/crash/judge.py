"""What must hold after a crash of a command, and when the next command is over."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil
import torch

from atlas.training.checkpoint.load import load_checkpoint
from tests.faults.crash.children import run_in
from tests.faults.crash.scenes import RUN, STEPS, Scene
from tests.faults.crash.strace import Call
from tests.faults.runs import PATIENCE_S, Broken, resumed_step, sound_checkpoints
from tests.runs import STATE, lines_without_timings, same_bits


def stage(scene: Scene, work: Path) -> Judge:
    """Make `work/before` and `work/whole`, the folder before and after the scene's command. The commands run in this
    process, which so imports whatever they need, and must stay without threads, so that it can be forked."""
    os.environ |= {"ATLAS_CACHE_DIR": "cache", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    num_threads = psutil.Process().num_threads()
    before, whole = work / "before", work / "whole"
    before.mkdir(parents=True)
    with run_in(before):
        scene.before()
    for action, code in ((scene.command, scene.ends_with), *([(scene.again, 0)] if scene.again else [])):
        shutil.rmtree(whole, ignore_errors=True)
        shutil.copytree(before, whole)
        with run_in(whole):
            ended, said = action()
        if ended != code:
            raise Broken(f"{scene.name}: exit code {ended} without any fault: {said}")
    deadline = time.monotonic() + PATIENCE_S
    while psutil.Process().num_threads() > num_threads and time.monotonic() < deadline:
        time.sleep(0.05)  # a thread may be about to end
    if psutil.Process().num_threads() > num_threads:
        raise Broken(f"{scene.name}: threads are left, so that this process cannot be forked")
    return Judge(scene, before, whole)


def announced(calls: Sequence[Call]) -> int:
    """The step of the last save that these calls announced in `metrics.jsonl`."""
    lines = b"".join(call.data for call in calls if call.paths and call.paths[0] == "run/metrics.jsonl")
    return _last_save(lines.splitlines())


def _last_save(lines: Iterable[bytes]) -> int:
    return max((json.loads(line)["step"] for line in lines if b'"event": "save"' in line), default=0)


def digests(place: Path) -> dict[str, str]:
    """Path in `place` → SHA-256 of each file; for a file, of itself."""
    files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    return {str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Judge:
    """Compares the current folder, after a crash of a scene's command, with `before` and `whole`, copies from before
    the command and after it."""

    def __init__(self, scene: Scene, before: Path, whole: Path) -> None:
        self._scene = scene
        self._before, self._whole = before, whole
        self._old = {target: digests(before / target) for target in scene.targets}
        self._new = {target: digests(whole / target) for target in scene.targets}
        moved, old = digests(whole / RUN / "previous-1"), digests(before / RUN)
        self._moved = {name: digest for name, digest in moved.items() if old.get(name) == digest}
        self._ended = _contents(whole / RUN)

    @property
    def base_step(self) -> int:
        """The step from which the command starts: no crash may cost it."""
        steps = sound_checkpoints(self._before / RUN)
        kept = [step for name, step in steps.items() if name not in self._moved]
        return max(kept, default=0)

    def announced_here(self) -> int:
        """The step of the last save that the command announced in the current folder, where no data is lost."""
        logs = [folder / RUN / "metrics.jsonl" for folder in (Path(), self._before)]
        now, old = (log.read_bytes().split(b"\n")[:-1] if log.exists() else [] for log in logs)
        return _last_save(line for line in now if line not in old)

    def check(self, saved: int, *, is_over: bool = False) -> None:
        """Check what a crash left in the current folder, then each command that a user may run next."""
        self.after_crash(saved, is_over=is_over)
        crashed = Path.cwd()
        for number, action in enumerate((self._scene.resume, *self._scene.instead)):
            copy = crashed.with_name(f"{crashed.name}-{number}")
            shutil.copytree(crashed, copy, symlinks=True)
            try:
                with run_in(copy):
                    self.after_all(*action(), saved, same=number == 0)
            finally:
                shutil.rmtree(copy)

    def after_crash(self, saved: int, *, is_over: bool = False) -> None:
        """Check what the crash left. A checkpoint of step `saved` was announced; the command was over, or not."""
        for target in self._scene.targets:
            self._check_target(target, is_over=is_over)
        if self._scene.targets:
            return
        newest = max(sound_checkpoints(RUN).values(), default=0)
        for folder in RUN.glob("previous-*"):
            sound_checkpoints(folder)
        present = {*digests(Path()).values()}
        if lost := [name for name, digest in self._moved.items() if digest not in present]:
            raise Broken(f"{', '.join(lost)} of the old run is lost")
        if newest < saved:
            raise Broken(
                f"the checkpoint of step {saved} was announced; the newest intact one is of step {newest}"
            )

    def _found(self, target: str) -> dict[str, str]:
        """The digests in a target, without the lock that a killed command leaves, and that the next one takes over."""
        found = digests(Path(target))
        if self._scene.is_sealed:
            found.pop("atlas.lock", None)
        return found

    def _check_target(self, target: str, *, is_over: bool) -> None:
        found, old, new = self._found(target), self._old[target], self._new[target]
        is_sealed = self._scene.is_sealed
        found = {name: digest for name, digest in found.items() if not name.endswith(".tmp")}
        if found == new or (not is_over and (found == old or (is_sealed and found.items() <= new.items()))):
            return
        if found or is_over:
            raise Broken(f"{target} is neither the old one nor the new one: {_difference(found, new)}")
        if old and all(digests(path) != old for path in Path().iterdir()):
            raise Broken(f"{target} is gone, and the old one is nowhere complete")

    def after_all(self, code: int, said: str, saved: int, *, same: bool = True) -> None:
        """Check what the next command left, its exit code and its output. `same` if it ends as the command does."""
        if code == 2 and self._new and all(self._found(name) == new for name, new in self._new.items()):
            return  # what is complete already may be refused
        if code != 0 or "Traceback" in said:
            raise Broken(f"the next command ends with exit code {code}: {' / '.join(said.splitlines()[-2:])}")
        if self._scene.targets:
            self._check_products()
            return
        if same and not self._moved and "nothing to do" not in said and resumed_step(said) < saved:
            raise Broken(f"resumed from step {resumed_step(said)}, but step {saved} was announced")
        if half := sorted(str(path) for path in RUN.glob("*.tmp" if same else "atlas_*.tmp")):
            raise Broken(f"half files are left: {', '.join(half)}")
        self._check_set()
        self._check_log()
        if same:
            self._check_end()

    def _check_products(self) -> None:
        for target, new in self._new.items():
            if (found := digests(Path(target))) != new:
                raise Broken(
                    f"{target} differs from that of an undisturbed command: {_difference(found, new)}"
                )
        left = {path.name for path in Path().iterdir()} - {path.name for path in self._whole.iterdir()}
        if left:
            raise Broken(f"files are left: {', '.join(sorted(left))}")

    def _check_set(self) -> None:
        """The checkpoints and files that the command moves aside must be in one place, all of them, as they were."""
        places = {folder: digests(folder) for folder in (RUN, *RUN.glob("previous-*"))}
        for folder, place in places.items():
            # If the run resumes in its place, its logs grow.
            needed = {name for name in self._moved if folder != RUN or name.startswith("atlas_")}
            if all(place.get(name) == self._moved[name] for name in needed):
                return
        found = {
            folder.name: [name for name, digest in self._moved.items() if place.get(name) == digest]
            for folder, place in places.items()
        }
        raise Broken(
            "the old run is not in one place: " + "; ".join(f"{n}: {', '.join(found[n])}" for n in found)
        )

    def _check_log(self) -> None:
        """Each step once, in order, and no step of an earlier log is lost or doubled."""
        text = (RUN / "metrics.jsonl").read_text(encoding="utf-8")
        records = [json.loads(line) for line in text.split("\n")[:-1]]  # a power cut may tear the last line
        steps = [record["step"] for record in records if record["kind"] == "train"]
        if steps != list(range(1, len(steps) + 1)):
            raise Broken(f"metrics.jsonl holds the steps {steps}")
        logs = RUN.rglob("metrics*.jsonl")
        lines = [line for path in logs for line in path.read_text(encoding="utf-8").splitlines()]
        old = self._before / RUN / "metrics.jsonl"
        for line in old.read_text(encoding="utf-8").splitlines() if old.exists() else ():
            if '"kind": "train"' in line and lines.count(line) != 1:
                raise Broken(
                    f"a line of the old metrics.jsonl is there {lines.count(line)} times: {line:.60}"
                )

    def _check_end(self) -> None:
        """The run must have the same log as the undisturbed one, apart from timings, the best checkpoint and one of the
        last step, and no other content in any checkpoint.

        After a kill in the last save, the run is complete as soon as a checkpoint of its last step is there. Then
        another one of this step may be missing, and an old one may be left, or may not be slim.
        """
        found = _contents(RUN)
        if "atlas_best" in self._ended.keys() - found.keys():
            raise Broken("atlas_best is missing")
        if max(contents["step"] for contents in found.values()) != STEPS:
            raise Broken(f"no checkpoint of the last step: {', '.join(sorted(found))}")
        for name in found.keys() & self._ended.keys():
            ours, theirs = self._ended[name], found[name]
            keys = [key for key in STATE if key != "optimizer_state_dict" or ours[key]]
            if wrong := [key for key in keys if not same_bits(ours[key], theirs[key])]:
                raise Broken(f"{name}: {wrong[0]} differs from that of an undisturbed run")
        if not (RUN / "metrics.jsonl").read_bytes().endswith(b"\n"):
            return  # the run was complete, and the last line of its log was torn
        for kind in ("train", "validation"):
            if lines_without_timings(self._whole / RUN, kind) != lines_without_timings(RUN, kind):
                raise Broken(f"metrics.jsonl: the {kind} lines differ from those of an undisturbed run")


def _difference(found: dict[str, str], wanted: dict[str, str]) -> str:
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    other = sorted(name for name in found.keys() & wanted.keys() if found[name] != wanted[name])
    facts = {"missing": missing, "more": extra, "different": other}
    return "; ".join(f"{name} {', '.join(names)}" for name, names in facts.items() if names)


def _contents(folder: Path) -> dict[str, dict]:
    """The contents of the checkpoints in a folder, by name, except those of an interrupt. A sidecar alone is none."""
    contents = {}
    for sidecar in folder.glob("atlas_*.json"):
        shards = json.loads(sidecar.read_text(encoding="utf-8")).get("folder")
        path = folder / (shards or f"{sidecar.stem}.pt")
        if path.exists() and "interrupt" not in sidecar.name:
            name = sidecar.stem
            contents[name] = load_checkpoint(folder / name) if shards else torch.load(path, weights_only=True)
    return contents
