"""What `atlas plan` says of a run: FLOPs against PyTorch's own counter, cards, what fits at once, and the command."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from atlas.cli import main
from atlas.config import AtlasConfig
from atlas.config.loader import overlay, resolve
from atlas.config.presets import preset_names
from atlas.data import open_dataset
from atlas.errors import AtlasError
from atlas.model import AtlasLM, build_model
from atlas.model.cost import training_flops_per_token
from atlas.planning import tables
from atlas.planning.cards import CARDS, card_named, find_card
from atlas.planning.machine import Machine, machine_with
from atlas.planning.run import SPREAD, describe_duration, plan_run
from atlas.planning.speed import card_speed, update_seconds
from atlas.training.loss import compute_lm_loss
from atlas.training.memory.estimate import estimate_training_memory
from atlas.training.memory.fit import largest_micro_batch, memory_advice
from atlas.training.memory.presets import plan_presets
from tests.conftest import corpus

SHAPE = {"hidden_size": 48, "num_layers": 3, "num_heads": 4, "vocab_size": 130, "max_seq_len": 32}
MODERN = {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False}


def config_of(**sections: dict[str, Any]) -> AtlasConfig:
    return resolve(overlay({"model": SHAPE}, sections))


# FLOPs


def counted_flops(config: AtlasConfig) -> int:
    """Of one update, by PyTorch, with the attention that is written out and so compares all pairs of tokens."""
    model = build_model(config.model, seed=0).train()
    model.gradient_checkpointing = config.training.gradient_checkpointing
    tokens = torch.zeros(config.training.batch_size, config.model.max_seq_len, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        compute_lm_loss(model(tokens), tokens).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "model",
    [
        {},
        {"dropout": 0.1},
        {"tie_embeddings": False, "bias": False},
        {"num_layers": 1, "num_heads": 1},
        {"max_seq_len": 100, "vocab_size": 7},
        MODERN,
        MODERN | {"num_kv_heads": 2, "head_dim": 32, "mlp_size": 200},
    ],
    ids=str,
)
def test_flops_are_those_that_pytorch_counts(model: dict[str, Any], checkpointing: bool) -> None:
    config = config_of(model=model, training={"batch_size": 2, "gradient_checkpointing": checkpointing})
    shape = config.model
    # Half of all pairs are masked; the fused kernels do not compute them, the one that is counted does.
    pairs = shape.num_layers * shape.max_seq_len * shape.num_heads * shape.head_size
    masked = (8 if checkpointing else 6) * pairs
    expected = 2 * shape.max_seq_len * (training_flops_per_token(config) + masked)
    assert counted_flops(config) == expected


# Cards

# Streaming multiprocessors, boost clock in GHz, and FLOPs of one in a clock, from the chips' descriptions.
CHIPS = {
    "GTX 1060": (10, 1.708, 256),
    "GTX 1070": (15, 1.683, 256),
    "GTX 1080": (20, 1.733, 256),
    "GTX 1080 Ti": (28, 1.582, 256),
    "RTX 2060": (30, 1.680, 512),
    "RTX 2070": (36, 1.620, 512),
    "RTX 2080": (46, 1.710, 512),
    "RTX 2080 Ti": (68, 1.545, 512),
    "RTX 3050": (20, 1.777, 512),
    "RTX 3060": (28, 1.777, 512),
    "RTX 3060 Ti": (38, 1.665, 512),
    "RTX 3070": (46, 1.725, 512),
    "RTX 3070 Ti": (48, 1.770, 512),
    "RTX 3080": (68, 1.710, 512),
    "RTX 3080 Ti": (80, 1.665, 512),
    "RTX 3090": (82, 1.695, 512),
    "RTX 3090 Ti": (84, 1.860, 512),
    "RTX 4060": (24, 2.460, 512),
    "RTX 4060 Ti": (34, 2.535, 512),
    "RTX 4070": (46, 2.475, 512),
    "RTX 4070 SUPER": (56, 2.475, 512),
    "RTX 4070 Ti": (60, 2.610, 512),
    "RTX 4070 Ti SUPER": (66, 2.610, 512),
    "RTX 4080": (76, 2.505, 512),
    "RTX 4080 SUPER": (80, 2.550, 512),
    "RTX 4090": (128, 2.520, 512),
    "RTX 5050": (20, 2.572, 512),
    "RTX 5060": (30, 2.497, 512),
    "RTX 5060 Ti": (36, 2.572, 512),
    "RTX 5070": (48, 2.512, 512),
    "RTX 5070 Ti": (70, 2.452, 512),
    "RTX 5080": (84, 2.617, 512),
    "RTX 5090": (170, 2.407, 512),
    "V100": (80, 1.530, 1024),
    "T4": (40, 1.590, 1024),
    "A10": (72, 1.695, 1024),
    "RTX A6000": (84, 1.800, 1024),
    "A100": (108, 1.410, 2048),
    "A100 PCIe": (108, 1.410, 2048),
    "L4": (58, 2.040, 1024),
    "L40S": (142, 2.520, 1024),
    "H100 PCIe": (114, 1.620, 4096),
    "H100": (132, 1.830, 4096),
    "H200": (132, 1.830, 4096),
    "RX 6800": (60, 2.105, 128),
    "RX 6800 XT": (72, 2.250, 128),
    "RX 7900 XTX": (96, 2.500, 512),
}


@pytest.mark.parametrize("card", CARDS, ids=lambda card: f"{card.name} {card.gibibytes}")
def test_rates_of_cards_are_units_times_clock(card: Any) -> None:
    units, gigahertz, per_clock = CHIPS[card.name]
    assert card.tflops == pytest.approx(units * gigahertz * per_clock / 1000, rel=0.015)


@pytest.mark.parametrize(
    ("text", "name", "gibibytes"),
    [
        ("RTX 3060", "RTX 3060", 12),
        ("rtx3060", "RTX 3060", 12),
        ("3060", "RTX 3060", 12),
        ("RTX 3060 12GB", "RTX 3060", 12),
        ("NVIDIA GeForce RTX 3060", "RTX 3060", 12),
        ("GeForce RTX 3060-Ti", "RTX 3060 Ti", 8),
        ("rtx 4060 ti", "RTX 4060 Ti", 8),
        ("RTX 4060 Ti 16 GB", "RTX 4060 Ti", 16),
        ("4070 ti super", "RTX 4070 Ti SUPER", 16),
        ("GTX 1060 6GB", "GTX 1060", 6),
        ("Tesla T4", "T4", 16),
        ("a100", "A100", 40),
        ("NVIDIA A100-SXM4-80GB", "A100", 80),
        ("NVIDIA A100-PCIE-40GB", "A100 PCIe", 40),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe", 80),
        ("NVIDIA H100 80GB HBM3", "H100", 80),
        ("NVIDIA RTX A6000", "RTX A6000", 48),
        ("AMD Radeon RX 7900 XTX", "RX 7900 XTX", 24),
    ],
)
def test_cards_are_found_by_any_of_their_names(text: str, name: str, gibibytes: int) -> None:
    card = find_card(text)
    assert (card.name, card.gibibytes) == (name, gibibytes)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("RTX 3061", r"--gpu RTX 3061: .*did you mean RTX 306.*--memory 8GB"),
        ("RTX 3060 8GB", "that card has 12 GB"),
        ("NVIDIA GeForce RTX 3060 Laptop GPU", "laptop"),
        ("abacus", "GTX 1060, .*RTX 5090, .*RX 7900 XTX"),
        ("", "give the card"),
    ],
)
def test_a_card_that_is_not_known_is_said_so(text: str, says: str) -> None:
    assert card_named(text) is None
    with pytest.raises(AtlasError, match=says):
        find_card(text)


def test_precision_decides_whether_the_table_knows_the_speed() -> None:
    ampere, turing = find_card("RTX 3060"), find_card("RTX 2060")
    assert machine_with(ampere, precision="fp16").flops_per_second == pytest.approx(25.5e12)
    assert machine_with(ampere, precision="fp32").flops_per_second is None
    assert "fp16" in str(machine_with(turing).rate_is)
    with pytest.raises(AtlasError, match="RTX 2060 does not compute in bf16"):
        machine_with(turing, precision="bf16")


# Time


def test_time_and_energy_are_flops_by_speed() -> None:
    config = config_of(training={"batch_size": 4})
    machine = Machine("here", "mps", 2**33, flops_per_second=1e9, watts=360)
    run = plan_run(config, machine, updates=1000, sequences_per_epoch=500)
    assert (run.tokens, run.epochs) == (1000 * 4 * 32, 8)
    assert run.flops == run.tokens * training_flops_per_token(config)
    assert run.seconds is not None
    low, high = run.seconds
    assert low * high == pytest.approx((run.flops / 0.35e9) ** 2)
    assert run.kilowatt_hours == pytest.approx((low / 10_000, high / 10_000))  # 0.36 kW
    unknown = plan_run(config, machine, updates=None)
    assert (unknown.tokens, unknown.flops, unknown.seconds) == (None, None, None)


@pytest.mark.parametrize(
    ("seconds", "says"),
    [
        ((3, 5), "less than 2 minutes"),
        ((75, 125), "1 to 2 minutes"),
        ((1800, 3100), "30 to 52 minutes"),
        ((11_000, 18_500), "3 to 5 hours"),
        ((150_000, 250_000), "2 to 3 days"),
        ((1e9, 1.7e9), "32 to 54 years"),
    ],
)
def test_a_duration_is_no_more_precise_than_it_is_known(seconds: tuple[float, float], says: str) -> None:
    assert describe_duration(seconds) == says


@given(st.floats(1, 1e12))
def test_a_duration_is_a_range(middle: float) -> None:
    said = describe_duration((middle / SPREAD, middle * SPREAD)).replace(",", "")
    if middle * SPREAD >= 120:
        low, _, high, _ = said.split()
        assert int(low) < int(high)


# What fits at once


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 40),
    accumulation=st.integers(1, 40),
    mebibytes=st.integers(1, 5000),
    device=st.sampled_from(["cpu", "cuda"]),
    checkpointing=st.booleans(),
)
def test_the_largest_micro_batch_fits_and_one_more_does_not(
    batch: int, accumulation: int, mebibytes: int, device: str, checkpointing: bool
) -> None:
    training = {"batch_size": batch, "gradient_accumulation_steps": accumulation}
    config = config_of(
        model={"max_seq_len": 512}, training={**training, "gradient_checkpointing": checkpointing}
    )
    every, available = batch * accumulation, mebibytes << 20

    def fits(at_once: int) -> bool:
        changed = config.training.model_copy(update={"micro_batch_size": at_once})
        memory = estimate_training_memory(config.model_copy(update={"training": changed}), device=device)
        return memory.total <= available

    largest = largest_micro_batch(config, available, device=device)
    assert 0 <= largest <= every
    assert largest == 0 or fits(largest)
    assert largest == every or not fits(largest + 1)


def test_an_update_of_any_size_is_searched() -> None:
    huge = {"batch_size": 2**60, "gradient_accumulation_steps": 2**60}
    assert 1 < largest_micro_batch(config_of(training=huge), 2**30, device="cuda") < 2**30


def test_what_would_help_names_a_preset_that_fits() -> None:
    large = next(plan for plan in plan_presets(0, device="cuda") if plan.name == "large")
    [smaller] = [
        line
        for line in memory_advice(large.config, device="cuda", available=4 * 2**30)
        if "smaller model" in line
    ]
    assert "--config small" in smaller


# The pages


@pytest.mark.parametrize("name", ["TRAINING.md", "FAQ.md"])
def test_tables_of_the_pages_are_current(name: str) -> None:
    page = (tables.DOCS / name).read_text(encoding="utf-8")
    assert page == tables.with_tables(name, page), "run python -m atlas.planning.tables"


# The command


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    (folder / "river.txt").write_text(corpus(), encoding="utf-8")
    prepared = folder / "river"
    arguments = ["--input", str(folder / "river.txt"), "--output", str(prepared), "--train-tokenizer", "300"]
    assert main(["prepare", *arguments]) == 0
    return prepared


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["plan", "--json", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    content = json.loads(out)
    assert isinstance(content, dict)
    return content


def test_json_says_what_the_estimate_says(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = ["--set", "training.epochs=3", "--set", "training.batch_size=2", "--set", "model.max_seq_len=64"]
    content = planned(capsys, "--data", str(dataset), "--gpu", "rtx 3060", *sets)
    found = content["config"]
    config = resolve(
        {"model": {"max_seq_len": 64, "vocab_size": 300}, "training": {"epochs": 3, "batch_size": 2}}
    )
    with torch.device("meta"):
        assert found["parameters"]["total"] == AtlasLM(config.model).num_parameters()
    assert found["training_memory_bytes"]["total"] == estimate_training_memory(config, device="cuda").total
    tokens = open_dataset(dataset).manifest.splits["train"].tokens
    windows = (tokens - 1) // 64
    assert content["data"]["tokens"] == tokens
    assert found["updates"] == -(-3 * windows // 2)
    assert found["tokens"] == found["updates"] * 2 * 64
    assert found["epochs"] == pytest.approx(3, rel=0.05)
    assert found["flops"] == found["tokens"] * training_flops_per_token(config)
    seconds = found["updates"] * update_seconds(config, card_speed(find_card("rtx 3060")))
    assert found["seconds"] == pytest.approx([seconds / SPREAD, seconds * SPREAD])
    assert found["utilisation"] == pytest.approx(found["flops"] / seconds / 25.5e12)
    assert content["machine"]["time_is"] == "simulated"
    assert found["verdict"] == "larger than this text can teach"
    assert found["micro_batch_size"] == found["largest_micro_batch_size"] == 2
    assert content["machine"]["memory_bytes"] == 12 * 2**30
    assert list(content["presets"]) == list(preset_names())
    assert content["presets"]["nano"]["vocab_size"] == 300
    assert content["presets"]["nano"]["epochs"] == pytest.approx(2400 * 4 * 256 / tokens, rel=0.1)
    assert content["largest_preset_for_the_data"] is None


def test_this_machine_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    content = planned(capsys, "--set", "device=cpu", "--set", "training.max_steps=10")
    machine = content["machine"]
    assert machine["flops_per_second"] > 1e8
    assert (machine["time_is"], machine["watts"]) == ("measured", None)
    assert content["config"]["seconds"][0] > 0
    assert content["config"]["kilowatt_hours"] is None
    assert content["data"] is None


def test_memory_that_is_given_wins_over_the_cards(capsys: pytest.CaptureFixture[str]) -> None:
    content = planned(capsys, "--gpu", "RTX 4090", "--memory", "4GB")
    assert content["machine"]["memory_bytes"] == 4 * 2**30
    assert content["config"] is None
    assert (content["machine"]["watts"], content["machine"]["memory_bytes_per_second"]) == (450, 1008e9)
    assert content["largest_preset_that_fits"] == "small"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["training.max_steps=null"], "not known without training.max_steps or --data"),
        (["training.max_steps=null", "training.max_hours=2"], "ends the run after 2 hours at the latest"),
        (["training.epochs=2"], "training.epochs may end the run sooner"),
        (["training.precision=fp32"], "Time: not known"),
        (["training.micro_batch_size=32"], r"--set training.micro_batch_size=\d+: fits"),
        (["model.num_layers=48"], "5. a smaller model, such as --config small"),
    ],
)
def test_what_is_not_known_or_does_not_fit_is_said(
    settings: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [word for setting in settings for word in ("--set", setting)]
    assert main(["plan", "--config", "small", "--gpu", "RTX 3060", "--memory", "4GB", *sets]) == 0
    assert re.search(says, capsys.readouterr().out)


def test_a_screen_about_a_config_a_text_and_a_card(
    dataset: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["plan", "--config", "nano", "--data", str(dataset), "--gpu", "RTX 3060"]) == 0
    out = capsys.readouterr().out
    assert "…" not in out
    assert "simulated: the FLOPs and bytes of an update at 24,225 GFLOP/s and 331 GB/s" in out
    assert "% of 25,500 GFLOP/s, its peak in bf16 by Atlas's table of cards" in out
    assert "the text is too small for every preset" in out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith(" ")}
    assert rows["updates"] == ["updates", "2,400"]
    assert rows["energy"][-1] == "kWh"
