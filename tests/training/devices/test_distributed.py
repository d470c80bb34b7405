"""Several processes under torchrun: the same run as one process, and what happens when one of them fails."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from atlas.cli import main
from atlas.config.loader import nested, overlay, resolve
from atlas.data.sequences.loader import share_of_update
from atlas.errors import AtlasError, EndedElsewhere
from atlas.training.checkpoint.load import load_checkpoint
from atlas.training.devices import world as distributed
from atlas.training.devices.world import World
from atlas.training.memory import parallel as sharing
from atlas.training.memory.parallel import choose_parallel
from tests.runs import REPOSITORY, config_flags, layer, logged, run_for, trained, write_config

pytestmark = pytest.mark.skipif(os.name == "nt", reason="torchrun's gloo and these signals are not Windows'")


def launch(
    config: Path, processes: int, *arguments: str, fault: str = "none@0:0", restarts: int = 0
) -> subprocess.Popen[str]:
    """`torchrun … train --config CONFIG ARGUMENTS`; see `tests/ranks.py` for faults."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"),
        *(f"--max-restarts={restarts}", str(REPOSITORY / "tests/ranks.py"), fault),
        *("train", *config_flags(config), "--timeout", "20", *arguments),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], *, within: float = 120) -> tuple[int, str]:
    """Its exit code and output. No process of it may be left."""
    try:
        said = process.communicate(timeout=within)[1]
    finally:
        process.kill()
    config = process.args[process.args.index("--config") + 1]  # type: ignore[union-attr, index]
    orphans = [p for p in psutil.process_iter(["cmdline"]) if config in (p.info["cmdline"] or ())]
    assert orphans == []
    return process.returncode, said


def trained_by(config: Path, processes: int, *arguments: str) -> None:
    code, said = finish(launch(config, processes, *arguments))
    assert code == 0, said


def hard(folder: Path, text: Path, **settings: object) -> dict:
    """Accumulation with an uneven split, padding, validation that does not divide evenly; no dropout."""
    return layer(
        folder,
        text,
        **{
            "training__batch_size": 4,
            "training__gradient_accumulation_steps": 2,
            "training__micro_batch_size": 3,
            "training__eval_interval": 3,
            "training__eval_sequences": 13,
            "data__packing": "best_fit",
            "data__val_data": str(text),
            "checkpoint__save_interval": 3,
            **settings,
        },
    )


def losses(folder: Path, kind: str = "train", key: str = "loss") -> list[float]:
    return [line[key] for line in logged(folder, kind)]


def elsewhere(explicit: dict, folder: Path) -> dict:
    """The same run of one process, in another folder."""
    return overlay(explicit, {"training": {"parallel": "auto"}, "checkpoint": {"output_dir": str(folder)}})


def assert_close(one: Path, other: Path, name: str = "atlas_step_6.pt") -> None:
    """Losses agree to 1e-5, weights and optimizer state to 1e-4."""
    for kind, key in (("train", "loss"), ("validation", "val_loss")):
        assert losses(other, kind, key) == pytest.approx(losses(one, kind, key), rel=1e-5)
    first, second = load_checkpoint(one / name), load_checkpoint(other / name)
    for key, weight in first["model_state_dict"].items():
        torch.testing.assert_close(second["model_state_dict"][key], weight, rtol=0, atol=1e-4)
    for number, state in first["optimizer_state_dict"]["state"].items():
        for key, value in state.items():
            torch.testing.assert_close(
                second["optimizer_state_dict"]["state"][number][key], value, rtol=1e-3, atol=1e-5
            )
    assert first["sequences_consumed"] == second["sequences_consumed"]


# One run, however many processes


@pytest.mark.parametrize(
    ("parallel", "optimizer"), [pytest.param("ddp", "adamw", marks=pytest.mark.slow), ("fsdp", "muon")]
)
def test_two_processes_train_as_one(tmp_path: Path, text_file: Path, parallel: str, optimizer: str) -> None:
    explicit = hard(tmp_path / "one", text_file, training__optimizer=optimizer)
    trained(explicit)
    trained_by(
        write_config(tmp_path / "run.yaml", explicit),
        2,
        *("--output-dir", str(tmp_path / "two"), "--set", f"training.parallel={parallel}"),
    )
    assert_close(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "two/training.rank-1.log").exists()
    lines = (tmp_path / "two/training.log").read_text().splitlines()
    assert sum("step 6/6" in line for line in lines) == 1, "one rank speaks"
    assert any(
        line.endswith(f"2 processes, {parallel}: each computes 4 sequences of an update") for line in lines
    )

    alone = overlay(explicit, {"checkpoint": {"output_dir": str(tmp_path / "two")}})
    assert run_for(alone, resume=str(tmp_path / "two/atlas_step_3.pt")).config.training.parallel == "auto"
    said = (tmp_path / "two/training.log").read_text()
    assert f"training.parallel: {parallel}: is for several processes, and this run has one" in said


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    ("processes", "settings"),
    [
        (2, ["training.parallel=ddp"]),
        (2, ["training.parallel=fsdp"]),
        (4, ["training.parallel=ddp"]),
        (4, ["training.parallel=fsdp"]),
        (4, ["training.parallel=fsdp", "training.shard_size=2"]),
        (2, ["training.parallel=fsdp", "training.gradient_checkpointing=true"]),
    ],
)
def test_thirty_updates_of_nano(
    tmp_path: Path, text_file: Path, processes: int, settings: list[str], optimizer: str
) -> None:
    explicit = hard(tmp_path / "one", text_file, training__optimizer=optimizer, training__max_steps=30)
    explicit["training"]["learning_rate"] = 1e-3
    explicit["model"] = {"num_layers": 4, "hidden_size": 128, "num_heads": 4, "max_seq_len": 64}
    explicit["checkpoint"]["save_interval"] = 30
    trained(explicit)
    config = write_config(tmp_path / "run.yaml", explicit)
    flags = [word for setting in settings for word in ("--set", setting)]
    for name in ("first", "second"):
        trained_by(config, processes, *flags, "--output-dir", str(tmp_path / name))
    assert_close(tmp_path / "one", tmp_path / "first", "atlas_step_30.pt")
    first, second = (load_checkpoint(tmp_path / name / "atlas_step_30.pt") for name in ("first", "second"))
    for key, weight in first["model_state_dict"].items():
        assert torch.equal(weight, second["model_state_dict"][key]), "bit-identical from run to run"
    assert losses(tmp_path / "first") == losses(tmp_path / "second")


@pytest.mark.slow
def test_dropout_is_the_same_where_the_split_is(tmp_path: Path, text_file: Path) -> None:
    explicit = hard(tmp_path / "one", text_file, model__dropout=0.2, training__micro_batch_size=2)
    trained(explicit)
    trained_by(write_config(tmp_path / "run.yaml", explicit), 2, "--output-dir", str(tmp_path / "two"))
    assert_close(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_shards_of_four_resume_on_any_number(tmp_path: Path, text_file: Path, processes: int) -> None:
    explicit = hard(tmp_path / "one", text_file, checkpoint__format="sharded")
    trained(explicit)
    config, folder = write_config(tmp_path / "run.yaml", explicit), tmp_path / "four"
    flags = ("--output-dir", str(folder), "--set", "training.parallel=fsdp")
    trained_by(config, 4, *flags)
    assert len(list((folder / "atlas_step_3").glob("*.safetensors"))) == 4, "each rank writes its own"
    if processes == 1:
        trained(elsewhere(explicit, folder), resume=str(folder / "atlas_step_3"))
    else:
        trained_by(config, processes, *flags, "--resume", str(folder / "atlas_step_3"))
    assert len(list((folder / "atlas_step_6").glob("*.safetensors"))) == processes
    assert_close(tmp_path / "one", folder, "atlas_step_6")


@pytest.mark.slow
def test_another_mode_resumes_the_same_run(tmp_path: Path, text_file: Path) -> None:
    explicit = hard(tmp_path / "one", text_file)
    trained(explicit)
    config = write_config(tmp_path / "run.yaml", explicit)
    flags = ("--output-dir", str(tmp_path / "two"))
    trained_by(config, 2, *flags, "--set", "training.parallel=ddp")
    trained_by(
        config,
        2,
        *flags,
        "--set",
        "training.parallel=fsdp",
        "--resume",
        str(tmp_path / "two/atlas_step_3.pt"),
    )
    assert_close(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    "feature", ["data.document_mask=true", "training.compile=on", "training.gradient_checkpointing=true"]
)
def test_what_works_on_one_works_on_two(tmp_path: Path, text_file: Path, parallel: str, feature: str) -> None:
    if "compile" in feature and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    explicit = hard(tmp_path / "one", text_file, training__micro_batch_size=2)
    if "compile" not in feature:
        key, _, value = feature.partition("=")
        explicit = overlay(explicit, nested(key, value == "true"))
    trained(explicit)
    flags = (
        "--set",
        feature,
        "--set",
        f"training.parallel={parallel}",
        "--output-dir",
        str(tmp_path / "two"),
    )
    trained_by(write_config(tmp_path / "run.yaml", explicit), 2, *flags)
    assert_close(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_low_rank_updates_train_on_two(tmp_path: Path, text_file: Path, parallel: str) -> None:
    trained(hard(tmp_path / "base", text_file))
    base = str(tmp_path / "base/atlas_step_6.pt")
    explicit = hard(tmp_path / "one", text_file, lora__rank=4)
    trained(explicit, init_from=base)
    flags = (
        "--set",
        f"training.parallel={parallel}",
        "--output-dir",
        str(tmp_path / "two"),
        "--init-from",
        base,
    )
    trained_by(write_config(tmp_path / "run.yaml", explicit), 2, *flags)
    assert_close(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_hours_are_planned_by_the_first_and_kept_by_all(tmp_path: Path, text_file: Path) -> None:
    explicit = hard(tmp_path / "one", text_file, training__max_steps=10**6, checkpoint__save_interval=10**6)
    explicit["training"] |= {"eval_interval": 10**6, "log_interval": 50}
    process = launch(write_config(tmp_path / "run.yaml", explicit), 2, "--max-hours", "0.002")
    code, said = finish(process)
    assert code == 0, said
    assert "the run is planned to end at step" in said
    (last,) = (tmp_path / "one").glob("atlas_step_*.pt")
    contents = load_checkpoint(last)
    assert contents["step"] > 20
    assert contents["seconds"] < 8


# Failures


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("fault", ["kill@1:4", "hang@1:4", "memory-late@1:4", "bug@1:4"])
def test_a_rank_that_fails_ends_all_and_a_restart_resumes(
    tmp_path: Path, text_file: Path, fault: str, parallel: str
) -> None:
    explicit = hard(tmp_path / "one", text_file, training__parallel=parallel, checkpoint__save_interval=2)
    config = write_config(tmp_path / "run.yaml", explicit)
    code, said = finish(launch(config, 2, fault=fault))
    assert code != 0
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    expected = {
        "hang": "rank 0: no answer from another rank within 20 s",
        "memory-late": "rank 1: step 5: out of memory with 3 sequences per micro-batch",
    }.get(fault.split("@")[0])
    assert len(errors) == (expected is not None)
    assert expected is None or expected in errors[0]
    assert ("ValueError: a bug" in said) == fault.startswith("bug")
    assert "saved atlas_step_6" not in said

    code, said = finish(launch(config, 2, "--no-resume", fault=fault, restarts=2))
    assert code == 0, said
    assert "at step 4 of 6" in said, "what was lost is no more than the updates since the last save"
    assert "torchrun restarted the run" in said
    trained(elsewhere(explicit, tmp_path / "alone"))
    assert_close(tmp_path / "alone", tmp_path / "one")


@pytest.mark.slow
def test_out_of_memory_before_the_reduction_is_survived(tmp_path: Path, text_file: Path) -> None:
    explicit = hard(tmp_path / "one", text_file, training__parallel="ddp")
    code, said = finish(launch(write_config(tmp_path / "run.yaml", explicit), 2, fault="memory@1:1"))
    assert code == 0, said
    assert (
        "step 2: out of memory with 3 sequences per micro-batch: 1 from now on. An update still has 8 sequences"
        in said
    )
    assert load_checkpoint(tmp_path / "one/atlas_step_6.pt")["micro_batch_size"] == 1
    trained(elsewhere(explicit, tmp_path / "alone"))
    assert_close(tmp_path / "alone", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("format", ["single", "sharded"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_kill_in_the_middle_of_a_save(tmp_path: Path, text_file: Path, format: str, rank: int) -> None:
    explicit = hard(
        tmp_path / "one",
        text_file,
        checkpoint__background=True,
        checkpoint__format=format,
        checkpoint__save_interval=2,
        training__parallel="fsdp",
    )
    config = write_config(tmp_path / "run.yaml", explicit)
    code, said = finish(launch(config, 2, fault=f"save@{rank}:4", restarts=2))
    assert code == 0, said
    assert ("torchrun restarted the run" in said) == (format == "sharded" or rank == 0)
    trained(elsewhere(explicit, tmp_path / "alone"))
    assert_close(
        tmp_path / "alone", tmp_path / "one", "atlas_step_6" if format == "sharded" else "atlas_step_6.pt"
    )
    assert not list((tmp_path / "one").glob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_bad_numbers_on_one_rank_roll_all_ranks_back(tmp_path: Path, text_file: Path, parallel: str) -> None:
    explicit = hard(tmp_path / "one", text_file, training__parallel=parallel, checkpoint__save_interval=2)
    explicit["guard"] = {"max_bad_steps": 2}
    code, said = finish(launch(write_config(tmp_path / "run.yaml", explicit), 2, fault="nan@1:4"))
    assert code == 0, said
    back = "step 6: rolled back to step 4 (rollback 1 of 3): sequences 32 to 47 are skipped"
    assert said.count(back) == 1
    assert back in (tmp_path / "one/training.rank-1.log").read_text()
    events = [line["event"] for line in logged(tmp_path / "one", "event")]
    told = [event for event in events if event not in ("start", "save", "finished")]
    assert told == ["rollback"], "what was cut back is in metrics.lost.jsonl"
    contents = load_checkpoint(tmp_path / "one/atlas_step_6.pt")
    assert (contents["rate_scale"], contents["sequences_consumed"]) == (0.5, 8 * 8)
    assert all(weight.isfinite().all() for weight in contents["model_state_dict"].values())


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_sigterm_to_torchrun_saves_once(tmp_path: Path, text_file: Path, parallel: str) -> None:
    explicit = hard(tmp_path / "one", text_file, training__max_steps=100_000, checkpoint__save_interval=10**6)
    explicit["training"]["parallel"] = parallel
    explicit["training"]["eval_interval"] = 10**6
    process = launch(write_config(tmp_path / "run.yaml", explicit), 2)
    while len(logged(tmp_path / "one") if (tmp_path / "one/metrics.jsonl").exists() else []) < 3:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = finish(process, within=40)
    (saved,) = (tmp_path / "one").glob("atlas_interrupt_step_*.pt")
    assert said.count("stopping after this micro-batch") == 1
    assert said.count(f"saved {saved.name}") == 1
    assert load_checkpoint(saved)["step"] == logged(tmp_path / "one")[-1]["step"]


@pytest.mark.slow
def test_no_rank_ends_before_the_last_save_is_complete(tmp_path: Path, text_file: Path) -> None:
    """If one torchrun ends with an error, as after SIGTERM, srun kills those of the other machines."""
    explicit = hard(tmp_path / "one", text_file, training__max_steps=100_000, checkpoint__save_interval=10**6)
    explicit["training"]["eval_interval"] = 10**6
    process = launch(write_config(tmp_path / "run.yaml", explicit), 2, fault="slow@0:0")
    while len(logged(tmp_path / "one") if (tmp_path / "one/metrics.jsonl").exists() else []) < 3:
        assert process.poll() is None
        time.sleep(0.1)
    (second,) = (rank for rank in psutil.Process(process.pid).children() if rank.environ().get("RANK") == "1")
    process.send_signal(signal.SIGTERM)
    while second.is_running() and second.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.05)
    assert len([*(tmp_path / "one").glob("atlas_interrupt_step_*.pt")]) == 1
    finish(process, within=40)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["single", "sharded"])
def test_a_disk_that_is_full_on_the_first_rank(tmp_path: Path, text_file: Path, format: str) -> None:
    explicit = hard(tmp_path / "one", text_file, checkpoint__format=format, training__parallel="fsdp")
    code, said = finish(launch(write_config(tmp_path / "run.yaml", explicit), 2, fault="disk@0:3"))
    assert code == 0, said
    assert "no checkpoint saved" in said
    assert (
        load_checkpoint(tmp_path / "one" / ("atlas_step_6" if format == "sharded" else "atlas_step_6.pt"))[
            "step"
        ]
        == 6
    )


# What is refused, and small parts


@pytest.mark.parametrize(
    ("settings", "size", "reason"),
    [
        ({"parallel": "none"}, 2, "would each train a model of their own"),
        ({"parallel": "fsdp", "optimizer": "adafactor"}, 2, "cannot be sharded"),
        ({"parallel": "fsdp", "optimizer": "adamw8bit"}, 2, "cannot be sharded"),
        ({"parallel": "fsdp", "precision": "fp16"}, 2, "only one rank would see an overflow"),
        ({"parallel": "fsdp", "precision": "bf16-true"}, 2, "its rounding needs full weights"),
        ({"parallel": "ddp", "shard_size": 2}, 4, "is for training.parallel fsdp"),
        ({"parallel": "fsdp", "shard_size": 3}, 4, "not a multiple"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    monkeypatch: pytest.MonkeyPatch, settings: dict, size: int, reason: str
) -> None:
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    with pytest.raises(AtlasError, match=reason):
        choose_parallel(resolve({"training": settings}), World(0, size), torch.device("cpu"))


def test_auto_shards_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    config = resolve({"model": {"vocab_size": 1000, "hidden_size": 64, "num_heads": 4}})
    for free, expected in ((1 << 40, "ddp"), (1 << 20, "fsdp")):
        monkeypatch.setattr(sharing, "measure_memory", lambda device, free=free: free)
        assert choose_parallel(config, World(0, 2), torch.device("cpu")) == expected
    assert choose_parallel(config, World(0, 1), torch.device("cpu")) == "none"


def test_one_process_alone_is_shown_how_to_start_several(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(
        tmp_path / "run.yaml", layer(tmp_path / "run", text_file, training__parallel="fsdp")
    )
    assert main(["train", *config_flags(config)]) == 2
    assert "torchrun --nproc-per-node=N -m atlas train" in capsys.readouterr().err


def test_an_update_that_cannot_be_shared_evenly_is_refused() -> None:
    assert share_of_update(12, 4) == 3
    with pytest.raises(AtlasError, match="a multiple of the number of processes"):
        share_of_update(10, 4)


def test_a_world_of_one_needs_no_others() -> None:
    world = World()
    assert world.sums(1, 2.5) == (1, 2.5)
    assert world.broadcast({"a": [1, None]}) == {"a": [1, None]}
    assert not world.any(False)
    assert world.all_min(7) == 7
    with pytest.raises(AtlasError, match="mine"), world.in_step():
        raise AtlasError("mine")


def test_only_the_first_rank_that_is_refused_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        World, "all_min", lambda self, number: min(number, 1)
    )  # as if rank 1 were refused as well
    with pytest.raises(EndedElsewhere), World(2, 4).in_step():
        raise AtlasError("mine, too")
    with pytest.raises(EndedElsewhere), World(0, 4).in_step():
        pass
    with pytest.raises(AtlasError, match="mine"), World(1, 4).in_step():
        raise AtlasError("mine")
