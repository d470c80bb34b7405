"""Each optimizer against another implementation, and what all promise: sound weights, the same bits, their size."""

from __future__ import annotations

import copy
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._inductor.exc import CppCompileError

from atlas.config import LoraConfig, ModelConfig, TrainingConfig
from atlas.config.loader import nested, overlay
from atlas.errors import AtlasError
from atlas.model import AtlasLM, add_lora, build_model
from atlas.training.checkpoint.atomic_write import tensor_bytes
from atlas.training.checkpoint.load import load_checkpoint
from atlas.training.checkpoint.validate import check_optimizer_state
from atlas.training.memory.estimate import checkpoint_bytes
from atlas.training.optimizers.build import build_optimizer
from atlas.training.step import apply_gradient
from atlas.training.train import train
from tests.runs import (
    STATE,
    gradient_of,
    layer,
    logged,
    resumes_with_the_same_bits,
    run_for,
    same_bits,
    trained,
    update,
)

NAMES = ("adamw", "muon", "adafactor")
RATE = 1e-3
SCALE = 0.2 * math.sqrt(768)
WIDENING = 768 / 32  # of the fixtures' width


@pytest.fixture
def model(tiny_config: ModelConfig) -> AtlasLM:
    """A model as a run begins with: the norms' gains are 1."""
    return build_model(tiny_config, seed=0)


def stepped(
    model: AtlasLM, config: TrainingConfig, gradients: list[dict[str, Tensor]]
) -> torch.optim.Optimizer:
    """The optimizer after a step with each of the gradients."""
    optimizer = build_optimizer(model, config)
    for gradient in gradients:
        for name, parameter in model.named_parameters():
            parameter.grad = gradient[name].clone()
        optimizer.step()
    return optimizer


def random_gradients(model: AtlasLM, count: int) -> list[dict[str, Tensor]]:
    torch.manual_seed(7)
    return [{name: 1e-4 * torch.randn_like(p) for name, p in model.named_parameters()} for _ in range(count)]


# Against something else.


def test_muon_updates_each_matrix_of_a_block_by_u_vt(model: AtlasLM) -> None:
    """The first step: U Vᵀ of the gradient U S Vᵀ, from its singular value decomposition, separately for q, k and v."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    (gradient,) = gradients = random_gradients(model, 1)
    gradient["blocks.0.attention.qkv.weight"][:1] *= 100  # of q alone: it must not touch k and v
    stepped(model, TrainingConfig(optimizer="muon", learning_rate=RATE, weight_decay=0.5), gradients)
    checked = 0
    for name, parameter in model.named_parameters():
        if not name.startswith("blocks.") or parameter.dim() < 2:
            continue
        parts = 3 if "qkv" in name else 1
        tensors = (before[name], parameter.detach(), gradient[name])
        for old, new, slope in zip(*(tensor.chunk(parts) for tensor in tensors), strict=True):
            scale = SCALE * math.sqrt(max(1, old.shape[0] / old.shape[1]))
            update = (old * (1 - RATE * 0.5) - new) / (RATE * scale)
            u, _, vt = torch.linalg.svd(slope, full_matrices=False)
            cosine = (update * (u @ vt)).sum() / (update.norm() * (u @ vt).norm())
            assert cosine > 0.9, name
            stretched = torch.linalg.svdvals(update)
            assert stretched.median() == pytest.approx(1, abs=0.3), name
            assert stretched.max() < 1.4, name
            checked += 1
    assert checked == 6 * len(model.blocks)


def test_muon_is_pytorchs_own_except_for_rounding(model: AtlasLM) -> None:
    """`torch.optim.Muon` orthogonalises in bf16, and treats q, k and v as one matrix."""
    gradients = random_gradients(model, 5)
    names = [name for name, p in model.named_parameters() if name.startswith("blocks.") and p.dim() == 2]
    names = [name for name in names if "qkv" not in name]
    theirs = [torch.nn.Parameter(model.get_parameter(name).detach().clone()) for name in names]
    before = [p.detach().clone() for p in theirs]
    stepped(model, TrainingConfig(optimizer="muon", learning_rate=RATE, weight_decay=0.5), gradients)
    reference = torch.optim.Muon(theirs, lr=RATE * SCALE, weight_decay=0.5 / SCALE, adjust_lr_fn="original")
    for gradient in gradients:
        for name, parameter in zip(names, theirs, strict=True):
            parameter.grad = gradient[name].clone()
        reference.step()
    for name, parameter, start in zip(names, theirs, before, strict=True):
        assert (model.get_parameter(name) - parameter).norm() < 0.03 * (parameter - start).norm(), name


def test_muon_leaves_the_rest_to_adamw(tiny_config: ModelConfig) -> None:
    """Biases and norms move as with AdamW alone, bit for bit, and so do tables, at their rate for the width."""
    muon, adamw, fast = (build_model(tiny_config, seed=0) for _ in range(3))
    gradients = random_gradients(muon, 3)
    stepped(muon, TrainingConfig(optimizer="muon", learning_rate=RATE), gradients)
    stepped(adamw, TrainingConfig(optimizer="adamw", learning_rate=RATE), gradients)
    quick = {"learning_rate": RATE * WIDENING, "weight_decay": 0.1 / WIDENING}
    stepped(fast, TrainingConfig(optimizer="adamw", **quick), gradients)
    for name, p in muon.named_parameters():
        assert torch.equal(p, adamw.get_parameter(name)) == (p.dim() < 2), name
        assert torch.equal(p, fast.get_parameter(name)) == (
            not name.startswith("blocks.") and p.dim() == 2
        ), name


def test_adafactor_is_the_one_of_transformers(model: AtlasLM) -> None:
    """Theirs without scaling by the weights, so that rates are absolute. Padding rows, without a gradient, stay
    zero."""
    reference = pytest.importorskip("transformers.optimization").Adafactor
    theirs = copy.deepcopy(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = random_gradients(model, 5)
    for gradient in gradients:
        gradient["token_embedding.weight"][model.config.vocabulary :] = 0
    stepped(model, TrainingConfig(optimizer="adafactor", learning_rate=RATE, weight_decay=0.5), gradients)
    groups = [
        {"params": [p for p in theirs.parameters() if p.dim() >= 2], "weight_decay": 0.5},
        {"params": [p for p in theirs.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = reference(groups, lr=RATE, scale_parameter=False, relative_step=False)
    for gradient in gradients:
        for name, parameter in theirs.named_parameters():
            parameter.grad = gradient[name].clone()
        optimizer.step()
    for name, parameter in theirs.named_parameters():
        ours, moved = dict(model.named_parameters())[name], parameter - before[name]
        assert (ours - parameter).norm() < 5e-3 * moved.norm(), name
    assert not model.token_embedding.weight[model.config.vocabulary :].any()


@pytest.mark.parametrize("name", NAMES)
def test_a_rate_means_the_same_for_low_rank_updates(name: str, model: AtlasLM) -> None:
    add_lora(model, LoraConfig(rank=2), seed=0)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    config = TrainingConfig(optimizer=name, learning_rate=RATE, weight_decay=0)
    build = random_gradients(model, 1)
    for key, parameter in model.named_parameters():
        if not parameter.requires_grad:
            build[0][key] = torch.zeros_like(parameter)
    stepped(model, config, build)
    moved = {
        key: float((p - before[key]).detach().square().mean().sqrt()) / RATE
        for key, p in model.named_parameters()
    }
    assert all(0.1 < far < 1.1 for key, far in moved.items() if "lora_" in key)
    assert not any(far for key, far in moved.items() if "lora_" not in key)


@pytest.mark.parametrize("name", NAMES)
def test_a_rate_means_the_same(name: str, model: AtlasLM) -> None:
    """The root mean square of a parameter's update, in units of the rate; for Muon's tables, in units of their rate."""
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    config = TrainingConfig(optimizer=name, learning_rate=RATE, weight_decay=0)
    stepped(model, config, random_gradients(model, 1))
    for key, parameter in model.named_parameters():
        moved = (parameter - before[key]).detach().square().mean().sqrt() / RATE
        if name == "muon" and not key.startswith("blocks.") and parameter.dim() == 2:
            moved /= WIDENING
        assert 0.1 < moved < 1.1, (key, float(moved))


# What holds for all of them.


@pytest.mark.parametrize("name", NAMES)
def test_matrices_decay_and_the_rest_does_not(name: str, model: AtlasLM) -> None:
    optimizer = build_optimizer(model, TrainingConfig(optimizer=name, weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for key, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.3 if parameter.dim() == 2 else 0.0), key


@pytest.mark.parametrize("name", NAMES)
def test_it_trains(name: str, tmp_path: Path, text_file: Path) -> None:
    trained(layer(tmp_path / "run", text_file, training__optimizer=name, training__max_steps=40))
    losses = [line["loss"] for line in logged(tmp_path / "run")]
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(
    name: str, bad: float, tmp_path: Path, text_file: Path
) -> None:
    run = run_for(layer(tmp_path / "run", text_file, training__optimizer=name))
    batches = run.batches()
    assert update(run, *next(batches)).fault is None
    before = copy.deepcopy([dict(run.model.state_dict()), run.optimizer.state_dict()["state"]])
    gradient = gradient_of(run, next(batches))
    run.model.blocks[0].mlp.up.weight.grad[0, 0] = bad
    assert apply_gradient(run.learner, gradient, run.state, rate=1e-2).fault is not None
    assert same_bits(before, [dict(run.model.state_dict()), run.optimizer.state_dict()["state"]])
    assert update(run, *next(batches)).fault is None  # and training continues
    assert not same_bits(before[0], dict(run.model.state_dict()))


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_has_the_same_bits(name: str, tmp_path: Path, text_file: Path) -> None:
    explicit = layer(
        tmp_path / "run",
        text_file,
        training__optimizer=name,
        model__dropout=0.2,
        checkpoint__save_interval=3,
    )
    resumes_with_the_same_bits(explicit, tmp_path / "run")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tied", [True, False])
def test_its_state_needs_what_was_planned(name: str, tied: bool, tmp_path: Path, text_file: Path) -> None:
    run, _ = trained(layer(tmp_path / "run", text_file, training__optimizer=name, model__tie_embeddings=tied))
    kept = run.optimizer.state_dict()["state"]
    steps = sum(tensor_bytes(state["step"]) for state in kept.values() if "step" in state)
    weights = tensor_bytes(dict(run.model.state_dict()))
    if tied:
        assert "lm_head.weight" not in run.model.state_dict()
    assert tensor_bytes(kept) - steps == checkpoint_bytes(run.config) - weights


@pytest.mark.parametrize("name", NAMES)
def test_state_of_another_shape_is_refused(name: str, model: AtlasLM) -> None:
    optimizer = stepped(model, TrainingConfig(optimizer=name), random_gradients(model, 1))
    sound = optimizer.state_dict()
    check_optimizer_state(optimizer, sound)
    for number, state in sound["state"].items():
        for key, value in state.items():
            for wrong in (torch.zeros(3, 3, 3), None, value.int()):
                changed = {**sound["state"], number: {**state, key: wrong}}
                with pytest.raises(ValueError, match=rf"parameter {number} does not have .*\b{key}\b"):
                    check_optimizer_state(optimizer, {**sound, "state": changed})
            less = {other: entry for other, entry in state.items() if other != key}
            if less:
                with pytest.raises(ValueError, match=f"parameter {number}"):
                    check_optimizer_state(optimizer, {**sound, "state": {**sound["state"], number: less}})


# Going on with another one.


def test_another_optimizers_checkpoint_is_refused_and_nothing_changes(
    tmp_path: Path, text_file: Path
) -> None:
    explicit = layer(tmp_path / "run", text_file)
    trained(explicit)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    longer = overlay(explicit, nested("training.max_steps", 8))
    with pytest.raises(AtlasError, match=r"training\.optimizer adamw.*muon.*--init-from") as caught:
        run_for(overlay(longer, nested("training.optimizer", "muon")))
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_checkpoint_without_an_optimizer_setting_is_adamws(tmp_path: Path, text_file: Path) -> None:
    explicit = layer(tmp_path / "run", text_file)
    trained(explicit)
    contents = load_checkpoint(tmp_path / "run" / "atlas_step_6.pt")
    del contents["config"]["training"]["optimizer"]
    torch.save(contents, tmp_path / "old.pt")
    longer = overlay(explicit, nested("checkpoint.output_dir", str(tmp_path / "new")))
    longer = overlay(longer, nested("training.max_steps", 8))
    assert trained(longer, resume=str(tmp_path / "old.pt"))[1].step == 8


# adamw8bit, where torchao is installed.


@pytest.fixture(scope="module")
def torchao() -> object:
    return pytest.importorskip("torchao.optim")


def in_8_bits(folder: Path, text: Path) -> dict:
    return layer(
        folder,
        text,
        training__optimizer="adamw8bit",
        model__hidden_size=64,
        model__dropout=0.2,
        checkpoint__save_interval=3,
    )


@pytest.mark.slow
def test_8_bits_resume_with_the_same_bits_train_and_need_what_was_planned(
    torchao: object, tmp_path: Path, text_file: Path
) -> None:
    """One test, since each process compiles the step for minutes."""
    folder = tmp_path / "run"
    run, _ = trained(in_8_bits(folder, text_file))
    assert "compiles its step" in (folder / "training.log").read_text(encoding="utf-8")
    whole = load_checkpoint(folder / "atlas_step_6.pt")
    losses = [line["loss"] for line in logged(folder)]
    assert losses[-1] < losses[0] - 0.3
    kept = tensor_bytes(run.optimizer.state_dict()["state"])
    planned = checkpoint_bytes(run.config) - tensor_bytes(dict(run.model.state_dict()))
    assert kept == pytest.approx(planned, rel=0.05)
    trained(in_8_bits(folder, text_file), resume=str(folder / "atlas_step_3.pt"))
    again = load_checkpoint(folder / "atlas_step_6.pt")
    for key in STATE:
        assert same_bits(whole[key], again[key]), key
    assert [line["loss"] for line in logged(folder)] == losses

    run = run_for(overlay(in_8_bits(folder, text_file), nested("training.max_steps", 9)))
    before = copy.deepcopy([dict(run.model.state_dict()), run.optimizer.state_dict()["state"]])
    gradient = gradient_of(run, next(run.batches()))
    run.model.blocks[0].mlp.up.weight.grad[0, 0] = math.nan
    assert apply_gradient(run.learner, gradient, run.state, rate=1e-2).fault is not None
    assert same_bits(before, [dict(run.model.state_dict()), run.optimizer.state_dict()["state"]])

    state = run.optimizer.state_dict()
    moment = state["state"][0]["exp_avg"]
    for wrong in ({**moment, "codes": moment["codes"][:1]}, {**moment, "scale": moment["scale"][:1]}, {}):
        changed = {**state["state"], 0: {**state["state"][0], "exp_avg": wrong}}
        with pytest.raises(ValueError, match="parameter 0"):
            check_optimizer_state(run.optimizer, {**state, "state": changed})


def test_8_bits_without_torchao_or_a_compiler_are_refused_in_one_line(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(AtlasError, match=r'pip install "atlas-llm\[lowmem\]".*adafactor') as caught:
        run_for(in_8_bits(tmp_path / "run", text_file))
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "torchao.optim", types.SimpleNamespace(AdamW8bit=None))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AtlasError, match=r"no C\+\+ compiler.*adafactor"):
        run_for(in_8_bits(tmp_path / "run", text_file))
    assert not (tmp_path / "run").exists()


def test_a_step_that_cannot_be_compiled_is_one_line(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise CppCompileError(["g++", "step.cpp"], "fatal error: omp.h: No such file")

    run = run_for(layer(tmp_path / "run", text_file, training__optimizer="muon"))
    monkeypatch.setattr(run.optimizer, "step", fail)
    with pytest.raises(
        AtlasError, match=r"training\.optimizer.*cannot be compiled here.*adafactor"
    ) as caught:
        train(run)
    assert "\n" not in str(caught.value)
