"""The plan against what it plans: real models, what autograd really keeps, real files."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas.cli import main
from atlas.config import AtlasConfig, ModelConfig
from atlas.config.loader import overlay, resolve
from atlas.config.presets import preset_names
from atlas.machine import _left_in_container, measure_memory
from atlas.model import AtlasLM, add_lora, build_model
from atlas.model.cost import Execution, count_parameters, trace_saved_tensors
from atlas.planning.inference import estimate_inference_memory
from atlas.training.loss import compute_lm_loss
from atlas.training.memory.estimate import checkpoint_bytes, estimate_training_memory, output_folder_bytes
from atlas.training.memory.presets import assume_vocabulary, largest_that_fits, plan_presets
from atlas.training.optimizers import memory as optimizer_memory
from atlas.training.optimizers.build import build_optimizer

SHAPE = {"hidden_size": 96, "num_layers": 3, "num_heads": 4, "vocab_size": 300, "max_seq_len": 64}
MODERN = {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False}


def config_of(**sections: dict) -> AtlasConfig:
    return resolve(overlay({"model": SHAPE}, sections))


@settings(max_examples=40, deadline=None)
@given(
    heads=st.integers(1, 5),
    head_dim=st.integers(1, 16),
    layers=st.integers(1, 4),
    vocab=st.integers(1, 300),
    context=st.integers(1, 50),
    bias=st.booleans(),
    tied=st.booleans(),
    others=st.fixed_dictionaries(
        {
            "position": st.sampled_from(["learned", "rope"]),
            "norm": st.sampled_from(["layernorm", "rmsnorm"]),
            "mlp": st.sampled_from(["gelu", "gelu_exact", "swiglu"]),
            "qk_norm": st.booleans(),
            "num_kv_heads": st.sampled_from([None, 1]),
            "head_dim": st.sampled_from([None, 6]),
        }
    ),
)
def test_parameters_are_those_of_the_model(
    heads: int, head_dim: int, layers: int, vocab: int, context: int, bias: bool, tied: bool, others: dict
) -> None:
    if others["position"] == "rope" and others["head_dim"] is None:
        head_dim *= 2  # it turns pairs
    model_config = ModelConfig(
        **others,
        hidden_size=heads * head_dim,
        num_layers=layers,
        num_heads=heads,
        vocab_size=vocab,
        max_seq_len=context,
        bias=bias,
        tie_embeddings=tied,
    )
    with torch.device("meta"):
        model = AtlasLM(model_config)
    by_part: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        is_table = name in ("token_embedding.weight", "lm_head.weight")
        part = (
            "norms"
            if "norm" in name
            else next(p for p in ("attention", "mlp", "token", "position", "head") if p in name)
        )
        by_part[part] += vocab * parameter.shape[1] if is_table else parameter.numel()

    counted = count_parameters(model_config)
    assert counted.total == model.num_parameters()
    assert (counted.token_embedding, counted.position_embedding) == (by_part["token"], by_part["position"])
    assert (counted.attention, counted.mlp) == (by_part["attention"], by_part["mlp"])
    assert (counted.norms, counted.head) == (by_part["norms"], by_part["head"])


# Memory


def kept_by_autograd(config: AtlasConfig) -> int:
    """Bytes that the model's forward really keeps for the backward pass, weights left out."""
    model = build_model(config.model, seed=0).train()
    if config.lora.rank:
        add_lora(model, config.lora)
    model.gradient_checkpointing = config.training.gradient_checkpointing
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = (
                tensor  # holding it keeps its address from being reused
            )
        return tensor

    tokens = torch.zeros(config.training.batch_size, config.model.max_seq_len, dtype=torch.long)
    is_half = config.training.precision == "bf16"
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=is_half, cache_enabled=False)
    with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.hidden_states(tokens)
        model.head(hidden)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(
    "shape", [{}, MODERN, MODERN | {"qk_norm": True, "num_kv_heads": 2, "head_dim": 32}], ids=str
)
def test_activations_are_what_autograd_keeps(
    shape: dict, batch_size: int, dropout: float, checkpointing: bool
) -> None:
    config = config_of(
        model={"dropout": dropout, **shape},
        training={"batch_size": batch_size, "gradient_checkpointing": checkpointing},
    )
    estimated = estimate_training_memory(config, device="cpu").activations
    # With dropout a CPU's attention copies q, k and v or does not, by their strides.
    assert estimated == pytest.approx(kept_by_autograd(config), rel=0.1 if dropout else 0.02)


@pytest.mark.parametrize("sections", [{"lora": {"rank": 8}}, {"training": {"precision": "bf16"}}], ids=str)
def test_activations_are_what_autograd_keeps_of_low_rank_updates_and_in_half_precision(
    sections: dict,
) -> None:
    config = config_of(**overlay({"training": {"batch_size": 4}}, sections))
    memory = estimate_training_memory(config, device="cpu")
    copies = (
        2 * 3 * 96 * 96 + 2 * 320 * 96 if "training" in sections else 0
    )  # of attention's outputs, and of the head
    # A first block saves no input for low-rank updates: nothing before it is trained.
    assert memory.activations + copies == pytest.approx(kept_by_autograd(config), rel=0.06)


def test_ten_thousand_layers_are_traced_as_one() -> None:
    one, many = (config_of(model={"num_layers": layers}) for layers in (1, 10_000))
    assert trace_saved_tensors(one.model, Execution("cpu")) is trace_saved_tensors(
        many.model, Execution("cpu")
    )
    activations = [estimate_training_memory(config, device="cpu").activations for config in (one, many)]
    block = sum(saved.bytes(1, 64) for saved in trace_saved_tensors(one.model, Execution("cpu")).block)
    batch = one.training.batch_size
    assert activations[1] - activations[0] == 9_999 * batch * block
    assert count_parameters(many.model).attention == 10_000 * count_parameters(one.model).attention


def test_an_optimizer_that_no_table_names_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    adamw = estimate_training_memory(config_of(), device="cuda")
    monkeypatch.setattr(
        optimizer_memory, "build_optimizer", lambda model, training: torch.optim.NAdam(model.parameters())
    )
    config = config_of()
    training = config.training.model_copy(update={"optimizer": "nadam"})
    other = estimate_training_memory(config.model_copy(update={"training": training}), device="cuda")
    assert other.optimizer == adamw.optimizer
    assert other.gradients >= adamw.gradients


def test_parts_of_training_memory_are_what_they_are_named() -> None:
    config = config_of(training={"batch_size": 2, "gradient_accumulation_steps": 4})
    weights = sum(p.numel() * p.element_size() for p in build_model(config.model).parameters())
    memory = estimate_training_memory(config, device="cuda")
    assert (memory.weights, memory.optimizer, memory.gradients) == (weights, 2 * weights, weights)
    less = {
        name: estimate_training_memory(config_of(training={"optimizer": name}), device="cuda").optimizer
        for name in ("muon", "adafactor")
    }
    assert 100 * less["adafactor"] < 7 * weights
    assert weights < less["muon"] < 1.5 * weights
    assert memory.total == sum(vars(memory).values())
    assert memory.half_precision_weights > 0
    in_fp32 = estimate_training_memory(config_of(training={"precision": "fp32"}), device="cuda")
    assert in_fp32.half_precision_weights == 0


def test_what_runs_at_once_decides_the_memory_not_the_update() -> None:
    def total(batch: int, accumulation: int, micro: int | str = "auto") -> int:
        training = {
            "batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            "micro_batch_size": micro,
        }
        return estimate_training_memory(config_of(training=training), device="cuda").total

    assert total(2, 4) == total(2, 100) == total(8, 1, 2)
    assert total(4, 2) > total(2, 4) > total(1, 8)
    assert total(4, 2, 16) == total(8, 1)  # never more than there is


def test_gradient_checkpointing_and_a_shorter_context_save_memory() -> None:
    memory = {plan.name: plan.memory for plan in plan_presets(0, device="cuda")}
    assert memory["ultra"] < memory["xlarge"] < memory["large"]


def test_inference_memory_grows_with_the_batch_by_its_cache() -> None:
    model = config_of().model
    one, three = (estimate_inference_memory(model, device="cpu", batch_size=size) for size in (1, 3))
    assert three.cache == 3 * one.cache == 3 * 2 * 3 * 64 * 96 * 4
    assert three.weights == one.weights


PEAK = """
import json, sys
import torch
from atlas.config.loader import resolve
from atlas.model import build_model
from atlas.training.devices.device import Runtime
from atlas.training.loss import SummedLoss
from atlas.training.optimizers.build import build_optimizer

config = resolve(json.loads(sys.argv[1]))
model = build_model(config.model, seed=0).train()
model.gradient_checkpointing = config.training.gradient_checkpointing
optimizer = build_optimizer(model, config.training)
shape = (config.training.batch_size, config.model.max_seq_len)

runtime, objective = Runtime(torch.device("cpu"), config.training.precision), SummedLoss(model)

for _ in range(3):
    for _ in range(config.training.gradient_accumulation_steps):
        tokens = torch.randint(config.model.vocab_size, shape)
        with runtime.autocast():
            loss = objective(tokens, tokens) / tokens.numel()
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
# Not ru_maxrss: it begins with the peak of the process that started this one.
status = dict(line.split(":", 1) for line in open("/proc/self/status", encoding="utf-8"))
print(int(status["VmHWM"].split()[0]) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux", reason="peak memory is in other units elsewhere, or not to be had"
)
@pytest.mark.parametrize(
    "sections",
    [
        {
            "model": {
                "hidden_size": 384,
                "num_layers": 12,
                "num_heads": 6,
                "vocab_size": 50257,
                "max_seq_len": 512,
            }
        },
        {
            "model": {
                "hidden_size": 192,
                "num_layers": 4,
                "num_heads": 6,
                "vocab_size": 2048,
                "max_seq_len": 256,
            }
        },
        {
            "model": {
                "hidden_size": 384,
                "num_layers": 12,
                "num_heads": 6,
                "vocab_size": 50257,
                "max_seq_len": 512,
            },
            "training": {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
        },
    ],
    ids=["tiny", "nano", "tiny with gradient checkpointing"],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_memory_is_near_the_measured_peak(sections: dict, precision: str) -> None:
    training = {"batch_size": 2, "precision": precision}
    assert_near_the_measured_peak(resolve(overlay({"training": training}, sections)))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="as above")
@pytest.mark.parametrize("optimizer_name", ["muon", "adafactor"])
def test_training_memory_with_another_optimizer_is_near_the_measured_peak(optimizer_name: str) -> None:
    shape = {"hidden_size": 512, "num_layers": 12, "num_heads": 8, "vocab_size": 16384, "max_seq_len": 128}
    training = {
        "batch_size": 1,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "optimizer": optimizer_name,
        "precision": "fp32",
    }
    assert_near_the_measured_peak(resolve({"model": shape, "training": training}))


def assert_near_the_measured_peak(config: AtlasConfig) -> None:
    measured = subprocess.run(
        [sys.executable, "-c", PEAK, config.model_dump_json()], check=True, capture_output=True, text=True
    )
    estimated = estimate_training_memory(config, device="cpu").total
    assert estimated == pytest.approx(int(measured.stdout), rel=0.15)


# Disk


@pytest.mark.parametrize("optimizer_name", ["adamw", "muon", "adafactor"])
@pytest.mark.parametrize(
    "shape",
    [{}, {"tie_embeddings": False}, MODERN | {"qk_norm": True, "num_kv_heads": 2, "head_dim": 32}],
    ids=str,
)
def test_a_checkpoint_takes_what_was_planned(shape: dict, optimizer_name: str, tmp_path: Path) -> None:
    config = config_of(model=shape, training={"optimizer": optimizer_name})
    model = build_model(config.model, seed=0)
    optimizer = build_optimizer(model, config.training)
    tokens = torch.zeros(1, 8, dtype=torch.long)
    compute_lm_loss(model(tokens), tokens).backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "x.pt")
    assert checkpoint_bytes(config) == pytest.approx((tmp_path / "x.pt").stat().st_size, rel=0.02)


def test_the_output_folder_holds_all_kinds_the_best_and_one_being_written() -> None:
    config = config_of(checkpoint={"keep_checkpoints": 3})
    assert output_folder_bytes(config) == (3 + 3 + 3 + 1 + 1) * checkpoint_bytes(config)


# What fits


def test_the_largest_preset_that_fits() -> None:
    def largest(gibibytes: float) -> str | None:
        found = largest_that_fits(plan_presets(int(gibibytes * 2**30), device="cuda"))
        return found.name if found else None

    assert [largest(size) for size in (0.1, 1, 4, 6, 8, 12, 80)] == [
        None,
        "nano",
        "small",
        "ultra",
        "xlarge",
        "large",
        "large",
    ]


def test_each_preset_fits_the_card_it_is_meant_for() -> None:
    """In GB as makers of graphics cards count them, with `cuda`'s estimate."""
    cards = {"tiny": 4, "small": 6, "default": 8, "large": 12, "xlarge": 8, "ultra": 6}
    memory = {plan.name: plan.memory for plan in plan_presets(0, device="cuda")}
    assert {name: memory[name] <= size * 2**30 for name, size in cards.items()} == dict.fromkeys(cards, True)


def test_a_vocabulary_left_to_the_dataset_is_assumed() -> None:
    left_out = AtlasConfig()
    assert assume_vocabulary(left_out).model.vocab_size == 2048
    assert left_out.model.vocab_size is None
    stated = config_of()
    assert assume_vocabulary(stated) is stated


def test_memory_of_a_container_is_what_its_limit_leaves(tmp_path: Path) -> None:
    unlimited = _left_in_container(tmp_path)
    assert 0 < measure_memory("cpu") <= unlimited
    (tmp_path / "memory.current").write_text("300\n", encoding="ascii")
    for limit, left in {"1000": 700, "200": 0, "max": unlimited}.items():
        (tmp_path / "memory.max").write_text(f"{limit}\n", encoding="ascii")
        assert _left_in_container(tmp_path) == left


# The command


def test_plan_of_a_preset(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["plan", "--config", "small", "--set", "training.batch_size=1", "--memory", "6GB"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "…" not in out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith(" ")}
    assert rows["token"] == ["token", "embedding", "38,597,376"]
    assert ["total", "124,439,808"] in [line.split() for line in out.splitlines()]
    assert rows["one"] == ["one", "checkpoint", "1.49", "GB"]
    assert set(preset_names()) < set(rows)
    assert "no" in rows["default"]
    assert "Presets on 6GB (cuda), 6.00 GiB: the largest that fits is ultra" in out


def test_plan_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--set", "device=cpu", "--config", "nano"]) == 0
    out, _ = capsys.readouterr()
    assert "Memory of training on cpu" in out
    assert "this plan assumes 2048" in out
    assert "Presets on this machine (cpu)" in out


@pytest.mark.parametrize(
    "arguments", [["--memory", "8x"], ["--config", "smal"], ["--set", "training.batch_size=0"]]
)
def test_mistakes_in_a_plan_are_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
