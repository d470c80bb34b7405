"""Weights in bf16: rounded at random, so that training works; on a CPU, which emulates bf16, with small models."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from atlas.config import ModelConfig, TrainingConfig
from atlas.config.loader import resolve
from atlas.inference.load import load_model
from atlas.model import build_model
from atlas.training.checkpoint.atomic_write import tensor_bytes
from atlas.training.checkpoint.load import load_checkpoint
from atlas.training.memory.estimate import checkpoint_bytes
from atlas.training.optimizers.bf16 import round_to_bf16, step_rounding_weights
from atlas.training.optimizers.build import build_optimizer
from tests.runs import layer, logged, resumes_with_the_same_bits, same_bits, trained

NAMES = ("adamw", "muon", "adafactor")


@pytest.fixture(autouse=True)
def _bf16_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atlas.training.devices.device.cpu_computes_in_bf16", lambda: True)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def neighbours(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The bf16 numbers next to each number, towards zero and away from it."""
    exact = numbers.double()
    last_digit = 2.0 ** (torch.frexp(exact).exponent - 8).double()
    inner, outer = (exact.abs() / last_digit).floor(), (exact.abs() / last_digit).ceil()
    return (inner * last_digit).copysign(exact).float(), (outer * last_digit).copysign(exact).float()


@given(
    number=st.floats(-(2.0**127), 2.0**127, width=32, allow_subnormal=False),
    seed=st.integers(0, 2**32),
)
def test_a_number_goes_to_one_of_its_neighbours(number: float, seed: int) -> None:
    numbers = torch.full((64,), number)
    inner, outer = neighbours(numbers)
    rounded = round_to_bf16(numbers, generator(seed)).float()
    assert ((rounded == inner) | (rounded == outer)).all()
    exact = numbers.bfloat16()
    assert torch.equal(
        round_to_bf16(exact.float(), generator(seed)), exact
    )  # a number that needs no rounding stays


@pytest.mark.parametrize("part", [0.01, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_mean_is_the_number(part: float, sign: int) -> None:
    """Between 1 and the next bf16 number, 1 + 1/128, the share rounded up is how near the number is to the upper
    one."""
    draws = 40_000
    rounded = round_to_bf16(torch.full((draws,), sign * (1 + part / 128)), generator()).float()
    up = (rounded.abs() > 1).float().mean().item()
    assert up == pytest.approx(part, abs=4 * (part * (1 - part) / draws) ** 0.5)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_the_optimizers_own_in_fp32(name: str, tiny_config: ModelConfig) -> None:
    """The result is a bf16 neighbour of the fp32 result; the optimizer's state has the same bits."""
    model = build_model(tiny_config, seed=0).bfloat16()
    exact = copy.deepcopy(model).float()
    config = TrainingConfig(optimizer=name, learning_rate=1e-3, weight_decay=0.5)
    ours, theirs = build_optimizer(model, config), build_optimizer(exact, config)
    for seed in range(3):
        for parameter, other in zip(model.parameters(), exact.parameters(), strict=True):
            other.data = parameter.detach().float()
            other.grad = (1e-3 * torch.randn(other.shape, generator=generator(seed))).bfloat16().float()
            parameter.grad = other.grad.bfloat16()
        step_rounding_weights(ours, generator(seed))
        theirs.step()
        for parameter, other in zip(model.parameters(), exact.parameters(), strict=True):
            inner, outer = neighbours(other.detach())
            rounded = parameter.detach().float()
            assert parameter.dtype == torch.bfloat16
            assert parameter.grad is None
            assert ((rounded == inner) | (rounded == outer)).all()
    assert same_bits(ours.state_dict()["state"], theirs.state_dict()["state"])


def test_small_steps_add_up() -> None:
    """Each of 1,000 steps is a fiftieth of the last digit: rounded to the nearest, none would move a weight."""
    weights = torch.nn.Parameter(torch.ones(2_000, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weights], lr=1.0)
    step, draw = 2.0**-7 / 50, generator()
    assert torch.equal(weights - step, weights)
    for _ in range(1000):
        weights.grad = torch.full_like(weights, step)
        step_rounding_weights(optimizer, draw)
    assert weights.float().mean().item() == pytest.approx(1 - 1000 * step, abs=2e-3)


def in_bf16(folder: Path, text: Path, optimizer: str, **settings: object) -> dict:
    explicit = {"training__precision": "bf16-true", "training__optimizer": optimizer, "model__dropout": 0.2}
    return layer(folder, text, **explicit, checkpoint__save_interval=3, **settings)


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_has_the_same_bits(name: str, tmp_path: Path, text_file: Path) -> None:
    whole = resumes_with_the_same_bits(in_bf16(tmp_path / "run", text_file, name), tmp_path / "run")
    assert {tensor.dtype for tensor in whole["model_state_dict"].values()} == {torch.bfloat16}
    kept = whole["optimizer_state_dict"]["state"]
    assert {value.dtype for state in kept.values() for value in state.values()} == {torch.float32}
    steps = sum(tensor_bytes(state["step"]) for state in kept.values() if "step" in state)
    in_file = tensor_bytes(whole["model_state_dict"]) + tensor_bytes(kept) - steps
    assert checkpoint_bytes(resolve(whole["config"])) == in_file


@pytest.mark.slow
def test_it_trains_as_with_weights_in_fp32(tmp_path: Path, text_file: Path) -> None:
    steps = {"training__max_steps": 60, "training__warmup_steps": 5}
    trained(in_bf16(tmp_path / "bf16", text_file, "adamw", **steps))
    trained(layer(tmp_path / "fp32", text_file, model__dropout=0.2, **steps))
    losses = [[line["loss"] for line in logged(tmp_path / name)] for name in ("bf16", "fp32")]
    assert losses[0][-1] < losses[0][0] - 1
    assert losses[0][-1] == pytest.approx(losses[1][-1], abs=0.1)


def test_its_checkpoint_is_read_like_any_other(tmp_path: Path, text_file: Path) -> None:
    """The same numbers in fp32; and a run in another precision resumes from it."""
    trained(in_bf16(tmp_path / "run", text_file, "adamw"))
    saved = load_checkpoint(tmp_path / "run" / "atlas_step_6.pt")["model_state_dict"]
    loaded = load_model(tmp_path / "run" / "atlas_step_6.pt", tokenizer="tests.toy:tokenizer").model
    assert loaded.token_embedding.weight.dtype == torch.float32
    assert all(torch.equal(tensor, saved[name].float()) for name, tensor in loaded.state_dict().items())
    longer = in_bf16(tmp_path / "run", text_file, "adamw", training__max_steps=8)
    longer["training"]["precision"] = "fp32"
    assert trained(longer)[0].model.token_embedding.weight.dtype == torch.float32
    back = in_bf16(tmp_path / "run", text_file, "adamw", training__max_steps=10)
    assert trained(back)[0].model.token_embedding.weight.dtype == torch.bfloat16
    log = (tmp_path / "run" / "training.log").read_text()
    for change in ("bf16-true when saved, fp32 here", "fp32 when saved, bf16-true here"):
        assert f"precision: {change}" in log
