"""Unsound numbers: which updates are skipped, that nothing changes by them, when a run rolls back and when it ends."""

from __future__ import annotations

import copy
import json
import math
import re
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atlas.cli import main
from atlas.config import GuardConfig
from atlas.config.loader import nested, overlay
from atlas.data import IGNORE_INDEX
from atlas.errors import AtlasError
from atlas.training.checkpoint.load import load_checkpoint
from atlas.training.checkpoint.manager import CheckpointManager
from atlas.training.evaluate import Evaluation
from atlas.training.guard import check_update, z_score
from atlas.training.loss import compute_lm_loss
from atlas.training.micro_batch import evaluate_within_memory
from atlas.training.run import Run
from atlas.training.state import TrainState
from atlas.training.step import apply_gradient
from atlas.training.train import train
from tests.runs import (
    config_flags,
    gradient_of,
    layer,
    logged,
    on_updates,
    run_for,
    same_bits,
    trained,
    update,
    write_config,
)

Loss = Callable[..., torch.Tensor]


def wrong_at(run: Run, steps: Callable[[int], bool], factor: float = math.nan) -> list[int]:
    """Let the loss of the second micro-batch of these steps be wrong; the steps at which it was."""
    calls: list[int] = []

    def loss(logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        step = run.state.step + 1
        calls.append(step)
        value = compute_lm_loss(logits, targets, mask)
        per_update = math.ceil(run.config.training.sequences_per_update / run.state.micro_batch_size)
        is_second = len(calls) % per_update == (2 % per_update)
        return value * factor if steps(step) and is_second else value

    run.learner.objective.custom_loss = loss
    return calls


def events(folder: Path, kind: str) -> list[dict]:
    return [line for line in logged(folder, "event") if line["event"] == kind]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_two_unsound_updates_change_nothing_and_are_logged(
    tmp_path: Path, text_file: Path, accumulation: int, factor: float
) -> None:
    folder = tmp_path / "run"
    settings = {"training__gradient_accumulation_steps": accumulation, "training__micro_batch_size": 2}
    run = run_for(layer(folder, text_file, training__max_steps=10, **settings))
    wrong_at(run, lambda step: step in (7, 8), factor)
    states = {}

    def record() -> None:
        states[run.state.step] = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()["state"]))

    on_updates(run, after=record)
    assert train(run).outcome == "finished"
    assert same_bits(states[6], states[7])
    assert same_bits(states[7], states[8])
    assert not same_bits(states[8], states[9])
    size = 4 * accumulation
    assert [
        (line["step"], line["first_sequence"], line["last_sequence"]) for line in events(folder, "skipped")
    ] == [(7, 6 * size, 7 * size - 1), (8, 7 * size, 8 * size - 1)]
    assert "step 7: not applied: loss" in (folder / "training.log").read_text()
    lines = logged(folder)
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["step"] for line in lines if line["loss"] is None] == [7, 8]
    assert (run.state.skipped, run.state.bad_in_a_row, run.state.rollbacks) == (2, 0, 0)


def test_every_line_of_the_log_is_json_as_others_read_it(tmp_path: Path, text_file: Path) -> None:
    run = run_for(layer(tmp_path / "run", text_file))
    wrong_at(run, lambda step: step == 2)
    train(run)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


@pytest.mark.parametrize("accumulation", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_numbers_that_stay_wrong_lead_back_three_times_and_then_to_an_account(
    tmp_path: Path, text_file: Path, accumulation: int
) -> None:
    folder = tmp_path / "run"
    settings = {"training__gradient_accumulation_steps": accumulation, "training__micro_batch_size": 2}
    explicit = layer(folder, text_file, training__max_steps=40, checkpoint__save_interval=8, **settings)
    run = run_for(explicit)
    wrong_at(run, lambda step: step >= 20)
    with pytest.raises(AtlasError, match=r"loss nan: rolling back did not help \(3 rollbacks\)"):
        train(run)
    rollbacks = events(folder, "rollback")
    # First to 16, whose event was cut with the log when that did not help; then to the save before it, twice.
    assert [(line["step"], line["from_step"]) for line in rollbacks] == [(8, 24)] * 2
    assert [line["step"] for line in logged(folder)] == list(range(1, 24))
    size, windows = 4 * accumulation, [(line["first_sequence"], line["last_sequence"]) for line in rollbacks]
    assert windows == [(24 * size, 32 * size - 1), (32 * size, 48 * size - 1)]  # no sequence twice
    log = (folder / "training.log").read_text()
    assert re.search(r"to check, 1: .*learning rate", log)
    assert f"sequences {59 * size:,} to {64 * size - 1:,} of the run" in log
    assert (
        f"back to step 16 (rollback 1 of 3): sequences {16 * size:,} to {24 * size - 1:,} are skipped" in log
    )
    assert (folder / "previous-1" / "atlas_step_16.pt").exists()  # nothing is deleted
    assert load_checkpoint(folder / "atlas_step_16.pt")["step"] == 16
    for path in folder.glob("*.pt"):
        assert all(tensor.isfinite().all() for tensor in load_checkpoint(path)["model_state_dict"].values())


def test_a_run_rolls_back_past_a_save_that_was_already_ruined(tmp_path: Path, text_file: Path) -> None:
    """Weights can be ruined and still finite: the save before them is the good one, for --resume auto too."""
    folder = tmp_path / "run"
    explicit = layer(folder, text_file, training__max_steps=30, checkpoint__save_interval=5)
    run = run_for(explicit)

    def ruin() -> None:
        if run.state.step == 15 and not run.state.rollbacks:
            with torch.no_grad():  # after the update, before the save
                run.model.final_norm.weight.fill_(1e38)

    on_updates(run, after=ruin)
    assert train(run).outcome == "finished"
    assert (folder / "previous-1" / "atlas_step_15.pt").exists()
    weights = load_checkpoint(folder / "atlas_step_15.pt")["model_state_dict"]
    assert all(tensor.abs().max() < 100 for tensor in weights.values())
    assert [line["step"] for line in logged(folder)] == list(range(1, 31))


@pytest.mark.parametrize("in_background", [True, False])
def test_rolling_back_past_bad_data_lets_the_run_finish_at_half_the_rate(
    tmp_path: Path, text_file: Path, in_background: bool
) -> None:
    folder = tmp_path / "run"
    explicit = layer(
        folder,
        text_file,
        training__max_steps=20,
        checkpoint__save_interval=6,
        checkpoint__background=in_background,
    )
    run = run_for(explicit)
    seen: list[int] = []

    def poisoned(
        logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        seen.append(run.state.sequences_consumed)
        bad = 8 * 4 <= run.state.sequences_consumed < 13 * 4
        return compute_lm_loss(logits, targets, mask) * (math.nan if bad else 1.0)

    run.learner.objective.custom_loss = poisoned
    assert train(run).outcome == "finished"
    assert seen == [4 * update for update in (*range(13), *range(13, 27))]  # none is read twice
    assert run.state.step == 20
    lines = logged(folder)
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert all(math.isfinite(line["loss"]) for line in lines)
    complete = trained(layer(tmp_path / "complete", text_file, training__max_steps=20))[0]
    rates = [line["learning_rate"] for line in logged(tmp_path / "complete")]
    assert [line["learning_rate"] for line in lines] == pytest.approx(
        rates[:6] + [rate / 2 for rate in rates[6:]]
    )
    assert complete.state.rate_scale == 1
    assert run.state.rollbacks == 0  # the run got past its trouble


def test_without_a_save_to_go_back_to_the_run_ends(tmp_path: Path, text_file: Path) -> None:
    run = run_for(layer(tmp_path / "run", text_file))  # no save before the end, no copy in memory
    wrong_at(run, lambda step: True)
    with pytest.raises(AtlasError, match="no save to roll back to"):
        train(run)
    assert not list((tmp_path / "run").glob("*.pt"))


def test_an_unsound_gradient_under_a_sound_loss_is_found(tmp_path: Path, text_file: Path) -> None:
    run = run_for(layer(tmp_path / "run", text_file))
    before = copy.deepcopy(run.model.state_dict())

    def steep(logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        infinite_slope = (logits * 0).abs().sqrt().sum()  # √x at 0
        return compute_lm_loss(logits, targets, mask) + infinite_slope

    run.learner.objective.custom_loss = steep
    steep_update = update(run)
    assert math.isfinite(steep_update.loss)
    assert "gradient norm" in steep_update.fault.reason
    assert same_bits(before, run.model.state_dict())


def test_a_micro_batch_without_a_valid_token_gives_no_nan(tmp_path: Path, text_file: Path) -> None:
    """A user's mean over no tokens is 0 ÷ 0; the run must not ask for it."""
    run = run_for(layer(tmp_path / "run", text_file, training__micro_batch_size=2))

    def naive(logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    run.learner.objective.custom_loss = naive
    inputs, targets = next(run.batches())
    targets[:2] = IGNORE_INDEX
    padded = update(run, inputs, targets)
    assert padded.fault is None
    alone = run_for(layer(tmp_path / "alone", text_file))
    alone.learner.objective.custom_loss = naive
    assert update(alone, inputs[2:], targets[2:]).loss == pytest.approx(padded.loss, rel=1e-5)
    before = copy.deepcopy(run.model.state_dict())
    assert update(run, inputs, torch.full_like(targets, IGNORE_INDEX)).fault is None
    assert same_bits(before, run.model.state_dict())


@pytest.mark.parametrize(("scale", "benign"), [(65536.0, True), (1.0, False)])
def test_fp16_overflow_is_distinguished_from_divergence(
    tmp_path: Path, text_file: Path, scale: float, benign: bool
) -> None:
    run = run_for(layer(tmp_path / "run", text_file))
    run.learner.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    before, batch = copy.deepcopy(run.model.state_dict()), next(run.batches())
    gradient = gradient_of(run, batch)
    next(run.model.parameters()).grad[0, 0] = math.inf
    overflow = apply_gradient(run.learner, gradient, run.state, rate=1e-2)
    assert overflow.fault.is_benign is benign
    assert "fp16" in overflow.fault.reason
    assert run.learner.scaler.get_scale() == scale / 2  # the scaler keeps looking for one that fits
    assert same_bits(before, run.model.state_dict())
    assert apply_gradient(run.learner, gradient_of(run, batch), run.state, rate=1e-2).fault is None
    assert not same_bits(before, run.model.state_dict())


@given(
    st.lists(st.floats(-10, 10), min_size=32, max_size=128),
    st.floats(-100, 100),
)
def test_z_score_is_the_definition(recent: list[float], value: float) -> None:
    deviation = statistics.pstdev(recent)
    if deviation > 0.1:
        assert z_score(value, recent) == pytest.approx(
            (value - statistics.mean(recent)) / deviation, abs=1e-6
        )
    assert z_score(value, recent[:31]) == 0  # too few for statistics


@pytest.mark.parametrize("mode", ["skip", "rollback"])
def test_a_spike_is_left_out_or_led_back_from(tmp_path: Path, text_file: Path, mode: str) -> None:
    folder = tmp_path / "run"
    explicit = layer(
        folder,
        text_file,
        training__max_steps=60,
        training__learning_rate=1e-4,
        guard__spikes=mode,
        checkpoint__save_interval=20,
        training__micro_batch_size=4,
    )
    run = run_for(explicit)
    spiked: list[int] = []

    def loss(logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        value = compute_lm_loss(logits, targets, mask)
        if run.state.step + 1 == 50 and not spiked:
            spiked.append(50)
            return value * 20
        return value

    run.learner.objective.custom_loss = loss
    assert train(run).outcome == "finished"
    assert len(events(folder, "rollback")) == (mode == "rollback")
    skipped = events(folder, "skipped")
    assert [line["step"] for line in skipped] == ([50] if mode == "skip" else [])  # that step was taken back
    assert "standard deviations above the mean" in (folder / "training.log").read_text()
    assert [line["step"] for line in logged(folder)] == list(range(1, 61))


def test_without_the_setting_a_spike_is_applied() -> None:
    state = TrainState(100, 4, 4, recent_losses=[2.0 + i % 2 * 0.1 for i in range(64)])
    assert check_update(200.0, 1.0, state=state, guard=GuardConfig()) is None
    fault = check_update(200.0, 1.0, state=state, guard=GuardConfig(spikes="skip"))
    assert fault is not None
    assert fault.is_spike
    assert check_update(0.1, 1.0, state=state, guard=GuardConfig(spikes="skip")) is None  # only upwards


def test_spikes_off_in_yaml_is_a_word() -> None:
    """YAML 1.1 reads `off` as false."""
    assert GuardConfig(spikes=False).spikes == "off"


@pytest.mark.parametrize("steps", [1, 3])
def test_a_rate_that_ruins_the_weights_ends_the_run_and_leaves_no_checkpoint(
    steps: int, tmp_path: Path, text_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also in a run too short for the limit of updates that are not applied."""
    explicit = layer(tmp_path / "run", text_file, training__max_steps=steps, training__warmup_steps=0)
    config = write_config(tmp_path / "c.yaml", explicit)
    assert main(["train", *config_flags(config), "--learning-rate", "1e300"]) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"error: step {steps}: weights that are not finite")
    assert list((tmp_path / "run").glob("atlas_*.pt")) == []
    assert main(["train", *config_flags(config), "--resume", "auto"]) == 0
    assert "no checkpoint to resume from; a new run starts" in capfd.readouterr().err


@pytest.mark.parametrize("with_validation", [True, False])
def test_weights_ruined_by_the_last_update_are_not_saved_and_the_run_rolls_back(
    tmp_path: Path, text_file: Path, with_validation: bool
) -> None:
    fraction = {} if with_validation else {"data__val_fraction": 0}
    run = run_for(layer(tmp_path / "run", text_file, checkpoint__save_interval=4, **fraction))
    ruined = []

    def ruin() -> None:
        if run.state.step == 6 and not ruined:
            ruined.append(6)
            with torch.no_grad():
                next(run.model.parameters()).fill_(math.inf)

    on_updates(run, after=ruin)
    result = train(run)
    assert (result.outcome, result.step, ruined) == ("finished", 6, [6])
    [back] = events(tmp_path / "run", "rollback")
    assert (back["from_step"], back["step"]) == (6, 4)
    for path in (tmp_path / "run").glob("atlas_*.pt"):
        weights = load_checkpoint(path)["model_state_dict"]
        assert all(bool(weight.isfinite().all()) for weight in weights.values())


@pytest.mark.parametrize("end", ["the last step", "a limit of time"])
def test_a_validation_loss_that_is_not_finite_is_a_fault_at_any_step(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """Also if no save is due at the step of this evaluation, and if the run ends before the next one."""
    explicit = layer(tmp_path / "run", text_file, training__eval_interval=4, training__max_steps=7)
    run = run_for(overlay(explicit, nested("checkpoint.save_interval", 3)))
    evaluated = []

    def not_finite_once(*args: object) -> Evaluation:
        evaluated.append(run.state.step)
        evaluation = evaluate_within_memory(*args)  # type: ignore[arg-type]
        return replace(evaluation, loss=math.nan) if len(evaluated) == 1 else evaluation

    monkeypatch.setattr("atlas.training.train.evaluate_within_memory", not_finite_once)
    if end == "a limit of time":
        run.clock.limit = 3600.0
        monkeypatch.setattr(run.clock, "is_over", lambda **_: len(evaluated) == 1 and run.state.step >= 4)
    result = train(run)
    [back] = events(tmp_path / "run", "rollback")
    assert (back["from_step"], back["step"], back["reason"]) == (4, 3, "validation loss nan")
    assert result.step > 4 or end == "a limit of time"
    assert result.val_loss is None or math.isfinite(result.val_loss)


def damaged(folder: Path, value: float) -> Path:
    """The latest checkpoint of a run, with a weight of this value, as an earlier version of Atlas could save it."""
    path = CheckpointManager(folder).found()[0][1]
    contents = load_checkpoint(path)
    contents["model_state_dict"]["blocks.0.mlp.down.weight"][1, 2] = value
    CheckpointManager(folder).save(contents, ["step"])
    return path


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_no_run_starts_from_weights_that_are_not_finite(
    tmp_path: Path, text_file: Path, value: float, capfd: pytest.CaptureFixture[str]
) -> None:
    explicit = layer(tmp_path / "run", text_file, checkpoint__save_interval=3)
    trained(explicit)
    (tmp_path / "run" / "atlas_best.json").unlink()
    path = damaged(tmp_path / "run", value)
    for option in ({"resume": str(path)}, {"init_from": str(path)}):
        with pytest.raises(AtlasError, match=r"atlas_step_6\.pt: its weights are not finite"):
            run_for(overlay(explicit, nested("checkpoint.output_dir", str(tmp_path / "new"))), **option)
    run = run_for(explicit, resume="auto")
    assert run.state.step == 3
    assert "atlas_step_6.pt: its weights are not finite" in capfd.readouterr().err


def test_an_interrupted_run_does_not_save_ruined_weights(tmp_path: Path, text_file: Path) -> None:
    run = run_for(layer(tmp_path / "run", text_file, checkpoint__save_interval=2))

    def ruin_and_stop() -> None:
        if run.state.step == 3:
            with torch.no_grad():
                next(run.model.parameters()).fill_(math.nan)
            run.stop.requested = True

    on_updates(run, after=ruin_and_stop)
    assert train(run).outcome == "interrupted"
    assert {path.name for path in (tmp_path / "run").glob("atlas_*.pt")} >= {"atlas_step_2.pt"}
    assert list((tmp_path / "run").glob("atlas_interrupt_*.pt")) == []
    assert "step 3: not saved: weights that are not finite" in (tmp_path / "run/training.log").read_text()


def test_a_run_that_was_extended_keeps_its_new_end_when_it_rolls_back(
    tmp_path: Path, text_file: Path
) -> None:
    """Also to a checkpoint of before, whose end was another."""
    explicit = layer(tmp_path / "run", text_file, checkpoint__save_interval=2)
    trained(explicit)
    explicit["training"]["max_steps"] = 12
    run = run_for(explicit, resume="auto")
    times = [0]

    def ruin() -> None:
        if run.state.step == 8 and times[0] < 2:
            times[0] += 1
            with torch.no_grad():
                next(run.model.parameters()).fill_(math.inf)

    on_updates(run, after=ruin)
    result = train(run)
    assert "(rollback 2 of 3)" in (tmp_path / "run/training.log").read_text(encoding="utf-8")
    assert (result.outcome, result.step, run.state.horizon) == ("finished", 12, 12)


def test_a_run_stopped_amid_updates_that_were_not_applied_saves_nothing(
    tmp_path: Path, text_file: Path
) -> None:
    """Weights can be ruined and finite; `--resume auto` would then begin with them."""
    run = run_for(layer(tmp_path / "run", text_file, checkpoint__save_interval=2))
    wrong_at(run, lambda step: step >= 4)

    def stop() -> None:
        run.stop.requested = run.state.step == 5

    on_updates(run, after=stop)
    result = train(run)
    assert (result.outcome, result.saved) == ("interrupted", [])
    assert list((tmp_path / "run").glob("atlas_interrupt_*.pt")) == []
    log = (tmp_path / "run/training.log").read_text(encoding="utf-8")
    assert "step 5: not saved: the last 2 updates could not be applied" in log


@pytest.mark.parametrize("optimizer", ["muon", "adafactor"])
def test_a_huge_learning_rate_is_a_fault_with_every_optimizer(
    tmp_path: Path, text_file: Path, optimizer: str
) -> None:
    explicit = layer(tmp_path / "run", text_file, training__optimizer=optimizer, training__warmup_steps=0)
    with pytest.raises(AtlasError, match="step 3: weights that are not finite"):
        trained(
            overlay(
                overlay(explicit, nested("training.learning_rate", 1e300)), nested("training.max_steps", 3)
            )
        )
    assert list((tmp_path / "run").glob("atlas_*.pt")) == []
