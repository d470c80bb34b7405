"""Preparation by any number of processes, killed at any moment: the shards are the same, bit for bit."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import psutil
import pytest

from atlas.cli import main
from atlas.data import open_dataset, prepare
from atlas.data.prepare import batching as reading
from atlas.data.prepare.cleaning import Cleaning
from atlas.errors import AtlasError
from tests.archive import write_folder, write_zip

ROOT = Path(__file__).parents[2]
WORDS = ["the", "river", "runs", "past", "old", "mill", "bridge", "boat", "waits", "where", "reeds", "grow"]


def documents(count: int, seed: int = 0) -> list[str]:
    """Short and long ones, some of them twice."""
    draw = random.Random(seed)
    made = [" ".join(draw.choices(WORDS, k=draw.choice((5, 40, 300)))) + f" {n}." for n in range(count)]
    return made + made[: count // 10]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in documents(400)), encoding="utf-8")
    return path


def bits(folder: Path) -> dict[str, str]:
    """Of all files of a dataset that hold what is trained on."""
    files = sorted(path for path in folder.iterdir() if path.suffix == ".npy")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_workers_gives_the_same_shards(
    workers: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BATCH_CHARS", 3000)
    options = {"val_fraction": 0.2, "shard_tokens": 5000}
    one = prepare([source], tmp_path / "one", workers=1, **options)  # type: ignore[arg-type]
    assert len(one.dataset.manifest.splits["train"].shards) > 5
    many = prepare([source], tmp_path / "many", workers=workers, **options)  # type: ignore[arg-type]
    assert bits(tmp_path / "one") == bits(tmp_path / "many")
    assert one.dataset.manifest == many.dataset.manifest


def test_zip_folder_and_tar_give_the_same_shards(tmp_path: Path) -> None:
    files = {f"{n % 7}/text {n}.txt": text for n, text in enumerate(documents(60))}
    write_folder(tmp_path / "folder", files)
    write_zip(tmp_path / "all.zip", files)
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        for name, text in random.Random(1).sample(list(files.items()), len(files)):
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    forms = ("folder", "all.zip", "all.tar")
    datasets = [
        prepare([tmp_path / form], tmp_path / f"of {form}", val_fraction=0.2).dataset for form in forms
    ]
    assert bits(datasets[0].folder) == bits(datasets[1].folder) == bits(datasets[2].folder)
    assert datasets[0].split("val") is not None


# Kills

CHILD = """
import os, signal, sys
from pathlib import Path
from atlas.data import prepare
from atlas.data.prepare import merge
from atlas import files
from atlas.data.prepare import workspace as folder
from atlas.data.prepare import batching as reading
from atlas.data.prepare import shard_writer as writer
prepare_module = sys.modules["atlas.data.prepare.pipeline"]
source, output, workers, kill_at = sys.argv[1:]
reading.BATCH_CHARS = 3000
prepare_module.COMMIT_SECONDS = 0
calls = 0

def counted(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == int(kill_at):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

# Each place where something on the disk changes.
for owner, name in ((writer, "flush_to_disk"), (folder, "flush_to_disk"), (files, "flush_to_disk"), (os, "replace"),
                    (Path, "rename"), (writer, "sha256_of"), (writer.SplitWriter, "append"),
                    (writer.SplitWriter, "_finish"), (merge.Merger, "add")):
    setattr(owner, name, counted(getattr(owner, name)))
prepare([source], output, workers=int(workers), val_fraction=0.2, shard_tokens=5000)
print(calls)
"""


def run_child(
    source: Path, output: Path, *, workers: int = 1, kill_at: int = -1
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHILD, str(source), str(output), str(workers), str(kill_at)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def kill_and_resume(source: Path, folder: Path, moments: list[int], workers: int = 1) -> int:
    """Kill at each moment, then resume to the end. Returns how many calls resumed something."""
    resumed = 0
    for moment in moments:
        killed = run_child(source, folder / "out", workers=workers, kill_at=moment)
        assert killed.returncode in (-signal.SIGKILL, 0), killed.stderr
        resumed += "were done before" in killed.stderr
        assert not (folder / "out").exists() or open_dataset(folder / "out", verify=True)
    finished = run_child(source, folder / "out", workers=workers)
    assert finished.returncode == 0, finished.stderr
    return resumed + ("were done before" in finished.stderr)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal on Windows")
def test_a_killed_preparation_resumes_to_the_same_shards(source: Path, tmp_path: Path) -> None:
    whole = prepare([source], tmp_path / "whole", val_fraction=0.2, shard_tokens=5000)
    assert kill_and_resume(source, tmp_path, [150, 99]) == 2
    assert bits(tmp_path / "out") == bits(tmp_path / "whole")
    assert open_dataset(tmp_path / "out").manifest == whole.dataset.manifest
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_kills_at_ten_random_moments(workers: int, source: Path, tmp_path: Path) -> None:
    prepare([source], tmp_path / "whole", val_fraction=0.2, shard_tokens=5000)
    calls = int(run_child(source, tmp_path / "out", workers=workers).stdout)
    draw = random.Random(workers)
    for round in range(2):
        (tmp_path / str(round)).mkdir()
        moments = [draw.randrange(1, calls // 4) for _ in range(9)] + [draw.randrange(1, calls)]
        assert kill_and_resume(source, tmp_path / str(round), moments, workers) > 5
        assert bits(tmp_path / str(round) / "out") == bits(tmp_path / "whole")


def test_another_text_or_option_does_not_resume(source: Path, tmp_path: Path) -> None:
    run_child(source, tmp_path / "out", kill_at=150)
    assert (tmp_path / ".out.preparing" / "journal.json").exists()
    prepare([source], tmp_path / "out", val_fraction=0.3, shard_tokens=5000)
    prepare([source], tmp_path / "fresh", val_fraction=0.3, shard_tokens=5000)
    assert bits(tmp_path / "out") == bits(tmp_path / "fresh")
    assert not (tmp_path / ".out.preparing").exists()


def test_an_interrupt_keeps_the_work_so_far(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reading, "BATCH_CHARS", 3000)
    monkeypatch.setattr(sys.modules["atlas.data.prepare.pipeline"], "COMMIT_SECONDS", 0)
    prepare([source], tmp_path / "whole", val_fraction=0.2)

    class Interrupting:
        calls = 0

        def __call__(self, add):  # type: ignore[no-untyped-def]
            def call(*args):  # type: ignore[no-untyped-def]
                self.calls += 1
                if self.calls == 20:
                    raise KeyboardInterrupt
                return add(*args)

            return call

    from atlas.data.prepare.merge import Merger

    with monkeypatch.context() as patch:
        patch.setattr(Merger, "add", Interrupting()(Merger.add))
        with pytest.raises(KeyboardInterrupt):
            prepare([source], tmp_path / "out", val_fraction=0.2)
    assert "the same command resumes it" in capsys.readouterr().err
    prepare([source], tmp_path / "out", val_fraction=0.2)
    assert "tokens were done before" in capsys.readouterr().err
    assert bits(tmp_path / "out") == bits(tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_worker_is_reported_and_nothing_is_lost(tmp_path: Path) -> None:
    """As the kernel kills it where memory runs out. A killed parent leaves no worker, either."""
    source = tmp_path / "big.txt"
    source.write_text("\n".join(documents(120_000)), encoding="utf-8")
    command = [sys.executable, "-m", "atlas", "prepare", "--input", str(source), "--workers", "2", "--output"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(
        [*command, str(tmp_path / "out")], stderr=subprocess.PIPE, text=True, env=environment
    )
    worker = _busy_worker(parent.pid)
    worker.kill()
    _, error = parent.communicate(timeout=60)
    assert parent.returncode == 2
    assert "error: a worker process was killed" in error
    parent = subprocess.Popen([*command, str(tmp_path / "out")], stderr=subprocess.DEVNULL, env=environment)
    worker = _busy_worker(parent.pid)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.2)
    assert main(["prepare", "--input", str(source), "--workers", "1", "--output", str(tmp_path / "out")]) == 0


def _busy_worker(parent: int) -> psutil.Process:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for process in psutil.Process(parent).children(recursive=True):
            if "popen_loky" in " ".join(process.cmdline()) and process.cpu_times().user > 0.9:
                return process
        time.sleep(0.1)
    raise AssertionError("no worker began")


DIES_WHILE_IT_SENDS = """
import multiprocessing.connection as pipes, os, signal
from types import SimpleNamespace
from atlas.data.prepare import workers
from atlas.data.prepare.workspace import WorkerKilled

class Encoder:
    tokenizer = None

    def __call__(self, parts):
        if parts == [3]:
            pipes.Connection._send = die_halfway
        return b"x" * 100_000

def die_halfway(pipe, message, *_):
    os.write(pipe.fileno(), bytes(message)[:3000])
    os.kill(os.getpid(), signal.SIGKILL)

workers._CHECK_SECONDS = 0.3
try:
    for batch, encoded in workers._encode_here((SimpleNamespace(parts=[n]) for n in range(20)), Encoder(), 2):
        print(batch.parts[0])
except WorkerKilled as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal on Windows")
def test_a_worker_killed_while_it_sends_is_reported() -> None:
    """Nothing must wait for the other half of its result."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", DIES_WHILE_IT_SENDS],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )
    assert run.stdout.startswith("0\n1\n2\na worker process was killed"), run.stderr


# Standard input, Ray, and what is printed


def pipe(text: str, output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "atlas", "prepare", "--input", "-", "--output", str(output), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=120, env=environment)


def test_standard_input_is_a_source(source: Path, tmp_path: Path) -> None:
    prepare([source], tmp_path / "file")
    piped = pipe(source.read_text(encoding="utf-8"), tmp_path / "piped")
    assert piped.returncode == 0, piped.stderr
    assert "standard input: Atlas read 0.3 MB from the start" in piped.stderr
    assert bits(tmp_path / "piped") == bits(tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "piped", "rows.jsonl"]
    empty = pipe("", tmp_path / "none")
    assert empty.returncode == 2
    assert "holds no text" in empty.stderr


@pytest.mark.slow
def test_ray_gives_the_same_shards(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster of two workers on this machine; sources in several bundles, one of them with an open end."""
    ray = pytest.importorskip("ray")
    from atlas.data.prepare import ray_engine

    monkeypatch.setattr(ray_engine, "_BUNDLE_BYTES", 30_000)
    files = {f"{n:03d}.txt": text for n, text in enumerate(documents(120, seed=5))}
    folder = write_folder(tmp_path / "folder", files)
    paths = [
        source,
        folder,
        write_zip(tmp_path / "all.zip", {"long.txt": "A long text of words.\n" * 100_000}),
    ]
    one = prepare(paths, tmp_path / "one", workers=1, val_fraction=0.2, shard_tokens=5000)
    bad = tmp_path / "bad.jsonl"
    bad.write_text("nonsense\n", encoding="utf-8")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        two = prepare(paths, tmp_path / "ray", workers=2, engine="ray", val_fraction=0.2, shard_tokens=5000)
        with pytest.raises(AtlasError, match="line 1: is not JSON"):
            prepare([bad], tmp_path / "bad", engine="ray")
    finally:
        ray.shutdown()
    assert bits(tmp_path / "one") == bits(tmp_path / "ray")
    assert one.dataset.manifest == two.dataset.manifest


LOSES_A_MACHINE = """
import sys
import ray
from ray.cluster_utils import Cluster
from atlas.data import prepare
from atlas.data.prepare import ray_engine
from atlas.data.prepare.merge import Merger

source, output = sys.argv[1:]
ray_engine._BUNDLE_BYTES = 2000  # each bundle is at least one batch
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
lost = cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
add, calls = Merger.add, []

def add_and_lose(*arguments):
    calls.append(None)
    if len(calls) == 5:
        cluster.remove_node(lost, allow_graceful=False)  # SIGKILL to the raylet
    if len(calls) == 20:
        cluster.add_node(num_cpus=1)
    add(*arguments)

Merger.add = add_and_lose
prepare([source], output, engine="ray", val_fraction=0.2, shard_tokens=5000)
print("batches:", len(calls))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
def test_a_lost_machine_of_a_ray_cluster_changes_nothing(tmp_path: Path) -> None:
    """A cluster of two machines with one CPU each. One of them is lost, so that no CPU is spare; later another one
    joins."""
    pytest.importorskip("ray")
    folder = write_folder(
        tmp_path / "in", {f"{n}.txt": text for n, text in enumerate(documents(100, seed=5))}
    )
    here = prepare([folder], tmp_path / "here", workers=1, val_fraction=0.2, shard_tokens=5000)
    command = [sys.executable, "-c", LOSES_A_MACHINE, str(folder), str(tmp_path / "ray")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert run.returncode == 0, run.stderr
    found = re.search(r"batches: (\d+)", run.stdout)  # Ray also prints there
    assert found
    assert int(found[1]) > 30
    assert bits(tmp_path / "here") == bits(tmp_path / "ray")
    assert here.dataset.manifest == open_dataset(tmp_path / "ray").manifest


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--workers", "0"], "--workers 0: must be"),
        (["--engine", "spark"], "--engine spark: must be local or ray"),
        (["--clean", "nfk"], "--clean nfk: no such step"),
        (["--min-chars", "-2"], "--min-chars -2: must be"),
    ],
)
def test_wrong_options_are_one_line(
    options: list[str], reason: str, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", "--input", str(source), *options]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1


def test_changes_are_reported(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "in", {f"{n}.txt": f"Text number {n}." for n in range(30)})
    out = tmp_path / "out"
    prepare([folder], out)
    assert "is rebuilt" not in capsys.readouterr().err
    assert prepare([folder], out).unchanged
    assert capsys.readouterr().err == ""
    (folder / "3.txt").write_text("Another text.", encoding="utf-8")
    (folder / "4.txt").unlink()
    (folder / "new.txt").write_text("A new text.", encoding="utf-8")
    prepare([folder], out, val_fraction=0.1)
    error = capsys.readouterr().err
    for line in ("new.txt is new", "4.txt is gone", "3.txt changed", "val_fraction was 0.05, is 0.1"):
        assert f"{out} is rebuilt: {line}\n" in error
    prepare([folder], out, val_fraction=0.1, train_tokenizer=270)
    assert "the tokenizer was gpt2, is trained with 270 tokens" in capsys.readouterr().err
    prepare([folder], out, val_fraction=0.1, cleaning=Cleaning(("nfc", "control"), min_chars=3))
    error = capsys.readouterr().err
    assert f"{out} is rebuilt: clean was nfc,control,whitespace,duplicates, is nfc,control\n" in error
    assert f"{out} is rebuilt: min_chars was 1, is 3\n" in error
    assert error.count("is rebuilt: ") == 3  # and the tokenizer
    prepare([folder], out, val_fraction=0.1, train_tokenizer=270)
    capsys.readouterr()
    prepare([folder], out, val_fraction=0.1)
    assert "the tokenizer was one of 270 tokens, trained on the text, is" in capsys.readouterr().err


def test_preparing_needs_no_pytorch() -> None:
    """Each worker would take a second and 200 MB more."""
    program = (
        "import sys, atlas.data.prepare.workers, atlas.data.prepare.pipeline, atlas.cli.prepare\n"
        "print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert run.stdout == "False\n", run.stderr
