"""Stopping and resuming: bit for bit after `kill -9`, and every way a run may start."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import pytest
import torch
import yaml

import atlas
from atlas.cli import main
from atlas.config.loader import nested, overlay
from atlas.errors import AtlasError
from atlas.inference.load import load_model
from atlas.tokenizer import Tokenizer
from atlas.training.checkpoint.load import load_checkpoint
from atlas.training.checkpoint.manager import CheckpointManager
from atlas.training.checkpoint.retention import drop_optimizer_state
from atlas.training.resume import Request, choose_start
from atlas.training.run import Run
from atlas.training.train import train
from tests.conftest import corpus
from tests.runs import (
    assert_same_run,
    hard_config,
    layer,
    logged,
    on_updates,
    run_for,
    same_bits,
    start_process,
    trained,
    write_config,
)

# A true process, truly killed.


def finish(process: subprocess.Popen) -> str:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return errors


def stalled(tmp_path: Path, config: Path, call: int) -> subprocess.Popen:
    """A run that stands still in the `call`-th micro-batch."""
    marker = tmp_path / f"stalled-{config.stem}"
    process = start_process(config, ATLAS_TEST_STALL_AT=str(call), ATLAS_TEST_STALL_FILE=str(marker))
    for _ in range(2400):
        if marker.exists():
            return process
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    raise AssertionError("the run never reached the place where it should stall")


@pytest.fixture
def short_text(tmp_path: Path) -> Path:
    path = tmp_path / "short.txt"
    path.write_text(corpus()[:5800], encoding="utf-8")
    return path


def test_kill_9_and_resume_give_the_same_bits(tmp_path: Path, short_text: Path) -> None:
    complete = write_config(tmp_path / "complete.yaml", hard_config(tmp_path / "uninterrupted", short_text))
    killed = write_config(tmp_path / "killed.yaml", hard_config(tmp_path / "killed", short_text))
    finish(start_process(complete))
    # Update 26, second of three micro-batches, is the (25 · 3 + 2)-th call: 25 updates are done.
    process = stalled(tmp_path, killed, 25 * 3 + 2)
    assert logged(tmp_path / "killed")[-1]["step"] == 25
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    saved = CheckpointManager(tmp_path / "killed").found()[0][0].step
    assert 6 <= saved <= 24  # where the disk is slow, the last saves may not have got there
    errors = finish(start_process(killed))  # the same command once more, without a terminal
    assert f"at step {saved} of 40" in errors
    assert_same_run(tmp_path / "uninterrupted", tmp_path / "killed", steps=40)
    lost = [
        json.loads(line) for line in (tmp_path / "killed" / "metrics.lost.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lost if line["kind"] == "train"] == list(range(saved + 1, 26))
    assert (
        load_checkpoint(tmp_path / "uninterrupted" / "atlas_step_40.pt")["epoch"] == 1
    )  # an epoch ended on the way
    assert load_checkpoint(tmp_path / "uninterrupted" / "atlas_step_40.pt")["machine"]["threads"] == 2


@pytest.mark.skipif(
    os.name == "nt", reason="Windows has no SIGTERM to send; its Ctrl-Break goes the same way"
)
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_interrupt_saves_exits_130_and_resumes_with_the_same_bits(
    tmp_path: Path, short_text: Path, number: signal.Signals
) -> None:
    trained(overlay(hard_config(tmp_path / "uninterrupted", short_text), nested("training.max_steps", 12)))
    config = hard_config(tmp_path / "stopped", short_text)
    path = write_config(tmp_path / "stopped.yaml", overlay(config, nested("training.max_steps", 12)))
    process = stalled(tmp_path, path, 8 * 3 + 1)  # in update 9
    process.send_signal(number)
    (tmp_path / "stalled-stopped.go").touch()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "atlas_interrupt_step_8.pt" in errors
    assert load_checkpoint(tmp_path / "stopped" / "atlas_interrupt_step_8.pt")["step"] == 8
    trained(yaml.safe_load(path.read_text()), resume="auto")
    # One thread here, two there: the bits of another thread count are other bits, the run is the same.
    losses = [[line["loss"] for line in logged(tmp_path / name)] for name in ("uninterrupted", "stopped")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# The ways a run begins, in this process.


@pytest.fixture
def done(tmp_path: Path, text_file: Path) -> tuple[dict, Path]:
    """A finished run of 6 steps with checkpoints at 2, 4 and 6."""
    explicit = layer(tmp_path / "run", text_file, checkpoint__save_interval=2, training__eval_interval=3)
    trained(explicit)
    return explicit, tmp_path / "run"


def longer(explicit: dict, steps: int = 8) -> dict:
    return overlay(explicit, nested("training.max_steps", steps))


def log_of(folder: Path) -> str:
    return (folder / "training.log").read_text(encoding="utf-8")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_command_without_a_terminal_resumes(done: tuple[dict, Path]) -> None:
    explicit, folder = done
    _trainer, result = trained(longer(explicit))
    assert result.step == 8
    assert "resuming" in log_of(folder)
    assert "horizon changes from step 6 to step 8" in log_of(folder)
    assert [line["step"] for line in logged(folder)] == list(range(1, 9))


def test_a_finished_run_has_nothing_to_do(done: tuple[dict, Path]) -> None:
    run = run_for(done[0])
    assert run.state.step == run.state.horizon == 6


def test_resume_without_training_data_takes_it_from_the_checkpoint(done: tuple[dict, Path]) -> None:
    _explicit, folder = done
    bare = {"device": "cpu", "training": {"max_steps": 8}, "data": {"tokenizer": "tests.toy:tokenizer"}}
    run, result = trained(bare, resume=str(folder / "atlas_step_6.pt"))
    assert result.step == 8
    assert run.checkpoints.folder == folder


def test_resuming_an_older_checkpoint_sets_the_newer_ones_aside(done: tuple[dict, Path]) -> None:
    explicit, folder = done
    before = snapshot(folder)
    _, result = trained(explicit, resume=str(folder / "atlas_step_4.pt"))
    assert result.step == 6
    aside = snapshot(folder / "previous-1")
    assert "atlas_step_6.pt" in aside
    for name, data in aside.items():
        assert before[name] == data  # moved, not changed
    assert [line["step"] for line in logged(folder)] == list(range(1, 7))
    again = load_checkpoint(folder / "atlas_step_6.pt")
    first = load_checkpoint(folder / "previous-1" / "atlas_step_6.pt")
    assert same_bits(again["model_state_dict"], first["model_state_dict"])


def test_resuming_an_older_checkpoint_to_where_it_stands_moves_nothing(done: tuple[dict, Path]) -> None:
    explicit, folder = done
    shorter = overlay(explicit, nested("training.max_steps", 3))
    run = run_for(shorter, resume=str(folder / "atlas_step_4.pt"))
    assert run.is_complete
    assert not (folder / "previous-1").exists()
    assert (folder / "atlas_step_6.pt").exists()
    assert [line["step"] for line in logged(folder)] == list(range(1, 7))


def test_another_model_is_refused_and_nothing_changes(done: tuple[dict, Path]) -> None:
    explicit, folder = done
    before = snapshot(folder)
    for request in ({}, {"resume": "auto"}, {"resume": str(folder / "atlas_step_6.pt")}):
        with pytest.raises(AtlasError, match="hidden_size 16 → 32"):
            choose_start(Request(overlay(explicit, nested("model.hidden_size", 32)), **request))
    assert snapshot(folder) == before


def test_other_data_is_refused_in_an_occupied_folder(done: tuple[dict, Path], tmp_path: Path) -> None:
    explicit, _folder = done
    other = tmp_path / "other.txt"
    other.write_text(corpus()[::-1], encoding="utf-8")
    with pytest.raises(AtlasError, match=r"other data.*--output-dir.*--no-resume"):
        choose_start(Request(overlay(explicit, nested("data.train_data", str(other)))))


def test_no_resume_moves_the_old_run_and_deletes_nothing(done: tuple[dict, Path]) -> None:
    explicit, folder = done
    before = snapshot(folder)
    _, result = trained(overlay(explicit, nested("model.hidden_size", 32)), no_resume=True)
    assert result.step == 6
    del before["atlas.lock"]  # it belongs to the folder, not to the run
    assert snapshot(folder / "previous-1") == before


@pytest.mark.parametrize("answer", [True, False])
def test_with_a_terminal_it_asks(done: tuple[dict, Path], answer: bool) -> None:
    explicit, _folder = done
    questions: list[str] = []

    def ask(question: str) -> bool:
        questions.append(question)
        return answer

    start = choose_start(Request(longer(explicit), ask=ask))
    assert "step 6" in questions[0]
    assert start.mode == ("resume" if answer else "fresh")
    assert bool(start.set_aside) is not answer


def test_resume_auto_in_an_empty_folder_starts_and_a_note_says_so(tmp_path: Path, text_file: Path) -> None:
    trained(layer(tmp_path / "run", text_file), resume="auto")
    assert "no checkpoint to resume from" in log_of(tmp_path / "run")


def test_a_broken_latest_checkpoint_is_passed_over(done: tuple[dict, Path]) -> None:
    explicit, folder = done
    for name in ("atlas_step_6.pt", "atlas_best.pt"):
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 255
        (folder / name).write_bytes(data)
    start = choose_start(Request(explicit))
    assert start.contents["step"] == 4
    assert any("atlas_step_6.pt: is not the file that was saved" in note for note in start.notes)


def test_a_folder_of_broken_checkpoints_is_not_overwritten(done: tuple[dict, Path]) -> None:
    explicit, folder = done
    for path in folder.glob("*.pt"):
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(AtlasError, match="none of them is intact"):
        choose_start(Request(explicit))


def test_resume_on_other_data_is_fine_tuning_into_a_folder_of_its_own(
    done: tuple[dict, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The FAQ's command: --resume pretrained.pt --train-data OTHER --learning-rate 1e-5."""
    _explicit, folder = done
    before = snapshot(folder)
    other = tmp_path / "other.txt"
    other.write_text(corpus().upper(), encoding="utf-8")
    request = {"data": {"train_data": str(other), "tokenizer": "tests.toy:tokenizer"}, "device": "cpu"}
    request = overlay(request, {"training": {"learning_rate": 1e-5, "max_steps": 3}})
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "checkpoints")
    run = run_for(request, resume=str(folder / "atlas_step_6.pt"))
    assert run.state.step == 0
    assert same_bits(run.model.state_dict(), load_checkpoint(folder / "atlas_step_6.pt")["model_state_dict"])
    assert not run.optimizer.state_dict()["state"]
    assert train(run).step == 3
    assert run.checkpoints.folder == Path("checkpoints/finetune-other")
    assert "fine-tuning from the weights" in log_of(tmp_path / "checkpoints" / "finetune-other")
    assert snapshot(folder) == before
    # The same command again resumes the fine-tuning that it began.
    assert (
        choose_start(Request(longer(request), resume=str(folder / "atlas_step_6.pt"))).contents["step"] == 3
    )


def test_init_from_starts_a_new_run_from_the_weights(done: tuple[dict, Path], tmp_path: Path) -> None:
    explicit, folder = done
    run = run_for(
        overlay(explicit, nested("checkpoint.output_dir", str(tmp_path / "new"))),
        init_from=str(folder / "best_model.pt"),
    )
    assert run.state.step == 0
    best = load_checkpoint(folder / "atlas_best.pt")
    assert same_bits(run.model.state_dict(), best["model_state_dict"])
    assert run.contents()["initialized_from"] == str(folder / "atlas_best.pt")


SHAPES = {
    "learned": {},
    "rope": {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False},
}


@pytest.fixture(params=SHAPES)
def pretrained(request: pytest.FixtureRequest, tmp_path: Path, text_file: Path) -> tuple[dict, str]:
    """A finished run with a context of 16: its settings but those of the model, and its kind of positions."""
    tokenizer = tmp_path / "bpe.json"
    Tokenizer.train([corpus()], 300).save(tokenizer)  # type: ignore[union-attr]
    explicit = layer(tmp_path / "run", text_file, data__tokenizer=str(tokenizer))
    trained(overlay(explicit, {"model": SHAPES[request.param]}))
    return explicit, request.param


def with_context(explicit: dict, folder: Path, max_seq_len: int) -> dict:
    """The user's own words for a new run: no setting of the model but its context."""
    explicit = {**explicit, "model": {"max_seq_len": max_seq_len}}
    return overlay(explicit, {"checkpoint": {"output_dir": str(folder)}, "training": {"max_steps": 3}})


@pytest.mark.parametrize("max_seq_len", [8, 15, 24])
def test_a_new_run_from_weights_may_have_another_context(
    pretrained: tuple[dict, str], tmp_path: Path, max_seq_len: int, capsys: pytest.CaptureFixture[str]
) -> None:
    explicit, position = pretrained
    source, tuned = tmp_path / "run" / "atlas_step_6.pt", tmp_path / "tuned"
    request = with_context(explicit, tuned, max_seq_len)
    if position == "learned" and max_seq_len > 16:
        with pytest.raises(
            AtlasError, match=r"16 trained positions and no others: set model\.max_seq_len to at most 16"
        ):
            choose_start(Request(request, init_from=str(source)))
        return
    run = run_for(request, init_from=str(source))
    tokens = torch.randint(300, (2, min(16, max_seq_len)))
    with torch.no_grad():
        before = atlas.load(str(source)).model(tokens)
        torch.testing.assert_close(run.model.eval()(tokens), before)
    run.model.train()
    assert train(run).step == 3
    [line] = [line for line in log_of(tuned).splitlines() if "max_seq_len 16" in line]
    assert f"max_seq_len 16 → {max_seq_len}: the new run has another context" in line
    assert ("has not been trained on distances beyond 16" in line) == (max_seq_len > 16)
    with pytest.raises(AtlasError, match=f"max_seq_len {max_seq_len} → 4"):  # of the new run it must stay
        choose_start(Request(with_context(request, tuned, 4), init_from=str(source)))
    assert choose_start(Request(longer(request), init_from=str(source))).mode == "resume"

    best = str(tuned / "atlas_step_3.pt")
    assert len(atlas.load(best).generate("a", max_tokens=max_seq_len + 9, seed=1)) > 0
    assert (
        main(["export", "--checkpoint", best, "--output", str(tmp_path / "m.gguf"), "--quantize", "f32"]) == 0
    )
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    [context] = [field.contents() for name, field in fields.items() if name.endswith(".context_length")]
    # A model with RoPE still knows the distances that its base was trained on.
    expected = max_seq_len if position == "learned" else max(16, max_seq_len)
    assert context == expected
    more = run_for(with_context(request, tmp_path / "more", 4), init_from=best)
    assert train(more).step == 3
    again = load_model(tmp_path / "more" / "atlas_step_3.pt")
    assert again.config.model.max_seq_len == (4 if position == "learned" else expected)
    assert load_model(best, context=5).logits("a").shape[0] == 1
    with pytest.raises(AtlasError, match="5 tokens"):
        load_model(best, context=4).logits([1] * 5)
    with pytest.raises(
        AtlasError, match=f"--context {expected + 1}: the model's context has 1 to {expected} "
    ):
        load_model(best, context=expected + 1)


@pytest.mark.parametrize("max_seq_len", [8, 24])
def test_a_resumed_run_keeps_its_context(
    pretrained: tuple[dict, str], tmp_path: Path, max_seq_len: int
) -> None:
    """On the same data; on other data `--resume` is fine-tuning, with a context of its own."""
    explicit, position = pretrained
    source = str(tmp_path / "run" / "atlas_step_6.pt")
    for wish in ({}, {"resume": "auto"}, {"resume": source}):
        with pytest.raises(AtlasError, match=f"max_seq_len 16 → {max_seq_len}") as error:
            choose_start(Request(with_context(explicit, tmp_path / "run", max_seq_len), **wish))
        assert ("--init-from" in str(error.value)) == (position == "rope" or max_seq_len < 16)
    other = tmp_path / "other.txt"
    other.write_text(corpus().upper(), encoding="utf-8")
    request = overlay(with_context(explicit, tmp_path / "tuned", 8), nested("data.train_data", str(other)))
    start = choose_start(Request(request, resume=source))
    assert (start.mode, start.config.model.max_seq_len) == ("finetune", 8)


def test_a_changed_batch_size_resumes_from_the_sequences_consumed(done: tuple[dict, Path]) -> None:
    explicit, folder = done
    changed = overlay(longer(explicit), nested("training.batch_size", 2))
    run, _ = trained(changed)
    assert run.state.sequences_consumed == 6 * 4 + 2 * 2
    assert "changed since the checkpoint: training.batch_size 4 → 2" in log_of(folder)


def test_the_horizon_is_kept_when_nothing_behind_it_changes(done: tuple[dict, Path]) -> None:
    explicit, _folder = done
    start = choose_start(Request(overlay(explicit, nested("training.learning_rate", 1e-4)), resume="auto"))
    start.contents["horizon"] = 11
    from atlas.training.launch import start_run

    assert start_run(start).state.horizon == 11


def test_a_strangers_checkpoint_imports_nothing_by_itself(done: tuple[dict, Path]) -> None:
    explicit, folder = done
    without_tokenizer = {**explicit, "data": {"train_data": explicit["data"]["train_data"]}}
    with pytest.raises(AtlasError, match="tokenizer"):
        choose_start(Request(without_tokenizer, resume=str(folder / "atlas_step_6.pt")))
    contents = load_checkpoint(folder / "atlas_step_6.pt")
    contents["config"]["training"]["loss"] = "antigravity:geohash"
    torch.save(contents, folder / "theirs.pt")
    with pytest.raises(AtlasError, match=r"--set training\.loss=antigravity:geohash"):
        choose_start(Request(explicit, resume=str(folder / "theirs.pt")))
    assert "antigravity" not in sys.modules


def test_contradictions_are_refused(done: tuple[dict, Path]) -> None:
    explicit, _folder = done
    for request in ({"resume": "auto", "no_resume": True}, {"resume": "x.pt", "init_from": "y.pt"}):
        with pytest.raises(AtlasError, match="give one of them"):
            choose_start(Request(explicit, **request))


def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path: Path, text_file: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(AtlasError, match="cannot be written"):
        run_for(layer(tmp_path / "file" / "run", text_file))


def test_a_checkpoint_loads_as_the_faq_shows(done: tuple[dict, Path]) -> None:
    explicit, folder = done
    run = run_for(explicit)
    checkpoint = CheckpointManager(folder).load_checkpoint(folder / "best_model.pt")
    run.model.load_state_dict(checkpoint["model_state_dict"])
    run.optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
    assert checkpoint["step"] in (3, 6)
    assert math.isfinite(checkpoint["loss"])


def test_an_interrupt_in_the_last_evaluation_leaves_nothing_undone(tmp_path: Path, text_file: Path) -> None:
    explicit, folder = layer(tmp_path / "run", text_file), tmp_path / "run"
    run = run_for(explicit)

    def stop() -> None:
        run.stop.requested = run.state.step == 6

    on_updates(run, after=stop)
    assert train(run).outcome == "interrupted"
    assert not logged(folder, "validation")
    again = run_for(explicit)
    assert not again.is_complete
    assert train(again).outcome == "finished"
    assert [line["step"] for line in logged(folder, "validation")] == [6]
    assert (folder / "atlas_step_6.pt").exists()
    assert run_for(explicit).is_complete


def test_an_interrupt_in_an_evaluation_changes_neither_the_early_stop_nor_the_names(
    tmp_path: Path, text_file: Path
) -> None:
    def explicit(name: str) -> dict:
        settings = {"training__learning_rate": 1e-30, "training__early_stopping_patience": 1}
        settings |= {"training__eval_interval": 2, "checkpoint__save_interval": 2}
        return layer(tmp_path / name, text_file, **settings)

    _, result = trained(explicit("uninterrupted"))
    assert (result.outcome, result.step) == ("stopped early", 4)
    run = run_for(explicit("stopped"))

    def stop() -> None:
        run.stop.requested = run.state.step == 4

    on_updates(run, after=stop)
    assert train(run).outcome == "interrupted"
    run.checkpoints.lock.release()
    _, result = trained(explicit("stopped"))
    assert (result.outcome, result.step) == ("stopped early", 4)
    names = [
        {path.name for path in (tmp_path / name).glob("atlas_*.pt")} for name in ("uninterrupted", "stopped")
    ]
    assert names[1] - names[0] == {"atlas_interrupt_step_4.pt"}
    assert names[0] <= names[1]


def test_a_checkpoint_without_fitting_optimizer_state_is_refused(done: tuple[dict, Path]) -> None:
    explicit, folder = done
    contents = load_checkpoint(folder / "atlas_step_6.pt")
    del contents["optimizer_state_dict"]
    torch.save(contents, folder / "theirs.pt")
    with pytest.raises(AtlasError, match="--init-from"):
        run_for(longer(explicit), resume=str(folder / "theirs.pt"))


def test_an_interrupt_before_the_first_update_is_a_checkpoint_too(
    tmp_path: Path, text_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    explicit, folder = layer(tmp_path / "run", text_file), tmp_path / "run"
    run = run_for(explicit)
    on_updates(run, before=lambda: os.kill(os.getpid(), signal.SIGINT))
    assert train(run).outcome == "interrupted"
    assert "stopping after this micro-batch" in capfd.readouterr().err
    assert (folder / "atlas_interrupt_step_0.pt").exists()
    run, result = trained(explicit, resume="auto")
    assert (result.outcome, result.step) == ("finished", 6)
    trained(overlay(explicit, nested("checkpoint.output_dir", str(tmp_path / "uninterrupted"))))
    assert [line["loss"] for line in logged(folder)] == [
        line["loss"] for line in logged(tmp_path / "uninterrupted")
    ]


def test_a_foreign_checkpoint_does_not_decide_where_this_run_writes(
    done: tuple[dict, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _explicit, folder = done
    (tmp_path / "here").mkdir()
    shutil.copy(folder / "atlas_step_4.pt", tmp_path / "downloaded.pt")  # its config names `folder`
    shutil.rmtree(folder)
    monkeypatch.chdir(tmp_path / "here")
    bare = {"device": "cpu", "data": {"tokenizer": "tests.toy:tokenizer"}}
    assert trained(bare, resume=str(tmp_path / "downloaded.pt"))[1].step == 6
    assert not folder.exists()
    assert (tmp_path / "here" / "checkpoints" / "atlas_step_6.pt").exists()


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
@pytest.mark.parametrize("name", ["training.log", "metrics.jsonl", "atlas_best.json.tmp", "config.yaml"])
def test_a_link_in_the_output_folder_is_refused_and_not_written_through(
    tmp_path: Path, text_file: Path, name: str
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("as it was", encoding="utf-8")
    (tmp_path / "run" / name).symlink_to(tmp_path / "precious")
    with pytest.raises(AtlasError, match="is a link"):
        run_for(layer(tmp_path / "run", text_file))
    assert (tmp_path / "precious").read_text(encoding="utf-8") == "as it was"
    assert os.listdir(tmp_path / "run") == [name]


def test_optimizer_state_of_another_size_is_refused(done: tuple[dict, Path], tmp_path: Path) -> None:
    """PyTorch takes it as it is, and the fused AdamW then writes beyond its end."""
    explicit, folder = done
    contents = load_checkpoint(folder / "atlas_step_4.pt")
    contents["optimizer_state_dict"]["state"][0]["exp_avg"] = torch.zeros(1)
    torch.save(contents, tmp_path / "theirs.pt")
    shutil.rmtree(folder)
    with pytest.raises(AtlasError, match="optimizer state does not fit"):
        run_for(explicit, resume=str(tmp_path / "theirs.pt"))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("training.batch_size", 10**12, "lower batch_size or gradient_accumulation_steps"),
        ("model.hidden_size", 2**18, "atlas plan shows which presets fit"),
    ],
)
def test_what_no_memory_holds_is_refused_before_it_is_allocated(
    tmp_path: Path, text_file: Path, key: str, value: int, words: str
) -> None:
    with pytest.raises(AtlasError, match=words):
        run_for(overlay(layer(tmp_path / "run", text_file), nested(key, value)))
    assert not (tmp_path / "run").exists()


def test_resuming_an_older_checkpoint_keeps_a_best_that_came_before_it(
    tmp_path: Path, text_file: Path
) -> None:
    explicit = layer(tmp_path / "run", text_file, checkpoint__save_interval=2, training__eval_interval=2)
    run = run_for(explicit)
    update_best = run.state.update_best
    run.state.update_best = lambda loss: update_best(loss if run.state.step == 2 else loss + 9)
    train(run)
    best = (tmp_path / "run" / "atlas_best.pt").read_bytes()
    score = load_checkpoint(tmp_path / "run" / "atlas_step_4.pt")["best_loss"]
    resumed = run_for(explicit, resume=str(tmp_path / "run" / "atlas_step_4.pt"))
    assert resumed.state.best_loss == score
    assert (tmp_path / "run" / "atlas_best.pt").read_bytes() == best


def test_a_slim_checkpoint_is_refused_before_anything_moves(done: tuple[dict, Path]) -> None:
    explicit, folder = done
    drop_optimizer_state(folder / "atlas_step_2.pt")
    before = snapshot(folder)
    with pytest.raises(AtlasError, match="slim_old"):
        run_for(explicit, resume=str(folder / "atlas_step_2.pt"))
    assert snapshot(folder) == before


# Fine-tuning never writes over another run


def fine_tuning(folder: Path, base: Path, text: Path, **request: object) -> Run:
    explicit = {"data": {"train_data": str(text)}, "checkpoint": {"output_dir": str(folder)}, "device": "cpu"}
    explicit["data"]["tokenizer"] = "tests.toy:tokenizer"
    return run_for(explicit, init_from=str(base), **request)


@pytest.fixture
def bases(tmp_path: Path, text_file: Path) -> list[Path]:
    """Two runs that differ in nothing but the seed, and a text to fine-tune on."""
    for seed in (1, 2):
        trained(layer(tmp_path / f"base{seed}", text_file, seed=seed, training__max_steps=2))
    return [tmp_path / f"base{seed}" / "atlas_best.pt" for seed in (1, 2)]


def test_fine_tuning_with_no_resume_moves_the_old_run_aside(tmp_path: Path, bases: list[Path]) -> None:
    text = tmp_path / "other.txt"
    text.write_text("A small boat waits. " * 300, encoding="utf-8")
    train(fine_tuning(tmp_path / "tuned", bases[0], text))
    old = sorted(path.name for path in (tmp_path / "tuned").glob("atlas_*.pt"))
    best = (tmp_path / "tuned/atlas_best.pt").read_bytes()
    train(fine_tuning(tmp_path / "tuned", bases[1], text, no_resume=True))
    assert sorted(path.name for path in (tmp_path / "tuned/previous-1").glob("atlas_*.pt")) == old
    assert (tmp_path / "tuned/previous-1/atlas_best.pt").read_bytes() == best
    assert (tmp_path / "tuned/atlas_best.pt").read_bytes() != best


def test_fine_tuning_resumes_from_the_same_base_only(tmp_path: Path, bases: list[Path]) -> None:
    text = tmp_path / "other.txt"
    text.write_text("A small boat waits. " * 300, encoding="utf-8")
    folder = tmp_path / "tuned"
    train(fine_tuning(folder, bases[0], text))
    assert fine_tuning(folder, bases[0], text).is_complete  # the same command again
    with pytest.raises(AtlasError, match=r"holds another run: choose another --output-dir"):
        fine_tuning(folder, bases[1], text)
    asked: list[str] = []
    with pytest.raises(AtlasError, match=r"holds another run and stays as it is"):
        fine_tuning(folder, bases[1], text, ask=lambda question: bool(asked.append(question)))
    assert "Start a new run? The old run moves to" in asked[0]
    assert not (folder / "previous-1").exists()
    train(fine_tuning(folder, bases[1], text, ask=lambda _: True))
    assert (folder / "previous-1/atlas_best.pt").exists()
