"""The simulated speed of training on a GPU: how kernels are counted, the bytes of the loss, and the rule of the plan.

Fake CUDA changes PyTorch for its process, so that each simulation runs in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from atlas.config import AtlasConfig
from atlas.config.loader import overlay, parse_overrides, read_yaml, resolve
from atlas.config.presets import preset_names, preset_path
from atlas.model.cost import training_flops_per_token
from atlas.planning.cards import CARDS, find_card
from atlas.planning.speed import card_speed, update_seconds
from atlas.training.memory.presets import assume_vocabulary

ROOT = Path(__file__).parents[2]
GPUS = ("H100", "H200", "L4", "T4", "RTX 5090", "RTX 4090", "RTX 3060")


def _why_not() -> str | None:
    spec = importlib.util.spec_from_file_location("fake_cuda", ROOT / "benchmarks/fake_cuda.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    reason: str | None = module.why_not()
    return reason


REASON = _why_not()
needs_fake_cuda = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def run(*arguments: str) -> str:
    paths = [str(ROOT / "benchmarks"), str(ROOT)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=env, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def simulated(*arguments: str) -> dict[str, dict[str, Any]]:
    """Atlas's update of each config."""
    gpus = [word for name in GPUS for word in ("--gpu", name)]
    found = json.loads(run("benchmarks/roofline.py", *arguments, "--json", *gpus))
    return {one["config"]: one["updates"]["Atlas"] for one in found}


def preset(name: str, *settings: str) -> AtlasConfig:
    written = overlay(read_yaml(preset_path(name)), parse_overrides(list(settings)))
    return assume_vocabulary(resolve(written))


COUNTED = """
import fake_cuda
device = fake_cuda.FakeCuda()
import torch, torch.nn.functional as F
from kernel_costs import KernelLog

def soften_(logits):
    logits.copy_(logits.float().softmax(-1))

def norm_and_gelu(x, weight):
    return F.gelu(F.layer_norm(x, x.shape[1:]) @ weight, approximate="tanh")

log = KernelLog(vocabulary=50304)
device.backend = log.backend()
calls = (soften_, [(64, 50304)]), (soften_, [(64, 512)]), (norm_and_gelu, [(256, 512), (512, 2048)])
half = {"dtype": torch.bfloat16, "device": "cuda"}
with device, log.mode():
    for function, shapes in calls:
        tensors = [torch.empty(shape, **half) for shape in shapes]
        torch._dynamo.reset()
        log.kernels.clear()
        torch.compile(function)(*tensors)
        costs = [(kernel.cost, times) for kernel, times in log.kernels.items()]
        print([sum(cost.bytes * times for cost, times in costs), sum(cost.flops * times for cost, times in costs)])
    log.kernels.clear()
    torch.empty(64, 50257, **half).t() @ torch.empty(64, 512, **half)
    print([kernel.cost.kind for kernel in log.kernels])
"""


@needs_fake_cuda
@pytest.mark.slow
def test_kernels_cost_what_counting_by_hand_gives() -> None:
    long, short, fused, kinds = run("-c", COUNTED).splitlines()
    assert json.loads(long) == [3 * 2 * 64 * 50304, 0]  # read for the sum, read again, written
    assert json.loads(short) == [2 * 2 * 64 * 512, 0]  # a row stays in its block
    x, weight, out = 256 * 512, 512 * 2048, 256 * 2048
    # norm: read, written; product: read, read, written; activation: read, written
    assert json.loads(fused) == [2 * (2 * x + x + weight + out + 2 * out), 2 * 256 * 512 * 2048]
    assert kinds == "['misaligned']"


@needs_fake_cuda
@pytest.mark.slow
def test_the_loss_of_an_update_moves_at_most_8_gb() -> None:
    """Of `small` with 8 × 1,024 tokens; it was 34.6 GB with chunks of 256 rows and a table of 50,257."""
    update = simulated("small", "--batch-size", "8", "--set", "model.num_layers=1")["small"]
    assert update["tokens"] == 8 * 1024
    logits = 2 * 8 * 1024 * 50304
    # Written by the product, three passes of the kernel, read by two products: no less can be.
    assert 6 * logits < update["bytes"]["loss"] <= 8e9
    assert update["flops"]["loss"] == 6 * 8 * 1024 * 50304 * 768


@needs_fake_cuda
@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["training.gradient_checkpointing=true", "training.gradient_accumulation_steps=2"],
        ["training.batch_size=8"],
    ],
    ids=str,
)
def test_the_plans_rule_is_near_the_simulation_of_every_preset(settings: list[str]) -> None:
    check_rule(*settings)


@needs_fake_cuda
@pytest.mark.slow
def test_the_plans_rule_is_near_the_simulation_of_blocks_that_are_not_compiled() -> None:
    check_rule("training.compile=off", names=("nano", "tiny", "modern", "small", "default"))


def check_rule(*settings: str, names: tuple[str, ...] = preset_names()) -> None:
    """Within 15 %, on each card."""
    sets = [word for setting in settings for word in ("--set", setting)]
    found = simulated(*names, *sets)
    off = {
        (name, gpu): update_seconds(preset(name, *settings), card_speed(find_card(gpu))) / figures["seconds"]
        - 1
        for name, update in found.items()
        for gpu, figures in update["cards"].items()
    }
    assert {key: f"{error:+.0%}" for key, error in off.items() if abs(error) > 0.15} == {}
    assert len(off) == len(names) * len(GPUS)


@pytest.mark.parametrize("name", preset_names())
def test_no_card_is_faster_than_its_products_and_more_of_either_number_is_never_slower(name: str) -> None:
    config = preset(name)
    tokens = config.training.sequences_per_update * config.model.max_seq_len
    for card in CARDS:
        seconds = update_seconds(config, card_speed(card))
        assert seconds > tokens * training_flops_per_token(config) / card_speed(card).products
        products, bandwidth = card_speed(card).products, card_speed(card).bandwidth
        assert update_seconds(config, card_speed(card, products=2 * products)) <= seconds
        assert update_seconds(config, card_speed(card, bandwidth=2 * bandwidth)) <= seconds
