"""The records of a run, the trackers that get them, and that no tracker changes or ends the run."""

from __future__ import annotations

import importlib.util
import json
import math
import signal
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from atlas.errors import AtlasError
from atlas.inference.text import sample_texts
from atlas.training.checkpoint.load import load_checkpoint
from atlas.training.devices.memory import remembered_peak_rate
from atlas.training.launch import start_run
from atlas.training.logs import throughput
from atlas.training.logs import trackers as tracking
from atlas.training.resume import Request, choose_start
from atlas.training.run import Run
from atlas.training.train import train
from tests.runs import (
    STATE,
    assert_same_run,
    layer,
    lines_without_timings,
    logged,
    on_updates,
    run_for,
    same_bits,
    start_process,
    trained,
    write_config,
)


def tracked(folder: Path, text: Path, **settings: object) -> dict:
    return layer(
        folder,
        text,
        training__eval_interval=2,
        training__eval_sequences=4,
        tracking__samples=2,
        tracking__sample_tokens=12,
        **settings,
    )


def sampling_run(explicit: dict, **request: Any) -> Run:
    return start_run(choose_start(Request(explicit, **request)), sampler=sample_texts)


def events(folder: Path, name: str) -> list[dict]:
    return [line for line in logged(folder, "event") if line["event"] == name]


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """The scalars that TensorBoard itself reads: tag → step → value, each step once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    reader.Reload()
    found = {}
    for tag in reader.Tags()["scalars"]:
        read = reader.Scalars(tag)
        found[tag] = {event.step: event.value for event in read}
        assert len(found[tag]) == len(read), tag
    return found


def assert_tensorboard_has_what_the_metrics_have(folder: Path) -> None:
    found = scalars(folder)
    expected: dict[str, dict[int, float]] = {}
    for kind in ("train", "validation"):
        for line in logged(folder, kind):
            for name, value in line.items():
                if name not in ("kind", "step") and isinstance(value, (int, float)):
                    rounded = struct.unpack("f", struct.pack("f", value))[0]
                    expected.setdefault(f"{kind}/{name}", {})[line["step"]] = rounded
    assert found == expected


# Records


def test_a_line_of_metrics_holds_all_metrics(tmp_path: Path, text_file: Path) -> None:
    run, _ = trained(tracked(tmp_path / "run", text_file, checkpoint__save_interval=3))
    lines = logged(tmp_path / "run")
    for line in lines:
        assert line["tokens"] == line["step"] * 4 * 16
        assert 0 < line["utilisation"] <= 1
        assert 2e7 < line["memory"] < 1e11
        assert line["grad_norm"] > 0
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)
    assert all(line["bits_per_byte"] > 0 for line in logged(tmp_path / "run", "validation"))
    (start,) = events(tmp_path / "run", "start")
    assert start["parameters"] == run.model.num_parameters()
    assert start["machine"]["torch"] == torch.__version__
    saves = events(tmp_path / "run", "save")
    assert {name for save in saves for name in save["names"]} >= {
        "atlas_step_3.pt",
        "atlas_step_6.pt",
        "atlas_best.pt",
    }
    assert [event["event"] for event in logged(tmp_path / "run", "event")][-1] == "finished"


def test_utilisation_is_relative_to_the_speed_that_was_measured_and_stored(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATLAS_CACHE_DIR", str(tmp_path / "cache"))
    measured: list[object] = []

    def measure(*arguments: object, **options: object) -> float:
        measured.append(arguments)
        return 1e15

    monkeypatch.setattr(throughput, "measure_matrix_products", measure)
    run, _ = trained(layer(tmp_path / "run", text_file))
    assert remembered_peak_rate(run.runtime) == 1e15
    trained(layer(tmp_path / "again", text_file))
    assert len(measured) == 1
    from atlas.model.cost import training_flops_per_token

    for line in logged(tmp_path / "again"):
        flops = line["tokens_per_second"] * training_flops_per_token(run.config)
        assert math.isclose(line["utilisation"], flops / 1e15)


def test_a_speed_measured_on_a_busy_machine_is_measured_again(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATLAS_CACHE_DIR", str(tmp_path / "cache"))
    rates = iter([1.0, 1e15])
    monkeypatch.setattr(throughput, "measure_matrix_products", lambda *_, **__: next(rates))
    trained(layer(tmp_path / "run", text_file))
    assert logged(tmp_path / "run")[-1]["utilisation"] < 1


def test_running_out_of_memory_is_an_event(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATLAS_CACHE_DIR", str(tmp_path / "cache"))  # what fits is stored, for this test alone
    run = run_for(layer(tmp_path / "run", text_file))
    forward = run.learner.objective.forward

    def with_too_many(inputs: Any, *rest: Any, **named: Any) -> Any:
        if run.state.step == 2 and len(inputs) > 2:
            raise MemoryError
        return forward(inputs, *rest, **named)

    monkeypatch.setattr(run.learner.objective, "forward", with_too_many)
    train(run)
    (event,) = events(tmp_path / "run", "out of memory")
    assert (event["step"], event["work"], event["sequences_at_once"]) == (3, "training", 2)


def test_an_interrupt_and_a_resume_are_events(tmp_path: Path, text_file: Path) -> None:
    explicit = layer(tmp_path / "run", text_file)
    run = run_for(explicit)
    state = run.state

    def stop() -> None:
        if state.step == 2:
            signal.raise_signal(signal.SIGINT)

    on_updates(run, after=stop)
    assert train(run).outcome == "interrupted"
    del run
    trained(explicit)
    told = [(line["event"], line["step"]) for line in logged(tmp_path / "run", "event")]
    assert told == [
        ("start", 0),
        ("save", 2),
        ("interrupted", 2),
        ("resumed", 2),
        ("save", 6),
        ("finished", 6),
    ]


# Samples


def test_samples_are_the_same_each_time_and_change_no_bit(tmp_path: Path, text_file: Path) -> None:
    def explicit(name: str) -> dict:
        return tracked(tmp_path / name, text_file, model__dropout=0.2)

    for name in ("one", "two"):
        run = sampling_run(explicit(name))
        train(run)
        assert run.model.training
    trained(explicit("without"))
    for name in ("two", "without"):
        assert_same_run(tmp_path / "one", tmp_path / name, steps=6)
    samples = logged(tmp_path / "one", "sample")
    assert samples == logged(tmp_path / "two", "sample")
    assert [(line["step"], line["number"]) for line in samples] == [
        (step, number) for step in (2, 4, 6) for number in (0, 1)
    ]
    assert all(line["text"] for line in samples)
    assert len({line["text"] for line in samples}) > 3
    assert logged(tmp_path / "without", "sample") == []


def test_samples_begin_with_the_configured_prompt(tmp_path: Path, text_file: Path) -> None:
    train(sampling_run(tracked(tmp_path / "run", text_file, tracking__sample_prompt="The river")))
    assert {line["prompt"] for line in logged(tmp_path / "run", "sample")} == {"The river"}


def test_samples_that_cannot_be_written_are_reported_once_and_given_up(
    tmp_path: Path, text_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> list[str]:
        raise MemoryError("no room")

    explicit = tracked(tmp_path / "run", text_file)
    train(start_run(choose_start(Request(explicit)), sampler=fails))
    assert capfd.readouterr().err.count("step 2: no samples from here on (tracking.samples): no room") == 1
    trained(tracked(tmp_path / "without", text_file))
    assert_same_run(tmp_path / "run", tmp_path / "without", steps=6)


# TensorBoard


def test_tensorboard_reads_what_the_metrics_hold(tmp_path: Path, text_file: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(sampling_run(tracked(tmp_path / "run", text_file, tracking__tensorboard=True)))
    assert_tensorboard_has_what_the_metrics_have(tmp_path / "run")
    reader = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    reader.Reload()
    assert "samples/0/text_summary" in reader.Tags()["tensors"]
    last = reader.Tensors("samples/0/text_summary")[-1].tensor_proto.string_val[0].decode()
    lines = [line for line in logged(tmp_path / "run", "sample") if line["number"] == 0]
    assert last == "    " + lines[-1]["text"].replace("\n", "\n    ")
    assert "events/text_summary" in reader.Tags()["tensors"]


@pytest.mark.slow
def test_a_killed_run_that_resumes_replaces_what_it_sent_to_tensorboard(
    tmp_path: Path, text_file: Path
) -> None:
    explicit = tracked(
        tmp_path / "run",
        text_file,
        tracking__tensorboard=True,
        training__max_steps=400,
        checkpoint__save_interval=20,
        training__loss="tests.toy:stalling_loss",
    )
    process = start_process(write_config(tmp_path / "config.yaml", explicit))
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and '"train", "step": 23' in metrics.read_text():
            break
        time.sleep(0.05)
    process.kill()
    process.communicate()
    time.sleep(1.1)  # TensorBoard reads files in the order of their names, which hold the second
    explicit["training"]["max_steps"] = 45
    train(sampling_run(explicit, resume="auto"))
    assert_tensorboard_has_what_the_metrics_have(tmp_path / "run")


def test_a_rollback_replaces_what_was_sent_to_tensorboard(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_for(tracked(tmp_path / "run", text_file, tracking__tensorboard=True, guard__max_bad_steps=1))
    forward, done = run.learner.objective.forward, []

    def ruined_once(*columns: Any, **named: Any) -> Any:
        loss = forward(*columns, **named)
        if run.state.step == 4 and run.model.training and not done:
            done.append(True)
            loss = loss * math.nan
        return loss

    monkeypatch.setattr(run.learner.objective, "forward", ruined_once)
    train(run)
    assert len(events(tmp_path / "run", "rollback")) == 1
    assert_tensorboard_has_what_the_metrics_have(tmp_path / "run")


# Trackers that break


class Broken:
    """Works for some calls, then raises."""

    def __init__(self, error: BaseException | None = None, *, hangs: bool = False) -> None:
        self.error = error
        self.hangs = hangs
        self.told: list[str] = []

    def record(self, kind: str, record: dict) -> None:
        self.told.append(kind)
        if len(self.told) == 3:
            if self.error:
                raise self.error
            time.sleep(60 if self.hangs else 0)

    def rewind(self, step: int) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize("error", [OSError("no space"), RuntimeError("boom"), SystemExit("bye")])
def test_a_tracker_that_raises_is_reported_once_and_the_run_keeps_its_bits(
    error: BaseException, tmp_path: Path, text_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = Broken(error)
    run = run_for(tracked(tmp_path / "run", text_file))
    run.log.trackers.append(tracking.Tracker("tensorboard", broken, run.log.say))
    train(run)
    assert len(broken.told) == 3
    said = capfd.readouterr().err
    assert said.count("tracking.tensorboard: ") == 1
    assert f"{type(error).__name__}: {error}: training continues without it" in said
    trained(tracked(tmp_path / "without", text_file))
    assert_same_run(tmp_path / "run", tmp_path / "without", steps=6)


def test_a_tracker_that_hangs_delays_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    hanging = Broken(hangs=True)
    tracker = tracking.Tracker("wandb", hanging, said.append)
    start = time.monotonic()
    for number in range(tracking._MOST_WAITING + 10):
        tracker.record("train", {"step": number})
    assert time.monotonic() - start < 2
    tracker.close(0.1)
    assert time.monotonic() - start < 3
    assert len(said) == 1
    assert "is too slow" in said[0]
    slow = tracking.Tracker("wandb", Broken(hangs=True), said.append)
    for number in range(4):
        slow.record("train", {"step": number})
    slow.close(0.1)
    assert said[1:] == [
        "tracking.wandb: has not finished within 0.1 s: training continues without it; metrics.jsonl has all records"
    ]


@pytest.mark.parametrize(
    ("key", "value", "written"),
    [("tensorboard", True, "tensorboard: true: needs"), ("wandb", "offline", "wandb: offline: needs")],
)
def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(
    key: str, value: object, written: str, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == key else find(name))
    with pytest.raises(AtlasError, match=rf"tracking\.{written} the package .*pip install"):
        run_for(layer(tmp_path / "run", text_file, **{f"tracking__{key}": value}))
    assert not (tmp_path / "run").exists()


# Weights & Biases


@pytest.mark.slow
def test_wandb_leaves_a_run_that_it_can_read(tmp_path: Path, text_file: Path) -> None:
    explicit = tracked(tmp_path / "run", text_file, tracking__wandb="offline")
    process = start_process(
        write_config(tmp_path / "config.yaml", explicit), https_proxy="http://127.0.0.1:9"
    )
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "tracking.wandb" not in said
    assert "wandb:" not in said.replace("  wandb: offline", "")
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    history = wandb_history(file)
    losses = {row["step"]: row["train/loss"] for row in history if "train/loss" in row}
    assert losses == {line["step"]: line["loss"] for line in logged(tmp_path / "run")}
    texts = [row["samples/0"] for row in history if "samples/0" in row]
    assert texts == [line["text"] for line in logged(tmp_path / "run", "sample") if line["number"] == 0]


def wandb_history(file: Path) -> list[dict]:
    """What was logged, read as LevelDB's log format has it: blocks of 32 KiB, of pieces with a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, rows, place, data = file.read_bytes(), [], 7, b""
    assert content.startswith(b":W&B")
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        length, piece = struct.unpack_from("<HB", content, place + 4)
        if left < 7 or piece == 0:  # padding
            place += left
            continue
        data += content[place + 7 : place + 7 + length]
        place += 7 + length
        if piece not in (1, 4):  # complete, or the last of several
            continue
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        data = b""
        if record.WhichOneof("record_type") == "history":
            rows.append(
                {
                    (item.key or ".".join(item.nested_key)): json.loads(item.value_json)
                    for item in record.history.item
                }
            )
    return rows


def test_the_state_with_samples_is_the_state_without(tmp_path: Path, text_file: Path) -> None:
    """Also if the run is resumed in between, since samples are no state."""
    explicit = tracked(tmp_path / "run", text_file, checkpoint__save_interval=3)
    train(sampling_run(explicit))
    whole, texts = load_checkpoint(tmp_path / "run" / "atlas_step_6.pt"), logged(tmp_path / "run", "sample")
    train(sampling_run(explicit, resume=str(tmp_path / "run" / "atlas_step_3.pt")))
    again = load_checkpoint(tmp_path / "run" / "atlas_step_6.pt")
    assert all(same_bits(whole[key], again[key]) for key in STATE)
    assert logged(tmp_path / "run", "sample") == texts
    assert len(lines_without_timings(tmp_path / "run", "train")) == 6
